"""A CSV file of codes, read line by line: ``code[,serial_number][,expires_at]`` with a header.

A line is a line: a quote that is never closed costs its own line and not the rest of the file.  Nothing that is
said about a line quotes it, for it may hold a code in any column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from service.errors import Fault
from service.store.stock import Row

COLUMNS: Final = ("code", "serial_number", "expires_at")

# A code, a serial number and a time take 220 bytes.  What is longer is no line of ours, and must not be held in memory.
LINE_BYTES_MAX: Final = 1_000

HASH_BYTES: Final = 1 << 20

EXPIRY_RULE: Final = "expires_at has to be a day (2027-01-31) or a time with its zone (2027-01-31T12:00:00Z)"

_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


class Content(Protocol):
    """What the content of a file is summed up in."""

    def update(self, part: bytes, /) -> None: ...


class UnusableFile(Fault):
    """The file can't be imported as a whole; nothing of it was."""


class CodesFile:
    """One file of codes.  ``read`` says how many of its ``size`` bytes have been looked at.

    ``id`` is the SHA-256 of the content, hex: the same content is the same import, wherever it lies.
    """

    def __init__(self, path: Path) -> None:
        """Raises UnusableFile, also for OSError, if ``path`` can't be read twice from its beginning."""
        self.path = path
        self.read = 0
        self.size = 0
        content = sha256()
        try:
            if not path.is_file():
                raise UnusableFile(f"{path} is not a file" if path.exists() else f"there is no file {path}")
            with path.open("rb") as file:
                while part := file.read(HASH_BYTES):
                    content.update(part)
                    self.size += len(part)
        except OSError as error:
            raise UnusableFile(f"{path} can't be read: {error.strerror}") from None
        self.id = content.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Every line below the header that is not empty; what can't be read comes as such, with its reason.

        Raises UnusableFile at the first step if there is no usable header, and at the end if the content is no longer
        what ``id`` says.
        """
        content = sha256()
        self.read = 0
        with self.path.open("rb") as file:
            columns: list[str] | None = None
            line = 0
            while raw := self._line(file, content):
                line += 1
                if columns is None:
                    columns = _header(self.path, raw)
                elif raw.strip():
                    yield _row(line, raw, columns)
        if columns is None:
            raise UnusableFile(f"{self.path} is empty: its first line has to name the columns, {','.join(COLUMNS)}")
        if content.hexdigest() != self.id:
            raise UnusableFile(
                f"{self.path} changed while it was imported: what came before is in stock; import it again"
            )

    def _line(self, file: BinaryIO, content: Content) -> bytes:
        """The next line with its end, b"" after the last; one that is too long comes cut to one byte too many."""
        first = part = file.readline(LINE_BYTES_MAX + 1)
        while part:
            content.update(part)
            self.read += len(part)
            if part.endswith(b"\n") or len(part) <= LINE_BYTES_MAX:
                break
            part = file.readline(LINE_BYTES_MAX + 1)
        return first


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


def _header(path: Path, raw: bytes) -> list[str]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableFile(f"{path} is not text in UTF-8") from None
    columns = [name.strip().lower() for name in _fields(text) or []]
    if sorted(set(columns)) != sorted(columns) or not set(columns) <= set(COLUMNS) or "code" not in columns:
        # Not quoted: a file without a header has a code there.
        raise UnusableFile(
            f"the first line of {path} has to name its columns, separated by commas: code, and as you like "
            "serial_number and expires_at"
        )
    return columns


def _row(line: int, raw: bytes, columns: list[str]) -> Row:
    if len(raw.rstrip(b"\r\n")) > LINE_BYTES_MAX:
        return _unreadable(line, f"longer than {LINE_BYTES_MAX} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return _unreadable(line, "not text in UTF-8")
    fields = _fields(text)
    if fields is None:
        return _unreadable(line, "a quote is opened and not closed, or stands inside a field")
    if len(fields) != len(columns):
        return _unreadable(line, f"{len(fields)} fields, where the header names {len(columns)}")
    values = dict(zip(columns, (field.strip(" \t") for field in fields), strict=True))
    serial, expires_at = values.get("serial_number"), values.get("expires_at")
    try:
        return Row(line, values["code"], serial or None, expiry(expires_at) if expires_at else None)
    except ValueError:
        return _unreadable(line, EXPIRY_RULE)


def _fields(text: str) -> list[str] | None:
    """The fields of one line, None if its quotes don't fit."""
    text = text.rstrip("\r\n")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration):
        return None


def _unreadable(line: int, reason: str) -> Row:
    return Row(line, "", None, None, unreadable=reason)
