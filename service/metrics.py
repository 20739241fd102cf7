"""Every Prometheus instrument, declared once.

Processes run in prometheus_client's multi-process mode when ``PROMETHEUS_MULTIPROC_DIR`` is set before this module
is imported: each writes its values to files in that directory, and ``exposition`` sums the files.  In that mode one
increment costs about 2 us, so what happens once a request is counted in a ``Tally``, in plain integers, and reaches
its instruments twice a second; what happens once a batch or less often is counted at once.

No label holds anything that a client chose: labels are pools, scripts, and codes of answers.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name for it

# Seconds.  Half a millisecond is an idle service on this kind of machine; the last ones are the deadline's.
SECONDS: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # requests; 256 vouchers is the bound of a batch

# --- serving: the edge

requests = Counter("voucherd_requests", "Requests answered", ["api", "status", "code"])  # by Tally
request_seconds = Histogram(
    "voucherd_request_seconds", "Seconds from the moment a request is taken up to its answer", ["api"], buckets=SECONDS
)  # by Tally
requests_malformed = Counter(
    "voucherd_requests_malformed", "Requests refused because they broke the rules or bounds of HTTP", ["code"]
)
defects = Counter("voucherd_defects", "Requests that ended in an unexpected exception (500); should stay 0")
connections = Gauge("voucherd_connections", "Client connections open now", multiprocess_mode="livesum")
connections_refused = Counter("voucherd_connections_refused", "Client connections over the limit of a process")

# --- serving: issuing

vouchers_issued = Counter("voucherd_vouchers_issued", "Vouchers issued to a new request")
replays = Counter("voucherd_replays", "Requests answered from their record")
queue = Gauge("voucherd_queue_vouchers", "Vouchers that wait for a batch now", multiprocess_mode="livesum")
batch_requests = Histogram("voucherd_batch_requests", "Requests in one call of the issue script", buckets=BATCHES)
batch_replies = Counter("voucherd_batch_replies", "Replies to whole batches (OK, STALE, LOST, CLOCK)", ["status"])
guard_refusals = Counter(
    "voucherd_guard_refusals", "Requests refused for the sake of other requests (429, 503), by guard", ["guard"]
)
refill_waits = Counter("voucherd_refill_waits", "Requests that waited for a window to be refilled")
fence_checks = Counter("voucherd_fence_checks", "Bare fence checks, made when no batch was on its way")
catalogue_version = Gauge(
    "voucherd_catalogue_version", "Version of the catalogue in use, the lowest of all processes of a role", ["role"],
    multiprocess_mode="livemin",
)  # fmt: skip
catalogue_loads = Counter("voucherd_catalogue_loads", "Catalogues loaded by processes")
script_seconds = Histogram(
    "voucherd_script_seconds", "Seconds of one script call as its caller saw it", ["script"], buckets=SECONDS
)
script_faults = Counter("voucherd_script_faults", "Script calls without an answer", ["script", "fault"])

# --- the background worker; its gauges have labels, so that a process that never sets one does not show it as 0

flushed = Counter("voucherd_flushed_codes", "Issued codes written to the ledger")
set_aside = Counter(
    "voucherd_set_aside_codes",
    "Codes that left a window other than by issue: little life, withdrawn, taken back",
)
parked = Counter("voucherd_parked_entries", "Malformed outbox entries put aside; should stay 0")
incidents = Counter("voucherd_incidents", "Incidents raised, also of codes that a roll left; should stay 0", ["kind"])
leased = Counter("voucherd_leased_codes", "Codes leased to windows", ["pool"])
outbox_codes = Gauge(
    "voucherd_outbox_codes", "Codes in the outbox, not yet in the ledger", ["partition"], multiprocess_mode="livemax"
)
outbox_bytes = Gauge(
    "voucherd_outbox_bytes", "Bytes of the outbox, not yet in the ledger", ["partition"], multiprocess_mode="livemax"
)
outbox_age_seconds = Gauge(
    "voucherd_outbox_age_seconds", "Age of the oldest outbox entry in seconds", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
window_codes = Gauge("voucherd_window_codes", "Codes ready to issue in Redis", ["pool"], multiprocess_mode="livemin")
stock_codes = Gauge(
    "voucherd_stock_codes", "Codes stored and not yet leased to a window", ["pool"], multiprocess_mode="livemin"
)
quarantined_codes = Gauge(
    "voucherd_quarantined_codes", "Codes leased in a closed generation and accounted for nowhere", ["pool"],
    multiprocess_mode="livemax",
)  # fmt: skip
outage_lasts_seconds = Gauge(
    "voucherd_outage_lasts_seconds", "Seconds that issuing would go on now without the store, at the planned rate",
    ["partition"], multiprocess_mode="livemin",
)  # fmt: skip
generation = Gauge("voucherd_generation", "Open generation", ["partition"], multiprocess_mode="livemax")
rolls = Counter("voucherd_rolls", "Generations opened, by reason", ["reason"])
store_older = Gauge(
    "voucherd_store_older", "1 while the store is older than Redis and leasing is stopped; should stay 0",
    ["partition"], multiprocess_mode="livemax",
)  # fmt: skip
unsafe_settings = Gauge(
    "voucherd_unsafe_settings", "1 while a check of Redis or the store is neither passed nor accepted; should stay 0",
    ["check"], multiprocess_mode="livemax",
)  # fmt: skip
step_faults = Counter(
    "voucherd_step_faults", "Steps of the worker's loops that failed, by loop and fault", ["loop", "fault"]
)


class Tally:
    """Counts the requests of one API in plain integers until ``flush`` adds them to the instruments.

    A process that is killed loses what it counted since the last flush.
    """

    def __init__(self, api: str) -> None:
        self._api = api
        self._codes: defaultdict[tuple[int, str], int] = defaultdict(int)
        self._buckets = [0] * (len(SECONDS) + 1)
        self._seconds = 0.0

    def count(self, status: int, code: str, seconds: float) -> None:
        """One answer with this status and code, ``seconds`` after its request was taken up."""
        self._codes[status, code] += 1
        self._buckets[bisect_left(SECONDS, seconds)] += 1
        self._seconds += seconds

    def flush(self) -> None:
        """Adds what was counted since the last flush to ``requests`` and ``request_seconds``."""
        codes, self._codes = self._codes, defaultdict(int)
        for (status, code), answers in codes.items():
            requests.labels(self._api, str(status), code).inc(answers)
        histogram = request_seconds.labels(self._api)
        for bucket, answers in enumerate(self._buckets):
            if answers:
                histogram._buckets[bucket].inc(answers)  # the library has no public way to add many observations
                self._buckets[bucket] = 0
        histogram._sum.inc(self._seconds)
        self._seconds = 0.0


class Supervision(Collector):
    """What only the parent of the serving processes knows; never written to the directory."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.ready = 0
        self.exits = 0

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("voucherd_workers", "Serving processes that should run", self.workers)
        yield GaugeMetricFamily("voucherd_workers_ready", "Serving processes that are ready", self.ready)
        yield CounterMetricFamily("voucherd_worker_exits", "Serving processes that ended untold", self.exits)


def given_directory() -> Path | None:
    """The directory that this process was started with, if it was: others write there too."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    return Path(given) if given else None


def exposition(directory: Path, supervision: Supervision) -> bytes:
    """The text that Prometheus reads: everything in ``directory`` summed over its processes, then the parent's own."""
    summed, own = CollectorRegistry(), CollectorRegistry()
    MultiProcessCollector(summed, path=str(directory))  # type: ignore[no-untyped-call]
    own.register(supervision)
    return generate_latest(summed) + generate_latest(own)


def forget(directory: Path, process: int) -> None:
    """What a dead process had open (its ``live`` gauges) no longer counts; what it counted does."""
    mark_process_dead(process, path=str(directory))  # type: ignore[no-untyped-call]


def declared() -> Iterator[tuple[str, str, str]]:
    """Name as exposed, type and help of each instrument: the README's table is compared with it."""
    instruments = [value for value in globals().values() if isinstance(value, MetricWrapperBase)]
    for metric in [*(metric for one in instruments for metric in one.describe()), *Supervision(0).collect()]:
        yield metric.name + ("_total" if metric.type == "counter" else ""), metric.type, metric.documentation
