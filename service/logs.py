"""Log lines: one JSON object each on standard error, by structlog and orjson.

No line may hold a token, a code or a key.  Exceptions carry such things in their messages, so a fault is
logged as its type and the places it came through, never as its text.
"""

from __future__ import annotations

import logging
import sys
import traceback

import orjson
import structlog

FRAMES_MAX = 20  # the innermost ones say where it was


def configure() -> None:
    """From now on structlog's lines, and the warnings of libraries, are JSON on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
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


class _Library(logging.Handler):
    """Writes what libraries log, first line only: the rest may quote what a client sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fault = record.exc_info[1] if record.exc_info else None
        structlog.get_logger(record.name).warning(
            "library",
            logger=record.name,
            message=record.getMessage().partition("\n")[0],
            **(where(fault) if fault is not None else {}),
        )
