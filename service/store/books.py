"""The books: what must balance, what is in quarantine, and what must never be (promises P1, P3, P5, P8).

Everything is derived from the tables at the moment of asking, never from a count that is kept somewhere; read within
one snapshot (``Database.read``) the figures belong together.  Cost: most of it reads every row of its tables, a few
seconds for some million codes, so ask with a longer statement time-out than the hot path's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Select, Table, and_, case, func, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Period, period_start
from service.domain import CapHolder
from service.store.flush import ADOPTED, DOUBLE_ISSUE
from service.store.generations import CLOSED
from service.store.schema import (
    WAY,
    assignments,
    campaigns,
    caps,
    codes,
    generations,
    imports,
    incidents,
    issuances,
    leases,
    lots,
    parked,
    pools,
    requests,
    set_asides,
    withdrawn,
)
from service.store.stock import not_in, not_withdrawn

# Every zone is off UTC by a multiple of this, so its days and hours begin with one: summing up per quarter first
# leaves less to sort into periods.
QUARTER_S: Final = 900

# A cap is in force when the last fence is raised, not when the store has it, and the hosts' clocks differ: what was
# issued so shortly after a change is judged by what was before.
SETTLING_S: Final = 60


# --- stock (P5) ----------------------------------------------------------------------------------------------------


class StockBalance(msgspec.Struct, frozen=True):
    """Codes of one pool.  ``imported``: by its imports; ``stored``: still to be leased; ``leased``: by its leases;
    ``withdrawn``: taken out of stock before they were leased."""

    pool: str
    imported: int
    stored: int
    leased: int
    withdrawn: int

    @property
    def difference(self) -> int:
        """Codes that are missing (too many, if negative)."""
        return self.imported - self.stored - self.leased - self.withdrawn

    @property
    def balanced(self) -> bool:
        return not self.difference


async def stock_balance(conn: AsyncConnection) -> list[StockBalance]:
    """Every pool's balance, each of the four figures counted by itself."""
    stored = (
        select(lots.c.pool, func.count())
        .join_from(lots, codes, and_(codes.c.lot == lots.c.id, codes.c.seq >= lots.c.leased_to))
        .where(not_withdrawn(codes))
        .group_by(lots.c.pool)
    )
    imported = await _by_pool(conn, select(imports.c.pool, func.sum(imports.c.inserted)).group_by(imports.c.pool))
    leased = await _by_pool(conn, select(leases.c.pool, func.sum(leases.c.codes)).group_by(leases.c.pool))
    unleased = await _by_pool(conn, stored)
    stretches = select(lots.c.pool, func.sum(withdrawn.c.seq_to - withdrawn.c.seq_from)).join_from(withdrawn, lots)
    taken = await _by_pool(conn, stretches.group_by(lots.c.pool))
    return [
        StockBalance(pool, imported.get(pool, 0), unleased.get(pool, 0), leased.get(pool, 0), taken.get(pool, 0))
        for pool in await conn.scalars(select(pools.c.id).order_by(pools.c.id))
    ]


async def _by_pool(conn: AsyncConnection, query: Select[Any]) -> dict[str, int]:
    return {pool: int(count) for pool, count in await conn.execute(query)}


# --- quarantine ------------------------------------------------------------------------------------------------------


class Quarantined(msgspec.Struct, frozen=True):
    """How many codes of a pool went to a generation that is closed and are nowhere else."""

    pool: str
    partition: int
    generation: int
    codes: int
    left_at: int  # Unix seconds at which the generation was closed


class QuarantinedCode(msgspec.Struct, frozen=True):
    """One code in quarantine, named by its position in stock and its serial number."""

    pool: str
    partition: int
    generation: int
    lot: int
    seq: int
    serial_number: str


async def quarantine(conn: AsyncConnection) -> list[Quarantined]:
    """Codes leased in closed generations that were neither issued nor set aside, nor are an incident.

    Those of a parked entry are among them, for nobody can read which they are.
    """
    each = _quarantined_leases(
        leases.c.pool, leases.c.partition, leases.c.generation, generations.c.closed_at
    ).subquery()
    grouped = (each.c.pool, each.c.partition, each.c.generation)
    left = func.sum(each.c.codes)
    rows = await conn.execute(
        select(*grouped, left, func.max(each.c.closed_at)).group_by(*grouped).having(left > 0).order_by(*grouped)
    )
    return [Quarantined(pool, partition, generation, int(count), at) for pool, partition, generation, count, at in rows]


async def quarantined_by_lot(conn: AsyncConnection) -> dict[int, int]:
    """The codes that ``quarantine`` counts, per lot; lots without any are left out."""
    each = _quarantined_leases(leases.c.lot).subquery()
    left = func.sum(each.c.codes)
    rows = await conn.execute(select(each.c.lot, left).group_by(each.c.lot).having(left > 0))
    return {lot: int(count) for lot, count in rows}


def _quarantined_leases(*columns: ColumnElement[Any]) -> Select[Any]:
    """The leases of closed generations, each with the ``codes`` of it that are in quarantine."""
    # Counted lease by lease over the walls' indexes, without a look at the codes themselves: several times faster.
    accounted_for = (
        _in_lease(issuances).scalar_subquery()
        + _in_lease(set_asides).where(not_in(issuances, set_asides)).scalar_subquery()
        + _in_lease(incidents, func.count(incidents.c.seq.distinct()))
        .where(not_in(issuances, incidents), not_in(set_asides, incidents))
        .scalar_subquery()
    )
    return _leased_and_closed(*columns, (leases.c.codes - accounted_for).label("codes"))


async def quarantined_codes(conn: AsyncConnection, limit: int) -> list[QuarantinedCode]:
    """The codes that ``quarantine`` counts, at most ``limit`` of them, in the order of stock."""
    named = in_quarantine(
        leases.c.pool, leases.c.partition, leases.c.generation, codes.c.lot, codes.c.seq, codes.c.serial
    )
    rows = await conn.execute(named.order_by(codes.c.lot, codes.c.seq).limit(limit))
    return [QuarantinedCode(*row) for row in rows]


def in_quarantine(*columns: ColumnElement[Any]) -> Select[Any]:
    """The codes that ``quarantine`` counts, with their ``leases`` and ``generations``."""
    raised = select(incidents.c.lot, incidents.c.seq).where(incidents.c.lot.is_not(None), incidents.c.seq.is_not(None))
    return (
        _leased_and_closed(*columns)
        .join(
            codes,
            and_(codes.c.lot == leases.c.lot, codes.c.seq >= leases.c.seq_from, codes.c.seq < leases.c.seq_to),
        )
        .where(
            not_withdrawn(codes),
            not_in(issuances, codes),
            not_in(set_asides, codes),
            tuple_(codes.c.lot, codes.c.seq).not_in(raised),
        )
    )


def _leased_and_closed(*columns: ColumnElement[Any]) -> Select[Any]:
    """The leases of closed generations."""
    return (
        select(*columns)
        .select_from(leases)
        .join(
            generations,
            and_(
                generations.c.partition == leases.c.partition,
                generations.c.generation == leases.c.generation,
                generations.c.state == CLOSED,
            ),
        )
    )


def _in_lease(table: Table, count: ColumnElement[int] | None = None) -> Select[Any]:
    """How many rows of ``table`` lie in the range of the lease at hand."""
    return select(func.count() if count is None else count).where(
        table.c.lot == leases.c.lot, table.c.seq >= leases.c.seq_from, table.c.seq < leases.c.seq_to
    )


# --- one generation (P5, across Redis and the store) -----------------------------------------------------------------


class Accounted(msgspec.Struct, frozen=True):
    """Codes of one generation that left its windows and that the store accounts for, each in one of these."""

    issued: int
    set_aside: int
    parked: int
    incidents: int

    @property
    def codes(self) -> int:
        return self.issued + self.set_aside + self.parked + self.incidents


async def accounted(conn: AsyncConnection, partition: int, generation: int) -> Accounted:
    """What the store accounts for of one generation."""
    figures = []
    for table, figure in (
        (issuances, func.count()),
        (set_asides, func.count()),
        (parked, func.sum(parked.c.codes)),
        (incidents, func.sum(incidents.c.codes)),
    ):
        found = await conn.scalar(
            select(figure).select_from(table).where(table.c.partition == partition, table.c.generation == generation)
        )
        figures.append(int(found or 0))
    return Accounted(*figures)


# --- what must never be ---------------------------------------------------------------------------------------------


class DoubleCode(msgspec.Struct, frozen=True):
    """A code that was given twice.  ``found``: as an incident that a flush raised, or because it is both issued and
    set aside, which two flushes at the same moment can't see of each other."""

    lot: int | None
    seq: int | None
    found: Literal["incident", "issued and set aside"]
    detail: str


async def double_codes(conn: AsyncConnection) -> list[DoubleCode]:
    """Every code that was given to more than one request, or set aside and issued as well (P1)."""
    raised = await conn.execute(
        select(incidents.c.lot, incidents.c.seq, incidents.c.detail)
        .where(incidents.c.kind == DOUBLE_ISSUE)
        .order_by(incidents.c.id)
    )
    both = await conn.execute(
        select(issuances.c.lot, issuances.c.seq, *(issuances.c[name] for name in WAY[1:]))
        .join_from(
            set_asides, issuances, and_(issuances.c.lot == set_asides.c.lot, issuances.c.seq == set_asides.c.seq)
        )
        .order_by(issuances.c.lot, issuances.c.seq)
    )
    return [
        *(DoubleCode(lot, seq, "incident", detail) for lot, seq, detail in raised),
        *(
            DoubleCode(
                lot, seq, "issued and set aside",
                f"lot {lot}, seq {seq} was set aside, and issued in generation {generation}, "
                f"outbox sequence {outbox_seq}, ordinal {ordinal}",
            )
            for lot, seq, generation, outbox_seq, ordinal in both
        ),
    ]  # fmt: skip


class DoubleKey(msgspec.Struct, frozen=True):
    """A key under which something new was issued although its first answer was still to be given."""

    client: str
    api: str
    key: str
    requests: int


async def double_keys(conn: AsyncConnection, retention_s: int) -> list[DoubleKey]:
    """Every key with two requests issued less than ``retention_s`` apart (P3); after that a key may be used again."""
    key = (requests.c.client, requests.c.api, requests.c.key)
    # One adopted code is one request: nobody knows which of them a partner got together.
    several = select(*key).where(requests.c.api != ADOPTED).group_by(*key).having(func.count() > 1).subquery()
    repeated = (
        select(*key, requests.c.issued_at)
        .join(several, and_(*(several.c[column.name] == column for column in key)))
        .order_by(*key, requests.c.issued_at)
    )
    found: dict[tuple[str, str, str], int] = {}
    before: tuple[tuple[str, str, str], int] | None = None
    for client, api, name, issued_at in await conn.execute(repeated):
        this = (client, api, name)
        if before is not None and before[0] == this and issued_at - before[1] < retention_s:
            found[this] = found.get(this, 1) + 1
        before = (this, issued_at)
    return [DoubleKey(*this, count) for this, count in found.items()]


class OverCap(msgspec.Struct, frozen=True):
    """A cap that was exceeded.  ``distributor`` and ``terminal`` are '' where the cap does not count by them;
    ``starts_at`` is the Unix second at which the day or hour began, 0 for a total."""

    campaign: str
    holder: CapHolder
    period: Period
    distributor: str
    terminal: str
    starts_at: int
    limit: int
    codes: int


async def over_caps(conn: AsyncConnection) -> list[OverCap]:
    """Every cap of today that was exceeded in any of its periods that the ledger has (P8).

    A cap counts from its publication.  Where its limit was changed later, what the one before had let through is not
    held against it, only what came on top.  Days and hours are those of the campaign's zone.
    """
    rows = await conn.execute(
        select(
            caps.c.campaign, caps.c.distributor, caps.c.holder, caps.c.period, caps.c.limit, caps.c.counted_from,
            caps.c.limited_from, func.coalesce(assignments.c.created_at, campaigns.c.created_at), campaigns.c.time_zone,
        )
        .join_from(caps, campaigns, campaigns.c.id == caps.c.campaign)
        .outerjoin(
            assignments,
            and_(assignments.c.campaign == caps.c.campaign, assignments.c.distributor == caps.c.distributor),
        )
        .order_by(caps.c.campaign, caps.c.distributor, caps.c.holder, caps.c.period)
    )  # fmt: skip
    return [over for row in rows.all() for over in await _exceeded(conn, _Cap(*row))]


class _Cap(NamedTuple):
    """A cap as it is today.  ``distributor`` '': it is the campaign's own, not an assignment's; ``made_at``: when that
    campaign or assignment was, so that nothing can have been issued by it before."""

    campaign: str
    distributor: str
    holder: CapHolder
    period: Period
    limit: int
    counted_from: int
    limited_from: int
    made_at: int
    time_zone: str


async def _exceeded(conn: AsyncConnection, cap: _Cap) -> list[OverCap]:
    """Whose count passed the limit in which period."""
    by = {
        "campaign": (),
        "distributor": (requests.c.distributor,),
        "terminal": (requests.c.distributor, requests.c.terminal),
    }[cap.holder]
    begin = 0 if cap.counted_from <= cap.made_at else cap.counted_from + SETTLING_S
    change = cap.limited_from + SETTLING_S if cap.limited_from > cap.counted_from else 0
    given = func.sum(requests.c.quantity)
    before = func.sum(case((requests.c.issued_at < change, requests.c.quantity), else_=0))
    counted = [requests.c.campaign == cap.campaign, requests.c.issued_at >= begin]
    if cap.holder == "terminal":
        counted.append(requests.c.api != ADOPTED)  # nobody knows at which terminals these were
    if cap.distributor and cap.holder != "campaign":
        counted.append(requests.c.distributor == cap.distributor)
    quarter = requests.c.issued_at // QUARTER_S if cap.period != "total" else literal(0)
    query = select(given, before, quarter.label("quarter"), *by).where(*counted).group_by("quarter", *by)
    if cap.period == "total":
        query = query.having(given > cap.limit)

    starts: dict[int, int] = {}
    passed: Counter[tuple[tuple[str, ...], int]] = Counter()
    had: Counter[tuple[tuple[str, ...], int]] = Counter()
    for codes_given, codes_before, number, *holder in await conn.execute(query):
        if number not in starts:
            starts[number] = 0 if cap.period == "total" else period_start(
                cap.period, cap.time_zone, number * QUARTER_S
            )  # fmt: skip
        passed[tuple(holder), starts[number]] += int(codes_given)
        had[tuple(holder), starts[number]] += int(codes_before)
    return [
        OverCap(
            campaign=cap.campaign,
            holder=cap.holder,
            period=cap.period,
            distributor=holder[0] if holder else "",
            terminal=holder[1] if len(holder) > 1 else "",
            starts_at=start,
            limit=cap.limit,
            codes=count,
        )
        for (holder, start), count in sorted(passed.items())
        if count > max(cap.limit, had[holder, start])
    ]
