"""Leases of several workers: a chain that does not fit stops leasing, one that others just move does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.store import schema
from service.store.database import Database
from service.store.stock import Row
from service.worker import refill
from service.worker.refill import Refill
from service.worker.stocking import import_codes
from tests.integration.stage import Stage, staged

POOL = "CAMP-001"
CODES = 2_000
OVERTAKEN = 12  # looks at which others are ahead: many more than a chain that does not fit is looked at


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign(POOL)
        rows = [Row(line, f"CODE-{line:05}", None, None) for line in range(1, CODES + 1)]
        await import_codes(stage.database, stage.scripts, POOL, rows, import_id="first")
        yield stage


def _worker(stage: Stage, database: Database | None = None) -> Refill:
    """One that sees no burn rate, whatever the machine: its clock stands still, and a window is 40 codes."""
    return Refill(database or stage.database, stage.scripts, low_water=20, store_outage_s=1, clock=lambda: 0.0)


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def _lease_again(stage: Stage, worker: Refill, name: str) -> None:
    """The window is used up, and ``worker`` fills it."""
    while (await stage.issue(*(f"{name}-{number}" for number in range(30))))[-1].status == "ISSUED":
        name += "+"
    assert (await worker.run_once()).codes > 0


async def _forks(stage: Stage) -> int:
    async with stage.database.read() as conn:
        return len(
            (await conn.execute(select(schema.incidents).where(schema.incidents.c.kind == "forked_lease"))).all()
        )


class Overtaken:
    """The store as a worker has it that others are ahead of: before each of its first looks they lease twice."""

    def __init__(self, stage: Stage, others: Refill) -> None:
        self._stage = stage
        self._others = others
        self.looks = 0

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        if self.looks < OVERTAKEN:
            self.looks += 1
            for turn in range(2):
                await _lease_again(self._stage, self._others, f"look-{self.looks}-{turn}")
        async with self._stage.database.read() as conn:
            yield conn

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return self._stage.database.write()


async def test_a_worker_that_others_overtake_at_each_look_calls_it_no_fork(stage: Stage) -> None:
    other = _worker(stage)
    await other.run_once()
    store = Overtaken(stage, other)
    slow = _worker(stage, cast(Database, store))
    await stage.issue(*(f"first-{number}" for number in range(35)))  # so that there is something to refill
    done = await slow.run_once()
    assert store.looks == OVERTAKEN
    assert done.forked == 0
    assert await _forks(stage) == 0
    await _lease_again(stage, slow, "last")
    await stage.flush.drain((await stage.scripts.generation()).open)
    assert (await stage.audit()).findings == []


async def test_a_chain_that_does_not_fit_and_that_nobody_moves_stops_leasing(stage: Stage) -> None:
    worker = _worker(stage)
    await worker.run_once()
    generation = (await stage.scripts.generation()).open
    held = keys.pool(0, generation, POOL)
    first = await stage.scripts.redis.hget(held, "lease")
    for turn in range(2):
        await _lease_again(stage, worker, f"turn-{turn}")
    await stage.scripts.redis.hset(held, "lease", first)
    for _ in range(2):
        done = await _worker(stage).run_once()
        assert (done.codes, done.forked) == (0, 1)
    assert await _forks(stage) > 0


async def test_a_window_for_a_long_outage_is_not_filled_at_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short is filled at once; what a burn rate asks for besides comes lease by lease, each when it is due."""
    monkeypatch.setattr(refill, "LEASE_CODES_MAX", 50)
    clock = Clock()
    worker = Refill(stage.database, stage.scripts, low_water=20, store_outage_s=60, clock=clock)
    assert (await worker.run_once()).codes == 40
    clock.now = 1.0
    await stage.issue(*(f"peak-{number}" for number in range(30)))
    assert (await worker.run_once()).codes == 30
    assert (await worker.run_once()).codes == 0
    clock.now = 4.0  # 30 codes are what 2.4 s of one and a half times that rate take
    assert (await worker.run_once()).codes == 50
    assert (await worker.run_once()).codes == 0


async def test_a_window_does_not_grow_beyond_what_an_outage_takes(stage: Stage) -> None:
    clock = Clock()
    worker = Refill(stage.database, stage.scripts, low_water=20, store_outage_s=3, clock=clock)
    await worker.run_once()
    await stage.issue(*(f"peak-{number}" for number in range(30)))
    given = 0
    for second in range(1, 60):
        clock.now = float(second)
        given += (await worker.run_once()).codes
    assert 30 <= given < 100


async def test_a_window_that_was_lost_is_not_taken_for_one_that_was_issued(stage: Stage) -> None:
    """What a generation leaves behind is in quarantine: one that holds more than it needs loses more the next time."""
    clock = Clock()
    worker = Refill(stage.database, stage.scripts, low_water=20, store_outage_s=60, clock=clock)
    await worker.run_once()
    for _ in range(3):
        await stage.scripts.redis.flushall()
        await stage.open()
        clock.now += 1.0
        assert (await worker.run_once()).codes == 40


async def test_a_pool_that_asks_is_refilled_between_two_looks_at_all(stage: Stage) -> None:
    worker = _worker(stage)
    assert (await worker.step(wait_s=0)).codes == 40
    assert (await worker.step(wait_s=0)).codes == 0
    await stage.issue(*(f"first-{number}" for number in range(30)))
    assert (await worker.step(wait_s=5)).codes == 30


async def test_a_demand_that_names_no_pool_does_not_keep_the_worker_busy(stage: Stage) -> None:
    worker = _worker(stage)
    await worker.step(wait_s=0)
    await stage.scripts.redis.zadd(keys.demand(0), {"no-such-pool": 1})
    assert (await worker.step(wait_s=5)).codes == 0
    assert await stage.scripts.redis.zcard(keys.demand(0)) == 0
