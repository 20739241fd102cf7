"""Withdrawal: codes are taken out of stock for good.  What was leased by then has to leave its window as well.

Like imports and leases these lock the pool's row first, so a code is either withdrawn here or was leased before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Select, and_, exists, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code
from service.errors import NotFound
from service.store import stock
from service.store.intake import LOOKUP_MAX
from service.store.schema import TAKEN_BACK, codes, issuances, leases, lots, set_asides, withdrawn
from service.store.stock import lock_pool, not_in, not_withdrawn

# Codes named in one transaction: it holds the pool's lock, and on SQLite the only write lock.
NAMED_MAX: Final = 5_000


class Leased(msgspec.Struct, frozen=True):
    """A code that went to a window before: which generation's, and the code as that window has it."""

    generation: int
    code: Code


class Withdrawn(msgspec.Struct, frozen=True):
    """What a withdrawal did, in codes: ``stored`` are withdrawn now, ``before`` were withdrawn or set aside earlier,
    ``issued`` are in the ledger and stay issued, ``unknown`` are not of this pool.  ``leased`` may still be in a
    window, on their way to the ledger, or in quarantine."""

    stored: int = 0
    before: int = 0
    issued: int = 0
    unknown: int = 0
    leased: tuple[Leased, ...] = ()


async def withdraw_codes(conn: AsyncConnection, pool: str, named: Sequence[str], now: int) -> Withdrawn:
    """None of the ``named`` codes (at most NAMED_MAX) of the pool is ever leased again.  Raises NotFound.

    Doing it again changes nothing.
    """
    if len(named) > NAMED_MAX:
        raise ValueError(f"at most {NAMED_MAX} codes in one transaction")
    await lock_pool(conn, pool)
    digests = sorted({stock.digest(code) for code in named})
    found: list[Any] = []
    for start in range(0, len(digests), LOOKUP_MAX):
        some = digests[start : start + LOOKUP_MAX]
        found += await conn.execute(_positions(codes.c.pool == pool, codes.c.digest.in_(some)))
    left = [row for row in found if not (row.gone or row.issued or row.aside)]
    stored = sorted((row.lot, row.seq) for row in left if row.seq >= row.leased_to)
    await _write(conn, _stretches(stored), now)
    return Withdrawn(
        stored=len(stored),
        before=sum(bool(row.gone or row.aside) for row in found),
        issued=sum(bool(row.issued) for row in found),
        unknown=len(digests) - len(found),
        leased=tuple(_held(row) for row in left if row.seq < row.leased_to),
    )


async def withdraw_lot(conn: AsyncConnection, pool: str, lot: int, now: int) -> Withdrawn:
    """No code of the lot is ever leased again.  Raises NotFound.  Doing it again changes nothing.

    What was not leased is written down as stretches, however many codes they hold.
    """
    await lock_pool(conn, pool)
    row = (await conn.execute(select(lots).where(lots.c.pool == pool, lots.c.id == lot))).first()
    if row is None:
        raise NotFound(f"pool {pool} has no lot {lot}: `voucherd pool show {pool}` lists them")
    stretches = [(lot, *free) for free in await stock.free_stretches(conn, row)]
    await _write(conn, stretches, now)
    await conn.execute(update(lots).where(lots.c.id == lot).values(leased_to=row.imported))
    leased = _positions(codes.c.pool == pool, codes.c.lot == lot, codes.c.seq < row.leased_to, not_withdrawn(codes))
    at_large = leased.where(not_in(issuances, codes), ~_aside())
    held = [_held(one) for one in await conn.execute(at_large)]
    return Withdrawn(stored=sum(seq_to - seq_from for _, seq_from, seq_to in stretches), leased=tuple(held))


async def became(conn: AsyncConnection, held: Sequence[Leased]) -> tuple[int, int]:
    """How many of ``held`` were issued, and how many set aside or withdrawn, as far as the store has heard."""
    issued = aside = 0
    for start in range(0, len(held), LOOKUP_MAX):
        digests = [stock.digest(one.code.code) for one in held[start : start + LOOKUP_MAX]]
        for row in await conn.execute(_positions(codes.c.digest.in_(digests))):
            issued, aside = issued + bool(row.issued), aside + bool(row.aside and not row.issued)
    return issued, aside


def _positions(*where: ColumnElement[bool]) -> Select[Any]:
    """Codes in their order, the generation that they were leased to, and what the store knows became of them."""
    lease = and_(leases.c.lot == codes.c.lot, leases.c.seq_from <= codes.c.seq, leases.c.seq_to > codes.c.seq)
    return (
        select(
            codes.c.lot, codes.c.seq, codes.c.code, codes.c.serial, lots.c.expires_at, lots.c.leased_to,
            leases.c.generation, (~not_withdrawn(codes)).label("gone"),
            (~not_in(issuances, codes)).label("issued"), _aside().label("aside"),
        )
        .join_from(codes, lots, lots.c.id == codes.c.lot)
        .outerjoin(leases, lease)
        .where(*where)
        .order_by(codes.c.lot, codes.c.seq)
    )  # fmt: skip


def _aside() -> ColumnElement[bool]:
    """This code left a window for good.  One that was taken back did not: it is about to be in stock again."""
    return exists().where(
        set_asides.c.lot == codes.c.lot, set_asides.c.seq == codes.c.seq, set_asides.c.why != TAKEN_BACK
    )


def _held(row: Any) -> Leased:
    return Leased(row.generation, Code(row.expires_at, row.lot, row.seq, row.code, row.serial))


def _stretches(positions: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """``(lot, seq_from, seq_to)`` of neighbours, from sorted positions."""
    stretches: list[tuple[int, int, int]] = []
    for lot, seq in positions:
        if stretches and stretches[-1][0] == lot and stretches[-1][2] == seq:
            stretches[-1] = (lot, stretches[-1][1], seq + 1)
        else:
            stretches.append((lot, seq, seq + 1))
    return stretches


async def _write(conn: AsyncConnection, stretches: Sequence[tuple[int, int, int]], now: int) -> None:
    if stretches:
        await conn.execute(
            insert(withdrawn),
            [
                {"lot": lot, "seq_from": seq_from, "seq_to": seq_to, "withdrawn_at": now}
                for lot, seq_from, seq_to in stretches
            ],
        )
