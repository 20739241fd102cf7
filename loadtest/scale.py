"""Whether a voucher costs the same at any size: `make bench-scale`.

Two installations of `voucherd up`, asked in turn: one as `make bench` has it, and one that grows from line to line.
Each line keeps what the ones before have added: campaigns and distributors with a token each, codes in stock, replay
records, and records that expire as fast as new ones are made.  Then, under load, a catalogue of that size is published,
and the metrics of all that are scraped.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest import contenders
from loadtest.bulk import NEVER_S, campaign, more_campaigns, more_records
from loadtest.client import run
from loadtest.contenders import Voucherd
from loadtest.figures import keep, verdict
from loadtest.processes import cpu_us, module, resident_mb
from loadtest.vouchers import VoucherRequests
from service.line import connect
from service.scripts import Scripts

FLAT = 1.15  # the target: what a voucher may cost at most, over what it costs in the small installation
DELAY_MS_MAX, IN_FORCE_S_MAX = 50.0, 3.0  # of a publication: what it delays any request by, and until it is in force
SCRAPE_S_MAX, SCRAPE_DELAY_MS_MAX = 0.2, 20.0  # of a scrape of 10,000 series: how long it takes, and what it delays
SCRAPE_EVERY_S = 0.5
CONNECTIONS, CONNECTIONS_OPEN = 64, 256
LOAD_SHARE = 0.5  # of the saturated rate: the load under which something is published, and scraped
LOADS = 3
LINES_MAX = 16  # more than there are, and what is repeated among them
ATTEMPTS_MAX = 5  # of one measurement: a disk that stands still for seconds makes any service refuse
PATIENCE_MS = 60_000  # for a server that takes in millions of records
EXPIRE_S = 60  # records that expire do so evenly over so many seconds
BYTES_PER_RECORD = 260  # more than either server takes (make bench-memory)

Requests = Callable[[int], bytes]


class Line(msgspec.Struct, frozen=True):
    """One size: CPU microseconds a voucher of the small installation and of the large one, round by round, the resident
    memory of the large one's serving process in MB, and how many measurements were repeated because one of their
    answers was a refusal."""

    name: str
    small_us: list[float]
    large_us: list[float]
    serve_mb: float
    repeated: int

    @property
    def ratio(self) -> float:
        """Median of the ratios of a round."""
        return statistics.median(large / small for small, large in zip(self.small_us, self.large_us, strict=True))


class Loaded(msgspec.Struct, frozen=True):
    """The same load three times: the longest that any request took in ms without anything beside it, with a publication
    (``command_s`` until its command returned, which is when the catalogue is in force), and with scrapes of so many
    ``series``, the longest of which took ``scrape_s``."""

    calm_ms: float
    published_ms: float
    command_s: float
    scraped_ms: float
    series: int
    scrape_s: float


def main() -> int:
    """Measures and prints; exit status 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-scale", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of both installations (default 5)")
    parser.add_argument("--requests", type=int, default=8_000, help="requests of one measurement (default 8,000)")
    parser.add_argument("--campaigns", type=int, default=10_000, help="campaigns, and distributors (default 10,000)")
    parser.add_argument("--codes", type=int, default=10_000_000, help="codes in stock (default 10,000,000)")
    parser.add_argument("--records", type=int, default=10_000_000, help="replay records (default 10,000,000)")
    parser.add_argument("--load", metavar="S", type=float, default=12.0, help="seconds with a publication (default 12)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    free = psutil.virtual_memory().available
    if free < options.records * BYTES_PER_RECORD * 1.5:
        parser.error(f"{options.records:,} records need more memory than there is: say --records with fewer")
    console = Console(stderr=True)
    with ExitStack() as stack, Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting two installations", total=None)
        small, large = (stack.enter_context(_installation(options)) for _ in range(2))
        lines, of_small = [], small.vouchers()

        def says(what: str) -> None:
            progress.update(task, description=what)

        for name, of_large in _growing(large, options, says):
            says(f"measuring: {name}")
            lines.append(line := _line(name, small, large, of_small, of_large, options))
            console.print(f"{name}: {line.ratio:.2f}")  # it takes a quarter of an hour: what is known is told
        progress.update(task, description="publishing and scraping under load")
        loaded = _loaded(large, options)
    return _print(lines, loaded, options)


@contextmanager
def _installation(options: argparse.Namespace) -> Iterator[Voucherd]:
    codes = LINES_MAX * (options.rounds + 1) * options.requests
    with (
        tempfile.TemporaryDirectory(prefix="voucherd-") as folder,
        contenders.voucherd(Path(folder), codes=codes, product_codes=1, window=3 * options.requests) as up,
    ):
        yield up


# --- growing ---------------------------------------------------------------------------------------------------------


def _growing(up: Voucherd, options: argparse.Namespace, says: Callable[[str], None]) -> Iterator[tuple[str, Requests]]:
    """Makes the installation larger, step by step; yields the name of each size and what is asked then."""
    vouchers, count = up.vouchers(), options.campaigns
    yield "both alike", vouchers
    says(f"{count:,} campaigns and distributors")
    tokens = asyncio.run(more_campaigns(up.data, count))
    yield f"{count:,} campaigns, one asked", vouchers
    yield f"{count:,} campaigns, all asked", _Turns([up.vouchers(campaign(number)) for number in range(count)])
    yield f"{count:,} distributors, all ask", _Turns([VoucherRequests(token, id) for id, token in tokens.items()])
    says(f"{options.codes:,} codes")
    up.stock(options.codes)
    yield f"{options.codes:,} codes in stock", vouchers
    says(f"{options.records:,} records")
    asyncio.run(_more_records(up, options.records))
    yield f"{options.records:,} replay records", vouchers
    expiring = options.rounds * options.requests
    says(f"{expiring:,} records that expire")
    asyncio.run(_more_records(up, expiring, lambda number: 1 + number % EXPIRE_S))
    yield f"records expire, {expiring // EXPIRE_S:,} a second", vouchers


class _Turns:
    """Requests of many makers, each in its turn."""

    def __init__(self, makers: Sequence[VoucherRequests]) -> None:
        self._makers = makers
        self._sent = 0

    def __call__(self, number: int) -> bytes:
        self._sent += 1
        return self._makers[self._sent % len(self._makers)](number)


async def _more_records(up: Voucherd, count: int, life_s: Callable[[int], int] = lambda _: NEVER_S) -> None:
    redis = connect(up.redis_url, timeout_ms=PATIENCE_MS)
    up.fsync("no")  # or ten million records wait for the disk, which is not what is measured
    try:
        scripts = Scripts(redis)
        await more_records(scripts, count, generation=(await scripts.generation()).open, life_s=life_s)
    finally:
        await redis.aclose()
        up.fsync("always")


# --- measuring -------------------------------------------------------------------------------------------------------


def _line(
    name: str, small: Voucherd, large: Voucherd, of_small: Requests, of_large: Requests, options: argparse.Namespace
) -> Line:
    _cpu_us(large, of_large, options.requests // 4)  # what is met for the first time is looked up for the first time
    seen = [
        (_cpu_us(small, of_small, options.requests), _cpu_us(large, of_large, options.requests))
        for _ in range(options.rounds)
    ]
    of_one, of_other = ([pair[number] for pair in seen] for number in (0, 1))
    repeated = sum(refused for _, refused in (*of_one, *of_other))
    serve_mb = resident_mb(large.groups["serve"])
    return Line(name, [us for us, _ in of_one], [us for us, _ in of_other], serve_mb, repeated)


def _cpu_us(up: Voucherd, requests: Requests, count: int) -> tuple[float, int]:
    """Microseconds a voucher when all were issued, and how many attempts before had a refusal among their answers."""
    pids = [*up.groups["serve"], *up.groups["Valkey"]]
    for attempt in range(ATTEMPTS_MAX):
        before = cpu_us(pids)
        seen = run("127.0.0.1", up.port, CONNECTIONS, count, requests)
        spent = cpu_us(pids) - before
        up.settled()
        if set(seen.statuses) == {200}:
            return spent / count, attempt
        if set(seen.statuses) - {200, 503}:
            break
    raise SystemExit(f"not every answer was 200: {seen.statuses}")


def _loaded(up: Voucherd, options: argparse.Namespace) -> Loaded:
    """Requests come at half of the saturated rate, while a campaign is paused and while metrics are scraped."""
    vouchers = up.vouchers()
    rate = LOAD_SHARE * options.requests / run("127.0.0.1", up.port, CONNECTIONS, options.requests, vouchers).seconds

    up.stock(int(LOADS * rate * options.load))

    def slowest_ms() -> float:
        up.settled()
        seen = run("127.0.0.1", up.port, CONNECTIONS_OPEN, int(rate * options.load), vouchers, rate=rate)
        return seen.percentile(1.0) * 1e3

    calm_ms, took, scrapes, series = slowest_ms(), list[float](), list[float](), 0

    def publish() -> None:
        began = time.monotonic()
        command = module("service.cli.main", "campaign", "pause", campaign(0), "--data-dir", str(up.data))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.monotonic() - began)

    def scrape() -> None:
        nonlocal series
        while not over.wait(SCRAPE_EVERY_S):
            began = time.monotonic()
            with urllib.request.urlopen(f"{up.demo['ops_url']}/metrics") as answer:  # noqa: S310
                text = answer.read()
            scrapes.append(time.monotonic() - began)
            series = text.count(b"\n") - text.count(b"\n#")

    publishing = threading.Timer(options.load / 4, publish)
    publishing.start()
    published_ms = slowest_ms()
    publishing.join()
    over, scraping = threading.Event(), threading.Thread(target=scrape)
    scraping.start()
    scraped_ms = slowest_ms()
    over.set()
    scraping.join()
    if not took or not scrapes:
        raise SystemExit("the campaign could not be paused, or nothing was scraped")
    return Loaded(calm_ms, published_ms, took[0], scraped_ms, series, max(scrapes))


def _print(lines: Sequence[Line], loaded: Loaded, options: argparse.Namespace) -> int:
    targets = [line.ratio <= FLAT for line in lines]
    delay, scrape_delay = loaded.published_ms - loaded.calm_ms, loaded.scraped_ms - loaded.calm_ms
    targets += [delay <= DELAY_MS_MAX, loaded.command_s <= IN_FORCE_S_MAX]
    targets += [loaded.scrape_s <= SCRAPE_S_MAX, scrape_delay <= SCRAPE_DELAY_MS_MAX]
    keep(options.json, {"lines": lines, "loaded": loaded, "met": targets})
    table = Table(
        title=f"CPU us a voucher, medians of {options.rounds} rounds; a line keeps what those before added",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for column in ("ratio", "range", "small", "large", "MB", "again", f"<= {FLAT:g}"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        ratios = [large / small for small, large in zip(line.small_us, line.large_us, strict=True)]
        table.add_row(
            line.name, f"{line.ratio:.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{statistics.median(line.small_us):.1f}", f"{statistics.median(line.large_us):.1f}",
            f"{line.serve_mb:.0f}", f"{line.repeated}", verdict(line.ratio <= FLAT),
        )  # fmt: skip
    Console().print(table)
    print(
        f"a publication delays a request by {delay:.0f} ms (slowest {loaded.published_ms:.0f}, without one "
        f"{loaded.calm_ms:.0f}), at most {DELAY_MS_MAX:g}: {verdict(delay <= DELAY_MS_MAX)}"
    )
    print(
        f"it is in force after {loaded.command_s:.1f} s, the command's start included, at most "
        f"{IN_FORCE_S_MAX:g}: {verdict(loaded.command_s <= IN_FORCE_S_MAX)}"
    )
    print(
        f"a scrape of {loaded.series:,} series takes {loaded.scrape_s:.3f} s, at most {SCRAPE_S_MAX:g}: "
        f"{verdict(loaded.scrape_s <= SCRAPE_S_MAX)}; it delays a request by {scrape_delay:.0f} ms (slowest "
        f"{loaded.scraped_ms:.0f}), at most {SCRAPE_DELAY_MS_MAX:g}: {verdict(scrape_delay <= SCRAPE_DELAY_MS_MAX)}"
    )
    return 0 if all(targets) else 1


if __name__ == "__main__":
    sys.exit(main())
