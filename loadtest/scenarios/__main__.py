"""``make loadtest SCENARIO=retry-storm``: runs a scenario with locust, then checks what came of it.

Without a scenario it lists them.  Afterwards what users were told is held against the ledger, the audit is made, and a
report is written.  Exit status 1 if the objective is missed, a promise was broken, or the books do not balance.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest import plots
from loadtest.figures import keep, machine
from loadtest.scenarios import place as places
from loadtest.scenarios.outcome import Facts, Outcome, issued_kinds, percentile, violations
from loadtest.scenarios.pictures import Event, draw
from loadtest.scenarios.plan import Plan, Seller
from loadtest.scenarios.report import Judged, Report, lines, page
from loadtest.scenarios.run import LOOPBACK, Run
from loadtest.scenarios.scenario import PARTNER, SCENARIOS, Scenario
from loadtest.scenarios.watch import Watch

REPORTS: Final = Path("var") / "loadtest"


def main() -> int:
    """Runs what was asked for; 2 if it was asked for wrongly or something that it needs is missing."""
    options = _options()
    console = Console(stderr=True, highlight=False)
    if options.scenario is None:
        _list()
        return 0
    for name, missing in (("locust", find_spec("locust") is None), ("matplotlib", bool(plots.missing()))):
        if missing:
            console.print(
                f"{name} is not installed: `make install` brings it (pip: the extra `loadtest`)", markup=False
            )
            return 2
    scenario = SCENARIOS[options.scenario]
    if options.token and not scenario.plain:
        console.print(f"{scenario.name} needs more than a token: leave --token away, and it makes what it needs")
        return 2
    if options.url and scenario.by_metrics and not options.ops_url:
        console.print(f"{scenario.name} is judged by the service's metrics too: say --ops-url of serve and of work")
        return 2
    with tempfile.TemporaryDirectory(prefix="voucherd-loadtest-") as name, ExitStack() as stack:
        report, picture, locust = _run(scenario, Path(name), stack, options, console)
        folder: Path = options.report
        folder.mkdir(parents=True, exist_ok=True)
        html = folder / f"{scenario.name}.html"
        html.write_text(page(report, picture))
        (folder / f"{scenario.name}.locust.html").write_bytes(locust)
        keep(folder / f"{scenario.name}.json", {**msgspec.to_builtins(report), "met": report.met})
    for line in lines(report):
        print(line)
    print(f"{scenario.name}: objective {'met' if report.met else 'MISSED'}; report: {html}")
    return 0 if report.met else 1


def _options() -> argparse.Namespace:
    parser = parser_of(os.environ)
    options = parser.parse_args()
    # A default of the parser would be one of them, whatever else is said.
    options.ops_url = [url.rstrip("/") for url in options.ops_url or os.environ.get("LOADTEST_OPS_URL", "").split()]
    if options.token and not (options.url and options.distributor and options.product):
        parser.error("--token needs --url, --distributor and --product")
    if options.workers and options.await_workers:
        parser.error("say either --workers or --await-workers")
    return options


def parser_of(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """Of what may be typed after ``make loadtest``; some of it may be in the environment instead."""
    given = environment.get
    parser = argparse.ArgumentParser(prog="make loadtest", description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="?", choices=SCENARIOS, metavar="SCENARIO", help="without it: list them")
    parser.add_argument(
        "--url", default=given("LOADTEST_URL", ""), help="a service that runs; without it one is started"
    )
    parser.add_argument(
        "--ops-url", action="append", metavar="URL",
        help="where its metrics are: once for serve and once for work, where they are not at one port",
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="data of that `voucherd up`; else the VOUCHERD_… settings say")
    parser.add_argument("--voucherd", default=given("LOADTEST_VOUCHERD", ""), metavar="COMMAND",
                        help="how its commands are typed, such as 'docker compose exec -T work voucherd'")  # fmt: skip
    parser.add_argument("--token", default=given("LOADTEST_TOKEN", ""), help="of a distributor that is there already")
    parser.add_argument("--distributor", default=given("LOADTEST_DISTRIBUTOR", ""), help="whose token it is")
    parser.add_argument("--product", default=given("LOADTEST_PRODUCT", ""), help="that it sells")
    parser.add_argument("--no-audit", action="store_true", help="only what users were told is looked at")
    parser.add_argument("--seconds", type=float, help="all stages together (default: what the scenario says)")
    parser.add_argument("--codes", type=int, help="in stock for the partner (default: what the scenario wants)")
    parser.add_argument("--slack", type=float, default=1.0, metavar="TIMES",
                        help="for a busy machine: all may take so many times as long")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="processes that locust runs its users in (default: one)")
    parser.add_argument("--await-workers", type=int, default=0, metavar="N",
                        help="be the master of so many workers, which are started elsewhere")  # fmt: skip
    parser.add_argument("--bind", default=LOOPBACK, metavar="ADDRESS", help="where they find it (default: loopback)")
    parser.add_argument("--report", type=Path, default=REPORTS, metavar="FOLDER", help=f"default: {REPORTS}")
    return parser


def _list() -> None:
    table = Table("scenario", "what happens", "load")
    for one in SCENARIOS.values():
        table.add_row(one.name, one.about, one.load())
    Console(highlight=False).print(table, "make loadtest SCENARIO=… runs one; docs/loadtest.md says more")


def _run(
    scenario: Scenario, folder: Path, stack: ExitStack, options: argparse.Namespace, console: Console
) -> tuple[Report, str, bytes]:
    """The report, its picture, and locust's own page."""

    def say(text: str) -> None:
        console.print(text, markup=False)

    seconds = options.seconds or scenario.seconds
    voucherd = shlex.split(options.voucherd)
    if options.url:
        place = places.running(options.url.rstrip("/"), options.ops_url, options.data_dir, voucherd)
    else:
        say("starting a service")
        place = stack.enter_context(places.own(folder, math.ceil(scenario.peak), voucherd))
    if options.token:
        sellers = {PARTNER: Seller(options.distributor, options.product, "first", options.token)}
        stocked: dict[str, int] | None = None
    else:
        sellers, stocked = places.furnish(place, scenario, seconds, options.codes)
    began = time.time()
    plan = Plan(scenario.name, seconds, place.url, str(folder / "record"), sellers)
    watch = Watch(Path(plan.record), place.ops_urls, list(stocked or ()), say)
    run = Run(
        scenario, plan, place, watch, folder,
        workers=options.workers, await_workers=options.await_workers, bind=options.bind,
    )  # fmt: skip
    say(f"{scenario.name}: {scenario.load(seconds)}")
    run.until_over(say)
    findings = issued = left = None
    if not options.no_audit:
        say("waiting for the ledger, then the audit")
        places.settle(place)
        findings = places.audit(place)
        issued = places.ledger(place, sellers, began)
        left = None if stocked is None else places.left(place, stocked)
    since = min((one.began for one in watch.attempts), default=began)
    ends = scenario.ends(seconds)
    facts = Facts(stocked, left, run.revoked, findings, watch.samples)
    outcome = Outcome(watch.attempts, since, (0.0, ends[-1]), ends, facts)
    empty = min((one.began for one in watch.attempts if one.kind == "exhausted"), default=None)
    events = [*run.events, *([] if empty is None else [Event(empty, "the pool is empty")])]
    report = Report(
        scenario=scenario.name, about=scenario.about, load=scenario.load(seconds), url=place.url, machine=machine(),
        began=datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), seconds=ends[-1],
        sales=len(outcome.sales), vouchers=outcome.vouchers,
        objective=[
            Judged(bound.what, bound.limit, seen, bound.met(seen))
            for bound in (one.eased(options.slack) for one in scenario.objective)
            for seen in (float(bound.figure(outcome)),)
        ],
        audited=None if findings is None else not findings, violations=violations(outcome, issued),
        kinds={kind: _took(outcome, kind) for kind in issued_kinds(outcome)}, cores=run.cores,
    )  # fmt: skip
    return report, draw(scenario, outcome, events), run.page.read_bytes()


def _took(outcome: Outcome, kind: str) -> tuple[int, float, float]:
    """How many attempts ended so, and their median and p99 in milliseconds."""
    seconds = [one.seconds for one in outcome.attempts if one.kind == kind]
    return len(seconds), percentile(seconds, 50) * 1e3, percentile(seconds, 99) * 1e3


if __name__ == "__main__":
    sys.exit(main())
