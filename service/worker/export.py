"""Exports of the ledger: lines of CSV or NDJSON, files that are whole or not there, and whether a period is over."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import orjson
from redis.exceptions import RedisError

from service import keys
from service.domain import instant
from service.errors import Fault, RedisUnreachable
from service.identity import uuid_told
from service.scripts import Scripts
from service.store import generations, ledger
from service.store.database import Database
from service.store.ledger import Found, Wanted

Format = Literal["csv", "ndjson"]

# A spreadsheet takes a cell that begins so for a formula and runs it (reliability.md, "Rules").
FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


class PeriodIncomplete(Fault):
    """Vouchers of the period may still be on their way to the ledger."""


async def export(
    database: Database, wanted: Wanted, file_format: Format, file: BinaryIO, *, progress: Callable[[int], None]
) -> int:
    """What is ``wanted`` of the ledger is in ``file``, as one snapshot has it; how many vouchers that was.

    ``progress`` is told the vouchers written so far, page by page.  Raises StoreUnreachable, and what ``file`` raises.
    """
    written = 0
    file.write(head(file_format))
    async with database.read() as conn:
        async for page in ledger.earliest_first(conn, wanted):
            file.write(lines(page, file_format))
            written += len(page)
            progress(written)
    file.flush()
    return written


async def refuse_incomplete(database: Database, scripts: Scripts, until: int) -> None:
    """All that was issued before ``until`` (Unix seconds) is in the ledger, for whoever reads it from now on.

    Raises PeriodIncomplete if the period is not over by the clock of Redis, or an outbox, that of a generation which
    was left included, still holds something of it; RedisUnreachable if Redis can't be asked.
    """
    async with database.read() as conn:
        left = await generations.closed(conn, scripts.partition)
    seen = await scripts.generation()
    if not seen.agrees:
        raise PeriodIncomplete("no generation is open in Redis, so nobody knows whether all of the period is flushed")
    try:
        now, _ = await scripts.redis.time()
        async with scripts.redis.pipeline(transaction=False) as pipe:
            for generation in {seen.open, *left}:
                pipe.xrange(keys.outbox(scripts.partition, generation), count=1)
            oldest: list[Any] = await pipe.execute()
    except RedisError as error:
        raise RedisUnreachable from error
    if now < until:
        raise PeriodIncomplete(f"the period is not over: it ends at {instant(until)}, Redis has {instant(now)}")
    if any(int(entries[0][0].split("-")[0]) < until * 1000 for entries in oldest if entries):
        raise PeriodIncomplete("vouchers of the period are still in the outbox: see that `voucherd work` runs")


# --- lines -------------------------------------------------------------------------------------------------------


def fields(one: Found) -> dict[str, object]:
    """Names and forms of the API, and where the voucher came from and went."""
    expires_at = min(one.expires_at, one.until) if one.until else one.expires_at
    return {
        "voucher_code": one.code,
        "serial_number": one.serial,
        "expiry_date": instant(expires_at),
        "issued_at": instant(one.issued_at),
        "request_id": one.request_id,
        "distributor_id": one.distributor,
        "terminal_id": one.terminal,
        "campaign_id": one.campaign,
        "category_id": one.category,
        "product_id": one.product,
        "api": one.api,
        "pool": one.pool,
        "lot": one.lot,
        "seq": one.seq,
        "outbox": f"{one.partition}/{one.generation}/{one.outbox_seq}.{one.ordinal}",
        "flushed_at": instant(one.flushed_at),
        "double": one.double,
        "voucher_id": uuid_told(one.voucher_id),
        "client_reference": one.client_reference,
        "answer_id": uuid_told(one.answer_id),
        "trace_id": one.trace_id,
        "parent_id": one.parent_id,
    }


FIELDS: Final = tuple(fields(Found(*(0,) * 4, *("",) * 10, *(0,) * 6, "", "", 0, False)))


def head(file_format: Format) -> bytes:
    """What a file of this format begins with."""
    return csv_rows([FIELDS]) if file_format == "csv" else b""


def lines(page: Sequence[Found], file_format: Format) -> bytes:
    """One line a voucher: NDJSON holds the exact values, CSV is safe to open in a spreadsheet (RFC 4180, a cell that
    would be a formula begins with an apostrophe)."""
    if file_format == "ndjson":
        return b"".join(orjson.dumps(fields(one), option=orjson.OPT_APPEND_NEWLINE) for one in page)
    return csv_rows([list(fields(one).values()) for one in page])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def csv_rows(rows: Sequence[Sequence[object]]) -> bytes:
    """Lines of CSV (RFC 4180) that are safe to open in a spreadsheet: a cell that would be a formula begins with an
    apostrophe."""
    text = io.StringIO(newline="")
    safe = [[_cell(value) for value in row] for row in rows]
    csv.writer(text).writerows(safe)  # its own defaults are RFC 4180: commas, CRLF, quotes where needed
    return text.getvalue().encode("utf-8", "surrogateescape")


# --- files -------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is at ``path``, durably, if the body ends well; if not, what was there before still is.

    Written as ``<path>.….part`` beside it, so a process that was killed leaves only that.  Raises OSError.
    """
    part = part_of(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f"{path.name}.{_OURS}.part")


_OURS: Final = secrets.token_hex(4)  # two that write the same file at the same time must not share a part


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
