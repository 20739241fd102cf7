"""Time zones: those of the pinned tzdata package, the same on every machine.

The only place that makes them.  ``ZoneInfo(name)`` reads the machine's zone files first, and two machines could then
tell two expiries, or count a cap by two midnights.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from zoneinfo import ZoneInfo


@cache  # of a few hundred names, since others are not remembered
def zone(name: str) -> ZoneInfo:
    """The time zone of this name, one object a process.  Raises ValueError, in a line that says what to write instead,
    for a name that is not one of ``names``."""
    if name not in names():
        raise ValueError(f"{name!r} is no time zone: take a name like Europe/Berlin")
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as rules:
        return ZoneInfo.from_file(rules, key=name)


@cache
def names() -> frozenset[str]:
    """Every time zone there is."""
    return frozenset((files("tzdata") / "zones").read_text().split())
