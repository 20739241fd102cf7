"""Vouchers read back: at once after they were issued, by nobody else, and without unknown ids costing much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event

from loadtest.servers import free_port
from service import keys
from service.domain import Record
from service.line import connect
from service.scripts import Scripts
from service.store.database import Database
from service.store.stock import Row
from service.web.v3_reading import READERS_MAX, LedgerReading
from service.worker.stocking import import_codes
from tests.integration.stage import CLIENT, IDS, Stage, staged

CODES = 100
DEADLINE_S = 10.0  # of a test: nothing here takes as long


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign()
        rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, CODES + 1)]
        await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="first")
        await stage.refill.run_once()
        yield stage


def _reading(stage: Stage, deadline_s: float = DEADLINE_S) -> LedgerReading:
    return LedgerReading(stage.database, stage.scripts, deadline_s=deadline_s)


def _ids(record: Record) -> list[bytes]:
    return [UUID(IDS.identity("k1", code.lot, code.seq).voucher_id).bytes for code in record.codes]


async def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.001)


async def _roll(stage: Stage) -> None:
    await stage.scripts.redis.hdel(keys.generation(0), "replid", "run_id")
    assert (await stage.recover.run_once()).rolled


async def test_fresh_voucher_is_waited_for_and_never_not_found(stage: Stage) -> None:
    record = await stage.issue_v3("a", 3)
    reading = asyncio.ensure_future(_reading(stage).read(CLIENT, _ids(record)))
    done, _ = await asyncio.wait({reading}, timeout=0.2)
    assert not done  # it is in the outbox, and nobody flushes yet
    await stage.flush.run_once()
    held = await reading
    assert isinstance(held, dict)
    assert [held[id].code for id in _ids(record)] == [code.code for code in record.codes]
    first = held[_ids(record)[0]]
    assert (first.face_value, first.client_reference, first.status, first.remaining) == (
        1_051,
        "sale-a",
        "active",
        None,
    )
    assert first.issued_at == record.issued_at


async def test_reads_racing_the_flush_find_every_voucher(stage: Stage) -> None:
    reading = _reading(stage)
    reads: list[asyncio.Task[Any]] = []
    wanted: list[list[bytes]] = []
    for number in range(20):
        record = await stage.issue_v3(f"key-{number}", 2)
        wanted.append(_ids(record))
        reads.append(asyncio.ensure_future(reading.read(CLIENT, wanted[-1])))
        if number % 3 == 0:
            await stage.flush.run_once()
        await stage.refill.run_once()
    await stage.flush.run_once()
    for ids, held in zip(wanted, await asyncio.gather(*reads), strict=True):
        assert sorted(held) == sorted(ids)


async def test_fresh_voucher_beside_a_known_one_is_not_left_out(stage: Stage) -> None:
    known = _ids(await stage.issue_v3("a"))
    await stage.flush.run_once()
    fresh = _ids(await stage.issue_v3("b"))
    assert await _reading(stage, 0.2).read(CLIENT, [*known, *fresh]) == "not_yet"
    reading = asyncio.ensure_future(_reading(stage).read(CLIENT, [*known, *fresh]))
    await stage.flush.run_once()
    assert set(await reading) == {*known, *fresh}


async def test_voucher_of_a_generation_that_was_left_is_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A roll whose drain misses it: the entry stays in the old outbox, and the new one is empty."""
    record = await stage.issue_v3("a")

    async def nothing(generation: int) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(stage.flush, "drain", nothing)
        await _roll(stage)
    assert await _reading(stage, 0.2).read(CLIENT, _ids(record)) == "not_yet"
    reading = asyncio.ensure_future(_reading(stage).read(CLIENT, _ids(record)))
    await stage.recover.clean_once()
    assert set(await reading) == set(_ids(record))


async def test_nothing_is_not_found_while_no_generation_is_open(stage: Stage) -> None:
    await stage.scripts.redis.hdel(keys.generation(0), "replid", "run_id")
    assert await _reading(stage).read(CLIENT, [bytes(16)]) == "store_unreachable"
    await stage.open()
    assert await _reading(stage).read(CLIENT, [bytes(16)]) == {}


async def test_another_clients_voucher_is_not_found(stage: Stage) -> None:
    mine = _ids(await stage.issue_v3("a"))
    other = _ids(await stage.issue_v3("a", client="CLIENT-002"))
    await stage.flush.run_once()
    reading = _reading(stage)
    both = [*mine, *other]
    first, second = await asyncio.gather(reading.read(CLIENT, both), reading.read("CLIENT-002", both))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (set(first), set(second)) == (set(mine), set(other))


async def test_store_or_redis_away_is_not_taken_for_not_found(stage: Stage) -> None:
    nowhere = Database.connect(f"postgresql+asyncpg://me@127.0.0.1:{free_port()}/x")
    redis = connect(f"redis://127.0.0.1:{free_port()}/0", timeout_ms=200)
    known = _ids(await stage.issue_v3("a"))
    await stage.flush.run_once()
    try:
        away = LedgerReading(nowhere, stage.scripts, deadline_s=DEADLINE_S)
        assert await away.read(CLIENT, known) == "store_unreachable"
        without = LedgerReading(stage.database, Scripts(redis), deadline_s=DEADLINE_S)
        assert set(await without.read(CLIENT, known)) == set(known)  # nothing is asked of Redis for those
        assert await without.read(CLIENT, [bytes(16)]) == "store_unreachable"
    finally:
        await redis.aclose()
        await nowhere.close()


async def test_unknown_ids_cost_a_bounded_number_of_calls_however_many(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.issue_v3("in the outbox")
    statements, calls = 0, 0
    execute_pipeline, execute = stage.scripts.redis.pipeline, stage.scripts.redis.execute_command

    def counted_pipeline(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return execute_pipeline(*given, **named)

    async def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return await execute(*given, **named)

    def selects(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal statements
        statements += statement.lstrip().lower().startswith("select") and "set_config" not in statement

    reading = _reading(stage)
    event.listen(stage.database._engine.sync_engine, "before_cursor_execute", selects)
    monkeypatch.setattr(stage.scripts.redis, "pipeline", counted_pipeline)
    monkeypatch.setattr(stage.scripts.redis, "execute_command", counted)
    try:
        asked = [
            asyncio.ensure_future(reading.read(f"CLIENT-{number % 7}", [number.to_bytes(16, "big")]))
            for number in range(10_000)
        ]
        await _until(lambda: calls > 5, "the barrier waits")
        monkeypatch.setattr(stage.scripts.redis, "pipeline", execute_pipeline)
        monkeypatch.setattr(stage.scripts.redis, "execute_command", execute)
        await stage.flush.run_once()
        said = await asyncio.gather(*asked)
    finally:
        event.remove(stage.database._engine.sync_engine, "before_cursor_execute", selects)
    assert said.count("overloaded") == 10_000 - READERS_MAX
    assert said.count({}) == READERS_MAX
    assert calls <= 30
    assert statements <= 30  # those of the flush included


async def test_misses_that_come_during_a_barrier_share_the_next(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    barriers, gate = 0, asyncio.Event()
    generation = stage.scripts.generation

    async def slow() -> Any:
        nonlocal barriers
        barriers += 1
        await gate.wait()
        return await generation()

    monkeypatch.setattr(stage.scripts, "generation", slow)
    reading = _reading(stage)
    first = asyncio.ensure_future(reading.read(CLIENT, [bytes(16)]))
    await _until(lambda: barriers == 1, "a barrier")
    later = [asyncio.ensure_future(reading.read(CLIENT, [bytes(15) + bytes([n])])) for n in range(1, 50)]
    given_up = later.pop()
    await asyncio.sleep(0)
    given_up.cancel()
    gate.set()
    assert await first == {}
    assert await asyncio.gather(*later) == [{}] * len(later)
    assert barriers == 2
    assert given_up.cancelled()
