"""What the benchmarks say of their figures, and where they keep them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec


def verdict(met: bool) -> str:
    """Of a target."""
    return "met" if met else "MISSED"


def keep(file: Path | None, figures: object) -> None:
    """``file``, if there is one, holds the figures as JSON."""
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


def machine() -> str:
    """What they were measured on."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = named[0].split(":", 1)[1].strip() if named else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({model}), Linux {platform.release()}, Python {platform.python_version()}"
