"""The ledger: what was issued, for good.  Append-only; ``flush`` writes it, the functions here read it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, FromClause, Row, Select, Table, and_, func, literal, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code, Record, Rule
from service.identity import is_uuid
from service.store.database import chunks
from service.store.entries import Entry, Way, unfit, way_of
from service.store.flush import ADOPTED, DOUBLE_ISSUE, QUARANTINE, Flushed, flush, lacking, park, raise_incident
from service.store.schema import WAY, codes, incidents, issuances, lots, requests, set_asides
from service.store.stock import digest

__all__ = [
    "QUARANTINE", "Count", "Entry", "Flushed", "Found", "Wanted", "counts", "earliest_first", "find", "flush",
    "issued_by_pool", "lacking", "last_seq", "lookup",
    "newest_first", "park", "raise_incident", "unfit",
]  # fmt: skip


class Found(msgspec.Struct, frozen=True):
    """One issued code with its request.  ``double``: another request had the code before, this is an incident.

    ``voucher_id`` is a UUID's 16 bytes, None where the API gives none; so is ``answer_id``, the request id in answers,
    None where it is the key.  ``trace_id`` and ``parent_id`` are those of the call's traceparent, '' if it had none.
    """

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int
    api: str
    distributor: str
    client: str
    request_id: str
    terminal: str
    payload: str
    campaign: str
    pool: str
    category: str
    product: str
    until: int
    issued_at: int
    flushed_at: int
    quantity: int
    lot: int
    seq: int
    code: str
    serial: str
    expires_at: int
    double: bool = False
    voucher_id: bytes | None = None
    answer_id: bytes | None = None
    trace_id: str = ""
    parent_id: str = ""

    @property
    def client_reference(self) -> str:
        """What a client of Client API v3 calls its sale; '' if it said nothing, and on v1."""
        return self.payload.split("\t")[4] if self.api == "v3" else ""


# Codes handed on at a time: a megabyte or two, and enough that a statement's own costs don't count.
PAGE_CODES: Final = 5_000


class Wanted(msgspec.Struct, frozen=True):
    """Which part of the ledger: issued at ``since`` or later and before ``until`` (Unix seconds, 0: open), by this
    campaign, to this distributor (None: any)."""

    since: int = 0
    until: int = 0
    campaign: str | None = None
    distributor: str | None = None


class Count(msgspec.Struct, frozen=True):
    """Codes of one campaign that one terminal of one distributor was given."""

    distributor: str
    terminal: str
    codes: int


async def lookup(conn: AsyncConnection, api: str, client: str, keys: Sequence[str]) -> dict[str, Record]:
    """Those of ``keys`` that the ledger holds with their records, exactly as issued; the earliest if a key has
    several (after its retention, or wrongly).

    A record whose codes are not all known can't be told and is left out.
    """
    found: dict[str, Record] = {}
    for some in chunks(list(dict.fromkeys(keys))):
        wanted = select(requests).where(requests.c.client == client, requests.c.api == api, requests.c.key.in_(some))
        for row, given in await _told(conn, wanted):  # newest first: what remains is the earliest
            if len(given) == row.quantity:
                found[row.key] = _record(row, given)
    return found


# When a request was issued, and its generation, outbox sequence and ordinal: where a page of the newest ended.
Cursor = tuple[int, int, int, int]


async def newest_first(
    conn: AsyncConnection, partition: int, issued_since: int, before: Cursor | None, limit: int
) -> list[tuple[Cursor, Record]]:
    """Records issued at ``issued_since`` (Unix seconds) or later, the latest first, each with its cursor; ``before`` is
    the cursor to go on from, None begins.

    At most ``limit``; only an empty page says that it was the last, for a record whose codes are not all known can't
    be told and is left out.  Nor can an adopted one: nobody knows the answer.
    """
    while True:
        # By time first, for an index bounds that at both ends: by position alone, the last page would read the whole
        # ledger to learn that nothing younger is left.
        # Plus 0: SQLite, which keeps no statistics, would go for the primary key, and so read all of the partition.
        # PostgreSQL, which does, would take that for a rare thing, and sort all that is left for each page.
        column = requests.c.partition + 0 if conn.dialect.name == "sqlite" else requests.c.partition
        wanted = select(*_TOLD).where(
            column == partition, requests.c.issued_at >= issued_since, requests.c.api != ADOPTED
        )
        if before is not None:
            position = tuple_(*(requests.c[name] for name in ("issued_at", *WAY[1:])))
            wanted = wanted.where(requests.c.issued_at <= before[0], position < before)
        latest = wanted.order_by(*(requests.c[name].desc() for name in ("issued_at", *WAY))).limit(limit).subquery()
        rows = await conn.execute(
            select(latest, *(issuances.c[name].label(f"given_{name}") for name in _GIVEN[1:]))
            .outerjoin_from(latest, issuances, _given_to(latest))
            .order_by(*(latest.c[name].desc() for name in ("issued_at", *WAY)), issuances.c.ordinal)
        )
        page: list[tuple[Cursor, Record]] = []
        last: Cursor | None = None
        for head, group in groupby(rows, key=itemgetter(slice(len(_TOLD)))):
            way, quantity, rule = Way(*head[:4]), head[4], _rule(*head[11:])
            payload, api, distributor, client, name, issued_at = head[5:11]
            last = (issued_at, *way[1:])
            given = tuple(Code(*row[len(_TOLD) :]) for row in group if row[-1] is not None)
            if len(given) < quantity:
                where = [requests.c[part] == value for part, value in zip(WAY, way, strict=True)]
                ((_, whole),) = await _told(conn, select(requests).where(*where), 1)
                given = tuple(one.code for one in whole)
            if len(given) == quantity:
                page.append((last, Record(payload, api, distributor, client, name, issued_at, rule, given)))
        if page or last is None:
            return page
        before = last


async def last_seq(conn: AsyncConnection, partition: int, generation: int) -> int:
    """The highest outbox sequence of this generation that was flushed, 0 if none was; of RECREATED, the last that
    something without an outbox entry of its own was written under, which is so while the partition is locked."""
    last = 0
    for table in (requests, set_asides, incidents):
        of_it = (table.c.partition == partition) & (table.c.generation == generation)
        last = max(last, int(await conn.scalar(select(func.max(table.c.outbox_seq)).where(of_it)) or 0))
    return last


async def issued_by_pool(conn: AsyncConnection, since: int) -> dict[str, int]:
    """Per pool, the codes issued at ``since`` (Unix seconds) or later; pools without any are left out."""
    given = select(requests.c.pool, func.sum(requests.c.quantity)).where(requests.c.issued_at >= since)
    return {pool: int(codes) for pool, codes in await conn.execute(given.group_by(requests.c.pool))}


async def counts(conn: AsyncConnection, campaign: str, since: int) -> list[Count]:
    """How many codes ``campaign`` gave to whom at ``since`` (Unix seconds; 0: ever) or later.

    By what clients were told: a code that was wrongly given twice counts twice.
    """
    rows = await conn.execute(
        select(requests.c.distributor, requests.c.terminal, func.sum(requests.c.quantity))
        .where(requests.c.campaign == campaign, requests.c.issued_at >= since)
        .group_by(requests.c.distributor, requests.c.terminal)
        .order_by(requests.c.distributor, requests.c.terminal)
    )
    return [Count(distributor, terminal, int(total)) for distributor, terminal, total in rows]


async def find(
    conn: AsyncConnection,
    *,
    request_id: str | None = None,
    code: str | None = None,
    voucher_id: bytes | None = None,
    distributor: str | None = None,
    trace_id: str | None = None,
    limit: int = 100,
) -> list[Found]:
    """At most ``limit`` issued codes that fit all that is given, the latest first.

    ``request_id``: what the client's request was called, or what answers to it were.
    """
    wanted = select(requests)
    if request_id is not None:
        wanted = wanted.where(await _called(conn, request_id))
    if trace_id is not None:
        wanted = wanted.where(requests.c.trace_id == trace_id, requests.c.trace_id != "")  # so that the index serves
    if distributor is not None:
        wanted = wanted.where(requests.c.distributor == distributor)
    if code is not None:
        issued = select(*_way_columns(issuances)).where(issuances.c.digest == digest(code))
        doubled = (
            select(*_way_columns(incidents))
            .join(codes, _same_stock(codes, incidents))
            .where(codes.c.digest == digest(code), incidents.c.kind == DOUBLE_ISSUE)
        )
        holders = [way_of(row) for query in (issued, doubled) for row in await conn.execute(query)]
        if not holders:
            return []
        wanted = wanted.where(or_(*(_covers(way) for way in holders)))
    if voucher_id is not None:
        known = await conn.execute(select(*_way_columns(issuances)).where(issuances.c.voucher_id == voucher_id))
        ways = [way_of(row) for row in known]
        if not ways:
            return []
        wanted = wanted.where(or_(*(_covers(way) for way in ways)))
    return [
        _found(row, one)
        for row, given in await _told(conn, wanted, limit)
        for one in given
        if (code is None or one.code.code == code) and (voucher_id is None or one.voucher_id == voucher_id)
    ][:limit]


async def _called(conn: AsyncConnection, request_id: str) -> ColumnElement[bool]:
    if is_uuid(request_id):
        answered = requests.c.answer_id == UUID(request_id).bytes
        if (await conn.execute(select(requests.c.key).where(answered).limit(1))).first() is not None:
            return answered
    return requests.c.key == request_id


async def earliest_first(conn: AsyncConnection, wanted: Wanted) -> AsyncIterator[list[Found]]:
    """All codes that are ``wanted``, in pages, by the second they were issued in and then by their way through the
    outbox: the same codes come in the same order whenever they are read.

    Reads one result as it goes along, so memory does not grow with the ledger; the caller's transaction is the
    snapshot.
    """
    position = [requests.c[name] for name in ("issued_at", *WAY)]
    columns = [literal(False) if name == "double" else _FOUND_FROM[name] for name in Found.__struct_fields__]
    query: Select[Any] = (
        select(*columns, requests.c.ordinal.label("first"))
        .outerjoin_from(requests, issuances, _given_to(requests))
        .where(requests.c.issued_at >= wanted.since)
        .order_by(*position, issuances.c.ordinal)
    )
    if wanted.until:
        query = query.where(requests.c.issued_at < wanted.until)
    if wanted.campaign is not None:
        query = query.where(requests.c.campaign == wanted.campaign)
    if wanted.distributor is not None:
        query = query.where(requests.c.distributor == wanted.distributor)
    async with conn.stream(query) as rows:
        request: list[Any] = []  # rows of the request that is being read
        async for some in rows.partitions(PAGE_CODES):
            page: list[Found] = []
            for row in some:
                if request and (row[:3] != request[0][:3] or row[-1] != request[0][-1]):
                    page += await _whole(conn, request)
                    request = []
                request.append(row)
            yield page
        if request:
            yield await _whole(conn, request)


async def _whole(conn: AsyncConnection, rows: Sequence[Any]) -> list[Found]:
    """The codes of one request, from its rows of ``earliest_first``."""
    found = [Found(*row[:-1]) for row in rows if row.ordinal is not None]
    first = rows[0]
    if len(found) == first.quantity:
        return found
    template = Found(*first[:-1])
    for one in await _doubled(
        conn, Way(first.partition, first.generation, first.outbox_seq, first.first), first.quantity
    ):
        code = msgspec.structs.asdict(one.code)
        found.append(msgspec.structs.replace(template, ordinal=one.ordinal, double=True, voucher_id=None, **code))
    return sorted(found, key=lambda one: one.ordinal)


# Where each field of Found comes from; the rest are the request's, under their own names.
_FOUND_FROM: Final = {
    **{name: requests.c[name] for name in Found.__struct_fields__ if name in requests.c},
    "request_id": requests.c.key,
    **{name: issuances.c[name] for name in ("ordinal", "lot", "seq", "code", "serial", "expires_at", "voucher_id")},
}


# What a record needs of its request, in the order in which `newest_first` takes it apart.
_TOLD: Final = [
    requests.c[name]
    for name in (
        *WAY, "quantity", "payload", "api", "distributor", "client", "key", "issued_at",
        "campaign", "pool", "category", "product", "until", "id_key", "terms",
    )
]  # fmt: skip


@lru_cache(maxsize=1_024)  # few rules make all records of a day
def _rule(*fields: Any) -> Rule:
    return Rule(*fields)


class _Given(NamedTuple):
    """One code that a request was given, and where it stands in its entry."""

    ordinal: int
    code: Code
    double: bool
    voucher_id: bytes | None = None


async def _told(
    conn: AsyncConnection, wanted: Select[Any], limit: int | None = None
) -> list[tuple[Row[Any], list[_Given]]]:
    """The latest ``limit`` of the wanted requests, the latest first, each with its codes as far as they are known."""
    latest = [requests.c[name].desc() for name in ("issued_at", *WAY)]
    page = wanted.order_by(*latest).limit(limit).subquery()
    given_columns = [issuances.c[name].label(f"given_{name}") for name in (*_GIVEN, "voucher_id")]
    rows = await conn.execute(
        select(page, *given_columns)
        .outerjoin_from(page, issuances, _given_to(page))
        .order_by(*(page.c[name].desc() for name in ("issued_at", *WAY)), issuances.c.ordinal)
    )
    told: list[tuple[Row[Any], list[_Given]]] = []
    for _, group in groupby(rows, key=way_of):
        some = list(group)
        given = [
            _Given(
                row.given_ordinal,
                Code(*(row._mapping[f"given_{name}"] for name in _GIVEN[1:])),
                double=False,
                voucher_id=row.given_voucher_id,
            )
            for row in some
            if row.given_ordinal is not None
        ]
        if len(given) < some[0].quantity:
            doubled = await _doubled(conn, way_of(some[0]), some[0].quantity)
            given = sorted([*given, *doubled], key=lambda one: one.ordinal)
        told.append((some[0], given))
    return told


_GIVEN: Final = ("ordinal", "expires_at", "lot", "seq", "code", "serial")  # after the first: a Code, in its order


async def _doubled(conn: AsyncConnection, way: Way, quantity: int) -> list[_Given]:
    """Codes that the request was given although another had them: it has no issuance, but stock knows the code."""
    rows = await conn.execute(
        select(incidents.c.ordinal, lots.c.expires_at, codes.c.lot, codes.c.seq, codes.c.code, codes.c.serial)
        .join(codes, _same_stock(codes, incidents))
        .join(lots, lots.c.id == codes.c.lot)
        .where(
            *(incidents.c[name] == value for name, value in zip(WAY[:3], way[:3], strict=True)),
            incidents.c.ordinal.between(way.ordinal, way.ordinal + quantity - 1),
            incidents.c.kind == DOUBLE_ISSUE,
        )
    )
    return [_Given(ordinal, Code(*code), double=True) for ordinal, *code in rows]


def _record(row: Row[Any], given: Sequence[_Given]) -> Record:
    return Record(
        payload=row.payload,
        api=row.api,
        distributor=row.distributor,
        client=row.client,
        key=row.key,
        issued_at=row.issued_at,
        rule=Rule(row.campaign, row.pool, row.category, row.product, row.until, row.id_key, row.terms),
        codes=tuple(one.code for one in given),
    )


def _found(row: Row[Any], one: _Given) -> Found:
    request = {name: row._mapping[name] for name in Found.__struct_fields__ if name in requests.c and name != "ordinal"}
    code = {name: getattr(one.code, name) for name in ("lot", "seq", "code", "serial", "expires_at")}
    place: dict[str, Any] = {"ordinal": one.ordinal, "double": one.double, "voucher_id": one.voucher_id}
    return Found(request_id=row.key, **place, **request, **code)


def _way_columns(table: Table) -> list[ColumnElement[int]]:
    return [table.c[name] for name in WAY]


def _at(table: Table, way: Way) -> ColumnElement[bool]:
    return and_(*(table.c[name] == value for name, value in zip(WAY, way, strict=True)))


def _covers(way: Way) -> ColumnElement[bool]:
    """The request to which the code at ``way`` was given."""
    return and_(
        *(requests.c[name] == value for name, value in zip(WAY[:3], way[:3], strict=True)),
        requests.c.ordinal <= way.ordinal,
        requests.c.ordinal + requests.c.quantity > way.ordinal,
    )


def _given_to(wanted: FromClause) -> ColumnElement[bool]:
    """The codes of the requests.  Named by position, so that both databases go through the issuances' primary key."""
    return and_(
        *(issuances.c[name] == wanted.c[name] for name in WAY[:3]),
        issuances.c.ordinal >= wanted.c.ordinal,
        issuances.c.ordinal < wanted.c.ordinal + wanted.c.quantity,
        issuances.c.request_ordinal == wanted.c.ordinal,
    )


def _same_stock(one: Table, other: Table) -> ColumnElement[bool]:
    return and_(one.c.lot == other.c.lot, one.c.seq == other.c.seq)
