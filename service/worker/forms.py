"""The forms in which operators write caps, durations, days and times, in options and in files alike.

Every function raises ValueError with one line that says what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from typing import Final, cast
from uuid import UUID
from zoneinfo import ZoneInfo

from service import traceparent
from service.catalogue import Cap, Period
from service.domain import CapHolder
from service.worker.codes_file import expiry

_CAP: Final = re.compile(r"(?:(campaign|distributor|terminal):)?(total|day|hour)=(\d{1,16}|none)", re.ASCII)
_DURATION: Final = re.compile(r"(\d{1,9})([smhd]?)", re.ASCII)
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def caps(given: Iterable[str], holder: CapHolder) -> list[Cap]:
    """Caps such as day=100 or terminal:hour=1, counted per ``holder`` unless they say otherwise."""
    return [Cap(by, period, limit) for (by, period), limit in _caps(given, holder, none=False) if limit is not None]


def cap_changes(given: Iterable[str], holder: CapHolder) -> dict[tuple[CapHolder, Period], int | None]:
    """The same, each at most once; None for day=none, which takes a cap away."""
    changes: dict[tuple[CapHolder, Period], int | None] = {}
    for counted, limit in _caps(given, holder, none=True):
        if counted in changes:
            raise ValueError(f"{':'.join(counted)} is there twice: say one limit for each")
        changes[counted] = limit
    return changes


def cap_told(cap: Cap) -> str:
    """A cap in the form in which it is written."""
    return f"{cap.holder}:{cap.period}={cap.limit}"


def caps_told(caps: Iterable[Cap]) -> str:
    """Several, or none, in one line."""
    return ", ".join(map(cap_told, caps)) or "none"


def seconds(text: str) -> int:
    """A duration such as 7d, 12h, 30m or 45 (seconds)."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no duration: write 7d, 12h, 30m or 45 (seconds), say")
    return int(match[1]) * _UNITS[match[2]]


def duration_told(seconds: int) -> str:
    """A duration in the form in which it is written, by the largest unit that fits: 7d, 36h, 90m, 45s."""
    for unit in "dhm":
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


def expiry_of(text: str) -> int:
    """The Unix second of an expiry: a day means its end in UTC."""
    try:
        return expiry(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a day (2027-01-31) nor a time (2027-01-31T12:00:00Z)") from None


def start_of(text: str, zone: ZoneInfo) -> int:
    """The Unix second of a beginning: a day means its first moment in ``zone``."""
    day = _day(text)
    return expiry_of(text) if day is None else _midnight(day, zone)


def end_of(text: str, zone: ZoneInfo) -> int:
    """The first Unix second that is past an end: a day means the whole of it in ``zone``."""
    day = _day(text)
    if day == date.max:
        raise ValueError(f"{text!r} is too far away: leave it open instead")
    return expiry_of(text) if day is None else _midnight(day + timedelta(days=1), zone)


def day_of(text: str, zone: ZoneInfo) -> tuple[int, int]:
    """The first Unix second of a day in ``zone``, and the first one past it."""
    if _day(text) is None:
        raise ValueError(f"{text!r} is no day: write 2026-11-25, say")
    return start_of(text, zone), end_of(text, zone)


def voucher_id_of(text: str) -> bytes:
    """The 16 bytes of a voucher's id, a UUID in any of the ways in which UUIDs are written."""
    try:
        return UUID(text).bytes
    except ValueError:
        raise ValueError(f"{text[:80]!r} is no voucher id: that is a UUID") from None


def trace_id_of(text: str) -> str:
    """The trace id, in hexadecimal, that ``text`` is or, as a traceparent, holds."""
    trace = traceparent.parsed(text.encode()) or traceparent.parsed(f"00-{text}-{'1' * 16}-00".encode())
    if not trace:
        raise ValueError(f"{text!r} is no trace: 32 hexadecimal digits in lower case, or a whole traceparent")
    return traceparent.ids(trace)[0]


def _caps(
    given: Iterable[str], holder: CapHolder, *, none: bool
) -> Iterable[tuple[tuple[CapHolder, Period], int | None]]:
    for text in given:
        match = _CAP.fullmatch(text)
        if match is None or (match[3] == "none" and not none):
            takes_away = ", or day=none to take it away" if none else ""
            raise ValueError(f"{text!r} is no cap: write day=100, total=5000 or terminal:hour=1, say{takes_away}")
        counted = (cast(CapHolder, match[1] or holder), cast(Period, match[2]))
        yield counted, None if match[3] == "none" else int(match[3])


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if len(text) == len("2027-01-31") else None
    except ValueError:
        return None


def _midnight(day: date, zone: ZoneInfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


_AFTER: Final = re.compile(r"(\d{1,5}) ?(day|month|year)s?(?: from issuance)?", re.ASCII)

AS_THE_CODE: Final = "as the code"  # of a product without a rule of its own


def product_expiry(text: str, zone: ZoneInfo) -> tuple[str, str]:
    """A product's rule of expiry as it is stored, and in words: `12 months` counts from issuance, a day is its end.

    The words are taken too.
    """
    if text == AS_THE_CODE:
        return "", AS_THE_CODE
    match = _AFTER.fullmatch(text)
    if match is not None:
        number, unit = int(match[1]), match[2]
        return f"{unit}s:{number}", f"{number} {unit}{'' if number == 1 else 's'} from issuance"
    end = text.removeprefix("until ")
    try:
        return f"until:{end_of(end, zone) - 1}", f"until {end}"
    except ValueError:
        raise ValueError(
            f"{text!r} is no expiry: write `90 days`, `12 months`, `1 year`, a day (2029-10-31), or `{AS_THE_CODE}`"
        ) from None
