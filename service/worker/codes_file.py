"""Codes in a file: CSV, ``code[,serial_number][,expires_at]`` with a header in any order, or NDJSON, one object a line.

A line is a line: a quote that is never closed costs its own line and not the rest of the file.  Nothing that is
said about a line quotes it, for it may hold a code in any column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, time
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec

from service.store.stock import Row
from service.worker.content import LINE_BYTES_MAX, Content, UnusableFile

COLUMNS: Final = ("code", "serial_number", "expires_at")

Fields = tuple[str, str | None, str | None]  # code, serial number, expiry

Format = Literal["csv", "ndjson"]

EXPIRY_RULE: Final = "expires_at has to be a day (2027-01-31) or a time with its zone (2027-01-31T12:00:00Z)"

# Expiries remembered, so that one which stands in every line is read once.
EXPIRIES_MAX: Final = 10_000

_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_BOM: Final = b"\xef\xbb\xbf"


class CodesFile:
    """One file of codes, or what is piped in.  The format is told by the first character unless it is given.

    ``id``, ``size`` and ``read`` are those of its content.
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        form: Format | None = None,
        looked_at: Callable[[int, int], None] = lambda read, size: None,
    ) -> None:
        """Raises UnusableFile as ``Content`` does, which explains ``looked_at``."""
        self._content = Content(source, looked_at)
        self._format = form
        self.id = self._content.id
        self.size = self._content.size

    @property
    def read(self) -> int:
        return self._content.read

    def close(self) -> None:
        """Nothing of what was piped in is kept."""
        self._content.close()

    def rows(self) -> Iterator[Row]:
        """Every line that is not empty, below the header if it has one; what can't be read comes with its reason.

        Raises UnusableFile at the first step if nothing is there or a CSV has no usable header, and at the end if the
        content is no longer what ``id`` says.
        """
        name, lines = self._content.name, enumerate(self._content.lines(), 1)
        for number, raw in lines:
            first = raw.removeprefix(_BOM) if number == 1 else raw
            if not first.strip():
                continue
            if (self._format or ("ndjson" if first.lstrip().startswith(b"{") else "csv")) == "ndjson":
                return _rows(chain([(number, first)], lines), _json_fields)
            return _rows(lines, _csv_fields(_header(name, first)))
        raise UnusableFile(
            f"{name} is empty: the first line of a CSV has to name the columns, {','.join(COLUMNS)}; "
            'NDJSON has {"code": …} in each'
        )


def expiry(text: str) -> int:
    """The Unix second that ``text`` means; a day means its last second in UTC.  Raises ValueError, quoting nothing."""
    try:
        if _DAY.fullmatch(text):
            return int(datetime.combine(date.fromisoformat(text), time(23, 59, 59), UTC).timestamp())
        if _TIME.fullmatch(text):
            return int(datetime.fromisoformat(text.upper()).timestamp())
    except (ValueError, OverflowError):
        pass  # the 31st of a shorter month, say
    raise ValueError(EXPIRY_RULE)


def _header(name: str, raw: bytes) -> list[str]:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise UnusableFile(f"{name} is not text in UTF-8") from None
    try:
        columns = [column.strip().lower() for column in split(text.rstrip("\r"))]
    except ValueError:
        columns = []
    if sorted(set(columns)) != sorted(columns) or not set(columns) <= set(COLUMNS) or "code" not in columns:
        # Not quoted: a file without a header has a code there.
        raise UnusableFile(
            f"the first line of {name} has to name its columns, separated by commas: code, and as you like "
            "serial_number and expires_at"
        )
    return columns


def _rows(lines: Iterable[tuple[int, bytes]], fields: Callable[[str], Fields]) -> Iterator[Row]:
    """A row a line, by what ``fields`` finds in it: code, serial number, expiry; it raises ValueError with a reason."""
    expiries: dict[str, int] = {}
    for number, raw in lines:
        try:
            text = text_of(raw)
            if not text or text.isspace():
                continue
            code, serial, expires_at = fields(text)
            until = None
            if expires_at:
                until = expiries.get(expires_at)
                if until is None:
                    if len(expiries) >= EXPIRIES_MAX:
                        expiries.clear()
                    until = expiries[expires_at] = expiry(expires_at)
            row = Row(number, code, serial or None, until)
        except ValueError as unreadable:
            row = Row(number, "", None, None, str(unreadable))
        yield row


def text_of(raw: bytes) -> str:
    """One line as text.  Raises ValueError, quoting nothing, if it is too long or no UTF-8."""
    if len(raw) > LINE_BYTES_MAX and len(raw.rstrip(b"\r")) > LINE_BYTES_MAX:
        raise ValueError(f"longer than {LINE_BYTES_MAX} bytes")
    try:
        return raw.decode().rstrip("\r")
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8") from None


def _csv_fields(columns: list[str]) -> Callable[[str], Fields]:
    code, serial, expires_at = (columns.index(name) if name in columns else len(columns) for name in COLUMNS)

    def fields(text: str) -> Fields:
        found = split(text)
        if len(found) != len(columns):
            raise ValueError(f"{len(found)} fields, where the header names {len(columns)}")
        found.append("")  # what stands in a column that is not there
        return found[code].strip(" \t"), found[serial].strip(" \t"), found[expires_at].strip(" \t")

    return fields


def split(text: str) -> list[str]:
    """The cells of one line of CSV.  Raises ValueError, quoting nothing."""
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration):
        raise ValueError("a quote is opened and not closed, or stands inside a field") from None


class _Object(msgspec.Struct, forbid_unknown_fields=True):
    code: str
    serial_number: str | None = None
    expires_at: str | None = None


_decode: Final = msgspec.json.Decoder(_Object).decode


def _json_fields(text: str) -> Fields:
    try:
        found = _decode(text)
    except msgspec.ValidationError:  # not repeated: it may quote the line
        raise ValueError(
            "no object of code and, as you like, serial_number and expires_at, all of them texts"
        ) from None
    except msgspec.DecodeError:
        raise ValueError("no JSON") from None
    return found.code, found.serial_number, found.expires_at
