"""Flush, each round of it a span, linked to the requests that it wrote into the ledger (``service.tracing``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from service import traceparent
from service.domain import RECORD_SEPARATOR
from service.tracing import Tracing
from service.worker.flush import Flush, Flushed


class TracedFlush(Flush):
    """``Flush``, with a span for whatever there was to flush."""

    def __init__(self, tracing: Tracing, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._tracing = tracing

    async def settle(self, generation: int, entries: Sequence[tuple[str, dict[str, str] | None]]) -> Flushed:
        if not entries:
            return await super().settle(generation, entries)
        said = {"voucherd.entries": len(entries), "voucherd.generation": generation}
        with self._tracing.step("flush", _traces(entries), said) as span:
            done = await super().settle(generation, entries)
            span.set_attributes({"voucherd.codes": done.codes, "voucherd.incidents": done.incidents})
            return done


def _traces(entries: Sequence[tuple[str, dict[str, str] | None]]) -> Iterator[str]:
    for _, fields in entries:
        yield from filter(traceparent.well_formed, (fields or {}).get("traces", "").split(RECORD_SEPARATOR))
