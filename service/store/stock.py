"""Stock: codes come in by imports, and go out to windows by leases.

Both lock the pool's row first.  So a lease never passes over rows that are not committed yet, no position is
leased twice, and in every committed state ``imported = stored + leased + withdrawn`` (P5).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Table, and_, bindparam, case, exists, func, insert, select, update
from sqlalchemy import Row as SqlRow
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code
from service.errors import Conflict, GenerationClosed, NotFound
from service.store.control import ID, TIME_MAX
from service.store.database import insert_rows
from service.store.schema import codes, generations, imports, leases, lots, pools, withdrawn

# One transaction holds the pool's lock, and on SQLite the only write lock: a flush must never wait long.
CHUNK_ROWS_MAX: Final = 5_000
# Values looked up in one statement: far below what either database takes, and few statements a chunk.
LOOKUP_MAX: Final = 1_000
# Each repetition means that another pool's import committed one of the same codes just then.
COLLISIONS_MAX: Final = 10

_CODE: Final = re.compile(r"[\x21-\x7e]{1,128}")
_SERIAL: Final = re.compile(r"[\x21-\x7e]{1,64}")


# What the worker asks several times a second; making such a statement costs several times what running it does.
_STOCK_VERSIONS: Final = select(pools.c.id, pools.c.stock_version)
_follower: Final = leases.alias()
_CHAIN_ENDS: Final = select(leases).where(
    leases.c.partition == bindparam("of_partition"),
    leases.c.generation == bindparam("of_generation"),
    ~select(1)
    .where(
        _follower.c.partition == leases.c.partition,
        _follower.c.generation == leases.c.generation,
        _follower.c.pool == leases.c.pool,
        _follower.c.predecessor == leases.c.id,
    )
    .exists(),
)


class Row(msgspec.Struct, frozen=True):
    """One line of an import.  ``line`` counts from 1 and rises; what is None is decided at the import.
    ``unreadable`` says why the line could not even be read ('': it could); it is counted and refused like any other.
    """

    line: int
    code: str
    serial: str | None
    expires_at: int | None
    unreadable: str = ""


class Refused(msgspec.Struct, frozen=True):
    """A line that was not imported, and why.  The reason never shows the code."""

    line: int
    reason: str


class ImportedChunk(msgspec.Struct, frozen=True):
    """What one call of ``import_rows`` did, and the pool's stock version after it."""

    inserted: int
    refused: list[Refused]
    stock_version: int


class ImportState(msgspec.Struct, frozen=True):
    """What an import has done in all its transactions: the last line looked at, and how many codes."""

    lines_done: int
    inserted: int
    refused: int


class Lease(msgspec.Struct, frozen=True):
    """``[seq_from, seq_to)`` of one lot went to a window: ``codes`` codes.  ``predecessor`` is '' for the first."""

    id: str
    predecessor: str
    partition: int
    generation: int
    pool: str
    lot: int
    seq_from: int
    seq_to: int
    codes: int


def digest(code: str) -> bytes:
    """What makes a code unique over all pools: 16 bytes, so that the walls' indexes stay small."""
    return blake2b(code.encode(), digest_size=16).digest()


# --- imports -------------------------------------------------------------------------------------------------


async def begin_import(connection: AsyncConnection, import_id: str, pool: str, now: int) -> int:
    """The import is known; how many of its lines were done before, to go on after them.

    Raises NotFound for an unknown pool; Conflict if the import is finished or belongs to another pool.
    """
    if ID.fullmatch(import_id) is None:
        raise Conflict("an import's id has 1 to 64 of A-Z a-z 0-9 . _ -")
    await lock_pool(connection, pool)
    known = select(imports).where(imports.c.id == import_id)
    found = (await connection.execute(known)).first()
    if found is None:
        counts = {"lines_done": 0, "inserted": 0, "refused": 0}
        try:
            async with connection.begin_nested():
                await connection.execute(insert(imports), {"id": import_id, "pool": pool, **counts, "started_at": now})
        except IntegrityError:  # begun for another pool just now
            found = (await connection.execute(known)).one()
        else:
            return 0
    if found.pool != pool:
        raise Conflict(f"import {import_id} filled pool {found.pool}, not {pool}: give it another id")
    if found.finished_at is not None:
        raise Conflict(f"import {import_id} is finished ({found.inserted} codes): the same file is not imported twice")
    return int(found.lines_done)


async def import_rows(
    connection: AsyncConnection, import_id: str, pool: str, rows: Sequence[Row], now: int
) -> ImportedChunk:
    """The good ones of ``rows`` (at most 5,000) are in stock, each with a position, an expiry, a serial number.

    Lines that an earlier call of the same import has done are passed over, so a chunk whose commit is in doubt
    may be sent again.  A bad line costs that line: duplicates of a code (in these rows, in any pool) or of a
    serial number (in this pool), no expiry or one that has passed, characters that don't fit.  Raises NotFound
    and Conflict as ``begin_import`` does; nothing was done then.
    """
    if len(rows) > CHUNK_ROWS_MAX:
        raise ValueError(f"at most {CHUNK_ROWS_MAX} rows in one transaction")
    into = await lock_pool(connection, pool)
    state = (await connection.execute(select(imports).where(imports.c.id == import_id).with_for_update())).first()
    if state is None or state.pool != pool or state.finished_at is not None:
        raise Conflict(f"import {import_id} of pool {pool} is not under way: begin it first")
    new = [row for row in rows if row.line > state.lines_done]
    good, refused = _sift(new, into.default_expires_at, now)
    inserted = 0
    for _ in range(COLLISIONS_MAX):
        good, duplicates = await _without_duplicates(connection, pool, good)
        refused += duplicates
        try:
            async with connection.begin_nested():
                inserted = await _insert(connection, pool, good)
            break
        except IntegrityError:
            continue  # another pool's import has committed one of these codes meanwhile: it is seen now
    else:
        raise Conflict(f"pool {pool} and another are being filled with the same codes: import one after the other")
    if new:
        await connection.execute(
            update(imports)
            .where(imports.c.id == import_id)
            .values(
                lines_done=new[-1].line,
                inserted=imports.c.inserted + inserted,
                refused=imports.c.refused + len(refused),
            )
        )
    stock_version = int(into.stock_version)
    if inserted:
        stock_version += 1
        await connection.execute(update(pools).where(pools.c.id == pool).values(stock_version=stock_version))
    return ImportedChunk(inserted, sorted(refused, key=lambda each: each.line), stock_version)


async def finish_import(connection: AsyncConnection, import_id: str, now: int) -> ImportState:
    """The import is finished: its id is refused from now on.  Raises NotFound; finishing twice is no mistake."""
    await connection.execute(
        update(imports).where(imports.c.id == import_id, imports.c.finished_at.is_(None)).values(finished_at=now)
    )
    found = (await connection.execute(select(imports).where(imports.c.id == import_id))).first()
    if found is None:
        raise NotFound(f"there is no import {import_id}")
    return ImportState(found.lines_done, found.inserted, found.refused)


async def stock_versions(connection: AsyncConnection) -> dict[str, int]:
    """Per pool, the number that rose with every commit that added stock."""
    found = await connection.execute(_STOCK_VERSIONS)
    return {row.id: row.stock_version for row in found}


def not_withdrawn(table: Table) -> ColumnElement[bool]:
    """The position ``(lot, seq)`` of this row of ``table`` was not withdrawn from stock."""
    return ~exists().where(
        withdrawn.c.lot == table.c.lot, withdrawn.c.seq_from <= table.c.seq, withdrawn.c.seq_to > table.c.seq
    )


async def left(connection: AsyncConnection, now: int) -> dict[str, int]:
    """Per pool, the codes that are stored, not leased, not withdrawn, and not past their expiry."""
    # A lease passes over a stretch as a whole, so none lies on both sides of ``leased_to``.
    gone = (
        select(func.coalesce(func.sum(withdrawn.c.seq_to - withdrawn.c.seq_from), 0))
        .where(withdrawn.c.lot == lots.c.id, withdrawn.c.seq_from >= lots.c.leased_to)
        .scalar_subquery()
    )
    usable = case((lots.c.expires_at > now, lots.c.imported - lots.c.leased_to - gone), else_=0)
    counted = (
        select(pools.c.id, func.coalesce(func.sum(usable), 0)).outerjoin(lots, lots.c.pool == pools.c.id)
    ).group_by(pools.c.id)
    return {pool: int(stored) for pool, stored in await connection.execute(counted)}


# --- leases --------------------------------------------------------------------------------------------------


async def lease(
    connection: AsyncConnection,
    *,
    pool: str,
    partition: int,
    generation: int,
    predecessor: str,
    lease_id: str,
    codes: int,
    now: int,
    earliest_expiry: int,
) -> Lease | None:
    """At most ``codes`` codes of one lot belong to the generation's window; None if the pool has none left.

    The lot that expires first among those that expire after ``earliest_expiry`` (and after ``now``); what is
    over stays in stock.  The pool stays locked until the transaction ends, so its stock version read in it is
    the one that a None is true for.  Calling again with the same ``lease_id`` returns the same lease.

    Raises NotFound for an unknown pool; GenerationClosed unless the generation is being built or open; Conflict
    if ``predecessor`` is not the end of the pool's chain in this generation.  Nothing was leased then.
    """
    if codes < 1:
        raise ValueError("a lease holds at least one code")
    await lock_pool(connection, pool)
    state = await connection.execute(
        select(generations.c.state)
        .where(generations.c.partition == partition, generations.c.generation == generation)
        .with_for_update(read=True)
    )
    if state.scalar_one_or_none() not in ("building", "open"):
        raise GenerationClosed(f"generation {generation} of partition {partition} is closed: nothing is leased to it")
    chain = (leases.c.partition == partition, leases.c.generation == generation, leases.c.pool == pool)
    known = (await connection.execute(select(leases).where(leases.c.id == lease_id))).first()
    if known is not None:
        again = _lease(known)
        if (again.partition, again.generation, again.pool, again.predecessor) == (
            partition, generation, pool, predecessor,
        ):  # fmt: skip
            return again
        raise Conflict(f"lease {lease_id} exists already, and is another one")
    if not await _ends(connection, chain, predecessor):
        raise Conflict(f"lease {predecessor or '(none)'} is not the end of pool {pool}'s chain")
    first = (
        select(lots)
        .where(lots.c.pool == pool, lots.c.leased_to < lots.c.imported, lots.c.expires_at > max(now, earliest_expiry))
        .order_by(lots.c.expires_at)
        .limit(1)
    )
    while True:
        if (lot := (await connection.execute(first)).first()) is None:
            return None
        seq_to, count = await _stretch(connection, lot, codes)
        if count:
            break
        # What is left of the lot was withdrawn: pass over it, once.
        await connection.execute(update(lots).where(lots.c.id == lot.id).values(leased_to=lot.imported))
    taken = Lease(lease_id, predecessor, partition, generation, pool, lot.id, lot.leased_to, seq_to, count)
    await connection.execute(update(lots).where(lots.c.id == lot.id).values(leased_to=seq_to))
    await connection.execute(insert(leases), {**msgspec.structs.asdict(taken), "leased_at": now})
    return taken


async def _stretch(connection: AsyncConnection, lot: SqlRow[Any], wanted: int) -> tuple[int, int]:
    """Where a lease of at most ``wanted`` codes of ``lot`` ends (exclusive), and how many codes it then holds."""
    ahead = (
        select(withdrawn.c.seq_from, withdrawn.c.seq_to)
        .where(withdrawn.c.lot == lot.id, withdrawn.c.seq_from >= lot.leased_to)
        .order_by(withdrawn.c.seq_from)
    )
    at, count = lot.leased_to, 0
    for seq_from, seq_to in (*await connection.execute(ahead), (lot.imported, lot.imported)):
        here = min(seq_from - at, wanted - count)
        count += here
        if count == wanted:
            return at + here, count
        at = seq_to
    return lot.imported, count


async def lease_codes(connection: AsyncConnection, lease: Lease) -> list[Code]:
    """The codes of a lease, in the order in which they are to be issued."""
    found = await connection.execute(
        select(lots.c.expires_at, codes.c.lot, codes.c.seq, codes.c.code, codes.c.serial)
        .join(lots, lots.c.id == codes.c.lot)
        .where(
            codes.c.lot == lease.lot, codes.c.seq >= lease.seq_from, codes.c.seq < lease.seq_to, not_withdrawn(codes)
        )
        .order_by(codes.c.seq)
    )
    return [Code(*row) for row in found]


async def chain_ends(connection: AsyncConnection, partition: int, generation: int) -> dict[str, Lease]:
    """Per pool that was ever leased from in this generation, the lease that no other one follows."""
    ends = await connection.execute(_CHAIN_ENDS, {"of_partition": partition, "of_generation": generation})
    return {row.pool: _lease(row) for row in ends}


async def lease_known(connection: AsyncConnection, lease_id: str) -> bool:
    """Whether the store ever made this lease."""
    return (await connection.execute(select(leases.c.id).where(leases.c.id == lease_id))).first() is not None


async def _ends(connection: AsyncConnection, chain: Iterable[Any], lease_id: str) -> bool:
    """Whether the chain ends with this lease ('': is empty).  Two look-ups, however long the chain is."""
    if lease_id:
        there = select(leases.c.id).where(*chain, leases.c.id == lease_id)
        if (await connection.execute(there)).first() is None:
            return False
    followed = select(leases.c.id).where(*chain, leases.c.predecessor == lease_id)
    return (await connection.execute(followed)).first() is None


def _lease(row: Any) -> Lease:
    return Lease(
        row.id, row.predecessor, row.partition, row.generation, row.pool, row.lot, row.seq_from, row.seq_to, row.codes
    )


# --- what an import decides ------------------------------------------------------------------------------------


class _Good(msgspec.Struct, frozen=True):
    line: int
    code: str
    serial: str | None
    expires_at: int
    digest: bytes


async def lock_pool(connection: AsyncConnection, pool: str) -> SqlRow[Any]:
    """The pool's row; until the transaction ends nobody else imports, leases or withdraws.  Raises NotFound."""
    row = (await connection.execute(select(pools).where(pools.c.id == pool).with_for_update())).first()
    if row is None:
        raise NotFound(f"there is no pool {pool}: create it first")
    return row


def _sift(rows: Iterable[Row], default_expires_at: int | None, now: int) -> tuple[list[_Good], list[Refused]]:
    """What can be told without looking into the stock."""
    good: list[_Good] = []
    refused: list[Refused] = []
    digests: set[bytes] = set()
    serials: set[str] = set()
    for row in rows:
        expires_at = default_expires_at if row.expires_at is None else row.expires_at
        if row.unreadable:
            refused.append(Refused(row.line, row.unreadable))
        elif _CODE.fullmatch(row.code) is None:
            refused.append(Refused(row.line, "the code needs 1 to 128 printable ASCII characters without space"))
        elif row.serial is not None and _SERIAL.fullmatch(row.serial) is None:
            refused.append(Refused(row.line, "the serial needs 1 to 64 printable ASCII characters without space"))
        elif expires_at is None:
            refused.append(Refused(row.line, "no expiry: neither the line nor the pool has one"))
        elif expires_at <= now:
            refused.append(Refused(row.line, "expired already"))
        elif expires_at > TIME_MAX:
            refused.append(Refused(row.line, "the expiry lies after the year 9999"))
        elif (value := digest(row.code)) in digests:
            refused.append(Refused(row.line, "the code stands in an earlier line"))
        elif row.serial is not None and row.serial in serials:
            refused.append(Refused(row.line, "the serial stands in an earlier line"))
        else:
            good.append(_Good(row.line, row.code, row.serial, expires_at, value))
            digests.add(value)
            if row.serial is not None:
                serials.add(row.serial)
    return good, refused


async def _without_duplicates(
    connection: AsyncConnection, pool: str, rows: Sequence[_Good]
) -> tuple[list[_Good], list[Refused]]:
    """What only the stock can tell, as committed until now."""
    pools_of: dict[bytes, str] = {}
    for part in _parts([row.digest for row in rows]):
        stored = select(codes.c.digest, codes.c.pool).where(codes.c.digest.in_(part))
        pools_of.update({bytes(value): owner for value, owner in await connection.execute(stored)})
    used = await _used_serials(connection, pool, [row.serial for row in rows if row.serial is not None])
    good: list[_Good] = []
    refused: list[Refused] = []
    for row in rows:
        if row.digest in pools_of:
            where = "this pool" if pools_of[row.digest] == pool else f"pool {pools_of[row.digest]}"
            refused.append(Refused(row.line, f"the code is in {where} already"))
        elif row.serial is not None and row.serial in used:
            refused.append(Refused(row.line, "the serial is used in this pool already"))
        else:
            good.append(row)
    return good, refused


async def _insert(connection: AsyncConnection, pool: str, rows: Sequence[_Good]) -> int:
    """Positions given and rows inserted.  Raises IntegrityError: then the caller's savepoint undoes all of it."""
    next_seq = await _lots(connection, pool, Counter(row.expires_at for row in rows))
    placed: list[tuple[_Good, int, int]] = []
    for row in rows:
        lot, seq = next_seq[row.expires_at]
        next_seq[row.expires_at] = (lot, seq + 1)
        placed.append((row, lot, seq))
    given = {row.serial for row in rows if row.serial is not None}
    wanted = [_serial(lot, seq) for row, lot, seq in placed if row.serial is None]
    taken = given | await _used_serials(connection, pool, wanted)
    inserts: list[dict[str, Any]] = [
        {
            "lot": lot,
            "seq": seq,
            "pool": pool,
            "code": row.code,
            "serial": row.serial or await _free_serial(connection, pool, _serial(lot, seq), taken),
            "digest": row.digest,
        }
        for row, lot, seq in placed
    ]
    # In the order of their digests, so that two imports with codes in common wait for each other once and never
    # in a circle.
    inserts.sort(key=lambda row: row["digest"])
    await insert_rows(connection, codes, inserts)
    return len(inserts)


async def _lots(connection: AsyncConnection, pool: str, wanted: Counter[int]) -> dict[int, tuple[int, int]]:
    """Per expiry, the lot and its first new position; the lots count what is about to come."""
    first: dict[int, tuple[int, int]] = {}
    for expires_at, count in sorted(wanted.items()):
        here = and_(lots.c.pool == pool, lots.c.expires_at == expires_at)
        grown = update(lots).where(here).values(imported=lots.c.imported + count)
        found = (await connection.execute(grown.returning(lots.c.id, lots.c.imported))).first()
        if found is None:
            row = {"pool": pool, "expires_at": expires_at, "imported": count, "leased_to": 0}
            made = await connection.execute(insert(lots).values(row).returning(lots.c.id, lots.c.imported))
            found = made.one()
        first[expires_at] = (found.id, found.imported - count)
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


async def _used_serials(connection: AsyncConnection, pool: str, serials: Collection[str]) -> set[str]:
    used: set[str] = set()
    for part in _parts(list(serials)):
        stored = select(codes.c.serial).where(codes.c.pool == pool, codes.c.serial.in_(part))
        used.update((await connection.execute(stored)).scalars())
    return used


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + LOOKUP_MAX] for start in range(0, len(values), LOOKUP_MAX))
