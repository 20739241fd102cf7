"""An alert of a real Prometheus gets to whom a real Alertmanager tells, once, with a link to click."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loadtest.servers import until
from tests.acceptance.monitors import Alertmanager, Prometheus
from tests.programs import installed
from tests.unit.test_documents import typed

ROOT = Path(__file__).parents[2]
IN_ITS_CONTAINER = "docker compose --file deploy/compose.yaml exec alertmanager "
RUNBOOK = "https://git.example.com/voucherd/blob/v0.1.0/docs/runbook.md"
# Books that differ wake somebody; that nobody counts them waits for the morning.  Both fire at once.
METRICS = """\
# TYPE voucherd_conservation_difference_codes gauge
voucherd_conservation_difference_codes{partition="0",books="ledger"} 2
voucherd_conservation_difference_codes{partition="0",books="windows"} 1
# TYPE voucherd_books_checked_timestamp_seconds gauge
voucherd_books_checked_timestamp_seconds{partition="0"} 1
"""


class Outside:
    """What Prometheus scrapes, and who is told by Alertmanager: ``told`` has path and content of each notification."""

    def __init__(self) -> None:
        told: list[tuple[str, dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(METRICS.encode())

            def do_POST(self) -> None:
                told.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self._answer(b"")

            def _answer(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.told = told
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def outside() -> Iterator[Outside]:
    made = Outside()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def alertmanager(tmp_path: Path, outside: Outside) -> Iterator[Alertmanager]:
    program = installed(
        "prometheus-alertmanager", "alertmanager", package="prometheus-alertmanager",
        untried="nobody was told of any alert",
    )  # fmt: skip
    with Alertmanager(program, tmp_path / "alertmanager", outside.port) as made:
        until(made.ready, "Alertmanager")
        yield made


def _waiting(alertmanager: Alertmanager, alerts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of these that wait for another one, once all are there."""
    alertmanager.client.post("api/v2/alerts", json=[{"labels": labels} for labels in alerts]).raise_for_status()

    def taken() -> list[dict[str, Any]]:
        found = alertmanager.client.get("api/v2/alerts").json()
        return found if len(found) == len(alerts) else []

    return [one["labels"] for one in until(taken, "every alert") if one["status"]["inhibitedBy"]]


def test_an_alert_comes_to_whom_it_is_for_with_its_like_and_a_link(
    alertmanager: Alertmanager, outside: Outside, tmp_path: Path
) -> None:
    program = installed("prometheus", package="prometheus", untried="no alert was raised")
    targets = {"voucherd-serve": outside.port, "voucherd-work": outside.port}
    with Prometheus(program, tmp_path, runbook=RUNBOOK, alertmanager=alertmanager.port, **targets):
        until(lambda: len(outside.told) >= 2, "one page and one ticket")
    told = dict(outside.told)
    assert len(outside.told) == 2 and told.keys() == {"/page", "/ticket"}
    page, ticket = told["/page"], told["/ticket"]
    assert page["groupLabels"] == {"alertname": "VoucherdBooksDiffer"}
    assert {one["labels"]["books"] for one in page["alerts"]} == {"ledger", "windows"}, "one page for both"
    assert ticket["groupLabels"] == {"alertname": "VoucherdBooksUnchecked"}
    for content, section in ((page, "voucherdbooksdiffer"), (ticket, "voucherdbooksunchecked")):
        assert content["commonAnnotations"]["runbook_url"] == f"{RUNBOOK}#{section}"
        assert "voucherd_runbook" not in content["commonLabels"]


def test_what_the_runbook_types_tries_who_is_told_and_keeps_an_alert_quiet(alertmanager: Alertmanager) -> None:
    installed("amtool", package="prometheus-alertmanager", untried="nothing was typed")
    lines = [line for line in typed((ROOT / "docs" / "runbook.md").read_text()) if "amtool" in line]
    for line in lines:
        assert line.startswith(IN_ITS_CONTAINER) and "//127.0.0.1:9093 " in line
        words = line.removeprefix(IN_ITS_CONTAINER).replace(":9093", f":{alertmanager.port}").split()
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(lines) == 2

    def quiet() -> bool:
        return [
            (one["labels"]["alertname"], one["labels"]["severity"], one["status"]["state"])
            for one in alertmanager.client.get("api/v2/alerts").json()
        ] == [("VoucherdTest", "page", "suppressed")]

    until(quiet, "an alert that is silenced")


def test_no_alert_waits_for_one_that_it_does_not_follow_from(alertmanager: Alertmanager) -> None:
    def of(name: str, **labels: str) -> dict[str, str]:
        return {"alertname": f"Voucherd{name}", **labels}

    caused = [
        of("PoolEmptiesWithinHour", pool="SPRING"),
        of("OutboxOld", partition="0"),
        of("GuardRefuses", guard="refill"),
        of("GuardRefuses", guard="outbox_bytes"),
        of("ProcessDown", job="voucherd-work", instance="work:8082"),
    ]
    not_caused = [
        of("PoolEmptiesWithinHour", pool="AUTUMN"),
        of("GuardRefuses", guard="share"),
        of("ProcessDown", job="voucherd-serve", instance="serve:8081"),
        of("RefusalsSpike", distributor="ACME"),
        of("ErrorBudgetBurnsFast"),
        of("Slow"),
        of("BooksUnchecked", partition="0"),
    ]
    causes = [
        of("PoolIsEmpty", pool="SPRING"),
        of("ServerAway", server="store"),
        of("OutboxFills", partition="0"),
        of("WorkerGone", loop="watch"),
    ]
    waiting = _waiting(alertmanager, [*caused, *not_caused, *causes])
    assert sorted(waiting, key=str) == sorted(caused, key=str)
