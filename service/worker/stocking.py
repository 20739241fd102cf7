"""Stocking: codes come into a pool, and every partition knows of them when the command returns (P4).

An import is many short transactions.  It may be interrupted between any two of them, or its last commit may be in
doubt: the store remembers how far it came, and the same import goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import msgspec
from sqlalchemy import select

from service import keys
from service.errors import Conflict, RedisUnreachable
from service.scripts import Scripts
from service.store import control, schema, stock
from service.store.database import Database
from service.store.intake import KINDS, Earlier, Kind
from service.store.stock import CHUNK_ROWS_MAX, Refused, Row
from service.worker import patience
from service.worker.currency import refuse_older

# Refused lines that a report keeps, so that a file of nothing but bad lines fits in memory; the listener gets all.
REFUSED_KEPT: Final = 1_000

# Seconds between two looks whether the store is still the one that Redis knows, as often as the worker looks.
CURRENCY_S: Final = 10.0


class Progress(msgspec.Struct, frozen=True):
    """How far this run of an import is: lines looked at, codes put in stock, lines refused."""

    lines: int
    inserted: int
    refused: int


class ImportReport(msgspec.Struct, frozen=True):
    """What an import did.  ``lines``, ``inserted``, ``refused``, ``kinds`` (how many lines of each) and ``reasons``
    (the first REFUSED_KEPT) are of this run; ``resumed_after`` is the line up to which an earlier run had come,
    ``inserted_before`` the codes that other runs put in.

    ``known``: the import was finished before; nothing was done.  ``dry_run``: nothing was written, the rest says what
    would have been.  ``unreached``: partitions that may still take the pool for exhausted (empty: none); ``work`` goes
    on trying those.
    """

    import_id: str
    pool: str
    known: bool
    dry_run: bool
    resumed_after: int
    lines: int
    inserted: int
    inserted_before: int
    refused: int
    kinds: dict[Kind, int]
    reasons: list[Refused]
    unreached: list[str]


class Listener:
    """Who is told how an import goes, after each transaction.  This one does nothing with it."""

    def begun(self, resumed_after: int) -> None:
        """Lines after this one are about to be looked at; told once, and not if the import is known."""

    def refused(self, lines: Sequence[Refused]) -> None:
        """These lines are refused; all of them are told, in their order, before that is committed.  A run that ends
        before it is leaves some told that the next run looks at again, after the line that ``begun`` tells it."""

    def progress(self, so_far: Progress) -> None:
        """So much was done."""


class Tally:
    """Sums up what was done, transaction by transaction, and tells the listener."""

    def __init__(self, listener: Listener) -> None:
        self.lines = 0
        self.inserted = 0
        self.kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.reasons: list[Refused] = []
        self.listener = listener

    @property
    def refused(self) -> int:
        return sum(self.kinds.values())

    def refuse(self, refused: Sequence[Refused]) -> None:
        """Tells the listener of these lines."""
        if refused:
            self.listener.refused(refused)

    def add(self, lines: int, inserted: int, refused: Sequence[Refused]) -> None:
        """Counts what was done, the lines that were refused among it."""
        self.lines += lines
        self.inserted += inserted
        for one in refused:
            self.kinds[one.kind] += 1
        self.reasons += refused[: REFUSED_KEPT - len(self.reasons)]
        self.listener.progress(Progress(self.lines, self.inserted, self.refused))

    def report(
        self,
        import_id: str,
        pool: str,
        *,
        known: bool = False,
        dry_run: bool = False,
        resumed_after: int = 0,
        inserted_before: int = 0,
        unreached: Sequence[str] = (),
    ) -> ImportReport:
        return ImportReport(
            import_id, pool, known, dry_run, resumed_after, self.lines, self.inserted, inserted_before, self.refused,
            self.kinds, self.reasons, list(unreached),
        )  # fmt: skip


async def import_codes(
    database: Database,
    scripts: Scripts,
    pool: str,
    rows: Iterable[Row],
    *,
    import_id: str,
    content: str = "",
    listener: Listener | None = None,
    actor: str = "voucherd",
    now: Callable[[], int] = lambda: int(time.time()),
) -> ImportReport:
    """The good ones of ``rows`` are in stock, and nothing takes the pool for exhausted any more.

    ``rows`` are the same at every call with the same ``import_id``, their lines rising; at most CHUNK_ROWS_MAX are
    held at a time; ``content`` is their SHA-256, '' if nobody knows.  Two calls for the same import at the same time
    share the work.

    Raises NotFound for an unknown pool, Conflict if the import is of another pool or of other content, StoreIsOlder,
    and RedisUnreachable before anything is written if the store can't be checked against Redis.  After a fault in
    between the same call goes on where this one came to.
    """
    tally = Tally(listener or Listener())
    await refuse_unchecked(database, scripts)
    checked_at = time.monotonic()
    if await is_known(database, import_id, pool, content):
        return tally.report(import_id, pool, known=True, unreached=await raise_stock(database, scripts, pool))
    iterator = iter(rows)
    chunk = list(islice(iterator, CHUNK_ROWS_MAX))  # first: what can't be read at all must not begin an import
    try:
        async with database.write() as conn:
            resumed_after = await stock.begin_import(conn, import_id, pool, now(), content)
    except Conflict:
        if not await is_known(database, import_id, pool, content):
            raise
        # Another run of the same import has finished it just now.
        return tally.report(import_id, pool, known=True, unreached=await raise_stock(database, scripts, pool))
    tally.listener.begun(resumed_after)
    done_to, earlier, look = resumed_after, Earlier(whole=not resumed_after), False
    while chunk:
        if chunk[-1].line > done_to:
            if time.monotonic() - checked_at > CURRENCY_S:
                await refuse_unchecked(database, scripts)
                checked_at = time.monotonic()
            async with database.write() as conn:
                done = await stock.import_rows(conn, import_id, pool, chunk, now(), earlier, look=look)
                tally.refuse(done.refused)  # before it is committed: what is told too early can be told again
            if done.inserted:
                # Now and not at the end: P4 holds for whoever asks in between as well.
                await tell_stock(scripts, pool, done.stock_version)
            earlier.add(done.placed)
            if done.lines < sum(row.line > done_to for row in chunk):
                earlier.whole = False  # another run of the same import did a part just now
            done_to = done.lines_done
            look = any(one.kind != "invalid" for one in done.refused)  # where there are some, there are more
            tally.add(done.lines, done.inserted, done.refused)
        patience.stop_if_cancelled()
        chunk = list(islice(iterator, CHUNK_ROWS_MAX))
    unreached = await raise_stock(database, scripts, pool)  # before it is finished: a run that dies here is repeated
    async with database.write() as conn:
        total = await stock.finish_import(conn, import_id, now())
        detail = f"import {import_id}: {total.inserted} codes, {total.refused} lines refused"
        await control.log(conn, actor=actor, action="codes import", subject=pool, detail=detail, now=now())
    return tally.report(
        import_id, pool, resumed_after=resumed_after, inserted_before=total.inserted - tally.inserted,
        unreached=unreached,
    )  # fmt: skip


async def is_known(database: Database, import_id: str, pool: str, content: str = "") -> bool:
    """Whether this import is finished.  Raises Conflict if it is of another pool or of other content."""
    async with database.read() as conn:
        found = (await conn.execute(select(schema.imports).where(schema.imports.c.id == import_id))).first()
    if found is None:
        return False
    stock.refuse_other_import(found, pool, content)
    return found.finished_at is not None


async def refuse_unchecked(database: Database, scripts: Scripts) -> None:
    try:
        await refuse_older(database, scripts)
    except RedisUnreachable as fault:
        raise RedisUnreachable(
            "Redis did not answer, so it can't be told whether the store is up to date: nothing more is imported"
        ) from fault


async def raise_stock(database: Database, scripts: Scripts, pool: str) -> list[str]:
    """The pool's stock version, also what an earlier run committed, is known to every partition but those returned."""
    async with database.read() as conn:
        version = (await stock.stock_versions(conn))[pool]
    deadline = time.monotonic() + patience.UNREACHED_S
    while True:
        reason = await tell_stock(scripts, pool, version)
        if not reason:
            return []
        if time.monotonic() > deadline:
            return [f"{keys.tag(scripts.partition)}: {reason}"]
        await asyncio.sleep(patience.UNREACHED_POLL_S)


async def tell_stock(scripts: Scripts, pool: str, version: int) -> str:
    """'' once the open generation knows the stock version (or none is open: a new one begins with it), else why not."""
    try:
        seen = await scripts.generation()
        if not seen.open or await scripts.stock(pool, version, generation=seen.open) == "OK":
            return ""
        return "it is being recovered"
    except RedisUnreachable:
        return "Redis did not answer"
