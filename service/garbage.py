"""How often Python's cyclic collector looks at what a process has allocated."""

from __future__ import annotations

import gc
from typing import Final

# Allocations between two collections of the youngest generation.  Neither a request nor a flush leaves cycles behind,
# so the collector finds next to nothing.  At the interpreter's 700 it ran every dozen requests, and took a tenth of the
# time of a flush, which makes some hundred thousand objects (`make bench-flush`), and half of that of a publication of
# 10,000 campaigns.
THRESHOLD: Final = 50_000


def collect_rarely() -> None:
    """From now on the collector runs every THRESHOLD allocations in this process."""
    gc.set_threshold(THRESHOLD)
