"""Taking back: what is left in the windows of a pool that nothing is issued from any more is stock again.

A code leaves its window by ``lua/take_back.lua`` and reaches the store through the outbox, as everything that leaves
one; whoever flushes that entry puts its codes back into stock before the entry leaves the outbox.  So a crash at any
line leaves each code in the window, in the outbox, or in stock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec

from service.catalogue import can_issue
from service.domain import Code
from service.errors import Conflict
from service.scripts import Scripts
from service.store import control, register, returning
from service.store.database import Database
from service.worker import patience
from service.worker.currency import refuse_older
from service.worker.refill import Refill
from service.worker.withdrawing import all_applied

# Codes of one script call, and of one outbox entry: half a millisecond in which nothing else is issued.
CODES_MAX: Final = 500


class Plan(msgspec.Struct, frozen=True):
    """What there is to take back, in codes.  ``campaigns``: those that can issue from the pool; none can be, for
    anything to be taken.  By catalogue ``version``.  ``reached``: ``windows`` is known."""

    pool: str
    windows: int
    campaigns: list[str]
    version: int
    reached: bool


class TakenBack(msgspec.Struct, frozen=True):
    """What was done, in codes.  ``returned`` are in stock again.  ``on_the_way`` left their window and `voucherd work`
    has not put them back yet.  ``unfinished``: others may still be in a window, because the partition could not be
    reached, the outbox was full, or a campaign can issue from the pool again."""

    pool: str
    returned: int
    on_the_way: int
    unfinished: bool


async def plan(database: Database, scripts: Scripts, pool: str, now: Callable[[], int]) -> Plan:
    """What ``take_back`` would do now.  Raises NotFound, RedisUnreachable and StoreUnreachable."""
    async with database.read() as conn:
        await register.pool(conn, pool)
        version = await control.version(conn)
        snapshot = await control.snapshot(conn, version)
    live = [one.id for one in snapshot.campaigns if one.pool == pool and can_issue(one, now())]
    books = None
    seen = await scripts.generation()
    if seen.agrees:
        books = await scripts.books([pool], generation=seen.open)
    return Plan(pool, 0 if books is None else books.windows[pool].length, sorted(live), version, books is not None)


async def take_back(
    database: Database,
    scripts: Scripts,
    refill: Refill,
    pool: str,
    *,
    reason: str,
    actor: str,
    outbox_max: int,
    now: Callable[[], int] = lambda: int(time.time()),
) -> TakenBack:
    """The codes of the pool's windows are in stock again, each at a new position of its lot.

    Doing it again takes what is in the windows then, and goes on where a fault in between stopped it.  Raises Conflict
    if a campaign can issue from the pool, for then the windows would be filled again as fast as they are emptied;
    NotFound, StoreIsOlder, RedisUnreachable and StoreUnreachable.  What was taken by then comes back all the same.
    """
    await refuse_older(database, scripts)
    planned = await plan(database, scripts, pool, now)
    refuse_live(planned)
    taken, unfinished = await _leave_windows(database, scripts, refill, planned, outbox_max)
    on_the_way = await _until_back(database, taken)
    returned = len(taken) - on_the_way
    async with database.write() as conn:
        detail = f"{len(taken)} codes from windows, {returned} of them in stock by now; {reason}"
        await control.log(conn, actor=actor, action="pool take-back", subject=pool, detail=detail, now=now())
    return TakenBack(pool, returned, on_the_way, unfinished)


def refuse_live(planned: Plan) -> None:
    """Raises Conflict if a campaign can issue from the pool."""
    if planned.campaigns:
        names = ", ".join(planned.campaigns)
        raise Conflict(
            f"{names} can issue from pool {planned.pool}: pause or end what does first "
            "(`voucherd campaign pause`, `voucherd campaign end`)"
        )


async def _leave_windows(
    database: Database, scripts: Scripts, refill: Refill, planned: Plan, outbox_max: int
) -> tuple[list[Code], bool]:
    """The codes that were taken, and whether others may still be in a window."""
    deadline = time.monotonic() + patience.UNREACHED_S
    taken: list[Code] = []
    while time.monotonic() <= deadline:
        async with database.read() as conn:
            if await control.version(conn) != planned.version:
                return taken, True  # what was looked at is no longer in force: who says that nothing is issued?
        seen = await scripts.generation()
        if seen.agrees and await all_applied(database, scripts, refill, planned.pool, seen.open):
            some = await scripts.take_back(planned.pool, CODES_MAX, generation=seen.open, outbox_max=outbox_max)
            if not isinstance(some, str):
                if not some:
                    return taken, False
                taken += some
                deadline = time.monotonic() + patience.UNREACHED_S
                continue
        await asyncio.sleep(patience.UNREACHED_POLL_S)
    return taken, True


async def _until_back(database: Database, taken: list[Code]) -> int:
    """How many of the codes are not in stock again; waits for the flush that puts them there, bounded."""
    positions = [(code.lot, code.seq) for code in taken]
    deadline = time.monotonic() + patience.UNREACHED_S
    while True:
        async with database.read() as conn:
            waiting = await returning.still_there(conn, positions)
        if not waiting or time.monotonic() > deadline:
            return waiting
        await asyncio.sleep(patience.UNREACHED_POLL_S)
