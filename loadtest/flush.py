"""What it takes to write issued vouchers to the ledger: `make bench-flush`.

PostgreSQL is the embedded one, with fsync on.  Vouchers are issued into the outbox of an embedded Valkey in batches as
a busy service makes them; then the worker's flush alone runs until the outbox is empty.  Each round counts the CPU time
of the flushing process, of PostgreSQL, and of Valkey.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.figures import keep, verdict
from loadtest.processes import cpu_us
from loadtest.servers import PostgresServer, RedisServer, postgresql, redis_like
from service.domain import Code, Request, Rule
from service.garbage import collect_rarely
from service.line import connect
from service.scripts import Candidate, Plan, Routed, Scripts
from service.store.database import Database
from service.store.migration import migrate
from service.worker.flush import Flush
from service.worker.recover import Recover

OWN_MAX, ALL_MAX = 5.0, 15.0  # the targets, microseconds a voucher: the worker's own CPU, and with PostgreSQL's
BATCH = 32  # vouchers of one outbox entry: what 64 busy connections make
LEASE = 1_000
RETENTION_S = 86_400
PLENTY = 10**9
POOL = "CAMP-001"
EXPIRES_AT = 1_893_456_000


class Round(msgspec.Struct, frozen=True):
    """CPU microseconds a voucher, and vouchers a second."""

    own_us: float
    postgres_us: float
    valkey_us: float
    rate: float


def main() -> int:
    """Measures and prints; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-flush", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements (default 5)")
    parser.add_argument("--vouchers", type=int, default=20_000, help="vouchers of one measurement (default 20,000)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    collect_rarely()  # as the worker does
    with (
        tempfile.TemporaryDirectory(prefix="voucherd-") as folder,
        postgresql(Path(folder)) as postgres,
        redis_like(Path(folder)) as valkey,
    ):
        rounds = asyncio.run(_rounds(postgres, valkey, options))
    return _print(rounds, options)


async def _rounds(postgres: PostgresServer, valkey: RedisServer, options: argparse.Namespace) -> list[Round]:
    database = Database.connect(postgres.url())
    redis = connect(valkey.url, timeout_ms=5_000)
    try:
        await migrate(database)
        scripts = Scripts(redis)
        flush = Flush(database, scripts, consumer="bench", retention_s=RETENTION_S)
        recover = Recover(database, scripts, flush, outbox_max=PLENTY, retention_s=RETENTION_S)
        while not (seen := await scripts.generation()).agrees or seen.restoring:
            await recover.run_once()
        issue = _Issuing(scripts, seen.open, seen.fence)
        rounds = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for _ in progress.track(range(options.rounds + 1), description="issuing and flushing"):
                await issue.vouchers(options.vouchers)
                rounds.append(await _flushed(flush, postgres, valkey, options.vouchers))
        return rounds[1:]  # the first one fills caches
    finally:
        await redis.aclose()
        await database.close()


async def _flushed(flush: Flush, postgres: PostgresServer, valkey: RedisServer, vouchers: int) -> Round:
    assert valkey.process is not None
    servers = ([*postgres.pids()], [valkey.process.pid])
    before = [cpu_us(pids) for pids in servers]
    began, cpu_began, done = time.perf_counter(), time.process_time(), 0
    while done < vouchers:
        done += (await flush.run_once()).codes
    own, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    theirs = [(cpu_us(pids) - spent) / vouchers for pids, spent in zip(servers, before, strict=True)]
    return Round(own / vouchers * 1e6, theirs[0], theirs[1], vouchers / seconds)


class _Issuing:
    """Fills the outbox as a serving process does."""

    def __init__(self, scripts: Scripts, generation: int, version: int) -> None:
        self._scripts = scripts
        self._generation = generation
        self._version = version
        self._leased = 0
        rule = Rule(POOL, POOL, "PAY", "PAY", 0).pack()
        self._plan = Plan((Candidate(POOL, 0, 0, 0, rule, ()),))

    async def vouchers(self, count: int) -> None:
        """So many vouchers more are in the outbox."""
        for start in range(0, count, LEASE):
            await self._restock(min(LEASE, count - start))
        for start in range(0, count, BATCH):
            await self._issue(min(BATCH, count - start))

    async def _restock(self, count: int) -> None:
        numbers = range(self._leased, self._leased + count)
        await self._scripts.restock(
            POOL, str(numbers.stop), str(self._leased or ""),
            [Code(EXPIRES_AT, 1, n, f"PSCF-{secrets.token_hex(5)}", f"SER-{n:06d}") for n in numbers],
            generation=self._generation, stock_version=1, low_water=20,
        )  # fmt: skip
        self._leased += count

    async def _issue(self, count: int) -> None:
        batch = [
            Routed(Request("v1", "DIST-001", str(uuid.uuid4()), "DIST-001", ("PAY",), f"AT-{n}\tPAY"), self._plan)
            for n in range(count)
        ]
        reply = await self._scripts.issue(
            batch, generation=self._generation, version=self._version, outbox_max=PLENTY, outbox_bytes_max=10**12,
            retention_s=RETENTION_S,
            bounds={},
        )  # fmt: skip
        if {answer.status for answer in reply.answers} != {"ISSUED"}:
            raise SystemExit(f"not every voucher was issued: {reply.status}")


def _print(rounds: list[Round], options: argparse.Namespace) -> int:
    names = Round.__struct_fields__
    median = Round(*(statistics.median(getattr(one, name) for one in rounds) for name in names))
    both = statistics.median(one.own_us + one.postgres_us for one in rounds)
    met = median.own_us <= OWN_MAX and both <= ALL_MAX
    keep(options.json, {"rounds": rounds, "median": median, "with_postgres_us": both, "met": met})
    table = Table(title=f"Flush of {options.vouchers:,} vouchers to PostgreSQL, CPU in microseconds a voucher")
    for column in ("", "worker", "PostgreSQL", "worker + PostgreSQL", "Valkey", "a second"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, one in enumerate([*rounds, median], 1):
        table.add_row(
            "median" if number > len(rounds) else f"round {number}", f"{one.own_us:.1f}", f"{one.postgres_us:.1f}",
            f"{one.own_us + one.postgres_us:.1f}", f"{one.valkey_us:.1f}", f"{one.rate:,.0f}",
            style="bold" if number > len(rounds) else "",
        )  # fmt: skip
    Console().print(table)
    print(f"worker {median.own_us:.1f} us, at most {OWN_MAX:g}: {verdict(median.own_us <= OWN_MAX)}")
    print(f"with PostgreSQL {both:.1f} us, at most {ALL_MAX:g}: {verdict(both <= ALL_MAX)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
