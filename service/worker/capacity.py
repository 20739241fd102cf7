"""How much of everything a load takes: what was measured of one voucher, times the load.

A factor says which command measured it; docs/performance.md has the runs.  CPU factors are those of a machine on which
an answer of the no-op application of `make bench` takes ``NOOP_US``; on another one they are in proportion.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from service.settings import Settings
from service.settings import load as of_environment
from service.store.database import connections_most
from service.worker.refill import FILL, LEASE_CODES_MAX
from service.worker.runner import FLUSH_S

Server = Literal["valkey", "redis"]

DAY_S: Final = 86_400
NOOP_US: Final = 28.1


class Factor(msgspec.Struct, frozen=True):
    """What something takes, in ``unit``, and where that is from: a command that measures it, or a document."""

    name: str
    value: float
    unit: str
    source: str


_FACTORS: Final = (
    Factor("replay record, Valkey 9", 205, "bytes", "make bench-memory"),
    Factor("replay record, Redis 7", 241, "bytes", "make bench-memory"),
    Factor("code in a window, Valkey 9", 42, "bytes", "make bench-memory"),
    Factor("code in a window, Redis 7", 52, "bytes", "make bench-memory"),
    Factor("voucher, serving process", 28.5, "us of CPU", "make bench"),
    Factor("voucher, Redis with appendfsync always", 20.5, "us of CPU", "make bench"),
    Factor("voucher, worker: flush", 15.0, "us of CPU", "make bench-flush"),
    Factor("voucher, worker: lease", 7.0, "us of CPU", "docs/performance.md, What paid"),
    Factor("voucher, PostgreSQL", 12.6, "us of CPU", "make bench-flush"),
    Factor("calls of the issue script", 520, "a second and serving process at most", "make bench"),
    Factor("voucher in the ledger, PostgreSQL", 665, "bytes", "make bench-recover"),
    Factor("replay record in a rewritten append-only file", 124, "bytes", "make bench-memory"),
    Factor("load of a rewritten append-only file", 190000, "records a second", "make bench-memory"),
    Factor("load of one as it was written", 24, "MB a second", "make bench-memory"),
)
FACTORS: Final = {one.name: one.value for one in _FACTORS}
SERVERS: Final[dict[Server, str]] = {"valkey": "Valkey 9", "redis": "Redis 7"}

# Cores that are kept busy to this share answer in time (p99, `make bench`); a peak comes on top of what was planned.
BUSY: Final = 0.5
# The file is rewritten when it has doubled (`auto-aof-rewrite-percentage 100`).
GROWN: Final = 2
# What the server needs besides its data while it rewrites its file: pages that are written meanwhile are copied.
REWRITE: Final = 1.5
# Commits a second of the watch, the publisher and whatever else the worker does, at most.
OTHER_COMMITS: Final = 2


class Load(msgspec.Struct, frozen=True):
    """``rate``: vouchers a second at the peak, ``mean`` of a day; ``retention_s``: how long a repeated request gets its
    first answer; ``outage_s``: how long the store may be away; ``works``: processes of `voucherd work`; ``noop_us``:
    what `make bench` says of the no-op application on the machines meant."""

    rate: int
    mean: float
    retention_s: int
    outage_s: int
    server: Server = "valkey"
    works: int = 2
    noop_us: float = NOOP_US


class Figure(msgspec.Struct, frozen=True):
    """``value`` in ``unit`` of what is needed, and ``how`` it comes about."""

    group: str
    name: str
    value: float
    unit: str
    how: str


def plan(load: Load) -> list[Figure]:
    """What the load needs, in the order in which it is shown.  Raises Misconfigured if it is out of bounds."""
    settings = of_environment(
        {}, planned_rate=load.rate, store_outage_s=load.outage_s, replay_retention_s=load.retention_s
    )
    return [*_memory(load, settings), *_cpu(load), *_store(load), *_disk(load)]


def _memory(load: Load, settings: Settings) -> list[Figure]:
    record, code = (FACTORS[f"{name}, {SERVERS[load.server]}"] for name in ("replay record", "code in a window"))
    records, window = load.mean * load.retention_s, FILL * settings.low_water
    parts = [
        Figure("Redis", "replay records", records * record, "bytes",
               f"{load.mean:,g} a second for {load.retention_s:,} s, {record:g} bytes each"),
        Figure("Redis", "windows", window * code, "bytes",
               f"{window:,} codes of one pool (twice what an outage takes), {code:g} bytes each"),
        Figure("Redis", "outbox in an outage", settings.outbox_bytes_max, "bytes",
               f"room for {settings.outbox_max:,} codes: the bound, which is twice what the outage needs"),
    ]  # fmt: skip
    needed = sum(one.value for one in parts)
    least = max(needed, settings.records_bytes)
    why = "their sum" if needed >= settings.records_bytes else "what the check `maxmemory` asks for: 512 bytes a record"
    return [
        *parts,
        Figure("Redis", "maxmemory", least, "bytes", f"{why}, at least"),
        Figure("Redis", "memory of the machine", REWRITE * least, "bytes",
               f"{REWRITE:g} times maxmemory: while the append-only file is rewritten"),
    ]  # fmt: skip


def _cpu(load: Load) -> list[Figure]:
    found = []
    for name, factors in (
        ("serve", ("voucher, serving process",)),
        ("Redis", ("voucher, Redis with appendfsync always",)),
        ("work", ("voucher, worker: flush", "voucher, worker: lease")),
        ("PostgreSQL", ("voucher, PostgreSQL",)),
    ):
        us = _us(load, *factors)
        found.append(Figure("CPU at the peak", name, load.rate * us / 1e6, "cores", f"{us:.1f} us a voucher"))
    return [
        *found,
        Figure("CPU at the peak", "serving processes", processes(load), "processes",
               f"each busy to {BUSY:.0%} of a core: VOUCHERD_WORKERS of all `serve` together"),
        Figure("CPU at the peak", "what one Redis carries", carried(load), "vouchers a second",
               f"it works in one thread, here busy to {BUSY:.0%}; there is one partition"),
    ]  # fmt: skip


def carried(load: Load) -> int:
    """Vouchers a second that one Redis issues on these machines, busy to ``BUSY``."""
    return math.floor(BUSY / (_us(load, "voucher, Redis with appendfsync always") / 1e6))


def processes(load: Load) -> int:
    """Serving processes that the peak needs; two at least, so that one may be restarted."""
    return max(2, math.ceil(load.rate * _us(load, "voucher, serving process") / 1e6 / BUSY))


def _us(load: Load, *names: str) -> float:
    """Microseconds of CPU that these factors take a voucher on the load's machines."""
    return load.noop_us / NOOP_US * sum(FACTORS[name] for name in names)


def _store(load: Load) -> list[Figure]:
    rows, bytes_each = load.mean * DAY_S, FACTORS["voucher in the ledger, PostgreSQL"]
    return [
        Figure("PostgreSQL", "connections", connections_most(processes(load), load.works), "connections",
               f"at most: {processes(load)} serving processes, {load.works} `work`, one command"),
        Figure("PostgreSQL", "requests a day", rows, "rows", "one for each sale; v3 has one for up to 20 vouchers"),
        Figure("PostgreSQL", "issuances a day", rows, "rows", "one for each voucher; the tables are not partitioned"),
        Figure("PostgreSQL", "ledger a day", rows * bytes_each, "bytes", f"{bytes_each:g} a voucher, indexes included"),
    ]  # fmt: skip


def _disk(load: Load) -> list[Figure]:
    calls = FACTORS["calls of the issue script"] * processes(load)
    records = load.mean * load.retention_s
    rewritten = records * FACTORS["replay record in a rewritten append-only file"]
    load_s = records / FACTORS["load of a rewritten append-only file"] + (
        (GROWN - 1) * rewritten / (FACTORS["load of one as it was written"] * 1e6)
    )
    commits = load.works / FLUSH_S + 2 * load.rate / LEASE_CODES_MAX + OTHER_COMMITS
    return [
        Figure("Disk", "fsyncs of Redis", min(load.rate, calls) + load.works / FLUSH_S, "a second",
               f"at most one a voucher, and {calls:,g} for {processes(load)} serving processes; one for each flush"),
        Figure("Disk", "fsyncs of PostgreSQL", commits, "a second",
               f"each `work` flushes {1 / FLUSH_S:g} times; two for each lease of {LEASE_CODES_MAX:,} codes"),
        Figure("Disk", "append-only file", (GROWN + 1) * rewritten, "bytes",
               "twice its rewritten length, at most, and the new file beside it while it is rewritten"),
        Figure("Disk", "load of it at a restart of Redis", load_s, "seconds",
               "nothing is issued meanwhile; then the generation rolls"),
    ]  # fmt: skip


def factors() -> tuple[Factor, ...]:
    """All that is measured."""
    return _FACTORS
