"""A Redis that was started again goes on with what it has where that was promised and nothing can be missing; in every
other case the generation is left."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis

from loadtest.servers import RedisServer, until
from service import keys
from service.domain import Record
from service.store import books, control, generations
from service.store.database import Database
from service.store.stock import Row
from service.worker.recover import Recover
from service.worker.restart import note_synced
from service.worker.stocking import import_codes
from tests.integration.stage import OUTBOX_MAX, RETENTION_S, Stage, staged

CODES = 90
only_sqlite = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


class Restarted:
    """A stage on a server of its own, with a worker to which a restart in place was promised."""

    def __init__(self, server: RedisServer, stage: Stage) -> None:
        self.server = server
        self.stage = stage
        self.recover = Recover(
            stage.database, stage.scripts, stage.flush, outbox_max=OUTBOX_MAX, retention_s=RETENTION_S,
            restart_in_place=True,
        )  # fmt: skip

    async def quarantined(self) -> int:
        async with self.stage.database.read() as conn:
            return sum(one.codes for one in await books.quarantine(conn))

    async def restart(self) -> None:
        """It crashes and comes back."""
        self.server.kill()
        self.server.start()
        await self.stage.scripts.redis.connection_pool.disconnect()  # or the next call finds out


@pytest.fixture
async def here(database: Database, new_valkey: Callable[..., RedisServer]) -> AsyncIterator[Restarted]:
    server = new_valkey()
    server.start()
    async with staged(database, server.url) as stage:
        await stage.campaign()
        rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, CODES + 1)]
        await import_codes(database, stage.scripts, "CAMP-001", rows, import_id="first")
        await stage.refill.run_once()
        yield Restarted(server, stage)


async def test_issuing_goes_on_and_no_code_is_lost_or_given_twice(here: Restarted) -> None:
    stage = here.stage
    await note_synced(stage.scripts)
    first = await stage.issue("a", "b")
    await stage.flush.run_once()
    second = await stage.issue("c")  # is in the outbox alone
    for _ in range(2):
        await here.restart()
        assert (await here.recover.run_once()).opened == 1
        assert not (await here.recover.run_once()).rolled
        await note_synced(stage.scripts)
    again = await stage.issue("a", "b", "c")
    assert [one.status for one in again] == ["REPLAY"] * 3
    assert [one.detail for one in again] == [one.detail for one in (*first, *second)]
    given = await stage.issue_everything()
    before = [code.code for one in again for code in Record.unpack(one.detail).codes]
    assert sorted(given + before) == [f"CODE-{line:04}" for line in range(1, CODES + 1)]
    assert await here.quarantined() == 0
    await stage.balanced()


async def _nothing(_: Restarted) -> None:
    """Nobody has seen that it syncs."""


async def _seen_otherwise(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    await here.stage.scripts.redis.config_set("appendfsync", "everysec")
    await note_synced(here.stage.scripts)
    await here.stage.scripts.redis.config_set("appendfsync", "always")


async def _other_settings(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    here.server.options["appendfsync"] = "everysec"


async def _older_copy(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    here.server.keep()
    await here.stage.issue("a")
    await here.stage.flush.run_once()
    here.server.put_back()


async def _copy_without_a_lease(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    await here.stage.issue(*(f"before-{number}" for number in range(30)))
    await here.stage.flush.run_once()
    here.server.keep()
    await here.stage.refill.run_once()
    here.server.put_back()


async def _nothing_left(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    here.server.kill()
    shutil.rmtree(here.server.directory)


async def _left_by_the_store(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    async with here.stage.database.write() as conn:
        await generations.close(conn, 0, 1, 0)


async def _published_meanwhile(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    async with here.stage.database.write() as conn:
        version = await control.raise_version(conn)
        await control.save_snapshot(conn, version, b"", 0)


@pytest.mark.parametrize(
    "before",
    [
        _nothing, _seen_otherwise, _other_settings, _older_copy, _copy_without_a_lease, _nothing_left,
        _left_by_the_store, _published_meanwhile,
    ],
    ids=lambda before: before.__name__.strip("_").replace("_", " "),
)  # fmt: skip
@only_sqlite
async def test_what_may_lack_something_is_left(
    here: Restarted, before: Callable[[Restarted], AsyncIterator[None]]
) -> None:
    await before(here)
    await here.restart()
    assert (await here.recover.run_once()).rolled
    assert (await here.stage.scripts.generation()).open == 2


@only_sqlite
async def test_what_is_read_of_one_server_is_not_said_of_another(
    here: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker slept between its looks, and the server was replaced by one with other settings."""
    scripts = here.stage.scripts
    await scripts.redis.config_set("appendfsync", "everysec")
    look = scripts.generation

    async def then_it_dies() -> Any:
        seen = await look()
        await here.restart()  # its options say `always`
        return seen

    monkeypatch.setattr(scripts, "generation", then_it_dies)
    await note_synced(scripts)
    monkeypatch.undo()
    assert (await here.recover.run_once()).rolled


@only_sqlite
async def test_one_with_a_replica_is_left(here: Restarted, new_valkey: Callable[..., RedisServer]) -> None:
    """What the replica has not heard of is lost when it is promoted; it is not told which of them is asked then."""
    await note_synced(here.stage.scripts)
    await here.restart()
    replica = new_valkey(replicaof=f"127.0.0.1 {here.server.port}")
    replica.start()
    with redis.Redis.from_url(here.server.url, decode_responses=True) as client:
        until(lambda: client.info("replication")["connected_slaves"] == 1, "a replica that is attached")
    assert (await here.recover.run_once()).rolled


@only_sqlite
async def test_a_worker_to_which_nothing_was_promised_leaves_it(here: Restarted) -> None:
    await note_synced(here.stage.scripts)
    await here.restart()
    assert (await here.stage.recover.run_once()).rolled
    assert await here.quarantined() > 0


@only_sqlite
async def test_settings_that_can_not_be_read_are_not_seen(here: Restarted) -> None:
    with redis.Redis.from_url(here.server.url) as client:
        client.acl_setuser("default", enabled=True, nopass=True, keys="*", commands=["+@all", "-config"])
    await note_synced(here.stage.scripts)
    assert not (await here.stage.scripts.generation()).synced


@only_sqlite
async def test_a_generation_that_nobody_has_opened_is_not_said_to_be_synced(here: Restarted) -> None:
    await here.stage.scripts.redis.flushall()
    await note_synced(here.stage.scripts)
    assert await here.stage.scripts.redis.exists(keys.generation(0)) == 0
