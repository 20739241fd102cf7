"""What a store that came back older is given back, by what Redis still knows (design 4).

Requests are written again by their replay records.  Stock is moved ahead: whatever may have been in a window, by any
trace of it, is leased for good to a generation that was left, so nothing of it is ever leased again.  What of that is
in no ledger is in quarantine; a position whose code nobody knows any more is withdrawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import msgspec
from sqlalchemy import delete, func, insert, literal, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code, Record
from service.identity import NO_KEYS, IdKeys
from service.store import generations, ledger, stock
from service.store.database import Database, chunks, insert_records
from service.store.entries import Entry, unfit
from service.store.flush import RECREATED, STORE_OLDER, is_request_of, raise_incident, write_unknown
from service.store.schema import (
    audit_log,
    catalogue_versions,
    codes,
    imports,
    incidents,
    issuances,
    leases,
    lots,
    pools,
    requests,
    set_asides,
    withdrawn,
)
from service.store.stock import digest

# An expiry for a lot of which nothing but its number is known: long past, so nothing is ever leased from it.
LONG_PAST: Final = 0


class Extent(msgspec.Struct, frozen=True):
    """Positions ``[0, end)`` of a lot may have been in a window.  ``pool`` '': nobody knows."""

    pool: str
    expires_at: int
    end: int


class Moved(msgspec.Struct, frozen=True):
    """``[seq_from, seq_to)`` of a lot were in stock or unknown, and are leased now: ``codes`` with a known code, and
    ``unknown`` positions.  ``traces``: Redis or the ledger name one of them; otherwise they were only next in line."""

    pool: str
    lot: int
    seq_from: int
    seq_to: int
    codes: int
    unknown: int
    traces: bool


# --- the ledger ----------------------------------------------------------------------------------------------------


async def lacking(conn: AsyncConnection, records: Iterable[Record]) -> list[Record]:
    """Those of the replay ``records`` whose request the ledger does not have, each once."""
    first = {(record.codes[0].lot, record.codes[0].seq): record for record in records}
    for positions in chunks(sorted(first)):
        known = (
            select(issuances.c.lot, issuances.c.seq, requests.c.client, requests.c.api, requests.c.key)
            .join(requests, is_request_of(issuances))
            .where(stock.at(issuances, positions))
        )
        for lot, seq, *whose in await conn.execute(known):
            record = first[lot, seq]
            if whose == [record.client, record.api, record.key]:
                del first[lot, seq]
    return list(first.values())


async def recreate(
    database: Database, partition: int, records: Sequence[Record], now: int, *, ids: IdKeys = NO_KEYS
) -> tuple[int, int]:
    """The ledger has the requests of these replay records; how many were written now, and how many no row can hold.

    If the outbox entry of one comes after all, it takes the place.  A code that another request has is an incident, as
    in a flush.  Raises StoreUnreachable: then none was written.  Raises UnknownIdKey.
    """
    fit = [record for record in records if record.codes and unfit(_entry(partition, 1, record)) is None]
    async with database.read() as conn:
        fit_and_new = await lacking(conn, fit)
    if fit_and_new:
        async with database.write() as conn:
            await generations.lock(conn, partition, exclusive=True)  # no flush writes one of them in between
            fit_and_new = await lacking(conn, fit_and_new)
            seq = await ledger.last_seq(conn, partition, RECREATED)
            entries = [_entry(partition, seq + n, record) for n, record in enumerate(fit_and_new, 1)]
            await write_unknown(conn, entries, now, ids)
    return len(fit_and_new), len(records) - len(fit)


def _entry(partition: int, seq: int, record: Record) -> Entry:
    return Entry(partition, RECREATED, seq, f"recreated-{seq}", (record,), ())


# --- stock ---------------------------------------------------------------------------------------------------------


async def advance(
    conn: AsyncConnection,
    partition: int,
    generation: int,
    *,
    windows: Mapping[str, Sequence[Code]],
    extents: Mapping[int, Extent],
    whole_pools: Iterable[str],
    unnamed: Iterable[str],
    restocked: int,
    now: int,
) -> list[Moved]:
    """Nothing that may have left stock is in stock.

    By the codes in ``windows`` (of whatever generation, by pool), by ``extents`` (by lot) and by the ledger: all of a
    lot up to the highest position that is named, and what expires before it in its pool, which was leased before.
    All stock of ``whole_pools`` that are not among these.  Every lease is of ``generation``.

    Codes that were set aside may be named nowhere any more.  Of the pools in ``unnamed`` as many more as there can be
    are passed over, from the head of their stock: those of ``restocked``, the codes that came to windows of this
    generation, that the store has no lease for.
    """
    leased = select(func.sum(leases.c.codes)).where(leases.c.partition == partition, leases.c.generation == generation)
    known = int(await conn.scalar(leased) or 0)
    ends = await _ends(conn, windows, extents)
    in_windows: dict[int, list[tuple[str, Code]]] = {}
    for pool, held in windows.items():
        for code in held:
            in_windows.setdefault(code.lot, []).append((pool, code))
    moved: list[Moved] = []
    last_expiry: dict[str, int] = {}
    for lot in sorted(ends):
        one = await _move(conn, partition, generation, lot, ends[lot], in_windows.get(lot, ()), now)
        if one is not None:
            moved.append(one)
            last_expiry[one.pool] = max(last_expiry.get(one.pool, 0), await _expiry(conn, lot))
    left = restocked - known - sum(one.codes for one in moved)
    for pool, expires_at in last_expiry.items():
        moved += await _pass_over(conn, partition, generation, pool, None, lots.c.expires_at < expires_at, now)
    for pool in sorted(whole_pools):
        if pool not in last_expiry:
            moved += await _pass_over(conn, partition, generation, pool, None, lots.c.id > 0, now)
    for pool in sorted(unnamed) if left > 0 else ():
        least_life = await conn.scalar(select(pools.c.least_life_s).where(pools.c.id == pool)) or 0
        over = now + least_life  # what can't be leased any more costs nothing, and may have been leased before
        moved += await _pass_over(conn, partition, generation, pool, None, lots.c.expires_at <= over, now)
        moved += await _pass_over(conn, partition, generation, pool, left, lots.c.expires_at > over, now)
    if moved and conn.dialect.name == "postgresql":  # lots were made under numbers that its sequence never gave
        await conn.execute(text("select setval(pg_get_serial_sequence('lots', 'id'), (select max(id) from lots))"))
    return moved


async def _ends(
    conn: AsyncConnection, windows: Mapping[str, Sequence[Code]], extents: Mapping[int, Extent]
) -> dict[int, Extent]:
    """How far each lot of which anything is named beyond its leases is known to have gone."""
    ends: dict[int, Extent] = {}

    def reach(lot: int, pool: str, expires_at: int, end: int) -> None:
        had = ends.get(lot, Extent(pool, expires_at, 0))
        ends[lot] = Extent(had.pool or pool, had.expires_at or expires_at, max(had.end, end))

    for lot, extent in extents.items():
        reach(lot, extent.pool, extent.expires_at, extent.end)
    for pool, held in windows.items():
        for code in held:
            reach(code.lot, pool, code.expires_at, code.seq + 1)
    for table, pool_of, expiry in (
        (issuances, func.max(requests.c.pool), func.max(issuances.c.expires_at)),
        (set_asides, literal(""), literal(LONG_PAST)),
    ):
        named = select(table.c.lot, pool_of, expiry, func.max(table.c.seq) + 1).select_from(table)
        if table is issuances:
            named = named.join(requests, is_request_of(issuances))
        named = named.outerjoin(lots, lots.c.id == table.c.lot)
        beyond = named.where(or_(lots.c.id.is_(None), table.c.seq >= lots.c.leased_to)).group_by(table.c.lot)
        for lot, pool, expires_at, end in await conn.execute(beyond):
            reach(lot, pool, expires_at, end)
    return ends


async def _move(
    conn: AsyncConnection,
    partition: int,
    generation: int,
    lot: int,
    extent: Extent,
    in_window: Sequence[tuple[str, Code]],
    now: int,
) -> Moved | None:
    """The lot's cursors are at the extent's end or beyond, and every position before it is accounted for."""
    row = await _lot(conn, lot, extent)
    if row is None or extent.end <= row.leased_to:
        return None
    begin, end, pool = int(row.leased_to), extent.end, str(row.pool)
    here = (codes.c.lot == lot, codes.c.seq >= begin, codes.c.seq < end)
    given = (issuances.c.lot == lot, issuances.c.seq >= begin, issuances.c.seq < end)
    issued = [
        (lot, seq, pool, code, serial, mark)
        for seq, code, serial, mark in await conn.execute(
            select(issuances.c.seq, issuances.c.code, issuances.c.serial, issuances.c.digest).where(*given)
        )
    ]
    held = [
        (lot, code.seq, pool, code.code, code.serial, digest(code.code))
        for _, code in in_window
        if begin <= code.seq < end
    ]
    await _put_codes(conn, here, {one[1]: one for one in (*held, *issued)})
    put_aside = select(set_asides.c.seq).where(
        set_asides.c.lot == lot, set_asides.c.seq >= begin, set_asides.c.seq < end
    )
    accounted = {one[1] for one in issued} | set(await conn.scalars(put_aside))
    coded = set(await conn.scalars(select(codes.c.seq).where(*here)))
    unknown = set(range(begin, end)) - coded - accounted
    taken = await _withdraw(conn, lot, begin, end, unknown, accounted | {one[1] for one in held}, now)
    imported = max(int(row.imported), end)
    await conn.execute(update(lots).where(lots.c.id == lot).values(leased_to=end, imported=imported))
    if imported > row.imported:
        added = imported - int(row.imported)
        await conn.execute(
            insert(imports),
            {
                "id": f"recreated-{lot}-{row.imported}", "pool": pool, "lines_done": added, "inserted": added,
                "refused": 0, "started_at": now, "finished_at": now, "content": "",
            },
        )  # fmt: skip
    left = end - begin - len(taken)
    await _lease(conn, partition, generation, pool, lot, begin, end, left, now)
    return Moved(pool, lot, begin, end, end - begin - len(unknown), len(unknown), traces=True)


async def _pass_over(
    conn: AsyncConnection, partition: int, generation: int, pool: str, count: int | None, where: Any, now: int
) -> list[Moved]:
    """The next ``count`` codes of the pool in these lots, all of them for None, are leased, in the order of leasing."""
    moved = []
    in_stock = select(lots).where(lots.c.pool == pool, lots.c.leased_to < lots.c.imported, where)
    for row in (await conn.execute(in_stock.order_by(lots.c.expires_at))).all():
        if count is not None and count <= 0:
            break
        wanted = row.imported - row.leased_to if count is None else count
        end, left = await stock.stretch(conn, row, wanted)
        await conn.execute(update(lots).where(lots.c.id == row.id).values(leased_to=end))
        await _lease(conn, partition, generation, pool, row.id, row.leased_to, end, left, now)
        moved.append(Moved(pool, row.id, row.leased_to, end, left, 0, traces=False))
        if count is not None:
            count -= left
    return moved


async def _lease(
    conn: AsyncConnection,
    partition: int,
    generation: int,
    pool: str,
    lot: int,
    seq_from: int,
    seq_to: int,
    count: int,
    now: int,
) -> None:
    if not count:
        return
    end = (await stock.chain_ends(conn, partition, generation)).get(pool)
    row = {
        "id": f"r{generation}.{lot}.{seq_from}", "predecessor": end.id if end is not None else "",
        "partition": partition, "generation": generation, "pool": pool, "lot": lot, "seq_from": seq_from,
        "seq_to": seq_to, "codes": count, "leased_at": now,
    }  # fmt: skip
    await conn.execute(insert(leases), row)


async def _lot(conn: AsyncConnection, lot: int, extent: Extent) -> Any:
    """The row of the lot, made if there is none; None if there is no pool that it could belong to."""
    wanted = select(lots).where(lots.c.id == lot)
    row = (await conn.execute(wanted)).first()
    if row is not None:
        return row
    pool, expires_at = extent.pool, extent.expires_at
    known = select(pools.c.id).order_by(pools.c.id)
    if pool:
        known = known.where(pools.c.id == pool)
    # Nothing is ever leased from it again, so any pool will do: it keeps the number from being given once more.
    found = await conn.scalar(known)
    if found is None:
        return None
    pool = str(found)
    taken = set(await conn.scalars(select(lots.c.expires_at).where(lots.c.pool == pool)))
    while expires_at in taken:  # the store made a lot for this expiry under another number, after it came back
        expires_at -= 1
    await conn.execute(insert(lots), {"id": lot, "pool": pool, "expires_at": expires_at, "imported": 0, "leased_to": 0})
    return (await conn.execute(wanted)).one()


async def _expiry(conn: AsyncConnection, lot: int) -> int:
    return int(await conn.scalar(select(lots.c.expires_at).where(lots.c.id == lot)) or 0)


async def _put_codes(conn: AsyncConnection, here: Sequence[Any], named: Mapping[int, tuple[Any, ...]]) -> None:
    """The codes ``named`` by their positions stand there, as far as none of them is in stock elsewhere."""
    there = {row.seq: row.digest for row in await conn.execute(select(codes.c.seq, codes.c.digest).where(*here))}
    # Another code at a position that was given away before was imported after the store came back older.
    displaced = [seq for seq, one in named.items() if there.get(seq, one[5]) != one[5]]
    for some in chunks(displaced):
        await conn.execute(delete(codes).where(*here, codes.c.seq.in_(some)))
    missing = [one for seq, one in named.items() if there.get(seq) != one[5]]
    for part in chunks(missing):
        known = set(await conn.scalars(select(codes.c.digest).where(codes.c.digest.in_([one[5] for one in part]))))
        used = select(codes.c.serial).where(codes.c.pool == part[0][2], codes.c.serial.in_([one[4] for one in part]))
        serials = set(await conn.scalars(used))
        rows = [one for one in part if one[5] not in known and one[4] not in serials]
        await insert_records(conn, codes, ("lot", "seq", "pool", "code", "serial", "digest"), rows)


async def _withdraw(
    conn: AsyncConnection, lot: int, begin: int, end: int, unknown: set[int], elsewhere: set[int], now: int
) -> set[int]:
    """Of ``[begin, end)`` the ``unknown`` positions are withdrawn too, and those that are ``elsewhere`` are not; all
    that are then."""
    stretches = (
        await conn.execute(
            select(withdrawn).where(withdrawn.c.lot == lot, withdrawn.c.seq_to > begin, withdrawn.c.seq_from < end)
        )
    ).all()
    before = {seq for row in stretches for seq in range(max(row.seq_from, begin), min(row.seq_to, end))}
    after = (before - elsewhere) | unknown
    if stretches or after:
        for row in stretches:
            await conn.execute(delete(withdrawn).where(withdrawn.c.lot == lot, withdrawn.c.seq_from == row.seq_from))
        rows = [(first, last + 1, now) for first, last in _runs(sorted(after))]
        rows += [(end, row.seq_to, row.withdrawn_at) for row in stretches if row.seq_to > end]
        for seq_from, seq_to, at in rows:
            await conn.execute(
                insert(withdrawn), {"lot": lot, "seq_from": seq_from, "seq_to": seq_to, "withdrawn_at": at}
            )
    return after


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        some = [number for _, number in run]
        runs.append((some[0], some[-1]))
    return runs


# --- what remains ----------------------------------------------------------------------------------------------------


async def knows_until(conn: AsyncConnection) -> int:
    """The newest moment of which the store has a trace that Redis has no part in; Unix seconds, 0 if none."""
    traces = (audit_log.c.at, catalogue_versions.c.published_at, imports.c.started_at, leases.c.leased_at)
    return max([int(await conn.scalar(select(func.max(column))) or 0) for column in traces])


async def note_repair(conn: AsyncConnection, partition: int, generation: int, detail: str, now: int) -> None:
    """It is on record that the store was repaired by what Redis had while this generation was open: what that says of
    the store holds no more."""
    if not await was_repaired(conn, partition, generation):
        await raise_incident(
            conn, kind=STORE_OLDER, partition=partition, generation=generation, subject="store", detail=detail, now=now
        )


async def was_repaired(conn: AsyncConnection, partition: int, generation: int) -> bool:
    """Whether ``note_repair`` was called for this generation."""
    noted = select(incidents.c.id).where(
        incidents.c.kind == STORE_OLDER, incidents.c.partition == partition, incidents.c.generation == generation
    )
    return (await conn.execute(noted.limit(1))).first() is not None


async def close_all(conn: AsyncConnection, partition: int, numbers: Iterable[int], reason: str, now: int) -> None:
    """No generation up to the highest of ``numbers`` is open any more, and none of them is ever given again."""
    await generations.lock(conn, partition, exclusive=True)
    for number in sorted(set(numbers)):
        if await generations.state(conn, partition, number) is None:
            await generations.put_closed(conn, partition, number, reason, now)
    for number in await generations.unclosed(conn, partition):
        await generations.close(conn, partition, number, now)


async def raise_stock_versions(conn: AsyncConnection, known: Mapping[str, int]) -> None:
    """Every pool's stock version is above the one that Redis has."""
    for pool, version in sorted(known.items()):
        await conn.execute(
            update(pools).where(pools.c.id == pool, pools.c.stock_version <= version).values(stock_version=version + 1)
        )
