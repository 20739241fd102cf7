"""Whether the ledger keeps up: `make bench-outbox`.

One serving process at 70 % of the rate that it saturates at, `voucherd work` and PostgreSQL on the same cores, for ten
minutes: how many codes wait in the outbox, and whether they become more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil
import redis
from rich.console import Console
from rich.progress import Progress

from loadtest.client import run
from loadtest.contenders import CAMPAIGN, PRODUCT, codes_file
from loadtest.figures import keep, verdict
from loadtest.processes import STOP_S_MAX, cpu_us, module, running
from loadtest.servers import PostgresServer, RedisServer, free_port, postgresql, redis_like
from loadtest.vouchers import VoucherRequests
from service.cli.demo import DISTRIBUTOR
from service.keys import totals

SHARE = 0.7  # of the saturated rate
CONNECTIONS, CONNECTIONS_OPEN = 64, 256
SATURATE = 40_000  # requests to see what saturates it
SAMPLE_S = 2.0
# Bounded: in the last third of the time there waits at most so much more than in the middle third.
GROWTH_MAX = 1.5
# What a worker that keeps up leaves: two steps of 100 batches.  Below it growth says nothing.
SMALL = 10_000
GENERATION = 1  # the first one of a new installation


class Sample(msgspec.Struct, frozen=True):
    """Codes in the outbox so many seconds after the beginning."""

    at_s: float
    codes: int


class Seen(msgspec.Struct, frozen=True):
    """What was offered and issued a second, CPU microseconds a voucher by process, and the outbox over time."""

    offered: float
    issued: float
    refused: int
    cpu_us: dict[str, float]
    samples: list[Sample]

    @property
    def growth(self) -> float:
        """Median of the last third of the samples over that of the middle third, both at least SMALL."""
        third = max(1, len(self.samples) // 3)
        middle, last = (
            max(SMALL, statistics.median(one.codes for one in part))
            for part in (self.samples[third : 2 * third] or self.samples, self.samples[-third:])
        )
        return last / middle


def main() -> int:
    """Measures and prints; exit status 1 if the outbox grows."""
    parser = argparse.ArgumentParser(prog="make bench-outbox", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--saturate", type=int, default=SATURATE, help=f"requests to find the rate ({SATURATE:,})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    with ExitStack() as stack, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting PostgreSQL, Valkey and voucherd", total=None)
        here = stack.enter_context(_installation())
        progress.update(task, description="finding the rate that saturates it")
        here.stock(options.saturate)
        vouchers = VoucherRequests(here.token, DISTRIBUTOR, PRODUCT)
        rate = SHARE * options.saturate / run("127.0.0.1", here.port, CONNECTIONS, options.saturate, vouchers).seconds
        count = int(rate * 60 * options.minutes)
        progress.update(task, description=f"importing {count:,} codes")
        here.stock(count)
        progress.update(task, description=f"{rate:,.0f} requests a second", total=60 * options.minutes)
        samples: list[Sample] = []
        stop = threading.Event()

        def watch() -> None:
            began = time.monotonic()
            while not stop.wait(SAMPLE_S):
                at_s = time.monotonic() - began
                samples.append(Sample(at_s, here.outbox()))
                progress.update(task, completed=at_s)

        watching = threading.Thread(target=watch)
        before = {name: cpu_us(here.pids(name)) for name in here.groups}
        watching.start()
        try:
            seen = run("127.0.0.1", here.port, CONNECTIONS_OPEN, count, vouchers, rate=rate)
        finally:
            stop.set()
            watching.join()
        spent = {name: (cpu_us(here.pids(name)) - had) / count for name, had in before.items()}
    issued = seen.statuses.get(200, 0)
    return _print(Seen(rate, issued / seen.seconds, count - issued, spent, samples), options)


class _Installation:
    """PostgreSQL, Valkey, one `voucherd serve` with one process, one `voucherd work`."""

    groups = ("serve", "Valkey", "work", "PostgreSQL")

    def __init__(
        self, folder: Path, environment: dict[str, str], postgres: PostgresServer, valkey: RedisServer
    ) -> None:
        self._folder = folder
        self._environment = environment
        self._postgres = postgres
        self._valkey = valkey
        self._redis = redis.Redis.from_url(valkey.url)
        self.port = int(environment["VOUCHERD_PORT"])
        self.token = ""
        self.serve = self.work = 0

    def command(self, *arguments: str) -> str:
        """Runs a command of voucherd; what it printed."""
        done = subprocess.run(
            module("service.cli.main", *arguments), env=self._environment, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    def stock(self, codes: int) -> None:
        """So many codes more."""
        self.command("codes", "import", CAMPAIGN, str(codes_file(self._folder, codes)))

    def outbox(self) -> int:
        """Codes that wait in it."""
        return int(self._redis.hget(totals(0, GENERATION), "codes") or 0)

    def pids(self, group: str) -> list[int]:
        """The processes of one of ``groups``."""
        if group == "PostgreSQL":
            return [*self._postgres.pids()]
        if group == "Valkey":
            assert self._valkey.process is not None
            return [self._valkey.process.pid]
        first = psutil.Process(self.serve if group == "serve" else self.work)
        return [first.pid, *(one.pid for one in first.children(recursive=True))]


@contextmanager
def _installation() -> Iterator[_Installation]:
    with tempfile.TemporaryDirectory(prefix="voucherd-") as name, ExitStack() as stack:
        folder = Path(name)
        postgres = stack.enter_context(postgresql(folder))
        valkey = stack.enter_context(redis_like(folder))
        environment = {
            **os.environ, "VOUCHERD_STORE_URL": postgres.url(), "VOUCHERD_REDIS_URL": valkey.url,
            "VOUCHERD_PORT": str(free_port()), "VOUCHERD_OPS_PORT": "0", "VOUCHERD_PLANNED_RATE": "2000",
        }  # fmt: skip
        here = _Installation(folder, environment, postgres, valkey)
        here.command("migrate")
        work = subprocess.Popen(module("service.cli.main", "work"), env=environment, stderr=subprocess.DEVNULL)
        stack.callback(work.wait, STOP_S_MAX)
        stack.callback(work.terminate)
        serve = stack.enter_context(running(module("service.cli.main", "serve"), here.port, environment))
        here.serve, here.work = serve, work.pid
        here.command("distributor", "create", DISTRIBUTOR)
        here.token = json.loads(here.command("token", "issue", DISTRIBUTOR, "--json"))["token"]
        here.command("campaign", "create", CAMPAIGN, "--category", PRODUCT, "--product", PRODUCT)
        here.command("campaign", "assign", CAMPAIGN, DISTRIBUTOR)
        yield here


def _print(seen: Seen, options: argparse.Namespace) -> int:
    met = seen.growth <= GROWTH_MAX and not seen.refused
    keep(options.json, {"seen": seen, "met": met})
    most = max(one.codes for one in seen.samples)
    print(
        f"{seen.offered:,.0f} requests a second for {options.minutes:g} minutes, {seen.issued:,.0f} issued, "
        f"{seen.refused:,} refused"
    )
    print("CPU us a voucher: " + ", ".join(f"{name} {us:.1f}" for name, us in seen.cpu_us.items()))
    print(f"codes in the outbox: at most {most:,}; at the end {seen.samples[-1].codes:,}")
    print(f"last third over middle third: {seen.growth:.2f}, at most {GROWTH_MAX:g}, and none refused: {verdict(met)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
