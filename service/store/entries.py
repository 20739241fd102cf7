"""Outbox entries as the rows that hold them, and those rows' key.  Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, Final, NamedTuple

import msgspec

from service import traceparent
from service.domain import RECORD_SEPARATOR, Code, Record, Rule
from service.identity import IdKeys
from service.store.schema import LITTLE_LIFE, TAKEN_BACK, WITHDRAWN
from service.store.stock import digest

INTEGER_MAX: Final = 2**63 - 1


class Entry(msgspec.Struct, frozen=True):
    """One outbox entry: issued records and set-aside codes, its codes numbered in this order by ``ordinal``.

    ``why``: what its set-aside codes left the window for, LITTLE_LIFE, WITHDRAWN or TAKEN_BACK.
    ``partition`` and ``generation`` are those of the stream that it was read from.  ``traces``: the traceparent of
    each record's request, '' if it sent none; no trace at all if none did.
    """

    partition: int
    generation: int
    outbox_seq: int
    entry_id: str
    records: tuple[Record, ...]
    asides: tuple[Code, ...]
    why: str = LITTLE_LIFE
    traces: tuple[str, ...] = ()

    @property
    def codes(self) -> int:
        """How many codes the entry holds."""
        return sum(len(record.codes) for record in self.records) + len(self.asides)

    @property
    def position(self) -> tuple[int, int, int]:
        """What is written once: partition, generation, ``outbox_seq``."""
        return self.partition, self.generation, self.outbox_seq

    def content(self) -> bytes:
        """The entry's records and then its set-aside codes, for keeping it as it is."""
        packed = [record.pack_entry() for record in self.records] + [code.pack() for code in self.asides]
        return RECORD_SEPARATOR.join(packed).encode(errors="surrogateescape")


class Way(NamedTuple):
    """One code's way through the outbox: the key of every row that says what became of it."""

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int


def way_of(row: Any) -> Way:
    """The key of a row, from its four columns."""
    return Way(row.partition, row.generation, row.outbox_seq, row.ordinal)


class RequestRow(NamedTuple):
    """A row of ``requests``, its columns in their order."""

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int
    quantity: int
    api: str
    distributor: str
    client: str
    key: str
    payload: str
    terminal: str
    campaign: str
    pool: str
    category: str
    product: str
    until: int
    id_key: str
    terms: str
    issued_at: int
    flushed_at: int
    answer_id: bytes | None
    trace_id: str
    parent_id: str

    @property
    def said(self) -> tuple[object, ...]:
        """What the request's record says of it, by which the same entry is known again.  The rest depends on the worker
        that wrote it, and on its version."""
        return self[:_SAID]


_SAID: Final = RequestRow._fields.index("flushed_at")


class IssuanceRow(NamedTuple):
    """A row of ``issuances``, its columns in their order."""

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int
    request_ordinal: int
    lot: int
    seq: int
    code: str
    serial: str
    expires_at: int
    digest: bytes
    voucher_id: bytes | None
    short: str | None
    pin: int | None


class AsideRow(NamedTuple):
    """A row of ``set_asides``, its columns in their order."""

    partition: int
    generation: int
    outbox_seq: int
    ordinal: int
    lot: int
    seq: int
    why: str
    flushed_at: int


class Rows(NamedTuple):
    """All rows of some entries, each list in the order of their ways."""

    requests: list[RequestRow]
    issuances: list[IssuanceRow]
    asides: list[AsideRow]


def rows_of(entries: Sequence[Entry], now: int, ids: IdKeys) -> Rows:
    """The rows that hold ``entries``, which are fit and sorted by position.

    Raises UnknownIdKey if a record's ids were derived with a key that is not of ``ids``.
    """
    rows = Rows([], [], [])
    for entry in entries:
        partition, generation, outbox_seq = entry.position
        ordinal = 0
        for record, trace in zip(entry.records, entry.traces or repeat(""), strict=False):
            rule, first = record.rule, ordinal
            answer_id = None
            if rule.id_key:
                number = ids.request_number(rule.id_key, record.client, record.key, record.issued_at)
                answer_id = number.to_bytes(16, "big")
            rows.requests.append(
                RequestRow(
                    partition, generation, outbox_seq, first, len(record.codes), record.api, record.distributor,
                    record.client, record.key, record.payload, record.terminal, rule.campaign, rule.pool,
                    rule.category, rule.product, rule.until, rule.id_key, rule.terms, record.issued_at, now,
                    answer_id, *traceparent.ids(trace),
                )
            )  # fmt: skip
            for code in record.codes:
                known_by: tuple[bytes | None, str | None, int | None] = (None, None, None)
                if rule.id_key:
                    voucher_id, short, pin = ids.identity(rule.id_key, code.lot, code.seq)
                    known_by = (bytes.fromhex(voucher_id.replace("-", "")), short, pin)
                rows.issuances.append(
                    IssuanceRow(
                        partition, generation, outbox_seq, ordinal, first, code.lot, code.seq, code.code, code.serial,
                        code.expires_at, digest(code.code), *known_by,
                    )
                )  # fmt: skip
                ordinal += 1
        for code in entry.asides:
            rows.asides.append(AsideRow(partition, generation, outbox_seq, ordinal, code.lot, code.seq, entry.why, now))
            ordinal += 1
    return rows


def unfit(entry: Entry) -> str | None:
    """Why rows can't hold what this entry says, None if they can.  The reason never holds a code."""
    if not 0 <= entry.outbox_seq <= INTEGER_MAX:
        return "its sequence is out of range"
    if entry.why not in (LITTLE_LIFE, WITHDRAWN, TAKEN_BACK):
        return "a reason that this version does not know"
    texts: list[str] = []
    for record in entry.records:
        if not record.codes:
            return "a record without a code"
        if not 0 <= record.issued_at <= INTEGER_MAX:
            return "a time is out of range"
        if (
            len(record.api) > 8 or len(record.key) > 128 or len(record.distributor) > 64 or len(record.client) > 64
            or len(record.terminal) > 64
        ):  # fmt: skip
            return "a field of a record is too long"
        if (reason := _unfit_rule(record.rule) or _unfit_codes(record.codes, texts)) is not None:
            return reason
        texts += (record.api, record.distributor, record.client, record.key, record.payload)
    return _unfit_codes(entry.asides, texts) or _unfit_text("".join(texts))


@lru_cache(maxsize=1_024)  # few rules make all records of a day
def _unfit_rule(rule: Rule) -> str | None:
    if not 0 <= rule.until <= INTEGER_MAX:
        return "a time is out of range"
    names = (rule.campaign, rule.pool, rule.category, rule.product)
    if len(rule.id_key) > 16 or any(len(text) > 64 for text in names):
        return "a field of a record is too long"
    return _unfit_text("".join((*names, rule.id_key, rule.terms)))


def _unfit_codes(codes: Sequence[Code], texts: list[str]) -> str | None:
    """``texts`` has theirs afterwards."""
    for code in codes:
        if not (0 <= code.lot <= INTEGER_MAX and 0 <= code.seq <= INTEGER_MAX and 0 <= code.expires_at <= INTEGER_MAX):
            return "a number of a code is out of range"
        if len(code.code) > 128 or len(code.serial) > 64:
            return "a field of a code is too long"
        texts += (code.code, code.serial)
    return None


def _unfit_text(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "text that is not Unicode"
    return None
