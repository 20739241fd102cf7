"""A rehearsal of an import: what it would do, and nothing is written."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from sqlalchemy import select

from service.errors import Misconfigured, NotFound
from service.store import intake, schema
from service.store.database import Database
from service.store.intake import Earlier, Good, Refused
from service.store.stock import CHUNK_ROWS_MAX, Row
from service.worker.stocking import ImportReport, Listener, Tally, is_known

# Of the file of lines seen before, held in memory.
SEEN_CACHE_KIB: Final = 32 * 1024


async def rehearse_import(
    database: Database,
    pool: str,
    rows: Iterable[Row],
    *,
    import_id: str,
    content: str = "",
    listener: Listener | None = None,
    now: Callable[[], int] = lambda: int(time.time()),
) -> ImportReport:
    """What ``import_codes`` with the same arguments would report, as the store is now.

    Raises NotFound for an unknown pool, Conflict if the import belongs to another one, and Misconfigured if there is no
    room for a temporary file.
    """
    tally = Tally(listener or Listener())
    if await is_known(database, import_id, pool, content):
        return tally.report(import_id, pool, known=True, dry_run=True)
    async with database.read() as conn:
        into = (await conn.execute(select(schema.pools).where(schema.pools.c.id == pool))).first()
        begun = (await conn.execute(select(schema.imports).where(schema.imports.c.id == import_id))).first()
    if into is None:
        raise NotFound(f"there is no pool {pool}: create it first")
    resumed_after = int(begun.lines_done) if begun is not None else 0
    tally.listener.begun(resumed_after)
    iterator, seen = iter(rows), _Seen()
    try:
        while chunk := list(islice(iterator, CHUNK_ROWS_MAX)):
            good, refused = intake.sift(chunk, into.default_expires_at, now())
            new = [row for row in good if row.line > resumed_after]
            async with database.read() as conn:
                new, stored = await intake.without_duplicates(conn, pool, new, Earlier(whole=not resumed_after))
            seen.add([row for row in good if row.line <= resumed_after])
            new, repeated = seen.add(new)
            refused = [one for one in (*refused, *stored, *repeated) if one.line > resumed_after]
            lines = sum(row.line > resumed_after for row in chunk)
            refused.sort(key=lambda each: each.line)
            tally.refuse(refused)
            tally.add(lines, len(new), refused)
    except sqlite3.Error as error:
        raise Misconfigured(
            f"a dry run keeps what it has seen in a temporary file, and can't: {error}; name another directory with "
            "SQLITE_TMPDIR"
        ) from None
    finally:
        seen.close()
    return tally.report(
        import_id, pool, dry_run=True, resumed_after=resumed_after, inserted_before=begun.inserted if begun else 0
    )


class _Seen:
    """The codes and serial numbers of all lines so far, in a temporary file without a name: a real import has them in
    the store by then."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("", isolation_level=None)
        self._file.execute(f"pragma cache_size = -{SEEN_CACHE_KIB}")
        self._file.execute("pragma journal_mode = off")
        self._file.execute("create table codes (value blob primary key, line integer) without rowid")
        self._file.execute("create table serials (value text primary key, line integer) without rowid")

    def add(self, rows: list[Good]) -> tuple[list[Good], list[Refused]]:
        """Those that stand in no earlier call's lines, and those that do."""
        self._file.execute("begin")
        codes = self._repeated("codes", [(row.digest, row.line) for row in rows])
        fresh = [row for row in rows if row.line not in codes]
        serials = self._repeated("serials", [(row.serial, row.line) for row in fresh if row.serial is not None])
        self._file.execute("commit")
        return [row for row in fresh if row.line not in serials], [
            *(intake.in_file(line, "code", f"line {before}") for line, before in codes.items()),
            *(intake.in_file(line, "serial number", f"line {before}") for line, before in serials.items()),
        ]

    def _repeated(self, table: str, values: list[tuple[bytes, int]] | list[tuple[str, int]]) -> dict[int, int]:
        """Per line whose value stood in an earlier one, that line; the others are noted."""
        noted = self._file.executemany(f"insert or ignore into {table} values (?, ?)", values).rowcount  # noqa: S608
        if noted == len(values):
            return {}
        look = f"select line from {table} where value = ?"  # noqa: S608 - one of two names
        before = ((line, self._file.execute(look, (value,)).fetchone()[0]) for value, line in values)
        return {line: first for line, first in before if first != line}

    def close(self) -> None:
        self._file.close()
