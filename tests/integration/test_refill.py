"""Leases of several workers: a chain that does not fit stops leasing, one that others just move does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.store import schema
from service.store.database import Database
from service.store.stock import Lease, Row, followers
from service.worker import refill
from service.worker.refill import Refill
from service.worker.stocking import import_codes
from tests.integration.stage import Stage, staged

POOL = "CAMP-001"
CODES = 2_000
OVERTAKEN = 8  # looks at which others are ahead: more than a chain that does not fit is looked at


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign(POOL)
        rows = [Row(line, f"CODE-{line:05}", None, None) for line in range(1, CODES + 1)]
        await import_codes(stage.database, stage.scripts, POOL, rows, import_id="first")
        yield stage


def _worker(stage: Stage) -> Refill:
    """One that sees no burn rate, whatever the machine: its clock stands still, and a window is 40 codes."""
    return Refill(stage.database, stage.scripts, low_water=20, store_outage_s=1, clock=lambda: 0.0)


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


async def test_a_worker_that_others_overtake_at_each_look_calls_it_no_fork(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = _worker(stage), _worker(stage)
    await other.run_once()
    looks, looking = 0, False

    async def overtaken(
        conn: AsyncConnection, partition: int, generation: int, last: Mapping[str, str]
    ) -> dict[str, Lease]:
        nonlocal looks, looking
        if not looking and looks < OVERTAKEN:
            looks, looking = looks + 1, True
            for turn in range(2):
                await _lease_again(stage, other, f"look-{looks}-{turn}")
            looking = False
        return await followers(conn, partition, generation, last)

    monkeypatch.setattr(refill.stock, "followers", overtaken)
    await stage.issue(*(f"first-{number}" for number in range(35)))  # so that there is something to refill
    done = await slow.run_once()
    assert looks == OVERTAKEN
    assert done.forked == 0
    assert await _forks(stage) == 0
    monkeypatch.undo()
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
