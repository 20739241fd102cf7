"""Generating: codes are made by a pattern, as many as are asked for, or ahead in blocks for pools that never run dry.

Codes go the way of an import, in short transactions under the pool's lock.  Each is a line of it, so that it can be
interrupted anywhere and gone on with, and so that two who do the same at once share the work: whoever offers lines that
the other has done is passed over.  A code that is in stock already, in whatever pool, is refused like any other and
another one drawn.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import blake2b, sha256
from itertools import islice
from typing import Final

import msgspec
import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, NotFound
from service.scripts import Scripts
from service.store import control, returning, schema, stock
from service.store.database import Database
from service.store.stock import CHUNK_ROWS_MAX, Row
from service.worker import forms, patience
from service.worker.pattern import Pattern, refuse_crowded
from service.worker.stocking import (
    CURRENCY_S,
    ImportReport,
    Listener,
    Tally,
    is_known,
    raise_stock,
    refuse_unchecked,
    tell_stock,
)

log = structlog.get_logger()

# Codes of one command: some minutes.
CODES_MAX: Final = 10_000_000

# Codes that a generated pool has in stock ahead of its windows: a few seconds of the highest peak, made in two
# transactions.
AHEAD_CODES: Final = 2 * CHUNK_ROWS_MAX

# Codes that a generated pool must have room for: one that "never runs dry" within a campaign.
GENERATED_MIN: Final = 1_000_000

DAYS_MAX: Final = 36_500
DAY_S: Final = 86_400


class Generator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pool is filled by.  ``days``: codes expire at the end of the day (UTC) so many days after they were made;
    None: by the pool's own expiry."""

    pattern: Pattern
    days: int | None = None

    def expires_at(self, now: int) -> int | None:
        """The expiry of codes that are made ``now``; None for the pool's own."""
        if self.days is None:
            return None
        day = datetime.fromtimestamp(now, UTC).date() + timedelta(days=self.days + 1)
        return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - 1

    def pack(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def unpack(cls, text: str) -> Generator:
        """Raises msgspec.DecodeError if ``text`` is none (of this version)."""
        return msgspec.json.decode(text, type=cls)


def new_generator(pattern: Pattern, days: int | None, default_expires_at: int | None, least_life_s: int) -> Generator:
    """What a new pool can be filled by.  Raises Conflict."""
    if days is None and default_expires_at is None:
        raise Conflict("generated codes need an expiry: say when all of them expire, or after how many days")
    if days is not None and not 1 <= days <= DAYS_MAX:
        raise Conflict(f"generated codes expire after 1 to {DAYS_MAX} days")
    if days is not None and least_life_s >= days * DAY_S:  # one made in a day's last second has no more than that
        raise Conflict(
            f"codes that expire after {days} days never have more than the least life of this pool, "
            f"{forms.duration_told(least_life_s)}: let them expire later"
        )
    refuse_crowded(pattern, 0, GENERATED_MIN)
    next(pattern.draw(random.SystemRandom()))  # says it now if its words leave none, and not the worker every step
    return Generator(pattern, days)


async def generate_codes(
    database: Database,
    scripts: Scripts,
    pool: str,
    count: int,
    pattern: Pattern,
    *,
    expires_at: int | None,
    import_id: str,
    listener: Listener | None = None,
    actor: str = "voucherd",
    source: random.Random | None = None,
    now: Callable[[], int] = lambda: int(time.time()),
) -> ImportReport:
    """``count`` new codes of the pattern are in stock, and nothing takes the pool for exhausted any more.

    ``expires_at``: Unix seconds, None for the pool's own expiry.  After a fault or a kill the same call with the same
    ``import_id`` adds those that are missing: it is exactly ``count`` in the end.

    Raises Conflict before anything is written if the pattern has too few codes, if there is no expiry, or if the import
    is of another pool or was begun with another count, pattern or expiry; NotFound, StoreIsOlder, RedisUnreachable and
    StoreUnreachable as ``import_codes`` does.
    """
    if not 1 <= count <= CODES_MAX:
        raise Conflict(f"1 to {CODES_MAX:,} codes can be generated at once")
    tally = Tally(listener or Listener())
    content = sha256(f"{count}\n{expires_at}\n".encode() + msgspec.json.encode(pattern)).hexdigest()
    await refuse_unchecked(database, scripts)
    if await is_known(database, import_id, pool, content):
        return tally.report(import_id, pool, known=True, unreached=await raise_stock(database, scripts, pool))
    try:
        async with database.write() as conn:
            done = await stock.begin_import(conn, import_id, pool, now(), content)
            inserted = (await _state(conn, import_id)).inserted
            there, default_expires_at, _ = await _pool(conn, pool)
            _refuse_expiry(pool, default_expires_at if expires_at is None else expires_at, now())
            refuse_crowded(pattern, there, count - inserted)
    except Conflict:
        if not await is_known(database, import_id, pool, content):
            raise
        # Another run of the same has finished it just now.
        return tally.report(import_id, pool, known=True, unreached=await raise_stock(database, scripts, pool))
    drawn, checked_at = pattern.draw(source or random.SystemRandom()), time.monotonic()
    tally.listener.begun(done)
    resumed_after = done
    while inserted < count:
        if time.monotonic() - checked_at > CURRENCY_S:
            await refuse_unchecked(database, scripts)
            checked_at = time.monotonic()
        # Never more lines than codes are missing: whatever another run of this did meanwhile, it is `count` at most.
        chunk = [
            Row(done + line, code, None, expires_at)
            for line, code in enumerate(islice(drawn, min(CHUNK_ROWS_MAX, count - inserted)), 1)
        ]
        async with database.write() as conn:
            put = await stock.import_rows(conn, import_id, pool, chunk, now())
            state = await _state(conn, import_id)
        if put.inserted:
            await tell_stock(scripts, pool, put.stock_version)
        if wrong := next((one for one in put.refused if one.kind == "invalid"), None):
            raise Conflict(f"pool {pool} takes no code of {pattern.text}: {wrong.reason}")
        patience.stop_if_cancelled()
        done, inserted = state.lines_done, state.inserted
        tally.add(put.lines, put.inserted, put.refused)
    unreached = await raise_stock(database, scripts, pool)
    async with database.write() as conn:
        total = await stock.finish_import(conn, import_id, now())
        detail = f"import {import_id}: {total.inserted} codes of {pattern.text}"
        await control.log(conn, actor=actor, action="codes generate", subject=pool, detail=detail, now=now())
    return tally.report(
        import_id, pool, resumed_after=resumed_after, inserted_before=total.inserted - tally.inserted,
        unreached=unreached,
    )  # fmt: skip


def _refuse_expiry(pool: str, expires_at: int | None, now: int) -> None:
    if expires_at is None:
        raise Conflict(f"pool {pool} has no expiry of its own: say when these codes expire")
    if expires_at <= now:
        raise Conflict("codes that have expired already can't be issued: give them a later expiry")


class Fill:
    """Keeps AHEAD_CODES codes in stock in every pool that is generated."""

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        *,
        source: random.Random | None = None,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._source = source or random.SystemRandom()
        self._now = now
        self._used_up: set[str] = set()

    async def run_once(self) -> int:
        """Every generated pool has AHEAD_CODES codes to lease, or one block more than before; how many were made.

        Raises StoreUnreachable, StoreIsOlder, RedisUnreachable.
        """
        async with self._database.read() as conn:
            generated = await conn.execute(
                select(schema.pools.c.id, schema.pools.c.least_life_s).where(schema.pools.c.generator.is_not(None))
            )
            pools = {row.id: row.least_life_s for row in generated}
            now = self._now()
            left = {life_s: await stock.left(conn, now + life_s) for life_s in set(pools.values())}
        short = [pool for pool, life_s in pools.items() if left[life_s].get(pool, 0) < AHEAD_CODES]
        if not short:
            return 0
        await refuse_unchecked(self._database, self._scripts)
        return sum([await self.block(pool) for pool in short])

    async def block(self, pool: str) -> int:
        """CHUNK_ROWS_MAX codes more are in stock; 0 if the pool is not generated, or nothing more can be.

        A pattern that is used up, an expiry that leaves codes too little life to be leased, and words that leave no
        code are told by the log once.
        """
        async with self._database.write() as conn:
            await stock.lock_pool(conn, pool)
            text = await conn.scalar(select(schema.pools.c.generator).where(schema.pools.c.id == pool))
            if text is None:
                return 0
            try:
                generator, now = Generator.unpack(text), self._now()
            except (msgspec.DecodeError, Conflict):
                return self._nothing(pool, "what it is generated by is of another version")
            there, default_expires_at, least_life_s = await _pool(conn, pool)
            expires_at = generator.expires_at(now) or default_expires_at
            room = generator.pattern.capacity - there + await returning.returned(conn, pool)
            if room <= 0:
                return self._nothing(pool, "its pattern is used up")
            # By the rule that leases go by: what none of them would take is not stock, and making it has no end.
            if expires_at is None or expires_at <= now + least_life_s:
                return self._nothing(pool, "its codes would expire too soon to be issued")
            try:
                drawn = list(islice(generator.pattern.draw(self._source), min(room, CHUNK_ROWS_MAX)))
            except Conflict as fault:  # one such pool must not keep the others from being filled
                return self._nothing(pool, str(fault))
            # One import a day: thousands of blocks are made in one, and its row counts them.
            import_id = f"generated.{blake2b(pool.encode(), digest_size=8).hexdigest()}.{now // DAY_S}"
            done = await stock.begin_import(conn, import_id, pool, now)
            rows = [Row(done + line, code, None, expires_at) for line, code in enumerate(drawn, 1)]
            put = await stock.import_rows(conn, import_id, pool, rows, now)
        await tell_stock(self._scripts, pool, put.stock_version)
        return put.inserted

    def _nothing(self, pool: str, reason: str) -> int:
        if pool not in self._used_up:
            self._used_up.add(pool)
            log.error("nothing more can be generated", pool=pool, reason=reason)
        return 0


async def _state(conn: AsyncConnection, import_id: str) -> stock.ImportState:
    imports = schema.imports
    row = (await conn.execute(select(imports).where(imports.c.id == import_id))).one()
    return stock.ImportState(row.lines_done, row.inserted, row.refused)


async def _pool(conn: AsyncConnection, pool: str) -> tuple[int, int | None, int]:
    """How many codes were ever put into the pool, its own expiry and the least life of its codes.  Raises NotFound."""
    of_pool = (schema.pools.c.default_expires_at, schema.pools.c.least_life_s)
    found = (
        await conn.execute(
            select(*of_pool, func.coalesce(func.sum(schema.lots.c.imported), 0).label("there"))
            .outerjoin(schema.lots, schema.lots.c.pool == schema.pools.c.id)
            .where(schema.pools.c.id == pool)
            .group_by(schema.pools.c.id, *of_pool)
        )
    ).first()
    if found is None:
        raise NotFound(f"there is no pool {pool}: create it first")
    return int(found.there), found.default_expires_at, found.least_life_s
