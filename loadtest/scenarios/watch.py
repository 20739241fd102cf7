"""A load test while it runs: what the users write down, and what the service says of itself."""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from loadtest.scenarios.outcome import Sample, percentile
from loadtest.scenarios.record import Attempt, Reader

SAMPLE_S: Final = 2.0  # between two looks at the metrics
SCRAPE_S_MAX: Final = 2.0
LINES_MAX: Final = 60  # of progress, however long it takes
SHOWN_MAX: Final = 5  # kinds of one line


class Watch:
    """Gathers attempts and samples."""

    def __init__(self, record: Path, ops_urls: Sequence[str], pools: Sequence[str], say: Callable[[str], None]) -> None:
        """``ops_urls``: of `serve` and of `work`, or of an `up`, which has both at one."""
        self.attempts: list[Attempt] = []
        self.samples: list[Sample] = []
        self._reader = Reader(record)
        self._ops_urls = tuple(ops_urls)
        self._pools = frozenset(pools)
        self._say = say
        self._sampled = self._said = time.monotonic()
        self._said_of = 0  # attempts

    def look(self, elapsed: float, seconds: float) -> None:
        """Takes in what is new, and says how it goes if it is time to."""
        self.attempts.extend(self._reader.new())
        now = time.monotonic()
        if self._ops_urls and now - self._sampled >= SAMPLE_S:
            self._sampled = now
            self._sample()
        if now - self._said >= max(1.0, seconds / LINES_MAX):
            self._progress(elapsed, now - self._said)
            self._said, self._said_of = now, len(self.attempts)

    def _progress(self, elapsed: float, since_s: float) -> None:
        new = self.attempts[self._said_of :]
        if not new:  # locust is starting, or all is over
            return
        kinds = Counter(one.kind for one in new)
        p99_ms = percentile([one.seconds for one in new if one.status], 99) * 1e3
        told = "  ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(SHOWN_MAX))
        self._say(f"{elapsed:4.0f} s {len(new) / since_s:7,.0f}/s  p99 {p99_ms:6,.0f} ms  {told}")

    def _sample(self) -> None:
        texts = []
        for url in self._ops_urls:
            try:
                with urllib.request.urlopen(f"{url}/metrics", timeout=SCRAPE_S_MAX) as answer:  # noqa: S310
                    texts.append(answer.read().decode())
            except (urllib.error.URLError, OSError):
                continue
        if texts:
            self.samples.append(sample(time.time(), texts, self._pools))


def sample(at: float, texts: Sequence[str], pools: Container[str]) -> Sample:
    """What the metrics say together, of these pools: `serve` knows its memory, `work` stock and outbox.  Where several
    say the same thing the least of stock and the most of what waits count, as they do among processes of one."""
    found = [one for text in texts for family in text_string_to_metric_families(text) for one in family.samples]

    def sum_of(take: Callable[[Sequence[float]], float], *names: str) -> float:
        said = defaultdict[tuple[str, ...], list[float]](list)
        for one in found:
            if one.name in names and ("pool" not in one.labels or one.labels["pool"] in pools):
                said[one.name, *one.labels.values()].append(one.value)
        return sum(map(take, said.values())) if said else math.nan

    serve = [one.value for one in found if one.name == "voucherd_process_resident_bytes"]
    return Sample(
        at, sum_of(min, "voucherd_stock_codes", "voucherd_window_codes"), sum_of(max, "voucherd_outbox_codes"),
        max(serve, default=math.nan) / 1e6,
    )  # fmt: skip
