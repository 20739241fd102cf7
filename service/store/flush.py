"""The durable end of the hot path: outbox entries go into the ledger.

A position ``(partition, generation, outbox_seq, ordinal)`` is written once.  Two walls stand behind it, and nothing
here steps around them: one position of stock ``(lot, seq)`` and one code (its digest) have at most one issuance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import (
    ColumnElement,
    Row,
    Table,
    and_,
    delete,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import LedgerLacks, StoreUnreachable
from service.identity import NO_KEYS, IdKeys
from service.store import generations, stock
from service.store.database import Database, chunks, insert_records
from service.store.entries import (
    AsideRow,
    Entry,
    IssuanceRow,
    RequestRow,
    Rows,
    Way,
    rows_of,
    unfit,
    way_of,
)
from service.store.schema import (
    TAKEN_BACK,
    WAY,
    WITHDRAWN,
    campaigns,
    incidents,
    issuances,
    parked,
    requests,
    set_asides,
)

DOUBLE_ISSUE: Final = "double_issue"
CONFLICTING_ENTRY: Final = "conflicting_entry"
STORE_OLDER: Final = "store_older"  # the store came back older, and was repaired
QUARANTINE: Final = "quarantine"  # a generation was left with codes of a pool that are accounted for nowhere

# Generation of requests that a store which came back older has again, by their replay records: which outbox entry they
# once came by, nobody knows (``recreation``).  No partition ever has a generation 0.
RECREATED: Final = 0

# API of requests that are in the ledger by a partner's word alone (``adoption``): nobody knows by which API it was
# told, at which terminal, nor the answer.  So no replay is ever made of one, and no lookup by a real API finds it.
ADOPTED: Final = "adopted"

# A round is lost only to another worker that commits some of the same rows meanwhile, and what it committed is seen
# by the next round.  Two rounds are enough; the rest is for what nobody thought of.
ROUNDS_MAX: Final = 5

# Sequences closer than this are looked up as one range: reading some known rows is cheaper than a statement.
RANGE_GAP: Final = 1_000


class Flushed(msgspec.Struct, frozen=True):
    """What a flush did, in codes: ``issued`` and ``set_aside`` are new in the ledger, ``already`` were accounted for
    before, ``parked`` came in entries that no row can hold.  ``incidents`` are those that this flush raised.

    ``paused``: campaigns that this flush, or an earlier one of the same entries, paused in the store and that still
    are.  Publish before acknowledging the entries: then a crash in between can't leave the pause unpublished.
    """

    issued: int = 0
    set_aside: int = 0
    already: int = 0
    incidents: int = 0
    parked: int = 0
    paused: tuple[str, ...] = ()


async def flush(
    database: Database, entries: Sequence[Entry], now: int, *, before: Collection[int] = (), ids: IdKeys = NO_KEYS
) -> Flushed:
    """Every code of ``entries`` is accounted for, durably and once, however often they are flushed and by whom.

    One transaction that shares the partitions' locks.  An entry whose ``outbox_seq`` is new goes into the ledger.
    One that is known is compared: what differs raises ``conflicting_entry`` and leaves the ledger as it is.  A code
    that was issued or set aside before, by whatever entry, raises ``double_issue`` in place of its second row, and
    the campaigns that issued it are paused in the store; its request is in the ledger all the same, so that a replay
    finds it.  An entry that no row can hold is parked.  There is one incident a position: a repeat raises none.

    ``before``: outbox sequences of these entries' generation that were committed before this call.  Raises
    LedgerLacks, and nothing was committed, if the ledger lacks one: rows written now could hide that it is older.

    ``ids``: what the ids of their vouchers are derived with.  Raises UnknownIdKey, and nothing was committed, if an
    entry needs a key that is not there.

    Raises StoreUnreachable: all of it was committed or nothing; flush the same entries again.
    """
    if not entries:
        return Flushed()
    reasons = [unfit(entry) for entry in entries]
    fit = sorted((entry for entry, reason in zip(entries, reasons, strict=True) if reason is None), key=_position)
    set_away = 0
    async with database.write() as conn:
        for partition in sorted({entry.partition for entry in fit}):
            await generations.lock(conn, partition, exclusive=False)
        if lost := await lacking(conn, *entries[0].position[:2], before):
            raise LedgerLacks(lost[0])
        for entry, reason in zip(entries, reasons, strict=True):
            if reason is not None:
                partition, generation, _ = entry.position
                await park(conn, partition, generation, entry.entry_id, entry.codes, reason, entry.content(), now)
                set_away += entry.codes
        written, again = await write_unknown(conn, fit, now, ids)
        compared = await _compare(conn, again, now, ids)
        return Flushed(
            issued=written.issued,
            set_aside=written.set_aside,
            already=compared.already,
            incidents=written.incidents + compared.incidents,
            parked=set_away,
            paused=await _still_paused(conn, written.campaigns | compared.campaigns),
        )


async def lacking(conn: AsyncConnection, partition: int, generation: int, seqs: Collection[int]) -> list[int]:
    """Those of ``seqs``, some dozen outbox sequences, of which the ledger has no row."""
    known: set[int] = set()
    for table in (requests, set_asides, incidents) if seqs else ():
        there = select(table.c.outbox_seq).where(
            table.c.partition == partition, table.c.generation == generation, table.c.outbox_seq.in_(seqs)
        )
        known.update(await conn.scalars(there))
    return sorted(set(seqs) - known)


async def park(
    conn: AsyncConnection,
    partition: int,
    generation: int,
    entry_id: str,
    codes: int,
    reason: str,
    content: bytes,
    now: int,
) -> None:
    """The outbox entry ``entry_id`` is kept as it came, out of everybody's way.  Parking it again changes nothing.

    ``codes``: how many it said it held, 0 if it did not say.  ``reason`` must not hold a code.
    """
    row = {
        "partition": partition, "generation": generation, "entry_id": entry_id,
        "codes": codes, "reason": reason, "content": content, "parked_at": now,
    }  # fmt: skip
    await conn.execute(_insert_once(conn, parked, ("partition", "generation", "entry_id")), row)


async def raise_incident(
    conn: AsyncConnection,
    *,
    kind: str,
    partition: int,
    generation: int,
    subject: str,
    detail: str,
    now: int,
    outbox_seq: int | None = None,
    ordinal: int | None = None,
    codes: int = 0,
    lot: int | None = None,
    seq: int | None = None,
) -> bool:
    """The incident is on record; False if there already was one at this position of the outbox.

    ``subject``: campaign or pool.  ``codes``: how many codes that left a window are accounted for by this incident
    alone.  ``detail`` must not hold a code.
    """
    row = {
        "kind": kind, "partition": partition, "generation": generation, "outbox_seq": outbox_seq, "ordinal": ordinal,
        "codes": codes, "lot": lot, "seq": seq, "subject": subject, "detail": detail, "raised_at": now,
    }  # fmt: skip
    return bool((await conn.execute(_insert_once(conn, incidents, WAY), row)).rowcount)


# --- writing what was never seen ---------------------------------------------------------------------------------


class Written(NamedTuple):
    issued: int
    set_aside: int
    incidents: int
    campaigns: set[str]


class _RaceLostError(Exception):
    """Someone else committed some of these rows meanwhile."""


async def write_unknown(
    conn: AsyncConnection, entries: Sequence[Entry], now: int, ids: IdKeys
) -> tuple[Written, list[Entry]]:
    """Writes the entries that the store does not know and returns the others, to be compared.

    The first round trusts that no code was given twice, as it always should be; only when a wall says otherwise are
    the culprits looked for, which costs as much again.
    """
    suspicious = False
    for _ in range(ROUNDS_MAX):
        known = await _known(conn, entries)
        unknown: list[Entry] = []
        again: list[Entry] = []
        for entry in entries:
            (again if entry.position in known else unknown).append(entry)
            known.add(entry.position)  # the same entry twice in one flush
        try:
            async with conn.begin_nested():
                return await _write(conn, rows_of(unknown, now, ids), now, suspicious), again
        except (IntegrityError, _RaceLostError):
            suspicious = True
    raise StoreUnreachable("the store was never still enough to flush: other workers flush the same entries")


async def _known(conn: AsyncConnection, entries: Sequence[Entry]) -> set[tuple[int, int, int]]:
    """Positions of entries of which any row is in the store."""
    known: set[tuple[int, int, int]] = set()
    for (partition, generation), group in groupby(entries, key=lambda entry: entry.position[:2]):
        for first, last in _ranges([entry.outbox_seq for entry in group]):
            for table in (requests, set_asides, incidents):  # an issuance has its request
                found = await conn.scalars(
                    select(table.c.outbox_seq)
                    .where(
                        table.c.partition == partition,
                        table.c.generation == generation,
                        table.c.outbox_seq.between(first, last),
                    )
                    .distinct()
                )
                known.update((partition, generation, seq) for seq in found)
    return known


async def _write(conn: AsyncConnection, rows: Rows, now: int, suspicious: bool) -> Written:
    if not (rows.requests or rows.asides):
        return Written(0, 0, 0, set())
    doubles: dict[Way, _Double] = {}
    if suspicious or await _crosses(conn, rows):
        await _take_their_places(conn, rows)
        doubles = await _doubles(conn, rows)
    kept = [row for row in rows.issuances if row[:4] not in doubles]
    put_aside = [row for row in rows.asides if row[:4] not in doubles]
    raised = [double.incident(way, now) for way, double in doubles.items()]
    for table, some in ((requests, rows.requests), (issuances, kept), (set_asides, put_aside), (incidents, raised)):
        await insert_records(conn, table, _INSERTED[table], some)
    involved = {campaign for double in doubles.values() for campaign in double.campaigns}
    for some_campaigns in chunks(sorted(involved)):
        await conn.execute(
            update(campaigns)
            .where(campaigns.c.id.in_(some_campaigns), campaigns.c.paused.is_(False))
            .values(paused=True)
        )
    return Written(len(kept), len(put_aside), len(raised), involved)


async def _crosses(conn: AsyncConnection, rows: Rows) -> bool:
    """Whether a code is both issued and set aside, which no wall of the database sees.

    Two flushes at the same moment, one with each half, don't see each other here: ``books.double_codes`` does.
    """
    issued = {(row.lot, row.seq) for row in rows.issuances}
    aside = {(row.lot, row.seq) for row in rows.asides}
    if issued & aside:
        return True
    for some in chunks(sorted(aside)):
        if (await conn.execute(select(issuances.c.lot).where(stock.at(issuances, some)).limit(1))).first():
            return True
    by_lot = groupby(sorted(issued), key=lambda position: position[0])
    stretches = [(lot, seqs[0], seqs[-1]) for lot, seqs in ((lot, [seq for _, seq in some]) for lot, some in by_lot)]
    for part in chunks(stretches):
        found = await conn.execute(
            select(set_asides.c.lot, set_asides.c.seq).where(
                or_(*(and_(set_asides.c.lot == lot, set_asides.c.seq.between(a, b)) for lot, a, b in part))
            )
        )
        if not issued.isdisjoint(map(tuple, found)):
            return True
    return False


async def _take_their_places(conn: AsyncConnection, rows: Rows) -> None:
    """What stood in for these very requests is gone, for they have come after all.

    What was recreated stands in for an outbox entry with the same request, word for word.  What was adopted stands in
    for whatever says that the same distributor was issued the same code under the same key: nobody knew more of it.
    What was withdrawn while it was in quarantine stands in for whatever had become of it before; if that is a way back
    to stock, it ends here: ``rows`` say that it was withdrawn.  Anything else that has one of these codes stays, and is
    the one that had it first (``_doubles``).
    """
    everything: list[IssuanceRow | AsideRow] = [*rows.issuances, *rows.asides]
    withdrawn: set[tuple[int, int]] = set()
    for positions in chunks(sorted({(row.lot, row.seq) for row in everything})):
        sealed = and_(
            set_asides.c.generation == RECREATED, set_asides.c.why == WITHDRAWN, stock.at(set_asides, positions)
        )
        found = await conn.execute(select(set_asides.c.lot, set_asides.c.seq).where(sealed))
        withdrawn.update((lot, seq) for lot, seq in found)
        await conn.execute(delete(set_asides).where(sealed))
    for n, aside in enumerate(rows.asides):
        if aside.why == TAKEN_BACK and (aside.lot, aside.seq) in withdrawn:
            rows.asides[n] = aside._replace(why=WITHDRAWN)
    request_of = {row[:4]: row for row in rows.requests}
    coming = {(row.lot, row.seq): (row.digest, request_of[*row[:3], row.request_ordinal]) for row in rows.issuances}
    for positions in chunks(sorted(coming)):
        standing_in = await conn.execute(
            select(issuances.c.lot, issuances.c.seq, issuances.c.digest, requests)
            .join(requests, is_request_of(issuances))
            .where(issuances.c.generation == RECREATED, stock.at(issuances, positions))
        )
        for lot, seq, mark, *row in standing_in.all():
            held, (came_mark, came) = RequestRow(*row), coming[lot, seq]
            if held.api == ADOPTED:
                same = came.api != ADOPTED and (mark, *_whose(held)) == (came_mark, *_whose(came))
            else:
                same = came.generation != RECREATED and held.said[4:] == came.said[4:]
            if same:
                for table in (issuances, requests):
                    way = (table.c[name] == value for name, value in zip(WAY[:3], held[:3], strict=True))
                    await conn.execute(delete(table).where(*way))


def _whose(request: RequestRow) -> tuple[str, str]:
    return request.distributor, request.key


class _Holder(NamedTuple):
    """Who has a code: the row that was first.  Set aside: no digest, no campaign."""

    way: Way
    digest: bytes | None
    campaign: str | None

    def says(self) -> str:
        generation, outbox_seq, ordinal = self.way[1:]
        did = "set aside" if self.campaign is None else f"issued by campaign {self.campaign}"
        return f"{did} in generation {generation}, outbox sequence {outbox_seq}, ordinal {ordinal}"


class _Double(NamedTuple):
    """A code that someone has already.  ``trusted``: stock's ``(lot, seq)`` is this very code."""

    lot: int
    seq: int
    trusted: bool
    campaign: str | None
    holder: _Holder

    @property
    def campaigns(self) -> set[str]:
        return {campaign for campaign in (self.campaign, self.holder.campaign) if campaign is not None}

    def incident(self, way: Way, now: int) -> tuple[object, ...]:
        """A row of ``incidents``, its columns in their order."""
        did = "set aside" if self.campaign is None else "issued"
        detail = f"lot {self.lot}, seq {self.seq} was {did} here, but before it was {self.holder.says()}"
        lot, seq = (self.lot, self.seq) if self.trusted else (None, None)
        subject = self.campaign or self.holder.campaign or f"lot {self.lot}"
        return DOUBLE_ISSUE, *way, 1, lot, seq, subject, detail, now


async def _doubles(conn: AsyncConnection, rows: Rows) -> dict[Way, _Double]:
    """Which of these rows must not be written, because another row has the code: in the store, or before it here."""
    by_position: dict[tuple[int, int], _Holder] = {}
    by_digest: dict[bytes, _Holder] = {}

    def hold(position: tuple[int, int], holder: _Holder) -> None:
        by_position.setdefault(position, holder)
        if holder.digest is not None:
            by_digest.setdefault(holder.digest, holder)

    issued = select(issuances, requests.c.campaign).join(requests, is_request_of(issuances))
    everything: list[IssuanceRow | AsideRow] = [*rows.issuances, *rows.asides]
    for positions in chunks([(row.lot, row.seq) for row in everything]):
        for row in await conn.execute(issued.where(stock.at(issuances, positions))):
            hold((row.lot, row.seq), _Holder(way_of(row), row.digest, row.campaign))
        for row in await conn.execute(select(set_asides).where(stock.at(set_asides, positions))):
            hold((row.lot, row.seq), _Holder(way_of(row), None, None))
    for digests in chunks([row.digest for row in rows.issuances]):
        for row in await conn.execute(issued.where(issuances.c.digest.in_(digests))):
            hold((row.lot, row.seq), _Holder(way_of(row), row.digest, row.campaign))

    campaign_of = {row[:4]: row.campaign for row in rows.requests}
    doubles: dict[Way, _Double] = {}
    for came in sorted(everything, key=way_of):
        mark: bytes | None = None
        campaign: str | None = None
        if isinstance(came, IssuanceRow):
            mark, campaign = came.digest, campaign_of[*came[:3], came.request_ordinal]
        there = by_position.get((came.lot, came.seq))
        holder = there or (by_digest.get(mark) if mark is not None else None)
        if holder is None:
            hold((came.lot, came.seq), _Holder(way_of(came), mark, campaign))
        elif holder.way == way_of(came):
            raise _RaceLostError  # it is this very row, committed since the round began
        else:
            trusted = there is not None and (mark is None or there.digest in (None, mark))
            doubles[way_of(came)] = _Double(came.lot, came.seq, trusted, campaign, holder)
    return doubles


# --- comparing what is known ---------------------------------------------------------------------------------------


class _Compared(NamedTuple):
    already: int
    incidents: int
    campaigns: set[str]


async def _compare(conn: AsyncConnection, entries: Sequence[Entry], now: int, ids: IdKeys) -> _Compared:
    """Finds whether entries that came again say what they said the first time."""
    if not entries:
        return _Compared(0, 0, set())
    stored: dict[Table, dict[Way, Row[Any]]] = {}
    for table in (requests, issuances, set_asides, incidents):
        stored[table] = {}
        for (partition, generation), group in groupby(entries, key=lambda entry: entry.position[:2]):
            for seqs in chunks([entry.outbox_seq for entry in group]):
                found = await conn.execute(
                    select(table).where(
                        table.c.partition == partition,
                        table.c.generation == generation,
                        table.c.outbox_seq.in_(seqs),
                    )
                )
                stored[table].update((way_of(row), row) for row in found)

    already = 0
    conflicts: list[tuple[object, ...]] = []

    def differs(way: Way, codes: int, lot: int | None, seq: int | None, subject: str, detail: str) -> None:
        conflicts.append((CONFLICTING_ENTRY, *way, codes, lot, seq, subject, detail, now))

    came: set[Way] = set()
    for entry in entries:
        rows = rows_of([entry], now, ids)
        request_of = {way_of(row): row for row in rows.requests}
        for issuance in rows.issuances:
            way, holder = way_of(issuance), Way(*issuance[:3], issuance.request_ordinal)
            came.add(way)
            had = stored[issuances].get(way)
            same = had is not None and tuple(had) == issuance
            if way in stored[incidents] or (same and _same_request(stored[requests].get(holder), request_of[holder])):
                already += 1
            else:
                # The same code under another request left its window once, and its row accounts for it.
                new = had is None or (had.lot, had.seq) != (issuance.lot, issuance.seq)
                differs(way, int(new), issuance.lot, issuance.seq, request_of[holder].campaign, _OTHER_CONTENT)
        for aside in rows.asides:
            way = way_of(aside)
            came.add(way)
            had = stored[set_asides].get(way)
            if way in stored[incidents] or (had is not None and _same_aside(AsideRow._make(had), aside)):
                already += 1
            else:
                differs(way, 1, aside.lot, aside.seq, f"lot {aside.lot}", _OTHER_CONTENT)
    for table in (issuances, set_asides):
        for way in sorted(stored[table].keys() - came - stored[incidents].keys()):
            differs(way, 0, None, None, f"lot {stored[table][way].lot}", _WITHOUT_IT)

    raised = 0
    for conflict in sorted(conflicts, key=lambda row: row[1:5]):
        row = dict(zip(_INSERTED[incidents], conflict, strict=True))
        raised += (await conn.execute(_insert_once(conn, incidents, WAY), row)).rowcount
    doubled = {row.subject for row in stored[incidents].values() if row.kind == DOUBLE_ISSUE}
    return _Compared(already, raised, doubled)


_OTHER_CONTENT: Final = "an entry of this position came again with other content here"
_WITHOUT_IT: Final = "an entry of this position came again without the code that stands here"


def _same_aside(had: AsideRow, came: AsideRow) -> bool:
    if (had.why, came.why) == (WITHDRAWN, TAKEN_BACK):  # on its way back it was withdrawn (``_take_their_places``)
        came = came._replace(why=WITHDRAWN)
    return had[:-1] == came[:-1]


def _same_request(had: Row[Any] | None, came: RequestRow) -> bool:
    return had is not None and RequestRow._make(had).said == came.said


async def _still_paused(conn: AsyncConnection, involved: set[str]) -> tuple[str, ...]:
    paused = select(campaigns.c.id).where(campaigns.c.paused.is_(True)).order_by(campaigns.c.id)
    found: list[str] = []
    for some in chunks(sorted(involved)):
        found += await conn.scalars(paused.where(campaigns.c.id.in_(some)))
    return tuple(found)


# --- the two databases -------------------------------------------------------------------------------------------


_INSERTED: Final = {
    table: [column.name for column in table.c if column.autoincrement is not True]
    for table in (requests, issuances, set_asides, incidents)
}


def _insert_once(conn: AsyncConnection, table: Table, target: Sequence[str]) -> sqlite.Insert | postgresql.Insert:
    if conn.dialect.name == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing(index_elements=target)
    return postgresql.insert(table).on_conflict_do_nothing(index_elements=target)


def _position(entry: Entry) -> tuple[int, int, int]:
    return entry.position


def is_request_of(table: Table) -> ColumnElement[bool]:
    """This row of ``requests`` is that of the issuance in ``table``."""
    return and_(*(requests.c[name] == table.c[name] for name in WAY[:3]), requests.c.ordinal == table.c.request_ordinal)


def _ranges(seqs: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches that hold all of ``seqs`` (sorted), with no gap above RANGE_GAP in any."""
    first = last = seqs[0]
    for seq in seqs[1:]:
        if seq - last > RANGE_GAP:
            yield first, last
            first = seq
        last = seq
    yield first, last
