"""What a partner says it received: CSV, ``code[,request_id][,idempotency_key][,voucher_id][,received_at]`` with a
header in any order, or NDJSON, one object of the same names a line.

Other columns are passed over: partners send what their systems write.  Nothing that is said about a line quotes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec

from service.worker.codes_file import split, text_of
from service.worker.content import Content, UnusableFile

COLUMNS: Final = ("code", "request_id", "idempotency_key", "voucher_id", "received_at")
# What our own exports and API call the code.
SYNONYMS: Final = {"voucher_code": "code"}

_BOM: Final = b"\xef\xbb\xbf"


class Line(msgspec.Struct, frozen=True):
    """One line.  '' and None: it does not say.  ``unreadable``: why it is of no use; then the rest is empty.

    ``request_id`` is what the partner calls by that name: its own id in the Voucher Request API, and in Client API v3,
    where it sends ``idempotency_key``, that of our answer.
    """

    line: int
    code: str = ""
    request_id: str = ""
    idempotency_key: str = ""
    voucher_id: bytes | None = None
    received_at: int | None = None
    unreadable: str = ""


class PartnerFile:
    """One file, plain or gzip.  ``size`` and ``read`` are those of its content, in bytes."""

    def __init__(self, source: Path, looked_at: Callable[[int, int], None] = lambda read, size: None) -> None:
        """Raises UnusableFile as ``Content`` does, which explains ``looked_at``."""
        self._content = Content(source, looked_at)
        self.id = self._content.id
        self.size = self._content.size

    @property
    def read(self) -> int:
        return self._content.read

    def lines(self) -> Iterator[Line]:
        """Every line that is not empty, below the header if it has one.  Raises UnusableFile if nothing is there, a CSV
        has no usable header, or the content changes meanwhile."""
        name, raw_lines = self._content.name, enumerate(self._content.lines(), 1)
        for number, raw in raw_lines:
            first = raw.removeprefix(_BOM) if number == 1 else raw
            if not first.strip():
                continue
            if first.lstrip().startswith(b"{"):
                return _lines(chain([(number, first)], raw_lines), _object)
            return _lines(raw_lines, _cells(_header(name, first)))
        raise UnusableFile(f"{name} is empty: the first line of a CSV has to name the columns, {','.join(COLUMNS)}")


def _header(name: str, raw: bytes) -> list[str]:
    try:
        columns = [column.strip().lower() for column in split(raw.decode().rstrip("\r"))]
    except ValueError:
        columns = []
    columns = [SYNONYMS.get(column, column) for column in columns]
    if any(columns.count(column) != 1 for column in COLUMNS if column in columns) or "code" not in columns:
        # Not quoted: a file without a header has a code there.
        raise UnusableFile(
            f"the first line of {name} has to name its columns, separated by commas: code, and as you like "
            "request_id, idempotency_key, voucher_id and received_at"
        )
    return columns


def _lines(raw_lines: Iterable[tuple[int, bytes]], fields: Callable[[str], list[str]]) -> Iterator[Line]:
    for number, raw in raw_lines:
        try:
            text = text_of(raw)
            if not text or text.isspace():
                continue
            code, request_id, key, voucher_id, received_at = fields(text)
            if not code:
                raise ValueError("no code")
            line = Line(number, code, request_id, key, _uuid(voucher_id), _time(received_at))
        except ValueError as unreadable:
            line = Line(number, unreadable=str(unreadable))
        yield line


def _cells(columns: list[str]) -> Callable[[str], list[str]]:
    places = [columns.index(name) if name in columns else None for name in COLUMNS]

    def fields(text: str) -> list[str]:
        found = split(text)
        if len(found) != len(columns):
            raise ValueError(f"{len(found)} fields, where the header names {len(columns)}")
        return ["" if place is None else _plain(found[place].strip(" \t")) for place in places]

    return fields


def _plain(cell: str) -> str:
    """What a cell held before an export made it safe for spreadsheets."""
    return cell[1:] if cell.startswith(("'=", "'+", "'-", "'@")) else cell


class _Object(msgspec.Struct):
    code: str = ""
    voucher_code: str = ""
    request_id: str | None = None
    idempotency_key: str | None = None
    voucher_id: str | None = None
    received_at: str | None = None


_decode: Final = msgspec.json.Decoder(_Object).decode


def _object(text: str) -> list[str]:
    try:
        found = _decode(text)
    except msgspec.ValidationError:  # not repeated: it may quote the line
        raise ValueError(f"no object of code and, as you like, {', '.join(COLUMNS[1:])}, all of them texts") from None
    except msgspec.DecodeError:
        raise ValueError("no JSON") from None
    others = (found.request_id, found.idempotency_key, found.voucher_id, found.received_at)
    return [found.code or found.voucher_code, *(one or "" for one in others)]


def _uuid(text: str) -> bytes | None:
    try:
        return uuid.UUID(text).bytes if text else None
    except ValueError:
        raise ValueError("voucher_id has to be a UUID") from None


def _time(text: str) -> int | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text.upper())
        if at.tzinfo is not None:
            return int(at.timestamp())
    except (ValueError, OverflowError):
        pass
    raise ValueError("received_at has to be a time with its zone (2027-01-31T12:00:00Z)")
