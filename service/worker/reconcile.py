"""Reconciling: what a partner says it received, against what the ledger says it was given.

The file is read line by line and the ledger page by page; what has been seen is kept in a temporary file, so a million
lines take no more memory than a thousand.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import compress, islice
from pathlib import Path
from typing import Final, Literal

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import instant
from service.identity import same_id, uuid_told
from service.store import ledger, reconciling
from service.store.database import Database
from service.store.ledger import Wanted
from service.store.reconciling import Known
from service.store.stock import digest
from service.worker import patience
from service.worker.adoption import Adoption
from service.worker.partner_file import Line
from service.worker.unseen import Back

Outcome = Literal["matched", "different", "missing_here", "missing_there", "repeated", "unreadable"]

ADOPTED: Final = "adopted"  # places, and reasons
QUARANTINED: Final = "quarantined"

# Lines that are looked up together: some statements of one IN list each.
LINES_MAX: Final = 5_000

# How far a partner's clock may be behind ours before a voucher was "received before it was issued".
CLOCK_S: Final = 300


class Result(msgspec.Struct, frozen=True):
    """One voucher of one side or both.  ``line`` is 0 if the file lacks it; ``pool`` is '', ``lot`` and ``seq``
    None if the store does not know the code."""

    outcome: Outcome
    reason: str
    code: str
    line: int = 0
    request_id: str = ""
    voucher_id: str = ""
    distributor: str = ""
    issued_at: str = ""
    pool: str = ""
    lot: int | None = None
    seq: int | None = None


class Reconciled(msgspec.Struct, frozen=True):
    """How many vouchers by outcome and reason, of ``lines`` in the file; ``returned``: codes that came back to stock
    from quarantine, or would; ``adopted``: codes that came from there into the ledger, or would."""

    lines: int
    counts: dict[tuple[Outcome, str], int]
    returned: int = 0
    adopted: int = 0

    def of(self, outcome: Outcome) -> int:
        return sum(count for (one, _), count in self.counts.items() if one == outcome)


async def reconcile(
    database: Database,
    lines: Iterable[Line],
    wanted: Wanted,
    distributors: Sequence[str],
    *,
    back: Back | None = None,
    adoption: Adoption | None = None,
    progress: Callable[[int], None],
    tell: Callable[[Sequence[Result]], None],
) -> Reconciled:
    """``tell`` was told every voucher of ``lines`` and every one that the ledger has as ``wanted``, page by page, each
    once: what the file says first, in its order, then what it lacks.

    ``wanted`` says of which period, and ``distributors`` whose file it is.  ``progress`` is told the lines looked at so
    far.  All of it is one snapshot of the store; ``adoption`` adopts what the file names, page by page, so what is told
    is what was before, and ``back`` returns at the end what the file proves to be nobody's.  Raises StoreUnreachable,
    and what ``lines``, ``tell``, ``adoption`` and ``back`` raise.
    """
    counts: Counter[tuple[Outcome, str]] = Counter()

    def count(page: Sequence[Result]) -> None:
        counts.update((one.outcome, one.reason) for one in page)
        tell(page)

    done = 0
    if adoption is not None:
        await adoption.begin()
    with _seen() as seen:
        async with database.read() as conn:
            iterator = iter(lines)
            while some := list(islice(iterator, LINES_MAX)):
                patience.stop_if_cancelled()
                here = await _here(conn, some, wanted, distributors, seen)
                count(here)
                if adoption is not None:
                    lost = (one.reason == QUARANTINED and one.outcome == "missing_here" for one in here)
                    await adoption.adopt(list(compress(some, lost)))
                done += len(some)
                progress(done)
            for one in distributors:
                of_one = msgspec.structs.replace(wanted, distributor=one)
                async for page in ledger.earliest_first(conn, of_one):
                    patience.stop_if_cancelled()
                    count([_lacking(given) for given in page if not seen.has(digest(given.code))])
        found = Reconciled(done, dict(counts), adopted=0 if adoption is None else adoption.adopted)
        if back is None:
            return found
        back.refuse_incomplete(found.of("unreadable") + found.of("missing_there"))
        return msgspec.structs.replace(found, returned=await back.run(seen.has))


async def _here(
    conn: AsyncConnection, lines: Sequence[Line], wanted: Wanted, distributors: Sequence[str], seen: _Seen
) -> list[Result]:
    known = await reconciling.known(conn, [digest(line.code) for line in lines if not line.unreadable])
    results = []
    for line in lines:
        if line.unreadable:
            results.append(Result("unreadable", line.unreadable, "", line.line))
            continue
        mark = digest(line.code)
        one = known.get(mark)
        outcome, reason = _judged(line, one, wanted, distributors) if seen.add(mark) else ("repeated", "")
        results.append(_result(outcome, reason, line, one))
    return results


def _judged(line: Line, one: Known | None, wanted: Wanted, distributors: Sequence[str]) -> tuple[Outcome, str]:
    if one is None:
        return "missing_here", "unknown code"
    if one.place not in ("issued", ADOPTED):
        return "missing_here", one.place
    if one.distributor not in distributors:
        return "different", "issued to another distributor"
    if line.idempotency_key and not same_id(line.idempotency_key, one.key):
        return "different", "another idempotency_key"
    if line.request_id and not _is_request(line, one):
        return "different", "another request_id"
    if one.place == ADOPTED:
        return "matched", ADOPTED  # the rest was taken from a line such as this
    if line.voucher_id is not None and line.voucher_id != one.voucher_id:
        return "different", "another voucher_id"
    if line.received_at is not None and line.received_at < one.issued_at - CLOCK_S:
        return "different", "received before it was issued"
    if one.issued_at < wanted.since or (wanted.until and one.issued_at >= wanted.until):
        return "matched", "issued outside of the period"
    return "matched", ""


def _is_request(line: Line, one: Known) -> bool:
    if one.place == ADOPTED and line.idempotency_key:
        return True  # our answer's id is not known of what was adopted
    return same_id(line.request_id, one.key) or same_id(line.request_id, uuid_told(one.answer_id))


def _result(outcome: Outcome, reason: str, line: Line, one: Known | None) -> Result:
    if one is None:
        return Result(outcome, reason, line.code, line.line, line.request_id)
    return Result(
        outcome, reason, line.code, line.line, one.key or line.request_id, uuid_told(one.voucher_id),
        one.distributor, instant(one.issued_at) if one.issued_at else "", one.pool, one.lot, one.seq,
    )  # fmt: skip


def _lacking(one: ledger.Found) -> Result:
    return Result(
        "missing_there", "given twice" if one.double else "", one.code, 0, one.request_id, uuid_told(one.voucher_id),
        one.distributor, instant(one.issued_at), one.pool, one.lot, one.seq,
    )  # fmt: skip


class _Seen:
    """The digests that a file names, on disk."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("pragma journal_mode = off")
        connection.execute("pragma synchronous = off")  # it is gone with the process, whatever happens
        connection.execute("create table seen (digest blob primary key) without rowid")

    def add(self, mark: bytes) -> bool:
        """Whether it was not there before."""
        return bool(self._connection.execute("insert or ignore into seen values (?)", (mark,)).rowcount)

    def has(self, mark: bytes) -> bool:
        return self._connection.execute("select 1 from seen where digest = ?", (mark,)).fetchone() is not None


@contextmanager
def _seen() -> Iterator[_Seen]:
    with (
        tempfile.TemporaryDirectory(prefix="voucherd-") as folder,
        closing(sqlite3.connect(Path(folder) / "seen", isolation_level=None)) as connection,
    ):
        yield _Seen(connection)
