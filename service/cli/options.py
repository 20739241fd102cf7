"""Options that several commands share, and the forms of what is given in them."""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import typer

from service.catalogue import Cap, CapHolder, Period
from service.worker.codes_file import expiry

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Data of a `voucherd up`; without it the VOUCHERD_… settings say where Redis and the store are.",
        file_okay=False,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CAP: Final = re.compile(r"(?:(campaign|distributor|terminal):)?(total|day|hour)=(\d{1,16})", re.ASCII)
_DURATION: Final = re.compile(r"(\d{1,9})([smhd]?)", re.ASCII)
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def caps(given: list[str] | None, holder: CapHolder) -> list[Cap]:
    """The caps of ``--cap`` options, counted per ``holder`` unless they say otherwise."""
    found = []
    for text in given or ():
        match = _CAP.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is no cap: write day=100, total=5000 or terminal:hour=1, say")
        found.append(Cap(cast(CapHolder, match[1] or holder), cast(Period, match[2]), int(match[3])))
    return found


def seconds(text: str) -> int:
    """A duration such as 7d, 12h, 30m or 45 (seconds)."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration: write 7d, 12h, 30m or 45 (seconds), say")
    return int(match[1]) * _UNITS[match[2]]


def expiry_of(text: str) -> int:
    """The Unix second of an expiry: a day means its end in UTC."""
    try:
        return expiry(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a day (2027-01-31) nor a time (2027-01-31T12:00:00Z)") from None


def zone_of(name: str) -> ZoneInfo:
    """A time zone by its name in the IANA database."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise typer.BadParameter(f"{name!r} is no time zone: take a name like Europe/Berlin") from None


def start_of(text: str, zone: ZoneInfo) -> int:
    """The Unix second of a beginning: a day means its first moment in ``zone``."""
    day = _day(text)
    return expiry_of(text) if day is None else _midnight(day, zone)


def end_of(text: str, zone: ZoneInfo) -> int:
    """The first Unix second that is past an end: a day means the whole of it in ``zone``."""
    day = _day(text)
    return expiry_of(text) if day is None else _midnight(day + timedelta(days=1), zone)


def day_of(text: str, zone: ZoneInfo) -> tuple[int, int]:
    """The first Unix second of a day in ``zone``, and the first one past it."""
    if _day(text) is None:
        raise typer.BadParameter(f"{text!r} is no day: write 2026-11-25, say")
    return start_of(text, zone), end_of(text, zone)


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if len(text) == len("2027-01-31") else None
    except ValueError:
        return None


def _midnight(day: date, zone: ZoneInfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())
