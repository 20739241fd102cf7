"""Codes in quarantine that nobody received: they come back to stock.

Whether one was received is not for the store to know: who asks has to be sure.  What is made sure of here: no flush is
under way meanwhile, and a flush that comes later with such a code after all finds that its position is taken, which is
an incident and no issuance (``flush``).
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import books, generations, ledger, returning, stock
from service.store.database import chunks
from service.store.flush import RECREATED
from service.store.schema import TAKEN_BACK, assignments, campaigns, codes, leases, parked, requests, set_asides
from service.store.schema import generations as generation_rows

Position = tuple[int, int]


async def page(
    conn: AsyncConnection, partition: int, pool: str, closed_before: int, after: Position, limit: int
) -> list[tuple[Position, bytes]]:
    """Positions and digests of codes of the pool in quarantine, of generations that were closed before that second and
    of which nothing is parked (nobody knows which codes that was), in the order of stock ``after`` this one."""
    left = (
        select(parked.c.entry_id)
        .where(parked.c.partition == leases.c.partition, parked.c.generation == leases.c.generation)
        .exists()
    )
    found = await conn.execute(
        books.in_quarantine(codes.c.lot, codes.c.seq, codes.c.digest)
        .where(
            leases.c.partition == partition, leases.c.pool == pool, generation_rows.c.closed_at < closed_before, ~left,
            stock.after(codes, after),
        )
        .order_by(codes.c.lot, codes.c.seq)
        .limit(limit)
    )  # fmt: skip
    return [((lot, seq), mark) for lot, seq, mark in found]


async def generations_of(conn: AsyncConnection, partition: int, positions: Sequence[Position]) -> set[int]:
    """Those to which these positions were leased."""
    found: set[int] = set()
    for some in chunks(positions):
        lease = (leases.c.lot == codes.c.lot) & (leases.c.seq_from <= codes.c.seq) & (leases.c.seq_to > codes.c.seq)
        rows = select(leases.c.generation).join_from(codes, leases, lease).distinct()
        found.update(await conn.scalars(rows.where(leases.c.partition == partition, stock.at(codes, some))))
    return found


async def return_(
    conn: AsyncConnection, partition: int, positions: Sequence[Position], now: int
) -> tuple[dict[str, int], int]:
    """Those of ``positions`` that are in quarantine are in stock again, at new positions; per pool its stock version,
    and how many they are.

    The caller holds the partition's lock exclusively, and has seen that the outboxes they left by are empty.
    """
    there = await set_aside(conn, partition, positions, TAKEN_BACK, now)
    return await returning.put_back(conn, there, now), len(there)


async def set_aside(
    conn: AsyncConnection, partition: int, positions: Sequence[Position], why: str, now: int
) -> list[Position]:
    """Those of ``positions`` that are in quarantine are set aside for this reason instead.

    The caller holds the partition's lock exclusively.
    """
    there: list[Position] = []
    for some in chunks(positions):
        rows = await conn.execute(books.in_quarantine(codes.c.lot, codes.c.seq).where(stock.at(codes, some)))
        there += [(row.lot, row.seq) for row in rows]
    if there:
        seq = await ledger.last_seq(conn, partition, RECREATED) + 1
        way = {"partition": partition, "generation": RECREATED, "outbox_seq": seq, "why": why, "flushed_at": now}
        rows_ = [{**way, "ordinal": n, "lot": lot, "seq": at} for n, (lot, at) in enumerate(sorted(there))]
        await conn.execute(insert(set_asides), rows_)
    return there


async def came_back(conn: AsyncConnection, positions: Sequence[Position]) -> set[Position]:
    """Those of ``positions`` that ``return_`` has returned from quarantine."""
    found: set[Position] = set()
    for some in chunks(positions):
        rows = await conn.execute(
            select(set_asides.c.lot, set_asides.c.seq).where(
                set_asides.c.generation == RECREATED, stock.at(set_asides, some)
            )
        )
        found.update((row.lot, row.seq) for row in rows)
    return found


async def could_have_received(conn: AsyncConnection, pool: str) -> set[str]:
    """The distributors that are assigned to a campaign of the pool now, or were ever issued one of its codes."""
    assigned = (
        select(assignments.c.distributor)
        .join(campaigns, campaigns.c.id == assignments.c.campaign)
        .where(campaigns.c.pool == pool)
    )
    issued = select(requests.c.distributor).where(requests.c.pool == pool).distinct()
    return {*await conn.scalars(assigned), *await conn.scalars(issued)}


async def lock(conn: AsyncConnection, partition: int) -> None:
    """No flush of the partition commits until the transaction ends."""
    await generations.lock(conn, partition, exclusive=True)
