"""Every Prometheus instrument, declared once.

Processes run in prometheus_client's multi-process mode when ``PROMETHEUS_MULTIPROC_DIR`` is set before this module
is imported: each writes its values to files in that directory, and ``service.exposition`` sums them.  In that mode one
increment costs about 2 us, so what happens once a request is counted in a ``Tally``, in plain integers, and reaches
its instruments twice a second; what happens once a batch or less often is counted at once.

No label holds anything that a client chose: labels are names of the catalogue, scripts, and codes of answers.  The
names of campaigns, distributors and pools are the only ones that grow with use; NAMES_MAX bounds each kind.
"""

from __future__ import annotations

import contextlib
import os
import platform
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from service import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, and several processes have none

DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name for it

# Seconds.  Half a millisecond is an idle service on this kind of machine; the last ones are the deadline's.
SECONDS: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)  # requests; as many vouchers are the bound of a batch
# Seconds from the answer to the ledger: a flush comes every 0.2 s; an outage of the store lasts minutes.
LAGS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)

# Campaigns, distributors, and pools, that have series of their own in one process, some 5 codes each: 10,000 series are
# scraped in 200 ms (tests/unit/test_metrics.py).  What comes later is counted under OTHERS, which no name can be.
NAMES_MAX: Final = 1_000
OTHERS: Final = "(others)"
NAMED: Final = ("campaign", "distributor", "pool")  # the labels that are such names

# Kinds of answers that one step of a flush adds up: 0.3 ms, some 5 when their series are new.
FLUSHED_AT_ONCE: Final = 50

# --- serving: the edge

requests = Counter("voucherd_requests", "Requests answered", ["api", "status", "code"])  # by Tally
request_seconds = Histogram(
    "voucherd_request_seconds", "Seconds from the moment a request is taken up to its answer", ["api"], buckets=SECONDS
)  # by Tally
campaign_requests = Counter(
    "voucherd_campaign_requests", "Requests by the campaign that issued, or that was considered first, and by answer",
    ["campaign", "code"],
)  # by Tally  # fmt: skip
campaign_vouchers_issued = Counter(
    "voucherd_campaign_vouchers_issued", "Vouchers issued to a new request, by campaign", ["campaign"]
)  # by Tally
distributor_requests = Counter(
    "voucherd_distributor_requests", "Requests of distributors whose credential was confirmed, by answer",
    ["distributor", "code"],
)  # by Tally  # fmt: skip
credentials_refused = Counter(
    "voucherd_credentials_refused", "Tokens, clients and secrets that were refused (401, 403)", ["api", "code"]
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
GUARDS: Final = (
    "rate_limit", "queue", "delay", "share", "deadline", "checks", "refill", "outbox_codes", "outbox_bytes", "memory",
    "disk",
)  # fmt: skip
for _guard in GUARDS:
    guard_refusals.labels(_guard)  # there from the start, so that the first one is an increase
refill_waits = Counter("voucherd_refill_waits", "Requests that waited for a window to be refilled")
fence_checks = Counter("voucherd_fence_checks", "Bare fence checks, made when no batch was on its way")
catalogue_version = Gauge(
    "voucherd_catalogue_version", "Version of the catalogue in use, by process", ["role"], multiprocess_mode="liveall"
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
for _kind in ("double_issue", "forked_lease", "quarantine"):
    incidents.labels(_kind)  # there from the start, as above
leased = Counter("voucherd_leased_codes", "Codes leased to windows", ["pool"])
flush_seconds = Histogram(
    "voucherd_flush_seconds", "Seconds of one flush from outbox to ledger, without the wait for entries",
    buckets=SECONDS,
)  # fmt: skip
flush_lag_seconds = Histogram(
    "voucherd_flush_lag_seconds", "Seconds that the oldest entry of a flush was in the outbox", buckets=LAGS
)
lease_seconds = Histogram("voucherd_lease_seconds", "Seconds of leasing codes in the store", buckets=SECONDS)
refill_seconds = Histogram(
    "voucherd_refill_seconds", "Seconds from asking the store for codes until they are in a window", buckets=SECONDS
)
loop_timestamp_seconds = Gauge(
    "voucherd_loop_timestamp_seconds",
    "Unix time at which a loop of the worker last ended a step, or found Redis or the store away",
    ["loop"], multiprocess_mode="max",
)  # fmt: skip
server_reachable = Gauge(
    "voucherd_server_reachable", "1 if Redis, or the store, answered the worker's last look", ["server"],
    multiprocess_mode="livemin",
)  # fmt: skip
outbox_codes = Gauge(
    "voucherd_outbox_codes", "Codes in the outbox, not yet in the ledger", ["partition"], multiprocess_mode="livemax"
)
outbox_bytes = Gauge(
    "voucherd_outbox_bytes", "Bytes of the outbox, not yet in the ledger", ["partition"], multiprocess_mode="livemax"
)
outbox_limit_codes = Gauge(
    "voucherd_outbox_limit_codes",
    "Codes that the outbox may hold before requests are refused",
    ["partition"],
    multiprocess_mode="livemax",
)  # by work
outbox_limit_bytes = Gauge(
    "voucherd_outbox_limit_bytes", "Bytes that the outbox may hold before requests are refused", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
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
pool_empty_in_seconds = Gauge(
    "voucherd_pool_empty_in_seconds",
    "Seconds until a pool that is asked now is empty at the burn rate of the last minute; +Inf if it is not, or at 0",
    ["pool"], multiprocess_mode="livemin",
)  # fmt: skip
conservation_difference = Gauge(
    "voucherd_conservation_difference_codes",
    "Codes by which the books are off: in windows, between windows and ledger, in stock; should stay 0",
    ["partition", "books"], multiprocess_mode="livemax",
)  # fmt: skip
books_checked = Gauge(
    "voucherd_books_checked_timestamp_seconds",
    "Unix time at which quarantine, ledger and stock were last counted code by code", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
catalogue_stored = Gauge(
    "voucherd_catalogue_stored_version", "Version of the catalogue in the store", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
fence_version = Gauge(
    "voucherd_fence_version", "Lowest version of the catalogue that the scripts accept, -1 if there is none",
    ["partition"], multiprocess_mode="livemax",
)  # fmt: skip
redis_memory_bytes = Gauge(
    "voucherd_redis_memory_bytes", "Memory that Redis uses for data, in bytes", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
redis_memory_limit_bytes = Gauge(
    "voucherd_redis_memory_limit_bytes", "maxmemory of Redis in bytes, +Inf if it has none", ["partition"],
    multiprocess_mode="livemax",
)  # fmt: skip
redis_append_failing = Gauge(
    "voucherd_redis_append_failing", "1 while Redis can't write its append-only file; should stay 0", ["partition"],
    multiprocess_mode="livemax",
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
    """Counts the requests of one API in plain integers until they are added to the instruments.

    A process that is killed loses what it counted since then.
    """

    def __init__(self, api: str) -> None:
        self._api = api
        self._answers: defaultdict[_Key, int] = defaultdict(int)
        self._issued: defaultdict[str, int] = defaultdict(int)  # vouchers, by campaign
        self._buckets = [0] * (len(SECONDS) + 1)
        self._seconds = 0.0
        self._to_add: list[_Counted] = []

    def count(
        self, status: int, code: str, seconds: float, distributor: str = "", campaign: str = "", issued: int = 0
    ) -> None:
        """One answer with this status and code, ``seconds`` after its request was taken up; '' is nobody's.  Of its
        vouchers so many were ``issued`` by this request."""
        self._answers[status, code, distributor, campaign] += 1
        if issued:
            self._issued[campaign] += issued
        self._buckets[bisect_left(SECONDS, seconds)] += 1
        self._seconds += seconds

    def flush(self) -> None:
        """All that was counted is in the instruments."""
        while self.flush_some():
            pass

    def flush_some(self) -> bool:
        """A bounded part of what was counted is in the instruments; whether there is more of it."""
        if not self._to_add:
            answers, self._answers = self._answers, defaultdict(int)
            issued, self._issued = self._issued, defaultdict(int)
            self._to_add = [*answers.items(), *issued.items()]
            self._add_seconds()
        self._to_add, now = self._to_add[FLUSHED_AT_ONCE:], self._to_add[:FLUSHED_AT_ONCE]
        for (instrument, *labels), number in self._sums(now).items():
            instrument.labels(*labels).inc(number)
        return bool(self._to_add)

    def _sums(self, counted: list[_Counted]) -> dict[tuple[Any, ...], int]:
        """By instrument and labels."""
        sums: defaultdict[tuple[Any, ...], int] = defaultdict(int)
        for counted_by, number in counted:
            if isinstance(counted_by, str):
                sums[campaign_vouchers_issued, bounded(_campaigns, counted_by)] += number
                continue
            status, code, distributor, campaign = counted_by
            sums[requests, self._api, str(status), code] += number
            if status in (401, 403):
                sums[credentials_refused, self._api, code] += number
            if distributor:
                sums[distributor_requests, bounded(_distributors, distributor), code] += number
            if campaign:
                sums[campaign_requests, bounded(_campaigns, campaign), code] += number
        return sums

    def _add_seconds(self) -> None:
        histogram = request_seconds.labels(self._api)
        for bucket, answers in enumerate(self._buckets):
            if answers:
                histogram._buckets[bucket].inc(answers)  # the library has no public way to add many observations
                self._buckets[bucket] = 0
        histogram._sum.inc(self._seconds)
        self._seconds = 0.0


_Key = tuple[int, str, str, str]  # status, code, distributor, campaign
_Counted = tuple[_Key | str, int]  # answers, or vouchers that a campaign issued

_distributors: Final[set[str]] = set()
_campaigns: Final[set[str]] = set()
_pools: Final[set[str]] = set()


def bounded(known: set[str], name: str) -> str:
    """``name``, as long as it is among the first NAMES_MAX that were met; OTHERS for those that come later."""
    if name in known or name == OTHERS:
        return name
    if len(known) >= NAMES_MAX:
        return OTHERS
    known.add(name)
    return name


def name_pools(pools: Iterable[str]) -> None:
    """These have series of their own before any other that is met later, as long as there is room."""
    for pool in pools:
        bounded(_pools, pool)


def set_by_pool(gauge: Gauge, values: Mapping[str, float], joined: Callable[[Iterable[float]], float] = sum) -> None:
    """``gauge`` says what ``values`` has for each pool, and as OTHERS what ``joined`` makes of those beyond
    NAMES_MAX.  All pools have to be given at once."""
    others = []
    for pool, value in values.items():
        if (name := bounded(_pools, pool)) == OTHERS:
            others.append(value)
        else:
            gauge.labels(name).set(value)
    if others:
        gauge.labels(OTHERS).set(joined(others))


def set_of_pool(gauge: Gauge, pool: str, value: float) -> None:
    """``gauge`` says this of one pool; of one beyond NAMES_MAX nothing is said until all are looked at."""
    if (name := bounded(_pools, pool)) != OTHERS:
        gauge.labels(name).set(value)


def leased_by_pool(pool: str, codes: int) -> None:
    """So many codes more went to the window of this pool."""
    leased.labels(bounded(_pools, pool)).inc(codes)


class Supervision(Collector):
    """What only the parent of the serving processes knows; never written to the directory."""

    def __init__(self, workers: int, ready: Callable[[], int] = lambda: 0) -> None:
        """``ready`` says how many are."""
        self.workers = workers
        self.ready = ready
        self.exits = 0
        self.pids: dict[int, int] = {}  # of the processes there are now, by number

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("voucherd_workers", "Serving processes that should run", self.workers)
        yield GaugeMetricFamily("voucherd_workers_ready", "Serving processes that are ready", self.ready())
        yield CounterMetricFamily("voucherd_worker_exits", "Serving processes that ended untold", self.exits)
        memory = GaugeMetricFamily(
            "voucherd_process_resident_bytes", "Resident memory of a serving process", labels=["process"]
        )
        for number, pid in sorted(self.pids.copy().items()):
            with contextlib.suppress(OSError, ValueError, IndexError):  # it ended just now, or this is no Linux
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                memory.add_metric([str(number)], pages * os.sysconf("SC_PAGE_SIZE"))
        yield memory


class Build(Collector):
    """Which version answers."""

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("voucherd_build_info", "1, with the version that runs", labels=["version", "python"])
        family.add_metric([__version__, platform.python_version()], 1)
        yield family


def given_directory() -> Path | None:
    """The directory that this process was started with, if it was: others write there too."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    return Path(given) if given else None


def declared() -> Iterator[tuple[str, str, str]]:
    """Name as exposed, type and help of each instrument: the README's table is compared with it."""
    instruments = [value for value in globals().values() if isinstance(value, MetricWrapperBase)]
    described = (metric for one in instruments for metric in one.describe())
    for metric in [*described, *Supervision(0).collect(), *Build().collect()]:
        yield metric.name + ("_total" if metric.type == "counter" else ""), metric.type, metric.documentation
