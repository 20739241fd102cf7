"""CPU per voucher, side by side in one run: `make bench`.

Rates on a shared machine say more about the machine; the CPU time that the kernel counted per answer is steadier, and
the ratio of two that were measured one after the other is steadier still.  In each round everything takes its turn: the
no-op application, voucherd with all its guards on (authentication, three caps, idempotency, outbox, metrics), and two
services that do the same job in other ways.  64 connections, closed loop; the load generator shares the machine.  Then
voucherd alone under loads from a tenth to twice of what it was saturated at (``load``).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest import contenders, plots
from loadtest.client import Run, run
from loadtest.contenders import DRY, Contender, Voucherd
from loadtest.figures import keep, machine, verdict
from loadtest.load import ISSUED_SHARE_MIN, P99_MS_MAX, SHARES, Level, codes_for, sweep
from loadtest.processes import cpu_us
from loadtest.vouchers import Repeated, VoucherRequests

# The targets, as ratios; each measured in the same round.
ISSUE_MAX = 1.6  # a voucher over an answer of the no-op application
GUARDS_MAX = 1.05  # the same with a rate limit in the script; all other guards can't be switched off
REPLAY_MAX = 1.0  # a replay over a voucher; a hundredth more is within what a run can tell
REFUSAL_MAX = 1.3  # a 409 over a voucher
TWENTY_MAX = 0.5  # one of 20 vouchers of one call over an answer of the no-op application
TOLERANCE = 0.02

TWENTY = 20
SLOW_PART, TWENTY_PART = 4, 8  # FastAPI, and calls for one and for 20 of Client API v3: this part of the requests
COMPARED = ("Fastify", "FastAPI")


class Case(msgspec.Struct, frozen=True):
    """One line of the table: ``requests`` to ``contender``, each for ``vouchers`` vouchers, answered by ``status``."""

    name: str
    contender: Contender
    requests: Callable[[int], bytes]
    part: int = 1
    vouchers: int = 1
    status: int = 200
    fsync: str = "always"


class Measured(msgspec.Struct, frozen=True):
    """CPU microseconds per voucher by group of processes, answers a second, latencies in milliseconds."""

    cpu_us: dict[str, float]
    rate: float
    p50_ms: float
    p99_ms: float

    @property
    def total_us(self) -> float:
        """What issuing takes: the serving process and Valkey."""
        return self.cpu_us["serve"] + self.cpu_us.get("Valkey", 0.0)


def main() -> int:
    """Measures and prints; exit status 1 if an answer was not as expected or a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of everything (default 7)")
    parser.add_argument("--requests", type=int, default=10_000, help="requests of one measurement (default 10,000)")
    parser.add_argument("--connections", type=int, default=64, help="connections, closed loop (default 64)")
    parser.add_argument("--no-load", action="store_true", help="leave out latency against load")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="also draw pictures there (SVG)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure there")
    options = parser.parse_args()
    console = Console(stderr=True)
    with ExitStack() as stack, Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        cases = list(_cases(stack, options, console))
        for case in cases:
            progress.update(task, description=f"warming up: {case.name}")
            _measure(case, options, warm=True)
        progress.update(task, total=options.rounds * len(cases), completed=0)
        rounds: list[dict[str, Measured]] = []
        for number in range(options.rounds):
            seen: dict[str, Measured] = {}
            for case in cases:
                progress.update(task, description=f"round {number + 1} of {options.rounds}: {case.name}")
                seen[case.name] = _measure(case, options)
                progress.advance(task)
            rounds.append(seen)
        levels = [] if options.no_load else _levels(cases, rounds, progress)
    status = _print(rounds, levels, options)
    if options.plots is not None and levels:
        if why := plots.missing():
            console.print(f"[yellow]{why}")
        else:
            for path in plots.draw(options.plots, {name: _cpu(rounds, name) for name in rounds[0]}, levels):
                print(path)
    return status


def _levels(cases: Sequence[Case], rounds: Sequence[dict[str, Measured]], progress: Progress) -> list[Level]:
    up = next(case.contender for case in cases if isinstance(case.contender, Voucherd))
    assert isinstance(up, Voucherd)
    up.fsync("always")
    saturated = statistics.median(one[ISSUE].rate for one in rounds)
    task = progress.add_task("more codes", total=None)
    up.stock(codes_for(saturated))
    progress.update(task, description="latency against load", total=len(SHARES))
    levels = []
    for level in sweep(up, saturated):
        levels.append(level)
        progress.advance(task)
    return levels


def _cases(stack: ExitStack, options: argparse.Namespace, console: Console) -> Iterator[Case]:
    """Everything is started; what takes a turn in each round, in this order."""
    turns, requests = options.rounds + 1, options.requests
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    yield Case(FLOOR, stack.enter_context(contenders.noop()), VoucherRequests("vch_" + 48 * "0", "DIST-001"))
    up = stack.enter_context(
        contenders.voucherd(
            folder, codes=6 * turns * requests, product_codes=2 * turns * requests * TWENTY // TWENTY_PART,
            window=3 * requests,
        )
    )  # fmt: skip
    yield Case(ISSUE, up, up.vouchers())
    yield Case(REPLAY, up, Repeated(up.vouchers(), requests // 10))
    yield Case(REFUSAL, up, up.vouchers(DRY), status=409)
    yield Case(NEW_HEADERS, up, up.vouchers(new_headers=True))
    yield Case(ONE, up, up.v3(1), part=TWENTY_PART)
    yield Case(EACH, up, up.v3(TWENTY), part=TWENTY_PART, vouchers=TWENTY)
    yield Case(LIMITED, up, up.limited())
    yield Case(ISSUE_EVERYSEC, up, up.vouchers(), fsync="everysec")
    yield Case(ISSUE_NO, up, up.vouchers(), fsync="no")
    for name in COMPARED:
        if why := contenders.missing(name):
            console.print(f"[yellow]{why}")
            continue
        part = SLOW_PART if name == "FastAPI" else 1
        other, vouchers = stack.enter_context(contenders.compared(name, 2 * turns * (requests // part + 1_000)))
        yield Case(f"{name}, always", other, vouchers, part=part)
        yield Case(f"{name}, no", other, vouchers, part=part, fsync="no")


FLOOR = "no-op application"
ISSUE, ISSUE_EVERYSEC, ISSUE_NO = "voucher, always", "voucher, everysec", "voucher, no"
LIMITED = "voucher, rate limit"
REPLAY, REFUSAL, NEW_HEADERS = "replay", "409, no codes left", "voucher, new headers"
ONE, EACH = "v3, one voucher", f"v3, each of {TWENTY}"


def _measure(case: Case, options: argparse.Namespace, *, warm: bool = False) -> Measured:
    requests = max(options.connections, options.requests // case.part // (10 if warm else 1))
    case.contender.fsync(case.fsync)
    before = {name: cpu_us(pids) for name, pids in case.contender.groups.items()}
    seen = run("127.0.0.1", case.contender.port, options.connections, requests, case.requests)
    spent = {name: cpu_us(pids) - before[name] for name, pids in case.contender.groups.items()}
    if set(seen.statuses) != {case.status}:
        raise SystemExit(f"{case.name}: not every answer was {case.status}: {seen.statuses}")
    case.contender.settled()
    return _measured(seen, spent, case, requests)


def _measured(seen: Run, spent: dict[str, float], case: Case, requests: int) -> Measured:
    return Measured(
        {name: spent_us / requests / case.vouchers for name, spent_us in spent.items()},
        requests / seen.seconds,
        seen.percentile(0.5, case.status) * 1e3,
        seen.percentile(0.99, case.status) * 1e3,
    )


def _cpu(rounds: Sequence[dict[str, Measured]], name: str) -> dict[str, float]:
    """Medians of the CPU microseconds a voucher by group of processes."""
    groups = rounds[0][name].cpu_us
    return {group: statistics.median(one[name].cpu_us[group] for one in rounds) for group in groups}


def _print(rounds: Sequence[dict[str, Measured]], levels: Sequence[Level], options: argparse.Namespace) -> int:
    targets = [*_targets(rounds), *_load_targets(levels)]
    measured_on = machine()
    keep(options.json, {
        "machine": measured_on, "options": {"requests": options.requests, "connections": options.connections},
        "rounds": rounds, "levels": levels, "targets": targets,
    })  # fmt: skip
    table = Table(
        title=f"Medians of {len(rounds)} rounds of {options.requests:,} requests; CPU in us a voucher",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for column in ("of no-op", "range", "serve", "Valkey", "sum", "per s", "p99 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in rounds[0]:
        seen = [one[name] for one in rounds]
        ratios = [one[name].total_us / one[FLOOR].total_us for one in rounds]
        spent = _cpu(rounds, name)
        cpu = [spent["serve"], spent.get("Valkey", 0.0), statistics.median(one.total_us for one in seen)]
        table.add_row(
            name, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}",
            *map(_short, cpu),
            f"{statistics.median(one.rate for one in seen):,.0f}",
            _short(statistics.median(one.p99_ms for one in seen)),
            style="bold" if name == ISSUE else "",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if levels:
        console.print(_load_table(levels))
    print(measured_on)
    for target in targets:
        spread = f" ({target.least:.2f} to {target.most:.2f})" if target.least < target.most else ""
        print(f"{target.what}: {target.median:.2f}{spread}, {target.verdict}")
    return 0 if all(target.met for target in targets) else 1


class Target(msgspec.Struct, frozen=True):
    """A ratio, its median over the rounds, and what it may be at most."""

    what: str
    median: float
    least: float
    most: float
    limit: float
    met: bool

    @property
    def verdict(self) -> str:
        """The limit, and whether it is kept."""
        return f"at most {self.limit:g}: {verdict(self.met)}"


def _targets(rounds: Sequence[dict[str, Measured]]) -> Iterator[Target]:
    wanted = [
        ("a voucher over the no-op application", ISSUE, FLOOR, ISSUE_MAX),
        ("a voucher under a rate limit over one without", LIMITED, ISSUE, GUARDS_MAX),
        ("a replay over a voucher", REPLAY, ISSUE, REPLAY_MAX),
        ("a 409 over a voucher", REFUSAL, ISSUE, REFUSAL_MAX),
        (f"each of {TWENTY} vouchers of v3 over the no-op application", EACH, FLOOR, TWENTY_MAX),
        ("a voucher over Fastify's, appendfsync always", ISSUE, "Fastify, always", 1.0),
        ("a voucher over Fastify's, appendfsync no", ISSUE_NO, "Fastify, no", 1.0),
    ]
    for what, one, other, limit in wanted:
        if other in rounds[0]:
            ratios = [seen[one].total_us / seen[other].total_us for seen in rounds]
            median = statistics.median(ratios)
            yield Target(what, median, min(ratios), max(ratios), limit, median <= limit * (1 + TOLERANCE))


def _load_targets(levels: Sequence[Level]) -> Iterator[Target]:
    at = {level.share: level for level in levels}
    if not at:
        return
    half, twice, shed = at[0.5], at[2.0], max(level.refused for level in levels if level.share < 1)
    saturated = half.offered / half.share
    yield _target("p99 in ms at half of the saturated rate", half.p99_ms, P99_MS_MAX)
    yield _target("requests refused a second below saturation", shed, 0.0)
    yield _target("saturated rate over what is issued at twice of it", saturated / twice.issued, 1 / ISSUED_SHARE_MIN)


def _target(what: str, seen: float, limit: float) -> Target:
    return Target(what, seen, seen, seen, limit, seen <= limit)


def _load_table(levels: Sequence[Level]) -> Table:
    table = Table(
        title="Open loop, appendfsync always: a second; ms from when a request was due, p99 of 503; CPU; slowest fsync",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("load", "offered/s", "issued", "503", "p50", "p99", "p99.9", "of 503", "us", "cores", "fsync"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in levels:
        table.add_row(
            f"{one.share:.0%}", *(f"{rate:,.0f}" for rate in (one.offered, one.issued, one.refused)),
            *map(_short, (one.p50_ms, one.p99_ms, one.p999_ms, one.refused_p99_ms)), f"{one.cpu_us:.0f}",
            f"{sum(one.cores.values()):.1f}", f"{one.fsync_ms:.0f}",
        )  # fmt: skip
    return table


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


if __name__ == "__main__":
    sys.exit(main())
