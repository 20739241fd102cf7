"""Log lines on standard error, by structlog: one JSON object each, or laid out for people.

No line may hold a token, a code or a key.  Exceptions carry such things in their messages, so a fault is logged as its
type and the places it came through, never as its text; what libraries say is cut where it begins to quote; and what
has the form of a token or a secret after all is struck out of the finished line.  ``docs/logs.md`` lists every event
with its fields, and a test compares it with the code.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any, Final, Literal

import orjson
import structlog

from service.tokens import LENGTH, PREFIX, SECRET_PREFIX

Format = Literal["json", "console"]
Level = Literal["debug", "info", "warning", "error"]
Process = Literal["serve", "serving", "work"]  # the parent of the serving processes, one of these, the worker

FRAMES_MAX: Final = 20  # the innermost ones say where it was

_Event = MutableMapping[str, Any]


def configure(process: Process, *, style: Format = "json", level: Level = "info") -> None:
    """From now on structlog's lines of ``level`` and above, and the warnings of libraries, are on standard error, each
    with the ``process`` and its ``pid``."""
    who = {"process": process, "pid": os.getpid()}

    def named(_: object, __: str, event: _Event) -> _Event:
        event.update(who)
        return event

    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        named,
        _places,
        _json if style == "json" else _Console(),
        _struck_out,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Library()], level=logging.WARNING, force=True)
    for name in ("uvicorn", "uvicorn.error"):  # its start and stop messages are ours to write
        logging.getLogger(name).setLevel(logging.WARNING)


def where(fault: BaseException) -> dict[str, object]:
    """The fields that describe a fault in a log line: its type and the places, innermost last."""
    frames = traceback.extract_tb(fault.__traceback__)[-FRAMES_MAX:]
    return {
        "fault": type(fault).__name__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def without_secrets(text: str) -> str:
    """``text``, with a mark in the place of what has the form of a token, a secret, a key or a password in a URL."""
    return _SECRETS.sub(_MARK, text.encode("utf-8", "backslashreplace")).decode()


def _places(_: object, __: str, event: _Event) -> _Event:
    """``log.exception`` says where it was, as ``where`` does, and not what."""
    if event.pop("exc_info", None) and (fault := sys.exception()) is not None:
        event.update(where(fault))
    return event


def _json(_: object, __: str, event: _Event) -> bytes:
    return orjson.dumps(event, default=repr)


class _Console:
    """Time, level and event, then the fields by name."""

    def __init__(self) -> None:
        self._renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())

    def __call__(self, logger: Any, name: str, event: _Event) -> bytes:
        return self._renderer(logger, name, event).encode("utf-8", "backslashreplace")


def _struck_out(_: object, __: str, line: bytes) -> bytes:
    return _SECRETS.sub(_MARK, line)


_MARK: Final = b"[struck out]"
_SECRETS: Final = re.compile(
    rb"(?:%b|%b)[0-9A-Za-z]{%d}"  # a distributor's token, a client's secret
    rb"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"  # an access token
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY[^\"]*"
    rb"|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"  # who, and with which password, in a URL
    % (PREFIX.encode(), SECRET_PREFIX.encode(), LENGTH - len(PREFIX))
)


class _Library(logging.Handler):
    """Writes what libraries log, up to where it begins to quote: arguments, say, of a callback that failed."""

    def emit(self, record: logging.LogRecord) -> None:
        fault = record.exc_info[1] if record.exc_info else None
        log = structlog.get_logger(record.name)
        (log.error if record.levelno >= logging.ERROR else log.warning)(
            "library",
            logger=record.name,
            message=_QUOTES.split(record.getMessage(), maxsplit=1)[0].rstrip(" :="),
            **(where(fault) if fault is not None else {}),
        )


_QUOTES: Final = re.compile(r"[\n(<\[{'\"]")
