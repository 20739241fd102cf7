"""Stores for the integration tier: every test of the store runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.servers import PostgresServer
from service.store.database import Database
from service.store.migration import migrate
from tests.integration.stage import Stage, staged
from tests.integration.typed import OnStage

TEMPLATE = "migrated"
_numbers = itertools.count(1)


def sqlite_url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


async def _migrated(url: str) -> None:
    database = Database.connect(url)
    try:
        await migrate(database)
    finally:
        await database.close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied."""
    path = tmp_path_factory.mktemp("store") / "template.db"
    asyncio.run(_migrated(sqlite_url(path)))
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresServer) -> str:
    """The name of a migrated database on the session's server, to be copied."""
    postgres.sql(f"create database {TEMPLATE}")
    asyncio.run(_migrated(postgres.url(TEMPLATE)))
    return TEMPLATE


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A file that is not there yet."""
    return sqlite_url(tmp_path / "empty.db")


@pytest.fixture
def empty_postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A database without a table."""
    yield from _own_database(postgres, "template1")


def _own_database(postgres: PostgresServer, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    postgres.sql(f"create database {name} template {template}")
    yield postgres.url(name)
    postgres.sql(f"drop database {name} with (force)")


@pytest.fixture
def migrated_sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A migrated file of this test's own."""
    path = tmp_path / "voucherd.db"
    shutil.copyfile(sqlite_template, path)
    return sqlite_url(path)


@pytest.fixture
def postgres_url(postgres: PostgresServer, postgres_template: str) -> Iterator[str]:
    """A migrated database of this test's own."""
    yield from _own_database(postgres, postgres_template)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """The URL of a migrated store of this test's own, once on each of the two."""
    url: str = request.getfixturevalue("migrated_sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """The URL of a store with nothing in it, once on each of the two."""
    url: str = request.getfixturevalue("empty_sqlite_url" if request.param == "sqlite" else "empty_postgres_url")
    return url


@pytest.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    """A migrated store of this test's own, once on each of the two."""
    opened = Database.connect(store_url)
    yield opened
    await opened.close()


@pytest.fixture
def store(store_url: str, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> OnStage:
    """The environment names a store and a Redis, and the partition is open.  Calls a step with a stage on them."""
    for name in [name for name in os.environ if name.startswith("VOUCHERD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VOUCHERD_STORE_URL", store_url)
    monkeypatch.setenv("VOUCHERD_REDIS_URL", valkey_url)
    monkeypatch.setenv("VOUCHERD_ACCEPT", "fsync")  # loadtest/servers.py: they are killed, no power is cut

    async def on_stage(step: Callable[[Stage], Any]) -> Any:
        database = Database.connect(store_url)
        try:
            async with staged(database, valkey_url) as stage:
                return await step(stage)
        finally:
            await database.close()

    def call(step: Callable[[Stage], Any]) -> Any:
        return asyncio.run(on_stage(step))

    async def nothing(stage: Stage) -> None: ...

    call(nothing)
    return call
