"""Codes that come back to stock, each at a new position of its lot.

The old position stays dead for ever: its lease and the row of ``set_asides`` that says why stay as they are, and no
code is at it any more.  A code is in ``codes`` once, whatever its position: the wall of its digest stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Select, bindparam, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import stock
from service.store.database import chunks
from service.store.schema import TAKEN_BACK, codes, imports, incidents, issuances, lots, pools, set_asides

# Beginning of the ids of the imports that codes come back by.  No operator can name an import so.
RETURNED: Final = "taken-back:"


async def put_back(conn: AsyncConnection, positions: Sequence[tuple[int, int]], now: int) -> dict[str, int]:
    """Those codes at ``positions`` that the store knows to be taken back are in stock, at the end of their lots.  Per
    pool of these positions its stock version, which rose if anything came back.

    Doing it again changes nothing: what came back is at that position no more.  A code that the ledger calls issued,
    or that an incident names, stays where it is.
    """
    found: set[str] = set()
    for these in chunks(sorted({lot for lot, _ in positions})):
        found.update(await conn.scalars(select(lots.c.pool).where(lots.c.id.in_(these))))
    versions: dict[str, int] = {}
    for pool in sorted(found):
        versions[pool] = int((await stock.lock_pool(conn, pool)).stock_version)
        waiting = list[tuple[int, int]]()
        for some in chunks(positions):
            rows = await conn.execute(_waiting(some).where(codes.c.pool == pool))
            waiting += [(row.lot, row.seq) for row in rows]
        if not waiting:
            continue  # it was done before
        for lot, group in groupby(sorted(set(waiting)), key=lambda position: position[0]):
            await _move(conn, pool, lot, [seq for _, seq in group], now)
        versions[pool] += 1
        await conn.execute(update(pools).where(pools.c.id == pool).values(stock_version=versions[pool]))
    return versions


async def still_there(conn: AsyncConnection, positions: Sequence[tuple[int, int]]) -> int:
    """How many codes are at these positions still: taken back, and not in stock again."""
    count = 0
    for some in chunks(positions):
        count += int(await conn.scalar(select(func.count()).select_from(codes).where(stock.at(codes, some))) or 0)
    return count


async def returned(conn: AsyncConnection, pool: str) -> int:
    """How many times a code of the pool came back to stock."""
    count = select(func.coalesce(func.sum(imports.c.inserted), 0))
    by = count.where(imports.c.pool == pool, imports.c.id.startswith(RETURNED, autoescape=True))
    return int(await conn.scalar(by) or 0)


def _waiting(positions: Sequence[tuple[int, int]]) -> Select[Any]:
    """Those of ``positions`` whose code was taken back and stands there still."""
    return (
        select(codes.c.lot, codes.c.seq)
        .join_from(codes, set_asides, (set_asides.c.lot == codes.c.lot) & (set_asides.c.seq == codes.c.seq))
        .where(
            stock.at(codes, positions),
            set_asides.c.why == TAKEN_BACK,
            stock.not_in(issuances, codes),
            stock.not_in(incidents, codes),
            codes.c.digest.not_in(select(issuances.c.digest).where(issuances.c.digest == codes.c.digest)),
        )
    )


async def _move(conn: AsyncConnection, pool: str, lot: int, seqs: Sequence[int], now: int) -> None:
    first = int(await conn.scalar(select(lots.c.imported).where(lots.c.id == lot)) or 0)
    await conn.execute(
        update(codes).where(codes.c.lot == lot, codes.c.seq == bindparam("was")).values(seq=bindparam("is_now")),
        [{"was": seq, "is_now": first + n} for n, seq in enumerate(seqs)],
    )
    count = len(seqs)
    await conn.execute(update(lots).where(lots.c.id == lot).values(imported=first + count))
    await conn.execute(
        insert(imports),
        {
            "id": f"{RETURNED}{lot}:{first}", "pool": pool, "lines_done": count, "inserted": count, "refused": 0,
            "started_at": now, "finished_at": now, "content": "",
        },
    )  # fmt: skip
