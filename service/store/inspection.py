"""What an audit and an operator look at besides the books: single rows that need a name, and sums of one generation.

Read within one snapshot (``Database.read``) together with ``books``.  Nothing here holds a code.
"""

from __future__ import annotations

from typing import Final

import msgspec
from sqlalchemy import and_, exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import schema, stock
from service.store.flush import DOUBLE_ISSUE, QUARANTINE, STORE_OLDER
from service.store.schema import codes, incidents, issuances, leases, parked, requests, set_asides

# Rows of one kind of damage that are looked at; a store that has more is not understood by reading a longer list.
DAMAGED_MAX: Final = 1_000

# Incidents that say what was lost and that all is done that can be: nothing waits for anybody.
SETTLED: Final = (STORE_OLDER, QUARANTINE)


class Incident(msgspec.Struct, frozen=True):
    """Something that had to be put on record.  ``subject``: campaign or pool."""

    kind: str
    partition: int
    generation: int
    outbox_seq: int | None
    codes: int
    lot: int | None
    seq: int | None
    subject: str
    detail: str
    raised_at: int


class Parked(msgspec.Struct, frozen=True):
    """An outbox entry that no row can hold.  ``codes``: how many it said it held."""

    partition: int
    generation: int
    entry_id: str
    codes: int
    reason: str
    parked_at: int


class Torn(msgspec.Struct, frozen=True):
    """A request that does not have its codes in the ledger, or a code there that does not have its request."""

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int
    expected: int
    found: int


async def open_incidents(conn: AsyncConnection) -> list[Incident]:
    """The incidents that are not settled, the oldest first."""
    columns = [incidents.c[name] for name in Incident.__struct_fields__]
    found = select(*columns).where(incidents.c.kind.not_in(SETTLED)).order_by(incidents.c.id).limit(DAMAGED_MAX)
    return [Incident(*row) for row in await conn.execute(found)]


async def on_record(conn: AsyncConnection, kind: str, partition: int) -> set[tuple[int, str]]:
    """Of which generations and subjects there is an incident of this kind."""
    found = select(incidents.c.generation, incidents.c.subject).where(
        incidents.c.kind == kind, incidents.c.partition == partition
    )
    return {(generation, subject) for generation, subject in await conn.execute(found)}


async def newest_incidents(conn: AsyncConnection, limit: int) -> list[Incident]:
    """The latest incidents first, settled ones too."""
    columns = [incidents.c[name] for name in Incident.__struct_fields__]
    return [Incident(*row) for row in await conn.execute(select(*columns).order_by(incidents.c.id.desc()).limit(limit))]


async def parked_entries(conn: AsyncConnection) -> list[Parked]:
    """The oldest parked entries first."""
    columns = [parked.c[name] for name in Parked.__struct_fields__]
    rows = await conn.execute(select(*columns).order_by(parked.c.parked_at, parked.c.entry_id).limit(DAMAGED_MAX))
    return [Parked(*row) for row in rows]


async def count_incidents(conn: AsyncConnection) -> tuple[int, int]:
    """How many incidents there are that are not settled, and how many parked entries."""
    return (
        int(await conn.scalar(select(func.count()).where(incidents.c.kind.not_in(SETTLED))) or 0),
        int(await conn.scalar(select(func.count()).select_from(parked)) or 0),
    )


async def torn_requests(conn: AsyncConnection) -> list[Torn]:
    """Requests whose codes are not all in the ledger (nor an incident), and codes there whose request is not."""
    way = (issuances.c.partition, issuances.c.generation, issuances.c.outbox_seq, issuances.c.request_ordinal)
    given = select(*way, func.count().label("given")).group_by(*way).subquery()
    short = (
        select(
            requests.c.partition, requests.c.generation, requests.c.outbox_seq, requests.c.ordinal,
            requests.c.quantity, func.coalesce(given.c.given, 0),
        )
        .outerjoin(
            given,
            and_(
                given.c.partition == requests.c.partition,
                given.c.generation == requests.c.generation,
                given.c.outbox_seq == requests.c.outbox_seq,
                given.c.request_ordinal == requests.c.ordinal,
            ),
        )
        .where(requests.c.quantity != func.coalesce(given.c.given, 0))
        .order_by(*(requests.c[name] for name in schema.WAY))
        .limit(DAMAGED_MAX)
    )  # fmt: skip
    torn = []
    for partition, generation, outbox_seq, ordinal, quantity, found in (await conn.execute(short)).all():
        doubled = await conn.scalar(
            select(func.count())
            .select_from(incidents)
            .where(
                incidents.c.partition == partition,
                incidents.c.generation == generation,
                incidents.c.outbox_seq == outbox_seq,
                incidents.c.ordinal.between(ordinal, ordinal + quantity - 1),
                incidents.c.kind == DOUBLE_ISSUE,
            )
        )
        if found + int(doubled or 0) != quantity:
            torn.append(Torn(partition, generation, outbox_seq, ordinal, quantity, found))
    lonely = (
        select(*way, func.count())
        .where(
            ~exists().where(
                requests.c.partition == issuances.c.partition,
                requests.c.generation == issuances.c.generation,
                requests.c.outbox_seq == issuances.c.outbox_seq,
                requests.c.ordinal == issuances.c.request_ordinal,
            )
        )
        .group_by(*way)
        .order_by(*way)
        .limit(DAMAGED_MAX)
    )
    return torn + [
        Torn(partition, generation, outbox_seq, ordinal, 0, int(found))
        for partition, generation, outbox_seq, ordinal, found in await conn.execute(lonely)
    ]


async def leased(conn: AsyncConnection, partition: int, generation: int) -> int:
    """Codes leased to this generation."""
    query = select(func.sum(leases.c.codes)).where(leases.c.partition == partition, leases.c.generation == generation)
    return int(await conn.scalar(query) or 0)


async def at_large(conn: AsyncConnection, partition: int, generation: int) -> dict[tuple[int, int], str]:
    """The positions ``(lot, seq)`` leased to this generation that the ledger has not heard of, each with its pool.

    While the generation is open these are in its windows, in its outbox, or in a lease on its way.
    """
    query = (
        select(codes.c.lot, codes.c.seq, leases.c.pool)
        .select_from(leases)
        .join(
            codes,
            and_(codes.c.lot == leases.c.lot, codes.c.seq >= leases.c.seq_from, codes.c.seq < leases.c.seq_to),
        )
        .where(
            leases.c.partition == partition,
            leases.c.generation == generation,
            stock.not_withdrawn(codes),
            *(stock.not_in(table, codes) for table in (issuances, set_asides, incidents)),
        )
    )
    return {(lot, seq): pool for lot, seq, pool in await conn.execute(query)}


async def known_entries(conn: AsyncConnection, partition: int, generation: int, seqs: list[int]) -> set[int]:
    """Which of these outbox sequences the ledger holds already, in whatever form."""
    known: set[int] = set()
    for start in range(0, len(seqs), 500):
        some = seqs[start : start + 500]
        for table in (requests, set_asides, incidents):
            rows = await conn.scalars(
                select(table.c.outbox_seq)
                .where(table.c.partition == partition, table.c.generation == generation, table.c.outbox_seq.in_(some))
                .distinct()
            )
            known.update(row for row in rows if row is not None)
    return known


async def known_parked(conn: AsyncConnection, partition: int, generation: int) -> set[str]:
    """The stream ids of this generation's parked entries."""
    rows = await conn.scalars(
        select(parked.c.entry_id).where(parked.c.partition == partition, parked.c.generation == generation)
    )
    return set(rows)
