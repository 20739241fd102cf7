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
from service.errors import RedisUnreachable
from service.scripts import Scripts
from service.store import control, schema, stock
from service.store.database import Database
from service.store.stock import CHUNK_ROWS_MAX, Refused, Row
from service.worker.currency import refuse_older

# Refused lines that a report keeps, so that a file of nothing but bad lines fits in memory; ``on_refused`` gets all.
REFUSED_KEPT: Final = 1_000

# Seconds between two looks whether the store is still the one that Redis knows, as often as the worker looks.
CURRENCY_S: Final = 10.0

# Seconds that a partition which is being recovered is waited for.
UNREACHED_S: Final = 5.0
UNREACHED_POLL_S: Final = 0.1


class Progress(msgspec.Struct, frozen=True):
    """How far this run of an import is: lines looked at, codes put in stock, lines refused."""

    lines: int
    inserted: int
    refused: int


class ImportReport(msgspec.Struct, frozen=True):
    """What an import did.  ``lines``, ``inserted``, ``refused`` and ``reasons`` (the first REFUSED_KEPT) are of this
    run; ``resumed_after`` is the line up to which an earlier run had come, ``inserted_before`` the codes it put in.

    ``known``: the import was finished before; nothing was done.  ``unreached``: partitions that may still take the
    pool for exhausted (empty: none); ``work`` goes on trying those.
    """

    import_id: str
    pool: str
    known: bool
    resumed_after: int
    lines: int
    inserted: int
    inserted_before: int
    refused: int
    reasons: list[Refused]
    unreached: list[str]


def _nobody_looks(progress: Progress) -> None: ...


def _nobody_asks(refused: Sequence[Refused]) -> None: ...


async def import_codes(
    database: Database,
    scripts: Scripts,
    pool: str,
    rows: Iterable[Row],
    *,
    import_id: str,
    progress: Callable[[Progress], None] = _nobody_looks,
    on_refused: Callable[[Sequence[Refused]], None] = _nobody_asks,
    actor: str = "voucherd",
    now: Callable[[], int] = lambda: int(time.time()),
) -> ImportReport:
    """The good ones of ``rows`` are in stock, and nothing takes the pool for exhausted any more.

    ``rows`` are the same at every call with the same ``import_id``, their lines rising; at most CHUNK_ROWS_MAX are
    held at a time.  ``progress`` and ``on_refused`` are told after each transaction.

    Raises NotFound for an unknown pool, Conflict if the import belongs to another pool, StoreIsOlder, and
    RedisUnreachable before anything is written if the store can't be checked against Redis.  After a fault in
    between the same call goes on where this one came to.
    """
    await _refuse(database, scripts)
    checked_at = time.monotonic()
    if await _is_known(database, import_id, pool):
        unreached = await _raise_stock(database, scripts, pool)
        return ImportReport(import_id, pool, True, 0, 0, 0, 0, 0, [], unreached)
    iterator = iter(rows)
    chunk = list(islice(iterator, CHUNK_ROWS_MAX))  # first: what can't be read at all must not begin an import
    async with database.write() as conn:
        resumed_after = await stock.begin_import(conn, import_id, pool, now())
    lines = inserted = refused = 0
    reasons: list[Refused] = []
    while chunk:
        if chunk[-1].line > resumed_after:
            if time.monotonic() - checked_at > CURRENCY_S:
                await _refuse(database, scripts)
                checked_at = time.monotonic()
            async with database.write() as conn:
                done = await stock.import_rows(conn, import_id, pool, chunk, now())
            if done.inserted:
                # Now and not at the end: P4 holds for whoever asks in between as well.
                await _tell(scripts, pool, done.stock_version)
            lines += sum(row.line > resumed_after for row in chunk)
            inserted += done.inserted
            refused += len(done.refused)
            reasons += done.refused[: REFUSED_KEPT - len(reasons)]
            on_refused(done.refused)
            progress(Progress(lines, inserted, refused))
        chunk = list(islice(iterator, CHUNK_ROWS_MAX))
    unreached = await _raise_stock(database, scripts, pool)  # before it is finished: a run that dies here is repeated
    async with database.write() as conn:
        total = await stock.finish_import(conn, import_id, now())
        detail = f"import {import_id}: {total.inserted} codes, {total.refused} lines refused"
        await control.log(conn, actor=actor, action="codes import", subject=pool, detail=detail, now=now())
    return ImportReport(
        import_id, pool, False, resumed_after, lines, inserted, total.inserted - inserted, refused, reasons, unreached
    )


async def _refuse(database: Database, scripts: Scripts) -> None:
    try:
        await refuse_older(database, scripts)
    except RedisUnreachable as fault:
        raise RedisUnreachable(
            "Redis did not answer, so it can't be told whether the store is up to date: nothing more is imported"
        ) from fault


async def _is_known(database: Database, import_id: str, pool: str) -> bool:
    known = select(schema.imports.c.id).where(
        schema.imports.c.id == import_id, schema.imports.c.pool == pool, schema.imports.c.finished_at.is_not(None)
    )
    async with database.read() as conn:
        return (await conn.execute(known)).first() is not None


async def _raise_stock(database: Database, scripts: Scripts, pool: str) -> list[str]:
    """The pool's stock version, also what an earlier run committed, is known to every partition but those returned."""
    async with database.read() as conn:
        version = (await stock.stock_versions(conn))[pool]
    deadline = time.monotonic() + UNREACHED_S
    while True:
        reason = await _tell(scripts, pool, version)
        if not reason:
            return []
        if time.monotonic() > deadline:
            return [f"{keys.tag(scripts.partition)}: {reason}"]
        await asyncio.sleep(UNREACHED_POLL_S)


async def _tell(scripts: Scripts, pool: str, version: int) -> str:
    """'' once the open generation knows the stock version (or none is open: a new one begins with it), else why not."""
    try:
        seen = await scripts.generation()
        if not seen.open or await scripts.stock(pool, version, generation=seen.open) == "OK":
            return ""
        return "it is being recovered"
    except RedisUnreachable:
        return "Redis did not answer"
