"""Withdrawing: codes that nobody may get any more leave stock and windows, and the books balance.

First the store: what was not leased never will be.  What was leased is in a window of the open generation (if its
lease has been applied, which is done first), on its way to the ledger, or in quarantine, from where it is set aside.  A
code leaves a window by ``lua/withdraw.lua`` and reaches the store through the outbox, as everything that leaves one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from service.scripts import Scripts
from service.store import control, stock, unseen, withdrawal
from service.store.database import Database, chunks
from service.store.schema import WITHDRAWN
from service.store.withdrawal import NAMED_MAX, Leased, Withdrawn
from service.worker import patience
from service.worker.currency import refuse_older
from service.worker.refill import Refill

# Codes of one script call: each is looked for from the window's beginning, 1 ms at the end of one of 100,000 codes.
CODES_MAX: Final = 16


class Withdrawal(msgspec.Struct, frozen=True):
    """What a withdrawal did, in codes.  Nobody gets those of ``stock``, ``windows``, ``before`` and ``quarantined``.

    ``issued``: in the ledger, somebody has them.  ``on_the_way``: left their window before, and the ledger has not
    heard yet whether they were issued or withdrawn.  ``unknown``: not of this pool.  ``unreached``: may still be in
    a window, because the partition could not be reached; do it again.
    """

    pool: str
    stock: int
    windows: int
    before: int
    quarantined: int
    issued: int
    on_the_way: int
    unknown: int
    unreached: int


async def withdraw(
    database: Database,
    scripts: Scripts,
    refill: Refill,
    pool: str,
    *,
    named: Sequence[str] = (),
    lot: int | None = None,
    reason: str,
    actor: str,
    now: Callable[[], int] = lambda: int(time.time()),
) -> Withdrawal:
    """The ``named`` codes, or all codes of the ``lot``, are given to nobody by a request begun later.

    Doing it again changes nothing and goes on where a fault in between stopped it.  Raises NotFound, StoreIsOlder,
    RedisUnreachable and StoreUnreachable; what was withdrawn by then is.
    """
    await refuse_older(database, scripts)
    total = Withdrawn()
    if lot is not None:
        async with database.write() as conn:
            total = await withdrawal.withdraw_lot(conn, pool, lot, now())
    # Short transactions: nothing depends on their being one.
    for start in range(0, len(named), NAMED_MAX):
        async with database.write() as conn:
            done = await withdrawal.withdraw_codes(conn, pool, named[start : start + NAMED_MAX], now())
        total = _sum(total, done)
    left = await _leave_windows(database, scripts, refill, pool, total.leased)
    issued, aside = await _became(database, left.gone)
    sealed = 0  # in quarantine still: a late flush may have taken some since they were looked at
    for some in chunks(left.quarantined):
        async with database.write() as conn:
            await unseen.lock(conn, scripts.partition)
            positions = [(one.code.lot, one.code.seq) for one in some]
            sealed += len(await unseen.set_aside(conn, scripts.partition, positions, WITHDRAWN, now()))
    async with database.write() as conn:
        what = f"lot {lot}" if lot is not None else f"{len(named)} codes"
        detail = f"{what}: {total.stored} in stock, {left.taken} in windows, {sealed} in quarantine; {reason}"
        await control.log(conn, actor=actor, action="pool withdraw", subject=pool, detail=detail, now=now())
    return Withdrawal(
        pool=pool,
        stock=total.stored,
        windows=left.taken,
        before=total.before + aside,
        quarantined=sealed,
        issued=total.issued + issued,
        on_the_way=len(left.gone) - issued - aside + len(left.quarantined) - sealed,
        unknown=total.unknown,
        unreached=left.unreached,
    )


class _Left(msgspec.Struct, frozen=True):
    """What became of leased codes: ``taken`` out of a window now, ``gone`` from it before; ``quarantined``: of windows
    that were left."""

    taken: int
    gone: list[Leased]
    quarantined: list[Leased]
    unreached: int


async def _leave_windows(
    database: Database, scripts: Scripts, refill: Refill, pool: str, leased: Sequence[Leased]
) -> _Left:
    deadline = time.monotonic() + patience.UNREACHED_S
    left, gone, taken, quarantined = list(leased), list[Leased](), 0, list[Leased]()
    while left:
        seen = await scripts.generation()
        if seen.agrees:
            quarantined += [one for one in left if one.generation != seen.open]
            left = [one for one in left if one.generation == seen.open]
            done = 0
            if left and await all_applied(database, scripts, refill, pool, seen.open):
                for done in range(0, len(left), CODES_MAX):
                    some = left[done : done + CODES_MAX]
                    flags = await scripts.withdraw(pool, [one.code for one in some], generation=seen.open)
                    if flags is None:
                        break
                    taken += sum(flags)
                    gone += [one for one, was_there in zip(some, flags, strict=True) if not was_there]
                else:
                    done = len(left)
            left = left[done:]
        if not left or time.monotonic() > deadline:
            break
        await asyncio.sleep(patience.UNREACHED_POLL_S)
    return _Left(taken, gone, quarantined, len(left))


async def _became(database: Database, gone: Sequence[Leased]) -> tuple[int, int]:
    """How many of the codes that had left their window were issued, and how many set aside or withdrawn; waits for
    the flush that brings the news, bounded."""
    deadline = time.monotonic() + patience.UNREACHED_S
    while True:
        async with database.read() as conn:
            issued, aside = await withdrawal.became(conn, gone)
        if issued + aside == len(gone) or time.monotonic() > deadline:
            return issued, aside
        await asyncio.sleep(patience.UNREACHED_POLL_S)


async def all_applied(database: Database, scripts: Scripts, refill: Refill, pool: str, generation: int) -> bool:
    """Whether every lease of the pool has come to its window: what is in none of both can't be taken out."""
    for _ in range(2):
        books = await scripts.books([pool], generation=generation)
        if books is None:
            return False
        async with database.read() as conn:
            if await stock.ends_with(conn, scripts.partition, generation, pool, books.windows[pool].lease):
                return True
        await refill.run_once([pool])
    return False


def _sum(one: Withdrawn, other: Withdrawn) -> Withdrawn:
    return Withdrawn(
        one.stored + other.stored,
        one.before + other.before,
        one.issued + other.issued,
        one.unknown + other.unknown,
        one.leased + other.leased,
    )
