"""What the benchmarks say of their figures, and where they keep them."""

from __future__ import annotations

from pathlib import Path

import msgspec


def verdict(met: bool) -> str:
    """Of a target."""
    return "met" if met else "MISSED"


def keep(file: Path | None, figures: object) -> None:
    """``file``, if there is one, holds the figures as JSON."""
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
