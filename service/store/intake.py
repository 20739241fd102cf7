"""Intake: the lines of an import are looked at, and the good ones get their places in a pool.

Nothing here holds more than one transaction's rows: that a code stands twice in a file is found, like a code that was
in stock before, by the walls of the store.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import bindparam, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.control import TIME_MAX
from service.store.database import insert_records
from service.store.schema import codes, lots

# Values looked up in one statement of SQLite: far below what it takes, and few statements a transaction.
LOOKUP_MAX: Final = 1_000
# Ranges remembered to tell a duplicate's line: 10 million lines of one expiry are at most 2,000.  Some 10 MB.
RANGES_MAX: Final = 100_000

_CODE: Final = re.compile(r"[\x21-\x7e]{1,128}")
_SERIAL: Final = re.compile(r"[\x21-\x7e]{1,64}")
_COLUMNS: Final = ("lot", "seq", "pool", "code", "serial", "digest")
_BY_DIGEST: Final = itemgetter(_COLUMNS.index("digest"))

# One look into the index per value, whatever the planner thinks of thousands of them: with `= any` it may read the
# whole table for each transaction.
_LOOK_UP: Final = """
    select found.{column}, found.pool, found.lot, found.seq from unnest(cast(:wanted as {kind}[])) as wanted (value)
    cross join lateral (select * from codes where {where} = wanted.value limit 1) as found
"""
_CODES_POSTGRESQL: Final = text(_LOOK_UP.format(column="digest", kind="bytea", where="codes.digest"))
_SERIALS_POSTGRESQL: Final = text(
    _LOOK_UP.format(column="serial", kind="varchar", where="codes.pool = :of_pool and codes.serial")
)

Kind = Literal["invalid", "duplicate_in_file", "duplicate_in_pool", "duplicate_elsewhere"]
KINDS: Final[tuple[Kind, ...]] = ("invalid", "duplicate_in_file", "duplicate_in_pool", "duplicate_elsewhere")


class Row(msgspec.Struct, frozen=True, gc=False):
    """One line of an import.  ``line`` counts from 1 and rises; what is None is decided at the import.
    ``unreadable`` says why the line could not even be read ('': it could); it is counted and refused like any other.
    """

    line: int
    code: str
    serial: str | None
    expires_at: int | None
    unreadable: str = ""


class Refused(msgspec.Struct, frozen=True):
    """A line that was not imported, and why.  The reason never shows the code.

    ``kind``: its code or serial number stands earlier in the file, is in the pool already, or its code is in another
    pool (``duplicate_elsewhere``); all else is ``invalid``.
    """

    line: int
    kind: Kind
    reason: str


class Good(msgspec.Struct, frozen=True, gc=False):
    """A line that only the stock can still refuse."""

    line: int
    code: str
    serial: str | None
    expires_at: int
    digest: bytes


class Placed(msgspec.Struct, frozen=True, gc=False):
    """The lines ``[line_from, line_to]`` have codes in ``[seq_from, seq_to)`` of a lot, in that order."""

    lot: int
    seq_from: int
    seq_to: int
    line_from: int
    line_to: int

    @property
    def exact(self) -> bool:
        """Every line of the range has its code here, so that a position tells its line."""
        return self.line_to - self.line_from == self.seq_to - self.seq_from - 1


class Earlier:
    """Where this run of an import has put the lines so far.  ``whole``: no line before went anywhere else, as it did
    if an earlier run, or another one at the same time, did a part, or if there were more than RANGES_MAX ranges.
    """

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole
        self._ranges: dict[int, list[Placed]] = {}
        self._count = 0

    def add(self, placed: Iterable[Placed]) -> None:
        """More lines went to places behind the ones before; ranges that go on where one ended become one."""
        for one in placed:
            ranges = self._ranges.setdefault(one.lot, [])
            last = ranges[-1] if ranges else None
            follows = last is not None and (last.seq_to, last.line_to + 1) == (one.seq_from, one.line_from)
            if last is not None and follows and last.exact and one.exact:
                ranges[-1] = Placed(one.lot, last.seq_from, one.seq_to, last.line_from, one.line_to)
            elif self._count < RANGES_MAX:
                ranges.append(one)
                self._count += 1
            else:
                self.whole = False

    def where(self, lot: int, seq: int) -> str:
        """'line 7', or 'one of lines 1 to 5000', or '' if none of this run's lines went there."""
        ranges = self._ranges.get(lot, [])
        at = bisect_right(ranges, seq, key=lambda one: one.seq_from) - 1
        if at < 0 or seq >= ranges[at].seq_to:
            return ""
        found = ranges[at]
        if found.exact:
            return f"line {found.line_from + seq - found.seq_from}"
        return f"one of lines {found.line_from} to {found.line_to}"


def digest(code: str) -> bytes:
    """What makes a code unique over all pools: 16 bytes, so that the walls' indexes stay small."""
    return blake2b(code.encode(), digest_size=16).digest()


def sift(rows: Iterable[Row], default_expires_at: int | None, now: int) -> tuple[list[Good], list[Refused]]:
    """What can be told of these lines without looking into the stock."""
    good: list[Good] = []
    refused: list[Refused] = []
    digests: dict[bytes, int] = {}
    serials: dict[str, int] = {}
    for row in rows:
        if reason := _invalid(row, default_expires_at, now):
            refused.append(Refused(row.line, "invalid", reason))
            continue
        value = digest(row.code)
        if value in digests:
            refused.append(in_file(row.line, "code", f"line {digests[value]}"))
            continue
        if row.serial is not None:
            if row.serial in serials:
                refused.append(in_file(row.line, "serial number", f"line {serials[row.serial]}"))
                continue
            serials[row.serial] = row.line
        digests[value] = row.line
        expires_at = default_expires_at if row.expires_at is None else row.expires_at
        assert expires_at is not None
        good.append(Good(row.line, row.code, row.serial, expires_at, value))
    return good, refused


def _invalid(row: Row, default_expires_at: int | None, now: int) -> str:
    expires_at = default_expires_at if row.expires_at is None else row.expires_at
    if row.unreadable:
        return row.unreadable
    if _CODE.fullmatch(row.code) is None:
        return "the code needs 1 to 128 printable ASCII characters without space"
    if row.serial is not None and _SERIAL.fullmatch(row.serial) is None:
        return "the serial number needs 1 to 64 printable ASCII characters without space"
    if row.code[0] == "=" or (row.serial is not None and row.serial[0] == "="):
        return "begins with = as a spreadsheet's formula does: write the code itself"
    if expires_at is None:
        return "no expiry: neither the line nor the pool has one"
    if expires_at <= now:
        return "expired already"
    return "" if expires_at <= TIME_MAX else "the expiry lies after the year 9999"


def in_file(line: int, what: str, where: str) -> Refused:
    """The ``what`` of this line stands in an earlier one, ``where``."""
    return Refused(line, "duplicate_in_file", f"the {what} stands in {where} already")


async def without_duplicates(
    connection: AsyncConnection, pool: str, rows: Sequence[Good], earlier: Earlier
) -> tuple[list[Good], list[Refused]]:
    """What only the stock can tell, as committed until now."""
    stored = await _stored(connection, [row.digest for row in rows])
    used = await _used_serials(connection, pool, [row.serial for row in rows if row.serial is not None])
    if not stored and not used:
        return list(rows), []
    good: list[Good] = []
    refused: list[Refused] = []
    for row in rows:
        place = stored.get(row.digest)
        if place is not None:
            refused.append(_stored_already(row.line, "code", pool, place, earlier))
        elif row.serial is not None and row.serial in used:
            refused.append(_stored_already(row.line, "serial number", pool, used[row.serial], earlier))
        else:
            good.append(row)
    return good, refused


def _stored_already(line: int, what: str, pool: str, place: tuple[str, int, int], earlier: Earlier) -> Refused:
    owner, lot, seq = place
    if owner != pool:
        return Refused(line, "duplicate_elsewhere", f"the {what} is in pool {owner} already")
    if where := earlier.where(lot, seq):
        return in_file(line, what, where)
    perhaps = "" if earlier.whole else ", perhaps from an earlier line of this file"
    return Refused(line, "duplicate_in_pool", f"the {what} is in this pool already{perhaps}")


async def place(connection: AsyncConnection, pool: str, rows: Sequence[Good], *, look: bool) -> list[Placed]:
    """Each row has a position in the lot of its expiry and is in stock; the ranges, one a lot.

    ``look``: see whether a serial number that is made for a row is used.  An imported one seldom looks like ours, so
    the wall is told to say it first.  Raises IntegrityError: then the caller's savepoint undoes all of it.
    """
    first = await _lots(connection, pool, Counter(row.expires_at for row in rows))
    following = {expires_at: seq for expires_at, (_, seq) in first.items()}
    lines: dict[int, list[int]] = {}
    records: list[tuple[int, int, str, str, str, bytes]] = []
    unnamed: list[int] = []
    for row in rows:
        expires_at = row.expires_at
        lot, seq = first[expires_at][0], following[expires_at]
        following[expires_at] = seq + 1
        serial = row.serial
        if serial is None:
            serial = _serial(lot, seq)
            unnamed.append(len(records))
        records.append((lot, seq, pool, row.code, serial, row.digest))
        lines.setdefault(expires_at, [row.line, 0])[1] = row.line
    taken = {row.serial for row in rows if row.serial is not None}
    if look:
        taken |= (await _used_serials(connection, pool, [records[at][4] for at in unnamed])).keys()
    if taken:
        for at in unnamed:
            lot, seq, _, code, serial, value = records[at]
            records[at] = (lot, seq, pool, code, await _free_serial(connection, pool, serial, taken), value)
    # In the order of their digests, so that two imports with codes in common wait for each other once and never
    # in a circle.
    records.sort(key=_BY_DIGEST)
    await insert_records(connection, codes, _COLUMNS, records)
    return [
        Placed(lot, seq, following[expires_at], *lines[expires_at])
        for expires_at, (lot, seq) in first.items()
    ]  # fmt: skip


async def _lots(connection: AsyncConnection, pool: str, wanted: Counter[int]) -> dict[int, tuple[int, int]]:
    """Per expiry, the lot and its first new position; the lots count what is about to come."""
    first: dict[int, tuple[int, int]] = {}
    expiries = sorted(wanted)
    for part in _parts(expiries):
        there = select(lots.c.expires_at, lots.c.id, lots.c.imported)
        found = await connection.execute(there.where(lots.c.pool == pool, lots.c.expires_at.in_(part)))
        first.update({expires_at: (lot, imported) for expires_at, lot, imported in found})
    if missing := [expires_at for expires_at in expiries if expires_at not in first]:
        rows = [{"pool": pool, "expires_at": expires_at, "imported": 0, "leased_to": 0} for expires_at in missing]
        made = await connection.execute(insert(lots).returning(lots.c.expires_at, lots.c.id), rows)
        first.update({expires_at: (lot, 0) for expires_at, lot in made})
    grown = update(lots).where(lots.c.id == bindparam("lot")).values(imported=lots.c.imported + bindparam("more"))
    await connection.execute(grown, [{"lot": first[one][0], "more": wanted[one]} for one in expiries])
    return first


def _serial(lot: int, seq: int) -> str:
    """The serial number that a position gets if its code brought none."""
    return f"SER-{lot:04}-{seq:08}"


async def _free_serial(connection: AsyncConnection, pool: str, wanted: str, taken: set[str]) -> str:
    """``wanted``, or the first variation of it that is not taken: an imported one may look like ours."""
    serial, number = wanted, 1
    while serial in taken or (serial != wanted and await _used_serials(connection, pool, [serial])):
        number += 1
        serial = f"{wanted}-{number}"
    taken.add(serial)
    return serial


async def _stored(connection: AsyncConnection, digests: Sequence[bytes]) -> dict[bytes, tuple[str, int, int]]:
    """Those of the digests that are in stock, with pool, lot and seq."""
    columns = (codes.c.digest, codes.c.pool, codes.c.lot, codes.c.seq)
    if connection.dialect.name == "postgresql":
        found = list(await connection.execute(_CODES_POSTGRESQL, {"wanted": digests})) if digests else []
    else:
        found = [
            row
            for part in _parts(digests)
            for row in await connection.execute(select(*columns).where(codes.c.digest.in_(part)))
        ]
    return {bytes(value): (owner, lot, seq) for value, owner, lot, seq in found}


async def _used_serials(
    connection: AsyncConnection, pool: str, serials: Collection[str]
) -> dict[str, tuple[str, int, int]]:
    """Those of the serial numbers that the pool uses, with pool, lot and seq."""
    columns = (codes.c.serial, codes.c.pool, codes.c.lot, codes.c.seq)
    if connection.dialect.name == "postgresql":
        wanted = {"wanted": list(serials), "of_pool": pool}
        found = list(await connection.execute(_SERIALS_POSTGRESQL, wanted)) if serials else []
    else:
        found = [
            row
            for part in _parts(list(serials))
            for row in await connection.execute(
                select(*columns).where(codes.c.pool == pool, codes.c.serial.in_(part))
            )
        ]  # fmt: skip
    return {serial: (owner, lot, seq) for serial, owner, lot, seq in found}


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + LOOKUP_MAX] for start in range(0, len(values), LOOKUP_MAX))
