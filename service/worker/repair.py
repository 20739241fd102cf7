"""Repairs a store that came back older than it was, by what Redis still knows (design 4; ``voucherd recover-store``).

Four steps, each of which may die and be done again.  While issuing goes on from the windows, the requests that the
store has lost are written again by their replay records.  Then nothing is accepted any more from the generation that is
open in Redis, so that what it holds stands still.  One transaction moves the store's cursors, versions and generation
numbers past everything that Redis names, makes the control plane say what was in force, closes that generation and
publishes.  From there on the store is not older any more, and the partition rolls as after any loss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.catalogue import Snapshot, decode, encode
from service.domain import Code, Record
from service.errors import RedisUnreachable, StoreIsOlder
from service.identity import NO_KEYS, IdKeys
from service.scripts import Books, Generation, Scripts
from service.store import control, generations, recreation, reinstatement, stock
from service.store.database import Database
from service.store.recreation import Extent, Moved
from service.store.reinstatement import Difference
from service.worker.currency import catalogue_at, refuse_older, unknown_leases
from service.worker.flush import Flush, parse
from service.worker.recover import Recover

log = structlog.get_logger()

# Keys of one SCAN and records of one transaction: on SQLite nobody else writes meanwhile, some 50 ms.
PAGE: Final = 1_000

# Codes of a window, and entries of an outbox, in one reply of Redis.
RANGE: Final = 5_000

# How long the partition may take to be open again; on a large ledger counting it under caps is most of that.
ROLL_S: Final = 300.0
ROLL_POLL_S: Final = 0.1

REASON: Final = "the store came back older and was repaired"


class Repair(msgspec.Struct, frozen=True):
    """What was done, or would be (``rolled_to`` 0).

    ``older`` says by what Redis knows that the store is older, '' if it is not; then nothing is to be done.
    ``knows_until``: Unix second of the newest trace that the store has.  ``generation``: open in Redis, and closed now.
    ``in_force``: the catalogue that Redis has, None if it has none of any.  ``published``: the store's new version.
    ``vouchers``: requests that were only in Redis; ``unreadable``: replay records that no row can hold.
    """

    older: str
    knows_until: int = 0
    generation: int = 0
    rolled_to: int = 0
    in_force: int | None = None
    published: int = 0
    vouchers: int = 0
    unreadable: int = 0
    moved: list[Moved] = []
    differences: list[Difference] = []


class _RehearsedError(Exception):
    """Rolls a rehearsal back."""


async def rehearse(
    database: Database,
    scripts: Scripts,
    *,
    told: Callable[[int], None] = lambda _: None,
    now: Callable[[], int] = lambda: int(time.time()),
) -> Repair:
    """What ``repair`` would do now; the store's part of it was tried, and nothing has changed.

    ``told`` hears how many replay records were looked at.  Raises RedisUnreachable, StoreUnreachable.
    """
    if not (older := await _older(database, scripts)):
        return Repair("")
    redis = await _survey(scripts)
    vouchers = unreadable = looked_at = 0
    async for records, unread in redis.records():
        async with database.read() as conn:
            vouchers += len(await recreation.lacking(conn, records))
        unreadable += unread
        looked_at += len(records)
        told(looked_at)
    await redis.read_outboxes()
    await redis.read_windows(database)
    try:
        async with database.write() as conn:
            done = await _commit(conn, redis, "rehearsal", now())
            raise _RehearsedError
    except _RehearsedError:
        return msgspec.structs.replace(done, older=older, vouchers=vouchers, unreadable=unreadable)


async def repair(
    database: Database,
    scripts: Scripts,
    flush: Flush,
    recover: Recover,
    *,
    actor: str,
    ids: IdKeys = NO_KEYS,
    told: Callable[[int], None] = lambda _: None,
    now: Callable[[], int] = lambda: int(time.time()),
) -> Repair:
    """The store knows all that Redis does, nothing that left its stock is in stock, what was in force is, and the
    partition has a new generation.  Done again after a fault or a death, whenever that was, it ends the same.

    Raises RedisUnreachable, StoreUnreachable, UnknownIdKey; StoreIsOlder if it became older meanwhile.
    """
    if not (older := await _older(database, scripts)):
        return Repair("")
    redis = await _survey(scripts)
    await _flush(flush, redis.generations)
    vouchers = unreadable = looked_at = 0
    async for records, unread in redis.records():
        written, unfit = await recreation.recreate(database, scripts.partition, records, now(), ids=ids)
        vouchers, unreadable, looked_at = vouchers + written, unreadable + unfit + unread, looked_at + len(records)
        told(looked_at)
    await redis.leave()
    await _flush(flush, redis.generations)
    await redis.read_outboxes()
    await redis.read_windows(database)
    async with database.write() as conn:
        done = await _commit(conn, redis, actor, now())
    log.warning("the store was repaired", generation=done.generation, catalogue=done.published, vouchers=vouchers)
    rolled_to = await _roll(scripts, recover, redis.generations)
    return msgspec.structs.replace(done, older=older, vouchers=vouchers, unreadable=unreadable, rolled_to=rolled_to)


async def _older(database: Database, scripts: Scripts) -> str:
    try:
        await refuse_older(database, scripts)
    except StoreIsOlder as fault:
        return str(fault)
    return ""


async def _flush(flush: Flush, left: Iterable[int]) -> None:
    """What outboxes hold is in the ledger, as far as the store takes it: a code that met a wall pauses its campaign,
    which can't be published yet."""
    for generation in sorted(left):
        with suppress(StoreIsOlder):
            await flush.drain(generation)


async def _roll(scripts: Scripts, recover: Recover, left: Iterable[int]) -> int:
    """The generation that is open then, and none of those that were ``left``."""
    deadline = time.monotonic() + ROLL_S
    while True:
        await recover.run_once()
        seen = await scripts.generation()
        if seen.agrees and seen.open not in left:
            return seen.open
        if time.monotonic() > deadline:
            raise RedisUnreachable
        await asyncio.sleep(ROLL_POLL_S)


async def _commit(conn: AsyncConnection, redis: _Redis, actor: str, now: int) -> Repair:
    """All that has to happen at once.  Nothing is accepted any more by what Redis has open, but in a rehearsal."""
    partition, seen, books = redis.partition, redis.seen, redis.books
    await generations.lock(conn, partition, exclusive=True)
    await control.lock(conn)
    since = await recreation.knows_until(conn)
    newest = redis.snapshot.version if redis.snapshot is not None else 0
    has_it = newest > 0 and await control.saved_snapshot(conn, newest) == redis.published[newest]
    await reinstatement.save_history(conn, redis.published, redis.highest_version, now)
    snapshot, found = redis.snapshot, list[Difference]()
    # A store that has the newest catalogue is not older in this: what it says besides was changed since.
    if snapshot is not None and not has_it:
        found = await reinstatement.reinstate(conn, snapshot, now, since)
    again = await recreation.was_repaired(conn, partition, seen.open)
    rolled_since = seen.open > 0 and await generations.state(conn, partition, seen.open) is None
    unnamed = set(await unknown_leases(conn, books)) if books else set[str]()
    # A generation that the store never knew was left: what others before it were leased is named by nothing but what
    # comes after it.
    used = {one.pool for one in snapshot.campaigns} if snapshot is not None else await control.pools_in_use(conn, 0)
    moved = await recreation.advance(
        conn, partition, max((seen.open, *redis.generations)),
        windows=redis.windows, extents=redis.extents,
        whole_pools=used - unnamed if rolled_since and not again else (),
        unnamed=() if again else unnamed,
        restocked=books.restocked if books else 0,
        now=now,
    )  # fmt: skip
    await recreation.raise_stock_versions(conn, redis.stock_versions)
    await recreation.close_all(conn, partition, redis.generations, REASON, now)
    version = await control.raise_version(conn)
    await control.save_snapshot(conn, version, encode(await control.snapshot(conn, version)), now)
    detail = f"generation {seen.open} was left, catalogue {version}"
    if seen.open:
        await recreation.note_repair(conn, partition, seen.open, f"{REASON}: {detail}", now)
    await control.log(
        conn, actor=actor, action="recover-store", subject="store", detail=detail, now=now, version=version
    )
    return Repair(
        "", knows_until=since, generation=seen.open, in_force=snapshot.version if snapshot is not None else None,
        published=version, moved=moved, differences=found,
    )  # fmt: skip


# --- what Redis knows ------------------------------------------------------------------------------------------------


async def _survey(scripts: Scripts) -> _Redis:
    """Raises RedisUnreachable."""
    redis = _Redis(scripts, await scripts.generation())
    await redis.read_catalogues()
    return redis


class _Redis:
    """What one partition of Redis has, as far as it was read."""

    def __init__(self, scripts: Scripts, seen: Generation) -> None:
        self.partition: Final = scripts.partition
        self.seen = seen
        self.generations = {seen.open} if seen.open else set[int]()
        self.highest_version = max(0, seen.fence)
        self.published: dict[int, bytes] = {}
        self.snapshot: Snapshot | None = None
        self.extents: dict[int, Extent] = {}
        self.windows: dict[str, list[Code]] = {}
        self.books: Books | None = None
        self.stock_versions: dict[str, int] = {}
        self._scripts = scripts

    async def read_catalogues(self) -> None:
        """Every published snapshot there is, the newest of them decoded, and the highest version of which there is any
        trace."""
        try:
            newest = int(await self._scripts.redis.get(keys.catalogue_newest()) or 0)
            async for found in self._keys():
                self.generations |= {number for name in found if (number := keys.generation_of(name))}
                for version in filter(None, map(keys.catalogue_version, found)):
                    if (blob := await catalogue_at(self._scripts, version)) is not None:
                        self.published[version] = blob
        except RedisError as error:
            raise RedisUnreachable from error
        self.highest_version = max(self.highest_version, newest, *self.published)
        for version in sorted(self.published, reverse=True):
            with suppress(msgspec.DecodeError):
                self.snapshot = decode(self.published[version])
                break

    async def records(self) -> AsyncIterator[tuple[list[Record], int]]:
        """All replay records, in pages of some, and how many keys of each could not be read."""
        clients = self.snapshot.clients if self.snapshot is not None else {}
        async for found in self._keys():
            names = [(key, name) for key in found if (name := keys.replay_name(key)) is not None]
            if not names:
                continue
            try:
                texts = await self._scripts.redis.mget([key for key, _ in names])
            except RedisError as error:
                raise RedisUnreachable from error
            records: list[Record] = []
            unread = 0
            for (_, name), text in zip(names, texts, strict=True):
                if text is None:
                    continue  # its retention is over since
                owner = clients[name.client].distributor if name.client in clients else name.client
                try:
                    record = Record.unpack(text, api=name.api, distributor=owner, client=name.client, key=name.key)
                except ValueError:
                    unread += 1
                    continue
                records.append(record)
                self._reach(record.rule.pool, record.codes)
            yield records, unread

    async def leave(self) -> None:
        """Nothing is accepted any more from the generation that is open, so what Redis has of it stands still."""
        try:
            await self._scripts.redis.hdel(keys.generation(self.partition), "replid", "run_id")
        except RedisError as error:
            raise RedisUnreachable from error

    async def read_outboxes(self) -> None:
        """How far stock has gone by the entries that are not in the ledger yet."""
        for generation in sorted(self.generations):
            after = "-"
            while page := await self._outbox(generation, after):
                after = f"({page[-1][0]}"
                for entry_id, fields in page:
                    with suppress(ValueError, KeyError):  # a malformed one names no code
                        entry = parse(self.partition, generation, entry_id, fields)
                        for record in entry.records:
                            self._reach(record.rule.pool, record.codes)
                        self._reach("", entry.asides)

    async def read_windows(self, database: Database) -> None:
        """The windows of every generation, and the books of the open one."""
        async with database.read() as conn:
            pools = set(await stock.stock_versions(conn))
        if self.snapshot is not None:
            pools |= {pool.id for pool in self.snapshot.pools}
        for pool in sorted(pools):
            for generation in sorted(self.generations):
                held = await self._window(generation, pool)
                self.windows.setdefault(pool, []).extend(held)
        if self.seen.open:
            self.books = await self._scripts.books(sorted(pools), generation=self.seen.open)
        self.stock_versions = {pool: one.stock for pool, one in self.books.windows.items()} if self.books else {}

    def _reach(self, pool: str, codes: Iterable[Code]) -> None:
        for code in codes:
            had = self.extents.get(code.lot, Extent(pool, code.expires_at, 0))
            if code.seq >= had.end or not had.pool:
                self.extents[code.lot] = Extent(had.pool or pool, code.expires_at, max(had.end, code.seq + 1))

    async def _keys(self) -> AsyncIterator[list[str]]:
        cursor = 0
        while True:
            try:
                cursor, found = await self._scripts.redis.scan(
                    cursor, match=keys.of_partition(self.partition), count=PAGE
                )
            except RedisError as error:
                raise RedisUnreachable from error
            yield found
            if cursor == 0:
                return

    async def _outbox(self, generation: int, after: str) -> list[tuple[str, dict[str, str]]]:
        try:
            page: list[tuple[str, dict[str, str]]] = await self._scripts.redis.xrange(
                keys.outbox(self.partition, generation), after, "+", count=RANGE
            )
        except RedisError as error:
            raise RedisUnreachable from error
        return page

    async def _window(self, generation: int, pool: str) -> list[Code]:
        key, held = keys.window(self.partition, generation, pool), list[str]()
        try:
            while page := await self._scripts.redis.lrange(key, len(held), len(held) + RANGE - 1):
                held += page
        except RedisError as error:
            raise RedisUnreachable from error
        return [Code.unpack(text) for text in held]
