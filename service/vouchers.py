"""What a product's terms make of one voucher: when it expires, what it is called.  Pure: no I/O, no clock."""

from __future__ import annotations

import calendar
from datetime import date, datetime, time, timedelta
from functools import lru_cache

from service import zones
from service.domain import Terms


def expires_at(terms: Terms, issued_at: int, code_expires_at: int) -> int:
    """The last second of a voucher, Unix seconds: by the product's rule or the code's own expiry, whichever is first.

    ``issued_at`` is Unix seconds.  A rule that counts from issuance ends with the day, in the product's time zone.
    """
    if not terms.expiry:
        return code_expires_at
    unit, _, number = terms.expiry.partition(":")
    if unit == "until":
        return min(int(number), code_expires_at)
    day = _local_day(terms.time_zone, issued_at)
    return min(_end_of_day_after(unit, int(number), terms.time_zone, day), code_expires_at)


def voucher_name(terms: Terms, face_value: int | None) -> str:
    """The voucher's name: ``${FV}`` of an open-value product is its face value, $10.51 or $150."""
    if not terms.is_open_value or face_value is None:
        return terms.name
    whole, cents = divmod(face_value, 100)
    return terms.name.replace("${FV}", f"${whole}.{cents:02}" if cents else f"${whole}")


@lru_cache(maxsize=10_000)  # vouchers of one day mostly end in the same second
def local_time(second: int, time_zone: str) -> str:
    """A Unix second as RFC 3339 with the offset of ``time_zone`` then."""
    return datetime.fromtimestamp(second, zones.zone(time_zone)).isoformat(timespec="seconds")


def _local_day(time_zone: str, second: int) -> date:
    return datetime.fromtimestamp(second, zones.zone(time_zone)).date()


@lru_cache(maxsize=10_000)  # one a product and day
def _end_of_day_after(unit: str, number: int, time_zone: str, day: date) -> int:
    """The last second of the day that is so many days, months or years after ``day``; the last of the month where a
    month has no such day."""
    if unit == "days":
        last = day + timedelta(days=number)
    else:
        months = day.month - 1 + number * (12 if unit == "years" else 1)
        year, month = day.year + months // 12, months % 12 + 1
        last = date(year, month, min(day.day, calendar.monthrange(year, month)[1]))
    # The second before the next day begins: where clocks are put back at midnight there are two 23:59:59, and some days
    # begin at one o'clock.
    next_day = datetime.combine(last + timedelta(days=1), time(), zones.zone(time_zone))
    return int(next_day.timestamp()) - 1
