"""What one voucher costs in the issue script: `make bench-script`.

Batches go straight to the wheel's Valkey, with nothing between: by the server's own account of EVALSHA, and by the CPU
time of its process.  The ways to ask take turns, so that what changes on the machine changes all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from loadtest.figures import keep
from loadtest.processes import cpu_us
from loadtest.servers import RedisServer, redis_like
from service import keys
from service.catalogue import period_bounds
from service.domain import Code, RateLimit, Request, Rule
from service.line import connect
from service.scripts import Candidate, CountedCap, Counter, Plan, Routed, Scripts

LEASE: Final = 2_500
YEAR_S: Final = 366 * 86_400
CAPS: Final = (
    CountedCap(Counter("CAMP", "total", "UTC"), "campaign", 10**9),
    CountedCap(Counter("CAMP", "day", "UTC"), "distributor", 10**9),
    CountedCap(Counter("CAMP", "day", "UTC"), "terminal", 10**9),
)
PLAN: Final = Plan((Candidate("CAMP", 0, 0, 0, Rule("CAMP", "CAMP", "CAT", "PAY", 0).pack(), CAPS),))
LIMIT: Final = RateLimit(1_000_000, 1_000_000)  # never reached


class Way(msgspec.Struct, frozen=True):
    """How a batch is asked for: by how many distributors, under which limit, and whether with traces."""

    distributors: int = 1
    limit: RateLimit | None = None
    traced: bool = False


WAYS: Final = {
    "one distributor": Way(),
    "one distributor, limited": Way(limit=LIMIT),
    "one distributor, traced": Way(traced=True),
    "a distributor each": Way(1_000),
    "a distributor each, limited": Way(1_000, LIMIT),
}


class Cost(msgspec.Struct, frozen=True):
    """Microseconds a voucher: inside EVALSHA, and of the server's process."""

    way: str
    evalsha_us: float
    server_us: float


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="make bench-script", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=31, help="requests of a batch (default 31, as of 64 connections)")
    parser.add_argument("--batches", type=int, default=150, help="batches of a round (default 150)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each way (default 9)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voucherd-") as folder, redis_like(Path(folder)) as server:
        costs = asyncio.run(_measured(server, options))
    print(f"{'medians, batches of ' + str(options.batch):<32}{'EVALSHA':>10}{'server':>10}   us a voucher")
    for way in WAYS:
        mine = [cost for cost in costs if cost.way == way]
        print(f"{way:<32}{median(c.evalsha_us for c in mine):>10.2f}{median(c.server_us for c in mine):>10.2f}")
    keep(options.json, costs)
    return 0


async def _measured(server: RedisServer, options: argparse.Namespace) -> list[Cost]:
    redis: Any = connect(server.url, timeout_ms=30_000)
    numbers, leased, costs = count(), 0, list[Cost]()
    try:
        await redis.config_set("appendfsync", "no")  # the disk is not what is measured
        scripts = Scripts(redis)
        await scripts.open(await scripts.generation(), 1, version=1, restoring=False)
        for _ in range(options.rounds):
            for name, way in WAYS.items():
                while await redis.llen(keys.window(0, 1, "CAMP")) < options.batch * options.batches:
                    expires = int(time.time()) + YEAR_S
                    codes = [Code(expires, 1, n, f"CODE-{n:09}", f"SER-{n:09}") for n in range(leased, leased + LEASE)]
                    await scripts.restock(
                        "CAMP", str(leased), str(leased - LEASE) if leased else "", codes,
                        generation=1, stock_version=1, low_water=20,
                    )  # fmt: skip
                    leased += LEASE
                batches = [[_routed(next(numbers), way) for _ in range(options.batch)] for _ in range(options.batches)]
                costs.append(await _round(redis, scripts, server, name, batches))
    finally:
        await redis.aclose()
    return costs


def _routed(number: int, way: Way) -> Routed:
    distributor = f"DIST-{number % way.distributors:04}"
    terminal = f"T-{number % 1_000}"
    trace = f"00-{number:032x}-{number:016x}-01" if way.traced else ""
    asked = Request("v1", distributor, f"request-{number:09}", distributor, ("PAY",), f"{terminal}\tPAY", trace=trace)
    return Routed(asked, PLAN, limit=way.limit)


async def _round(
    redis: Any, scripts: Scripts, server: RedisServer, way: str, batches: Sequence[Sequence[Routed]]
) -> Cost:
    now = int(time.time())
    bounds = {cap.counter: period_bounds(cap.counter.period, "UTC", now) for cap in CAPS}
    await redis.config_resetstat()
    assert server.process is not None
    began = cpu_us([server.process.pid])
    for batch in batches:
        reply = await scripts.issue(
            batch, generation=1, version=1, outbox_max=10**9, outbox_bytes_max=10**12, retention_s=86_400,
            bounds=bounds,
        )  # fmt: skip
        assert all(answer.status == "ISSUED" for answer in reply.answers), reply.answers[0]
    used = cpu_us([server.process.pid]) - began
    vouchers = sum(map(len, batches))
    stats = await redis.info("commandstats")
    return Cost(way, stats["cmdstat_evalsha"]["usec"] / vouchers, used / vouchers)


if __name__ == "__main__":
    sys.exit(main())
