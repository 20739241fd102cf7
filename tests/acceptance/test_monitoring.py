"""Prometheus reads a running service: every metric is there, the rules hold, every panel of the dashboard has data."""

from __future__ import annotations

import asyncio
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.grafana import dashboard
from loadtest.servers import free_port, until
from service import metrics
from tests.acceptance.monitors import Prometheus
from tests.acceptance.service import Service
from tests.acceptance.test_loadtest import loadtest
from tests.programs import installed

SPAN = "[20s]"  # what Grafana would put in for a scrape every second, and a little more for a busy machine
PANELS_S = 30.0  # until every panel has data, after a load test
# What fires, or is about to, when sixty codes are given and ten more are wanted, and something was just published.
OF_AN_EMPTY_POOL = {
    "VoucherdPoolEmptiesWithinHour", "VoucherdPoolEmptiesWithin10Minutes", "VoucherdPoolIsEmpty",
    "VoucherdRefusalsSpike", "VoucherdFenceBehind",
}  # fmt: skip
STORM_CODES = 20  # so few that a retry storm can't come to its objective


@pytest.fixture
def prometheus(running: Service, tmp_path: Path) -> Iterator[Prometheus]:
    program = installed("prometheus", package="prometheus", untried="the metrics were not scraped")
    work_ops_port = free_port()
    running.environment["VOUCHERD_WORK_OPS_PORT"] = str(work_ops_port)
    running.start("serve", "work")
    targets = {"voucherd-serve": running.ops_port, "voucherd-work": work_ops_port}
    with Prometheus(program, tmp_path, **targets) as made:
        yield made


@pytest.mark.parametrize("running", ["sqlite"], indirect=True)
async def test_no_metric_is_missing_no_rule_fails_and_no_panel_is_empty(
    running: Service, prometheus: Prometheus, tmp_path: Path
) -> None:
    promtool = installed("promtool", package="prometheus", untried="the metrics were not looked at")
    running.at_once = asyncio.Semaphore(32)
    await running.furnish(60)
    until(lambda: prometheus.get("query", query="sum(up)") and prometheus.values("sum(up)") == [2.0], "two targets")

    asked = 0

    async def some_of_everything() -> None:
        """A voucher and its replay, one of a partner that is over its stock, and one without a right."""
        nonlocal asked
        async with running.client() as client:
            for _ in range(5):
                asked += 1
                await running.voucher(client, f"req-{asked}")
                await running.voucher(client, f"req-{asked}")
            await running.ask(client, f"refused-{asked}", token="vch_" + "0" * 48)

    while asked < 70:  # ten more than there are codes
        await some_of_everything()

    wanted = {name: kind for name, kind, _ in metrics.declared()}

    def typed() -> bool:
        found = {name: said[0]["type"] for name, said in prometheus.get("metadata").items()}
        return wanted.items() <= found.items()

    until(typed, "every metric, with its type")

    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    for port in (running.ops_port, int(running.environment["VOUCHERD_WORK_OPS_PORT"])):
        said = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).content
        linted = subprocess.run([promtool, "check", "metrics"], input=said, capture_output=True)
        assert (linted.returncode, linted.stdout + linted.stderr) == (0, b"")

    until(lambda: {rule["health"] for rule in rules()} == {"ok"}, "every rule evaluated")
    assert {rule["name"] for rule in rules()} >= {"VoucherdPoolIsEmpty", "VoucherdWorkerGone", "VoucherdBooksDiffer"}
    until(lambda: "VoucherdPoolIsEmpty" in _not_silent(rules()), "the alert of the empty pool")
    assert _not_silent(rules()) <= OF_AN_EMPTY_POOL

    storm = loadtest(
        "retry-storm", tmp_path, "--url", f"http://127.0.0.1:{running.port}", "--ops-url",
        f"http://127.0.0.1:{running.ops_port}", "--voucherd", str(running.program), "--seconds", "4",
        "--codes", str(STORM_CODES), **settings_of(running),
    )  # fmt: skip
    empty = set(dashboard.expressions())

    def shown() -> bool:
        for title, expression in list(empty):  # fails for one that Prometheus can't read
            if any(not math.isnan(value) for value in prometheus.values(expression.replace(dashboard.OVER, SPAN))):
                empty.discard((title, expression))
        print("without data:", *sorted(empty), sep="\n")
        return not empty

    until(shown, "data for every expression of every panel", PANELS_S)

    # Its codes were gone before its end, so it can't have come to the vouchers that it asks for.  A machine on which
    # hardly anything takes long enough to time out may miss that as well, and no more.
    assert storm.status == 1, storm.said
    report = storm.report("retry-storm")
    missed = {one["what"] for one in report["objective"] if not one["met"]}
    assert {"vouchers a second"} <= missed <= {"vouchers a second", "hasty attempts that timed out, %"}, storm.said
    assert report["violations"] == [] and report["audited"]
    assert report["vouchers"] == STORM_CODES
    assert report["kinds"]["timed out"][0] > 0
    running.stop()


def settings_of(running: Service) -> dict[str, str]:
    """Where its Redis and its store are, for commands."""
    return {name: value for name, value in running.environment.items() if name.startswith("VOUCHERD_")}


def _not_silent(rules: list[dict[str, Any]]) -> set[str]:
    """Alerts that fire, or will if it goes on."""
    return {rule["name"] for rule in rules if rule.get("state") in ("pending", "firing")}
