"""Stock: codes come in by imports, and go out to windows by leases.

Both lock the pool's row first.  So a lease never passes over rows that are not committed yet, no position is
leased twice, and in every committed state ``imported = stored + leased + withdrawn`` (P5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, ScalarSelect, Table, bindparam, case, exists, func, insert, select, tuple_, update
from sqlalchemy import Row as SqlRow
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code
from service.errors import Conflict, GenerationClosed, NotFound
from service.store import intake
from service.store.control import ID
from service.store.database import chunks
from service.store.intake import Earlier, Placed
from service.store.intake import Refused as Refused  # these three are had from here: what a line is belongs to stock
from service.store.intake import Row as Row
from service.store.intake import digest as digest
from service.store.schema import codes, generations, imports, leases, lots, pools, withdrawn

# One transaction holds the pool's lock, and on SQLite the only write lock: a flush must never wait long.
CHUNK_ROWS_MAX: Final = 5_000
# Each repetition means that another pool's import committed one of the same codes just then.
COLLISIONS_MAX: Final = 10

# What the worker asks several times a second; making such a statement costs several times what running it does.
_STOCK_VERSIONS: Final = select(pools.c.id, pools.c.stock_version)
_POOL_HELD: Final = select(pools).where(pools.c.id == bindparam("of_pool")).with_for_update()
_STATE_HELD: Final = (
    select(generations.c.state)
    .where(generations.c.partition == bindparam("of_partition"), generations.c.generation == bindparam("of_generation"))
    .with_for_update(read=True)
)
_FIRST_LOT: Final = (
    select(lots)
    .where(
        lots.c.pool == bindparam("of_pool"), lots.c.leased_to < lots.c.imported,
        lots.c.expires_at > bindparam("earliest"),
    )
    .order_by(lots.c.expires_at)
    .limit(1)
)  # fmt: skip
_LEASED_TO: Final = update(lots).where(lots.c.id == bindparam("of_lot")).values(leased_to=bindparam("to"))
_LEASE: Final = select(leases).where(leases.c.id == bindparam("of_lease"))
_WITHDRAWN_AHEAD: Final = (
    select(withdrawn.c.seq_from, withdrawn.c.seq_to)
    .where(withdrawn.c.lot == bindparam("of_lot"), withdrawn.c.seq_from >= bindparam("leased_to"))
    .order_by(withdrawn.c.seq_from)
)
_CHAIN: Final = (
    leases.c.partition == bindparam("of_partition"),
    leases.c.generation == bindparam("of_generation"),
    leases.c.pool == bindparam("of_pool"),
)
_IN_CHAIN: Final = select(leases.c.id).where(*_CHAIN, leases.c.id == bindparam("of_lease"))
_AFTER_IN_CHAIN: Final = select(leases.c.id).where(*_CHAIN, leases.c.predecessor == bindparam("of_lease"))
_follower: Final = leases.alias()
_CHAIN_ENDS: Final = select(leases).where(
    *_CHAIN[:2],
    ~select(1)
    .where(
        _follower.c.partition == leases.c.partition,
        _follower.c.generation == leases.c.generation,
        _follower.c.pool == leases.c.pool,
        _follower.c.predecessor == leases.c.id,
    )
    .exists(),
)


class ImportedChunk(msgspec.Struct, frozen=True):
    """What one call of ``import_rows`` did, and the pool's stock version after it.

    ``lines`` were looked at: the rows without those that were done before.  ``lines_done``: the import's last line
    that is done now, by whichever run.
    """

    inserted: int
    refused: list[Refused]
    stock_version: int
    lines: int
    lines_done: int
    placed: list[Placed]


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


# --- imports -------------------------------------------------------------------------------------------------


async def begin_import(connection: AsyncConnection, import_id: str, pool: str, now: int, content: str = "") -> int:
    """The import is known; how many of its lines were done before, to go on after them.

    ``content``: SHA-256 of what is imported, hex; '' if nobody knows.  Raises NotFound for an unknown pool; Conflict if
    the import is finished, belongs to another pool, or was begun with other content.
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
                await connection.execute(
                    insert(imports), {"id": import_id, "pool": pool, **counts, "started_at": now, "content": content}
                )
        except IntegrityError:  # begun for another pool just now
            found = (await connection.execute(known)).one()
        else:
            return 0
    refuse_other_import(found, pool, content)
    if found.finished_at is not None:
        raise Conflict(f"import {import_id} is finished ({found.inserted} codes): the same file is not imported twice")
    return int(found.lines_done)


def refuse_other_import(found: SqlRow[Any], pool: str, content: str) -> None:
    """Raises Conflict if this row of ``imports`` is of another pool or of other content."""
    if found.pool != pool:
        raise Conflict(f"import {found.id} filled pool {found.pool}, not {pool}: give it another id")
    if content and found.content and content != found.content:
        raise Conflict(f"import {found.id} was begun with other content: give this one another id")


async def import_rows(
    connection: AsyncConnection,
    import_id: str,
    pool: str,
    rows: Sequence[Row],
    now: int,
    earlier: Earlier | None = None,
    *,
    look: bool = False,
) -> ImportedChunk:
    """The good ones of ``rows`` (at most CHUNK_ROWS_MAX) are in stock, each with position, expiry and serial number.

    Lines that an earlier call of the same import has done are passed over, so a chunk whose commit is in doubt
    may be sent again, and two runs may do the same import at the same time.  A bad line costs that line: duplicates
    of a code (in these rows, in any pool) or of a serial number (in this pool), no expiry or one that has passed,
    characters that don't fit.  ``earlier`` tells which line a duplicate repeats.  ``look``: duplicates are likely, so
    the stock is looked into first; otherwise only if a wall says that there is one.  Raises NotFound and Conflict as
    ``begin_import`` does; nothing was done then.
    """
    if len(rows) > CHUNK_ROWS_MAX:
        raise ValueError(f"at most {CHUNK_ROWS_MAX} rows in one transaction")
    into = await lock_pool(connection, pool)
    state = (await connection.execute(select(imports).where(imports.c.id == import_id).with_for_update())).first()
    if state is None or state.pool != pool:
        raise Conflict(f"import {import_id} of pool {pool} is not under way: begin it first")
    new = [row for row in rows if row.line > state.lines_done]
    if new and state.finished_at is not None:
        raise Conflict(
            f"import {import_id} was finished by another run, after line {state.lines_done}: is this its file?"
        )
    good, refused = intake.sift(new, into.default_expires_at, now)
    placed: list[Placed] = []
    for attempt in range(COLLISIONS_MAX):
        if look or attempt:
            good, duplicates = await intake.without_duplicates(connection, pool, good, earlier or Earlier(whole=True))
            refused += duplicates
        if not good:
            break
        try:
            async with connection.begin_nested():
                placed = await intake.place(connection, pool, good, look=attempt > 0)
            break
        except IntegrityError:
            continue  # in stock already, or another pool's import has committed one of these codes meanwhile
    else:
        raise Conflict(f"pool {pool} and another are being filled with the same codes: import one after the other")
    inserted = sum(one.seq_to - one.seq_from for one in placed)
    lines_done = int(state.lines_done)
    if new:
        lines_done = new[-1].line
        await connection.execute(
            update(imports)
            .where(imports.c.id == import_id)
            .values(
                lines_done=lines_done,
                inserted=imports.c.inserted + inserted,
                refused=imports.c.refused + len(refused),
            )
        )
    stock_version = int(into.stock_version)
    if inserted:
        stock_version += 1
        await connection.execute(update(pools).where(pools.c.id == pool).values(stock_version=stock_version))
    refused.sort(key=lambda each: each.line)
    return ImportedChunk(inserted, refused, stock_version, len(new), lines_done, placed)


async def finish_import(connection: AsyncConnection, import_id: str, now: int) -> ImportState:
    """The import is finished: its id is refused from now on.  Raises NotFound; finishing twice is no mistake."""
    await connection.execute(
        update(imports).where(imports.c.id == import_id, imports.c.finished_at.is_(None)).values(finished_at=now)
    )
    found = (await connection.execute(select(imports).where(imports.c.id == import_id))).first()
    if found is None:
        raise NotFound(f"there is no import {import_id}")
    return ImportState(found.lines_done, found.inserted, found.refused)


async def stock_versions(connection: AsyncConnection, of: Sequence[str] | None = None) -> dict[str, int]:
    """Per pool (of these, None: of all), the number that rose with every commit that added stock."""
    if of is None:
        return {row.id: row.stock_version for row in await connection.execute(_STOCK_VERSIONS)}
    found = dict[str, int]()
    for some in chunks(of):
        rows = await connection.execute(_STOCK_VERSIONS.where(pools.c.id.in_(some)))
        found.update((row.id, row.stock_version) for row in rows)
    return found


def not_withdrawn(table: Table) -> ColumnElement[bool]:
    """The position ``(lot, seq)`` of this row of ``table`` was not withdrawn from stock."""
    return ~exists().where(
        withdrawn.c.lot == table.c.lot, withdrawn.c.seq_from <= table.c.seq, withdrawn.c.seq_to > table.c.seq
    )


def not_in(table: Table, other: Table) -> ColumnElement[bool]:
    """No row of ``table`` has the position ``(lot, seq)`` of this row of ``other``."""
    return ~exists().where(table.c.lot == other.c.lot, table.c.seq == other.c.seq)


_CODES: Final = (
    select(lots.c.expires_at, codes.c.lot, codes.c.seq, codes.c.code, codes.c.serial)
    .join(lots, lots.c.id == codes.c.lot)
    .where(
        codes.c.lot == bindparam("of_lot"), codes.c.seq >= bindparam("seq_from"), codes.c.seq < bindparam("seq_to"),
        not_withdrawn(codes),
    )
    .order_by(codes.c.seq)
)  # fmt: skip


def at(table: Table, positions: Sequence[tuple[int, int]]) -> ColumnElement[bool]:
    """This row of ``table`` is at one of the ``positions``, at most an IN list of them."""
    return tuple_(table.c.lot, table.c.seq).in_(positions)


def after(table: Table, position: tuple[int, int]) -> ColumnElement[bool]:
    """This row of ``table`` is at a position after this one, in the order of ``(lot, seq)``."""
    return tuple_(table.c.lot, table.c.seq) > position


def withdrawn_ahead() -> ScalarSelect[int]:
    """Of this row of ``lots``, the codes that were withdrawn and that no lease has passed over yet.

    A lease passes over a stretch as a whole, so none lies on both sides of ``leased_to``.
    """
    codes_of = func.coalesce(func.sum(withdrawn.c.seq_to - withdrawn.c.seq_from), 0)
    return (
        select(codes_of).where(withdrawn.c.lot == lots.c.id, withdrawn.c.seq_from >= lots.c.leased_to).scalar_subquery()
    )


async def left(connection: AsyncConnection, now: int) -> dict[str, int]:
    """Per pool, the codes that are stored, not leased, not withdrawn, and not past their expiry."""
    usable = case((lots.c.expires_at > now, lots.c.imported - lots.c.leased_to - withdrawn_ahead()), else_=0)
    counted = (
        select(pools.c.id, func.coalesce(func.sum(usable), 0)).outerjoin(lots, lots.c.pool == pools.c.id)
    ).group_by(pools.c.id)
    return {pool: int(stored) for pool, stored in await connection.execute(counted)}


async def leased_ever(connection: AsyncConnection) -> dict[str, int]:
    """Per pool, how many positions of its lots were passed by leases: what it is now less what it was, was leased."""
    passed = select(lots.c.pool, func.sum(lots.c.leased_to)).group_by(lots.c.pool)
    return {pool: int(positions) for pool, positions in await connection.execute(passed)}


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
) -> tuple[Lease | None, int]:
    """At most ``codes`` codes of one lot belong to the generation's window, or None if the pool has none left; with the
    pool's stock version, which a None is true for.

    The lot that expires first among those that expire after ``earliest_expiry`` (and after ``now``); what is
    over stays in stock.  The pool stays locked until the transaction ends.  Calling again with the same ``lease_id``
    returns the same lease.

    Raises NotFound for an unknown pool; GenerationClosed unless the generation is being built or open; Conflict
    if ``predecessor`` is not the end of the pool's chain in this generation.  Nothing was leased then.
    """
    if codes < 1:
        raise ValueError("a lease holds at least one code")
    version = int((await lock_pool(connection, pool)).stock_version)
    chain = (partition, generation, pool)
    state = await connection.scalar(_STATE_HELD, {"of_partition": partition, "of_generation": generation})
    if state not in ("building", "open"):
        raise GenerationClosed(f"generation {generation} of partition {partition} is closed: nothing is leased to it")
    known = (await connection.execute(_LEASE, {"of_lease": lease_id})).first()
    if known is not None:
        again = _lease(known)
        if (again.partition, again.generation, again.pool, again.predecessor) == (*chain, predecessor):
            return again, version
        raise Conflict(f"lease {lease_id} exists already, and is another one")
    if not await ends_with(connection, *chain, predecessor):
        raise Conflict(f"lease {predecessor or '(none)'} is not the end of pool {pool}'s chain")
    while True:
        usable = {"of_pool": pool, "earliest": max(now, earliest_expiry)}
        if (lot := (await connection.execute(_FIRST_LOT, usable)).first()) is None:
            return None, version
        seq_to, count = await stretch(connection, lot, codes)
        if count:
            break
        # What is left of the lot was withdrawn: pass over it, once.
        await connection.execute(_LEASED_TO, {"of_lot": lot.id, "to": lot.imported})
    taken = Lease(lease_id, predecessor, *chain, lot.id, lot.leased_to, seq_to, count)
    await connection.execute(_LEASED_TO, {"of_lot": lot.id, "to": seq_to})
    await connection.execute(insert(leases), {**msgspec.structs.asdict(taken), "leased_at": now})
    return taken, version


async def free_stretches(connection: AsyncConnection, lot: SqlRow[Any]) -> list[tuple[int, int]]:
    """The positions ``[seq_from, seq_to)`` of ``lot`` that were neither leased nor withdrawn, in their order."""
    ahead = await connection.execute(_WITHDRAWN_AHEAD, {"of_lot": lot.id, "leased_to": lot.leased_to})
    at, free = lot.leased_to, []
    for seq_from, seq_to in (*ahead, (lot.imported, lot.imported)):
        if at < seq_from:
            free.append((at, seq_from))
        at = seq_to
    return free


async def stretch(connection: AsyncConnection, lot: SqlRow[Any], wanted: int) -> tuple[int, int]:
    """Where a lease of at most ``wanted`` codes of ``lot`` ends (exclusive), and how many codes it then holds."""
    count = 0
    for seq_from, seq_to in await free_stretches(connection, lot):
        if count + seq_to - seq_from >= wanted:
            return seq_from + wanted - count, wanted
        count += seq_to - seq_from
    return lot.imported, count


async def lease_codes(connection: AsyncConnection, lease: Lease) -> list[Code]:
    """The codes of a lease, in the order in which they are to be issued."""
    stretch = {"of_lot": lease.lot, "seq_from": lease.seq_from, "seq_to": lease.seq_to}
    return [Code(*row) for row in await connection.execute(_CODES, stretch)]


async def chain_ends(connection: AsyncConnection, partition: int, generation: int) -> dict[str, Lease]:
    """Per pool that was ever leased from in this generation, the lease that no other one follows."""
    ends = await connection.execute(_CHAIN_ENDS, {"of_partition": partition, "of_generation": generation})
    return {row.pool: _lease(row) for row in ends}


async def followers(
    connection: AsyncConnection, partition: int, generation: int, last: Mapping[str, str]
) -> dict[str, Lease]:
    """Per pool, the lease that follows its lease of this id ('': the one that begins the chain), if there is one.

    As many look-ups as pools, however long their chains are.
    """
    found: dict[str, Lease] = {}
    for some in chunks(list(last.items())):
        rows = await connection.execute(
            select(leases).where(
                leases.c.partition == partition,
                leases.c.generation == generation,
                tuple_(leases.c.pool, leases.c.predecessor).in_(some),
            )
        )
        found.update((row.pool, _lease(row)) for row in rows)
    return found


async def leases_known(connection: AsyncConnection, lease_ids: Sequence[str]) -> set[str]:
    """Those of these leases that the store has made."""
    known: set[str] = set()
    for some in chunks(lease_ids):
        known.update(await connection.scalars(select(leases.c.id).where(leases.c.id.in_(some))))
    return known


async def ends_with(connection: AsyncConnection, partition: int, generation: int, pool: str, lease_id: str) -> bool:
    """Whether the pool's chain ends with this lease ('': is empty).  Two look-ups, however long the chain is."""
    asked = {"of_partition": partition, "of_generation": generation, "of_pool": pool, "of_lease": lease_id}
    if lease_id and (await connection.execute(_IN_CHAIN, asked)).first() is None:
        return False
    return (await connection.execute(_AFTER_IN_CHAIN, asked)).first() is None


def _lease(row: Any) -> Lease:
    return Lease(
        row.id, row.predecessor, row.partition, row.generation, row.pool, row.lot, row.seq_from, row.seq_to, row.codes
    )


async def lock_pool(connection: AsyncConnection, pool: str) -> SqlRow[Any]:
    """The pool's row; until the transaction ends nobody else imports, leases or withdraws.  Raises NotFound."""
    row = (await connection.execute(_POOL_HELD, {"of_pool": pool})).first()
    if row is None:
        raise NotFound(f"there is no pool {pool}: create it first")
    return row
