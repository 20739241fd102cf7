"""The checks of Redis and of the store on real servers, each started with what a check is there for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import structlog

from loadtest.servers import PostgresServer, RedisServer, free_port
from service import metrics
from service.errors import Misconfigured
from service.line import connect
from service.scripts import Scripts
from service.settings import Settings
from service.store.database import Database
from service.vetting import COMMANDS, Look, Vetting, look, until_vetted
from service.web.serve import Announce, Vetted, serve
from service.worker.runner import work
from tests.integration.conftest import sqlite_url
from tests.unit.test_lua_contract import READS, WRITES


@contextlib.asynccontextmanager
async def servers(settings: Settings) -> AsyncIterator[tuple[Database, Scripts]]:
    database, client = Database.connect(settings.store_url), connect(settings.redis_url, timeout_ms=1_000)
    try:
        yield database, Scripts(client)
    finally:
        await client.aclose()
        await database.close()


def seen(settings: Settings) -> dict[str, str]:
    """What is not passed, and why."""

    async def run() -> Look:
        async with servers(settings) as (database, scripts):
            return await look(database, scripts, settings)

    found = asyncio.run(run())
    assert found.unreached == ()
    return {one.check: one.state for one in found.findings}


@pytest.fixture
def file(tmp_path: Path) -> str:
    return sqlite_url(tmp_path / "store.db")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"appendonly": "no"}, "appendonly"),
        ({"appendfsync": "everysec"}, "appendfsync"),
        ({"no_appendfsync_on_rewrite": "yes"}, "no-appendfsync-on-rewrite"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy"),
        ({"maxmemory": "100mb"}, "maxmemory"),
        ({"min_replicas_to_write": "1"}, "min-replicas-to-write"),
        ({"cluster_enabled": "yes"}, "cluster"),
    ],
)
def test_a_dangerous_setting_of_redis_is_found(
    new_valkey: Callable[..., RedisServer], file: str, options: dict[str, str], name: str
) -> None:
    if name == "cluster":  # its default is above this one by more than there may be ports
        options = {**options, "cluster_port": str(free_port())}
    server = new_valkey(**options)
    server.start()
    assert seen(Settings(redis_url=server.url, store_url=file)) == {name: "wrong"}


def test_a_server_as_it_must_be_passes(new_valkey: Callable[..., RedisServer], file: str) -> None:
    server = new_valkey(maxmemory="4gb")
    server.start()
    assert seen(Settings(redis_url=server.url, store_url=file)) == {}


def test_replicas_are_found_from_either_side(new_valkey: Callable[..., RedisServer], file: str) -> None:
    primary, replica = new_valkey(), new_valkey()
    primary.start()
    replica.start()
    with redis.Redis.from_url(replica.url) as client, redis.Redis.from_url(primary.url) as admin:
        client.replicaof("127.0.0.1", str(primary.port))
        while admin.info("replication")["connected_slaves"] == 0:
            pass
        for server in (primary, replica):
            assert seen(Settings(redis_url=server.url, store_url=file))["replicas"] == "wrong"


def test_an_old_redis_is_found(redis7_url: str, file: str) -> None:
    with redis.Redis.from_url(redis7_url) as client:
        version = tuple(int(part) for part in client.info("server")["redis_version"].split("."))
    corrected = {(7, 2): (7, 2, 11), (7, 4): (7, 4, 6), (8, 0): (8, 2, 2), (8, 2): (8, 2, 2)}
    old = version < corrected.get(version[:2], (7, 2, 11))
    assert seen(Settings(redis_url=redis7_url, store_url=file)) == ({"version": "wrong"} if old else {})


@pytest.mark.parametrize("missing", ["xadd", "lpop", "xdel"])
def test_a_right_that_is_missing_is_found(new_valkey: Callable[..., RedisServer], file: str, missing: str) -> None:
    server = new_valkey()
    server.start()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "narrow", "on", ">secret", "~*", "+@all", f"-{missing}")
    url = server.url.replace("redis://", "redis://narrow:secret@")
    assert seen(Settings(redis_url=url, store_url=file)) == {"rights": "wrong"}


def test_rights_are_asked_for_every_command_that_a_script_may_use() -> None:
    assert {name.upper() for name in COMMANDS} == READS | WRITES


def test_what_may_not_be_read_is_unknown(new_valkey: Callable[..., RedisServer], file: str) -> None:
    """As on a managed service: CONFIG is forbidden, and INFO tells a part of it."""
    server = new_valkey()
    server.start()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "managed", "on", ">secret", "~*", "+@all", "-config")
    url = server.url.replace("redis://", "redis://managed:secret@")
    unknown = {"appendfsync", "no-appendfsync-on-rewrite", "min-replicas-to-write"}
    assert seen(Settings(redis_url=url, store_url=file)) == dict.fromkeys(unknown, "unknown")
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("appendonly", "no")
        admin.config_set("maxmemory-policy", "volatile-lru")
        admin.config_set("maxmemory", "100mb")
    found = seen(Settings(redis_url=url, store_url=file))
    assert {name for name, state in found.items() if state == "wrong"} == {
        "appendonly",
        "maxmemory-policy",
        "maxmemory",
    }
    with pytest.raises(Misconfigured, match="appendfsync can't be read"):
        asyncio.run(_vetted(Settings(redis_url=url, store_url=file, production=True)))


def test_dangerous_settings_of_postgresql_are_found(
    new_postgres: Callable[..., PostgresServer], valkey_url: str
) -> None:
    server = new_postgres(fsync="off", full_page_writes="off", max_connections="20")
    server.start()
    server.sql("create database ascii encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0")
    settings = Settings(redis_url=valkey_url, store_url=server.url("ascii"))
    unsafe = {"fsync", "full_page_writes", "max_connections", "server_encoding"}
    assert seen(settings) == dict.fromkeys(unsafe, "wrong")


def test_a_postgresql_as_it_must_be_passes(new_postgres: Callable[..., PostgresServer], valkey_url: str) -> None:
    server = new_postgres(fsync="on", max_connections="100")
    server.start()
    server.sql("alter system set synchronous_commit = off", "select pg_reload_conf()")  # sessions set their own
    settings = Settings(redis_url=valkey_url, store_url=server.url(), workers=8)
    assert seen(settings) == {}
    assert seen(Settings(redis_url=valkey_url, store_url=server.url(), workers=10)) == {"max_connections": "wrong"}


def test_a_file_system_without_a_write_ahead_log_is_found(tmp_path: Path, valkey_url: str) -> None:
    url = f"sqlite+aiosqlite:///file:{tmp_path / 'store.db'}?vfs=unix-dotfile&uri=true"
    assert seen(Settings(redis_url=valkey_url, store_url=url)) == {"journal_mode": "wrong"}


async def _vetted(settings: Settings) -> Look:
    async with servers(settings) as (database, scripts):
        return await Vetting(database, scripts, settings).run_once()


async def test_what_changes_is_said_once_and_counted(new_valkey: Callable[..., RedisServer], file: str) -> None:
    server = new_valkey()
    server.start()
    settings = Settings(redis_url=server.url, store_url=file, production=True, accept="maxmemory-policy")

    def gauge(name: str) -> float:
        return metrics.unsafe_settings.labels(name)._value.get()

    async with servers(settings) as (database, scripts):
        vetting = Vetting(database, scripts, settings)
        with structlog.testing.capture_logs() as logged:
            await vetting.run_once()
            assert logged == []
            await scripts.redis.config_set("appendfsync", "everysec")
            await scripts.redis.config_set("maxmemory-policy", "allkeys-lru")
            for _ in range(3):
                await vetting.run_once()  # it was started with safe ones, so it goes on
        assert [(one["log_level"], one["check"]) for one in logged] == [
            ("critical", "appendfsync"), ("warning", "maxmemory-policy"),
        ]  # fmt: skip
        assert (gauge("appendfsync"), gauge("maxmemory-policy"), gauge("appendonly")) == (1, 0, 0)
        with structlog.testing.capture_logs() as logged:
            await scripts.redis.config_set("appendfsync", "always")
            await vetting.run_once()
            server.kill()
            await vetting.run_once()
        assert [(one["event"], one.get("check", one.get("server"))) for one in logged] == [
            ("safe again", "appendfsync"), ("unchecked", "Redis"),
        ]  # fmt: skip
        assert gauge("appendfsync") == 0


@pytest.mark.parametrize("process", ["serve", "work"])
def test_production_does_not_start_on_a_dangerous_setting_unless_it_is_named(
    migrated_sqlite_url: str, new_valkey: Callable[..., RedisServer], process: str
) -> None:
    server = new_valkey(appendfsync="everysec", maxmemory_policy="allkeys-lru")
    server.start()
    given: dict[str, Any] = {"redis_url": server.url, "store_url": migrated_sqlite_url, "production": True}
    with pytest.raises(Misconfigured) as refused:
        _start(process, Settings(**given))
    for part in ("appendfsync is everysec", "maxmemory-policy is allkeys-lru", "VOUCHERD_ACCEPT=appendfsync,maxmemory"):
        assert part in str(refused.value)
    with pytest.raises(Misconfigured, match="maxmemory-policy is allkeys-lru"):
        _start(process, Settings(**given, accept="appendfsync"))
    _start(process, Settings(**given, accept="appendfsync,maxmemory-policy"))
    _start(process, Settings(**(given | {"production": False})))


@pytest.mark.parametrize("process", ["serve", "work"])
def test_production_ends_when_a_server_that_was_away_turns_out_to_be_dangerous(
    migrated_sqlite_url: str, new_valkey: Callable[..., RedisServer], process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_valkey(appendfsync="everysec")
    monkeypatch.setattr("service.vetting.RETRY_S", 0.1)
    monkeypatch.setattr("service.worker.runner.VET_S", 0.1)
    monkeypatch.setattr("service.web.serve.VET_S", 0.3)
    settings = Settings(redis_url=server.url, store_url=migrated_sqlite_url, production=True)
    with pytest.raises(Misconfigured, match="appendfsync is everysec"):
        _start(process, settings, then=server.start)


def _start(process: str, settings: Settings, then: Callable[[], None] | None = None) -> None:
    """Starts ``process``; once it runs, does ``then`` and waits for its end, or tells it to stop."""

    async def run() -> None:
        stop, started = asyncio.Event(), asyncio.Event()
        if process == "work":
            running = asyncio.create_task(work(settings, stop))
            started.set()
        else:
            free = msgspec.structs.replace(settings, port=0, ops_port=0)
            vetted = partial(until_vetted, settings)
            running = asyncio.create_task(_served(free, lambda _: started.set(), vetted))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if then is not None:
            await asyncio.to_thread(then)
        elif process == "work":
            stop.set()
        elif not running.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 30)

    asyncio.run(run())


async def _served(settings: Settings, announce: Announce, vetted: Vetted) -> None:
    assert await serve(settings, announce=announce, vetted=vetted) == 0
