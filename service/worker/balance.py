"""One partition's books, in Redis and in the store, held against each other (P1, P5).

Two kinds of evidence.  *Sums* say that no code is missing or too many; they hold at any moment as inequalities, and
exactly when nothing moves.  *Names* say which: every position leased to the open generation is in the ledger, in a
window, in the outbox, or in the lease that is on its way, and in one of them only.

The store is read before Redis and after it.  If anything moved in between, the look is repeated, a bounded number of
times; a service under load that never stands still is held to what holds while it moves, and the figures say so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from redis.exceptions import RedisError

from service import keys
from service.domain import Code
from service.errors import RedisUnreachable
from service.scripts import Books, Generation, Scripts
from service.store import books, control, generations, inspection, stock
from service.store.books import Accounted
from service.store.database import Database
from service.store.stock import Lease
from service.worker.flush import parse

# Looks at a partition until nothing moves, and the pauses between them: about four seconds in all.
LOOKS_MAX: Final = 12
PAUSE_S_MIN: Final = 0.02
PAUSE_S_MAX: Final = 0.5

# Codes or entries of one reply of Redis: some 5 ms of its time.
PAGE: Final = 5_000

# Names in one finding.  What has more is a catastrophe, and `figures` has its size.
NAMES_MAX: Final = 5

Promise = Literal["P1", "P2", "P3", "P5", "P6", "P8"]
Position = tuple[int, int]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is off.  ``subject`` is a pool, a campaign, a partition or the store; no text holds a code."""

    promise: Promise
    subject: str
    detail: str
    figures: dict[str, int] = {}


class PartitionFigures(msgspec.Struct, frozen=True):
    """A partition's open generation, in codes but for ``outbox_entries``.  ``at_rest``: nothing moved during the look,
    so every equality was demanded."""

    partition: int
    generation: int
    leased: int
    restocked: int
    popped: int
    set_aside: int
    taken_back: int
    withdrawn: int
    windows: int
    outbox: int
    outbox_entries: int
    accounted: int
    at_rest: bool


class _Ledger(msgspec.Struct, frozen=True):
    """What the store says of one generation, in one snapshot."""

    accounted: Accounted
    leased: int
    ends: dict[str, Lease]
    at_large: dict[Position, str]
    version: int
    state: generations.State | None


class _Entry(msgspec.Struct, frozen=True):
    """One outbox entry.  ``seq`` and ``positions`` are empty if nobody can read it."""

    entry_id: str
    codes: int
    seq: int
    positions: tuple[Position, ...]


class _Look(msgspec.Struct, frozen=True):
    """One look at the partition: the store before, Redis in between, the store after.

    ``counted`` is the outbox' own count of its codes, read together with ``entries`` if ``together``.
    """

    seen: Generation
    before: _Ledger
    held: Books
    counted: int
    entries: list[_Entry]
    together: bool
    windows: dict[str, list[str]]
    after: _Ledger
    settled: int  # codes of entries that are in the ledger and still in the outbox: a flush is between the two
    at_rest: bool


async def examine(database: Database, scripts: Scripts) -> tuple[list[Finding], PartitionFigures | None]:
    look: _Look | None = None
    pause_s = PAUSE_S_MIN
    for _ in range(LOOKS_MAX):
        look = await _look(database, scripts)
        if look is not None and look.at_rest and not _findings(look):
            break
        # What is off may be a flush or a lease that is half-way: what is really off stays off.
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)
    if look is None:
        return await _not_open(database, scripts), None
    findings = _findings(look) + await _in_windows_too(scripts, look)
    held, after = look.held, look.after
    return findings, PartitionFigures(
        partition=scripts.partition,
        generation=look.seen.open,
        leased=after.leased,
        restocked=held.restocked,
        popped=held.popped,
        set_aside=held.set_aside,
        taken_back=held.taken_back,
        withdrawn=held.withdrawn,
        windows=_lengths(held),
        outbox=held.codes,
        outbox_entries=held.entries,
        accounted=after.accounted.codes,
        at_rest=look.at_rest,
    )


async def _not_open(database: Database, scripts: Scripts) -> list[Finding]:
    async with database.read() as conn:
        newest = await generations.newest(conn, scripts.partition)
    if not newest and not (await scripts.generation()).open:
        return []  # nothing was ever started here
    return [
        Finding(
            "P5", f"partition {scripts.partition}",
            "no generation is open in Redis, it is being recovered: see that `voucherd work` runs, then audit again",
            {"newest_generation": newest},
        )
    ]  # fmt: skip


async def _look(database: Database, scripts: Scripts) -> _Look | None:
    """None while no generation is open, or if another one was opened meanwhile."""
    seen = await scripts.generation()
    if not seen.agrees:
        return None
    before, _ = await _ledger(database, scripts.partition, seen.open)
    async with database.read() as conn:
        pools = sorted(await stock.stock_versions(conn))
    held = await scripts.books(pools, generation=seen.open)
    try:
        # Windows before the outbox: a code on its way from one to the other is seen in at least one of them.
        windows = {pool: await _window(scripts, seen.open, pool) for pool in pools}
        counted, entries, together = await _outbox(scripts, seen.open)
    except RedisError as error:
        raise RedisUnreachable from error
    again = await scripts.books(pools, generation=seen.open)
    after, settled = await _ledger(database, scripts.partition, seen.open, entries)
    if held is None or again is None:
        return None
    return _Look(
        seen, before, held, counted, entries, together, windows, after, settled,
        at_rest=held == again and before == after,
    )  # fmt: skip


async def _ledger(
    database: Database, partition: int, generation: int, entries: Sequence[_Entry] = ()
) -> tuple[_Ledger, int]:
    """What the store says of a generation, and how many codes of these outbox entries it accounts for already."""
    async with database.read() as conn:
        ledger = _Ledger(
            await books.accounted(conn, partition, generation),
            await inspection.leased(conn, partition, generation),
            await stock.chain_ends(conn, partition, generation),
            await inspection.at_large(conn, partition, generation),
            await control.version(conn),
            await generations.state(conn, partition, generation),
        )
        known = await inspection.known_entries(conn, partition, generation, [one.seq for one in entries if one.seq])
        parked = await inspection.known_parked(conn, partition, generation)
    return ledger, sum(one.codes for one in entries if one.seq in known or one.entry_id in parked)


async def _window(scripts: Scripts, generation: int, pool: str) -> list[str]:
    key = keys.window(scripts.partition, generation, pool)
    packed: list[str] = []
    while page := await _of(scripts.redis.lrange(key, len(packed), len(packed) + PAGE - 1)):
        packed += page
    return packed


async def _outbox(scripts: Scripts, generation: int) -> tuple[int, list[_Entry], bool]:
    """Its own count of codes, its entries, and whether the two were read at the same moment."""
    outbox = keys.outbox(scripts.partition, generation)
    async with scripts.redis.pipeline(transaction=True) as pipe:
        pipe.hget(keys.totals(scripts.partition, generation), "codes")
        pipe.xrange(outbox, count=PAGE)
        counted, page = await pipe.execute()
    together = len(page) < PAGE
    entries = []
    while page:
        entries += [_read_entry(scripts.partition, generation, entry_id, fields) for entry_id, fields in page]
        page = [] if len(page) < PAGE else await scripts.redis.xrange(outbox, f"({page[-1][0]}", count=PAGE)
    return int(counted or 0), entries, together


def _read_entry(partition: int, generation: int, entry_id: str, fields: dict[str, str]) -> _Entry:
    try:
        entry = parse(partition, generation, entry_id, fields)
    except (ValueError, KeyError):
        said = fields.get("codes", "")
        return _Entry(entry_id, int(said) if said.isdecimal() and len(said) < 10 else 0, 0, ())
    given = (code for record in entry.records for code in record.codes)
    return _Entry(entry_id, entry.codes, entry.outbox_seq, tuple((one.lot, one.seq) for one in (*given, *entry.asides)))


def _findings(look: _Look) -> list[Finding]:
    """What one look shows, nothing of which a moving service can bring about by itself."""
    subject = f"generation {look.seen.open}"
    held, before, after = look.held, look.before, look.after
    findings = []
    windows, left = _lengths(held), left_windows(held)
    if in_redis(held):
        findings.append(
            Finding(
                "P5", subject,
                "restocked - popped - set aside - taken back - withdrawn is not the length of the windows",
                {"restocked": held.restocked, "popped": held.popped, "set_aside": held.set_aside,
                 "taken_back": held.taken_back, "withdrawn": held.withdrawn, "windows": windows},
            )
        )  # fmt: skip
    in_entries = sum(one.codes for one in look.entries)
    if look.together and look.counted != in_entries:
        findings.append(
            Finding(
                "P5", subject, "the outbox does not count as many codes as its entries hold",
                {"counted": look.counted, "in_entries": in_entries},
            )
        )  # fmt: skip
    lost = left - after.accounted.codes - held.codes + (look.settled if look.at_rest else 0)
    if lost > 0:
        findings.append(
            Finding(
                "P5", subject, "codes left the windows and are neither in the ledger nor in the outbox",
                {"left": left, "accounted": after.accounted.codes, "outbox": held.codes, "missing": lost},
            )
        )  # fmt: skip
    surplus = before.accounted.codes - left
    if surplus > 0 or (look.at_rest and lost < 0):
        findings.append(
            Finding(
                "P5", subject, "the ledger and the outbox hold more codes than left the windows",
                {"left": left, "accounted": before.accounted.codes, "outbox": held.codes,
                 "too_many": max(surplus, -lost)},
            )
        )  # fmt: skip
    if look.at_rest:
        findings += _at_rest(look, subject)
    return findings


def in_redis(held: Books) -> int:
    """Codes that were restocked, did not leave the windows, and are not in them: 0, by P5's first identity."""
    return held.restocked - left_windows(held) - _lengths(held)


def left_windows(held: Books) -> int:
    """Codes that left the windows, in whatever way."""
    return held.popped + held.set_aside + held.taken_back + held.withdrawn


def in_between(before: Books, accounted: int, after: Books) -> int:
    """Codes that are missing, or too many, between windows, outbox and a ledger that ``accounted`` for so many between
    the two looks at Redis: 0, by P5's third identity, whatever moved meanwhile."""
    missing = left_windows(before) - before.codes - accounted
    return max(0, missing, accounted - left_windows(after))


def _at_rest(look: _Look, subject: str) -> list[Finding]:
    """What holds exactly because nothing moved."""
    findings, held, after = [], look.held, look.after
    coming: list[Lease] = []
    for pool, window in held.windows.items():
        end = after.ends.get(pool)
        if end is not None and window.lease == end.predecessor:
            coming.append(end)
        elif window.lease != (end.id if end is not None else ""):
            findings.append(
                Finding(
                    "P5",
                    f"pool {pool}",
                    "the last lease in Redis is neither the end of the store's chain nor next to it",
                )
            )
    if after.state not in ("open", "building"):
        findings.append(Finding("P5", subject, "open in Redis and closed in the store: its windows are in quarantine"))
    on_the_way = sum(lease.codes for lease in coming)
    if after.leased - on_the_way != held.restocked:
        findings.append(
            Finding(
                "P5", subject, "leased in the store is not what was restocked in Redis",
                {"leased": after.leased, "on_the_way": on_the_way, "restocked": held.restocked},
            )
        )  # fmt: skip
    if look.seen.fence < after.version:
        findings.append(
            Finding(
                "P6", "catalogue", "the newest version is in the store but not in force: see that `voucherd work` runs",
                {"store": after.version, "fence": look.seen.fence},
            )
        )  # fmt: skip
    return findings + _named(look, coming)


def _named(look: _Look, coming: list[Lease]) -> list[Finding]:
    """Positions that are nowhere, in two places, or where they must not be."""
    findings: list[Finding] = []
    places: Counter[Position] = Counter()
    in_window: set[Position] = set()
    for pool, packed in look.windows.items():
        foreign: list[Position] = []
        unreadable = 0
        for text in packed:
            try:
                code = Code.unpack(text)
            except ValueError:
                unreadable += 1
                continue
            position = (code.lot, code.seq)
            places[position] += 1
            in_window.add(position)
            if look.after.at_large.get(position, pool) != pool:
                foreign.append(position)
        if unreadable:
            what = "its window holds something that is no code"
            findings.append(Finding("P5", f"pool {pool}", what, {"entries": unreadable}))
        findings += _name("P1", f"pool {pool}", "in its window, but leased to another pool", foreign)
    for entry in look.entries:
        places.update(entry.positions)
    twice = [position for position, times in places.items() if times > 1]
    findings += _name("P1", "windows and outbox", "more than once", twice)
    missing: dict[str, list[Position]] = {}
    for position, pool in look.after.at_large.items():
        if position not in places and not any(
            lease.lot == position[0] and lease.seq_from <= position[1] < lease.seq_to for lease in coming
        ):
            missing.setdefault(pool, []).append(position)
    if sum(map(len, missing.values())) > look.after.accounted.parked:  # a parked entry's codes have no names
        for pool, positions in missing.items():
            findings += _name("P5", f"pool {pool}", "leased, and neither in window, outbox nor ledger", positions)
    return findings


async def _in_windows_too(scripts: Scripts, look: _Look) -> list[Finding]:
    """Codes that may be issued again: the ledger has them, or nobody leased them, and they are in a window.

    Found while things move too: a code that was in the ledger must not be in a window at any later moment.
    """
    findings: list[Finding] = []
    for pool, packed in look.windows.items():
        key, wrong = keys.window(scripts.partition, look.seen.open, pool), []
        for text in packed:
            try:
                code = Code.unpack(text)
            except ValueError:
                continue
            if (code.lot, code.seq) not in look.after.at_large:
                try:
                    still = await _of(scripts.redis.lpos(key, text))
                except RedisError as error:
                    raise RedisUnreachable from error
                if still is not None:
                    wrong.append((code.lot, code.seq))
        findings += _name("P1", f"pool {pool}", "in its window, but issued, set aside or never leased to it", wrong)
    return findings


def _name(promise: Promise, subject: str, what: str, positions: list[Position]) -> list[Finding]:
    if not positions:
        return []
    names = ", ".join(position_name(*position) for position in sorted(positions)[:NAMES_MAX])
    more = f" and {len(positions) - NAMES_MAX} more" if len(positions) > NAMES_MAX else ""
    return [Finding(promise, subject, f"{what}: {names}{more}", {"codes": len(positions)})]


def position_name(lot: int | None, seq: int | None) -> str:
    return f"lot {lot} seq {seq}"


def _lengths(held: Books) -> int:
    return sum(window.length for window in held.windows.values())


async def _of(reply: Any) -> Any:
    """redis-py types one method for both of its clients."""
    return await reply
