"""An alert of a real Prometheus gets to whom a real Alertmanager tells, once, with a link to click."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loadtest.servers import free_port, until
from tests.acceptance.test_monitoring import Prometheus, flags
from tests.unit.test_documents import typed

ROOT = Path(__file__).parents[2]
ROUTES = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
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


class Alertmanager:
    """One by the configuration that is shipped, with receivers filled in, that does not wait before it tells."""

    def __init__(self, program: str, directory: Path, outside: int) -> None:
        configured = yaml.safe_load(ROUTES.read_text())
        configured["route"]["group_wait"] = "2s"
        for receiver in configured["receivers"]:
            receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{outside}/{receiver['name']}"}]
        directory.mkdir()
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(configured))
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/", trust_env=False)
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [program, *flags("alertmanager", directory), f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ready(self) -> bool:
        try:
            return self.client.get("-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def waits(self, alerts: list[dict[str, str]]) -> list[dict[str, str]]:
        """Those of these that wait for another one, once all are there."""
        self.client.post("api/v2/alerts", json=[{"labels": labels} for labels in alerts]).raise_for_status()

        def taken() -> list[dict[str, Any]]:
            found = self.client.get("api/v2/alerts").json()
            return found if len(found) == len(alerts) else []

        return [one["labels"] for one in until(taken, "every alert") if one["status"]["inhibitedBy"]]


@pytest.fixture
def alertmanager(tmp_path: Path, outside: Outside) -> Iterator[Alertmanager]:
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        pytest.skip(
            "no alertmanager on PATH (Debian's package is prometheus-alertmanager): nobody was told of any alert"
        )
    made = Alertmanager(program, tmp_path / "alertmanager", outside.port)
    until(made.ready, "Alertmanager")
    yield made
    made.client.close()
    made.process.terminate()
    made.process.wait()


def test_an_alert_comes_to_whom_it_is_for_with_its_like_and_a_link(
    alertmanager: Alertmanager, outside: Outside, tmp_path: Path
) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on PATH (Debian's package is prometheus): no alert was raised")
    prometheus = Prometheus(
        program, tmp_path, runbook=RUNBOOK, alertmanager=alertmanager.port,
        **{"voucherd-serve": outside.port, "voucherd-work": outside.port},
    )  # fmt: skip
    try:
        until(lambda: len(outside.told) >= 2, "one page and one ticket")
    finally:
        prometheus.client.close()
        prometheus.process.terminate()
        prometheus.process.wait()
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
    if shutil.which("amtool") is None:
        pytest.skip("no amtool on PATH (Debian's package is prometheus-alertmanager): nothing was typed")
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
    waiting = alertmanager.waits([*caused, *not_caused, *causes])
    assert sorted(waiting, key=str) == sorted(caused, key=str)
