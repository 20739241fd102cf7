"""Refusals that somebody should look into, as lines of the log: which request it was, and which trace it belongs to.

Somebody knocks with a token that is not in force, a partner uses a key twice, or nobody knows what became of a request.
What is refused because there is much to do or nothing left is counted by the metrics alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from service import traceparent
from service.web.problems import Answer
from service.web.v3_errors import REFUSALS

log = structlog.get_logger()

OF_NOTE: Final = frozenset(
    {"token_unknown", "distributor_mismatch", "distributor_suspended", "key_reused", "store_unreachable"}
    | {REFUSALS[name].code for name in ("token_unknown", "suspended", "key_reused", "store_unreachable")}
)

# Lines of one process: enough to see what it is, and nothing that a flood of bad requests could fill a disk with.
LINES_A_SECOND: Final = 10


class Refusals:
    """The lines of one process."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = 0
        self._written = 0  # in this second
        self._left_out = 0  # since the last line

    def note(self, api: str, answer: Answer, trace: str) -> None:
        """A refusal whose code is ``OF_NOTE`` is in the log, or counted in the next line if there were too many."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written >= LINES_A_SECOND:
            self._left_out += 1
            return
        self._written += 1
        trace_id, parent_id = traceparent.ids(trace)
        log.warning(
            "refused",
            api=api,
            status=answer.status,
            code=answer.code,
            request_id=answer.request_id,
            distributor=answer.distributor,
            trace_id=trace_id,
            parent_id=parent_id,
            left_out=self._left_out,
        )
        self._left_out = 0
