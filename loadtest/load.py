"""Latency against load: voucherd under requests that are due at a steady pace, whatever the answers do (open loop).

A latency counts from when its request was due, so one stall is seen by every request that was due meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from loadtest.client import run
from loadtest.contenders import Voucherd
from loadtest.processes import cpu_us

# Of the rate that a closed loop saturates at.
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.25, 1.5, 2.0)
LEVEL_S = 5.0  # one level
# Below saturation, several times what is ever under way.  Above, far more than the service lets wait in its queue
# (VOUCHERD_QUEUE_MAX), so that it is the service that refuses, and not the generator that waits for a connection.
CONNECTIONS, CONNECTIONS_ABOVE = 256, 4_096

P99_MS_MAX = 10.0  # the targets: p99 at half of the saturated rate,
ISSUED_SHARE_MIN = 0.8  # and what is still issued at twice the saturated rate, of that rate


class Level(msgspec.Struct, frozen=True):
    """One load: requests offered, vouchers issued and requests refused a second, latencies of each in milliseconds, CPU
    microseconds of serve and Valkey per request that was answered; what may stand in the way: the cores that each
    group of processes and the load itself took, and the slowest fsync of Valkey in milliseconds."""

    share: float
    offered: float
    issued: float
    refused: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    refused_p99_ms: float
    cpu_us: float
    cores: dict[str, float]
    fsync_ms: float


def codes_for(rate: float) -> int:
    """How many codes a sweep around this rate may issue."""
    return int(sum(SHARES) * rate * LEVEL_S)


def sweep(up: Voucherd, saturated: float) -> Iterator[Level]:
    """One level after the other, each when the worker has written what the one before has issued."""
    vouchers = up.vouchers()
    groups = {**up.groups, "load": [os.getpid()]}
    for share in SHARES:
        rate = share * saturated
        requests = int(rate * LEVEL_S)
        before = {name: cpu_us(pids) for name, pids in groups.items()}
        up.fsync_ms()
        connections = CONNECTIONS if share < 1 else CONNECTIONS_ABOVE
        seen = run("127.0.0.1", up.port, connections, requests, vouchers, rate=rate)
        spent = {name: cpu_us(pids) - before[name] for name, pids in groups.items()}
        fsync_ms = up.fsync_ms()
        up.settled()
        issued = seen.statuses.get(200, 0)
        if set(seen.statuses) - {200, 503}:
            raise SystemExit(f"an answer was neither 200 nor 503: {seen.statuses}")
        yield Level(
            share, rate, issued / seen.seconds, (requests - issued) / seen.seconds,
            seen.percentile(0.5) * 1e3, seen.percentile(0.99) * 1e3, seen.percentile(0.999) * 1e3,
            seen.percentile(0.99, 503) * 1e3, (spent["serve"] + spent["Valkey"]) / requests,
            {name: us / 1e6 / seen.seconds for name, us in spent.items()}, fsync_ms,
        )  # fmt: skip
