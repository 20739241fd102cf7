"""The parent of the serving processes: what it starts, says, restarts, drains and takes along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest.servers import until
from service.web.v1 import PATH
from tests.issuers import DISTRIBUTOR, TOKEN

PATIENCE_S = 20.0
Answer = tuple[int, dict[str, str], bytes]


class Served:
    """One parent with its processes."""

    def __init__(self, directory: Path, token: str, *arguments: str, temporary: Path | None = None) -> None:
        self.token = token
        self.log = directory / "serve.log"  # one JSON object a line
        self.temporary = temporary or directory / "tmp"
        self.temporary.mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving", *arguments],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "TMPDIR": str(self.temporary), "TEST_TOKEN": token},
            )  # fmt: skip
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    @property
    def public(self) -> tuple[str, int]:
        host, port = json.loads(self.said)["public"]
        return host, port

    def request(self, address: str, method: str, path: str, **given: Any) -> Answer:
        host, port = json.loads(self.said)[address]
        connection = HTTPConnection(host, port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, **given)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def ops(self, path: str, method: str = "GET") -> Answer:
        return self.request("ops", method, path)

    def voucher(self, key: str, terminal: str = "T1") -> Answer:
        asked = {"request_id": key, "distributor_id": DISTRIBUTOR, "terminal_id": terminal, "product_ids": ["PAY"]}
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        return self.request("public", "POST", PATH, body=json.dumps(asked), headers=headers)

    def ready(self) -> bool:
        return self.ops("/readyz")[0] == 200

    def until_ready(self) -> None:
        until(self.ready, "ready")

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]

    def value(self, sample: str) -> float:
        """One sample of /metrics, 0 if it is not there."""
        lines = self.ops("/metrics")[2].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((sample + " ", sample + "{")))

    def end(self) -> None:
        for process in [*self.workers(), self.process] if self.process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    served: list[Served] = []

    def make(*arguments: str, temporary: Path | None = None) -> Served:
        directory = tmp_path / str(len(served))
        directory.mkdir()
        served.append(Served(directory, TOKEN, *arguments, temporary=temporary))
        return served[-1]

    yield make
    for one in served:
        one.end()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_every_port_answers_and_metrics_are_summed_over_the_processes(start: Callable[..., Served]) -> None:
    served = start("workers=2")
    served.until_ready()
    assert len(served.workers()) == 2
    for number in range(40):
        assert served.voucher(f"req-{number}")[0] == 200
    until(lambda: served.value("voucherd_requests_total") == 40, "40 requests in the metrics")
    assert served.value('voucherd_requests_total{api="v1",code="issued",status="200"}') == 40
    assert served.value("voucherd_request_seconds_count") == 40
    assert served.value(f'voucherd_distributor_requests_total{{code="issued",distributor="{DISTRIBUTOR}"}}') == 40
    assert served.value('voucherd_process_resident_bytes{process="2"}') > 10**7
    assert served.value("voucherd_build_info") == 1
    assert served.value("voucherd_workers") == served.value("voucherd_workers_ready") == 2
    text = served.ops("/metrics")[2].decode()
    assert len(set(helps := [line for line in text.splitlines() if line.startswith("# HELP")])) == len(helps)

    status, headers, body = served.ops("/readyz")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"ready": True, "workers": 2, "workers_ready": 2, "missing": []}
    assert served.ops("/healthz")[0] == 200
    for path, method, code in (("/", "GET", "not_found"), ("/metrics", "POST", "method_not_allowed")):
        _, headers, body = served.ops(path, method)
        assert headers["content-type"] == "application/problem+json"
        assert json.loads(body)["code"] == code
    assert "server" not in headers


def test_not_ready_says_what_is_missing(start: Callable[..., Served]) -> None:
    served = start("redis_url=unready")
    until(lambda: served.ops("/readyz")[0] == 503, "an answer")
    body = json.loads(served.ops("/readyz")[2])
    assert body["ready"] is False
    assert body["missing"]
    assert served.ops("/healthz")[0] == 200


def test_port_in_use_is_named(start: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for variable, argument in (("VOUCHERD_PORT", f"port={port}"), ("VOUCHERD_OPS_PORT", f"ops_port={port}")):
            served = start(argument)
            assert served.said.startswith(f"misconfigured: {variable}={port}: port {port} ")
            assert "in use" in served.said
            assert served.process.wait(PATIENCE_S) == 2


def test_an_address_of_another_machine_is_named_and_not_the_port(start: Callable[..., Served]) -> None:
    for name in ("host", "ops_host"):
        variable = f"VOUCHERD_{name.upper()}"
        served = start(f"{name}=192.0.2.1")
        assert served.said.startswith(f"misconfigured: {variable}='192.0.2.1': this machine can't listen there: ")
        assert served.said.strip().endswith(f"; for example {variable}=127.0.0.1")
        assert served.process.wait(PATIENCE_S) == 2


def test_settings_that_no_process_can_use_end_it_with_the_reason(start: Callable[..., Served]) -> None:
    served = start("redis_url=bad", "workers=2")
    assert served.process.wait(PATIENCE_S) == 2
    assert served.process.stdout is not None
    assert served.process.stdout.read() == "misconfigured: VOUCHERD_REDIS_URL: bad\n"


def test_process_that_dies_is_replaced_and_its_counts_are_kept(start: Callable[..., Served]) -> None:
    served = start()
    served.until_ready()
    [worker] = served.workers()
    assert served.voucher("req-1")[0] == 200
    until(lambda: served.value("voucherd_requests_total") == 1, "the count")
    with pytest.raises((HTTPException, OSError)):
        served.voucher("req-2", "die")
    until(lambda: [other.pid for other in served.workers()] not in ([], [worker.pid]), "another process")
    served.until_ready()
    assert served.voucher("req-3")[0] == 200
    until(lambda: served.value("voucherd_requests_total") == 2, "the count")
    assert served.value("voucherd_worker_exits_total") == 1
    served.process.terminate()
    assert served.process.wait(PATIENCE_S) == 0
    text = served.log.read_text()
    ended = [line for line in map(json.loads, text.splitlines()) if line["event"] == "worker_ended"]
    assert [(line["worker"], line["status"], line["again_in_s"]) for line in ended] == [(1, 7, 0.2)]
    assert served.token not in text
    assert "PSCF" not in text


def test_process_that_can_not_start_is_tried_again_ever_more_slowly(start: Callable[..., Served]) -> None:
    served = start("redis_url=crash")
    until(lambda: served.value("voucherd_worker_exits_total") >= 2, "two exits")
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    pauses = [line["again_in_s"] for line in lines if line["event"] == "worker_ended"]
    assert pauses[:2] == [0.2, 0.4]
    assert not served.ready()
    served.process.terminate()
    assert served.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_drain_cuts_no_request_and_ends_with_0(start: Callable[..., Served], ending: signal.Signals) -> None:
    served = start("workers=2")
    served.until_ready()
    workers = served.workers()
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(served.voucher(f"req-{n}", "wait 1")[0])) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    until(lambda: served.value("voucherd_connections") >= 8, "the requests")
    with socket.create_connection(served.public) as idle:
        began = time.monotonic()
        served.process.send_signal(ending)
        until(lambda: b"shutting down" in _quietly(served), "not ready while draining")
        idle.settimeout(PATIENCE_S)
        assert idle.recv(1) == b""
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers == [200] * 8
    assert served.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - began < 5
    assert all(gone(worker) for worker in workers)
    assert not list(served.temporary.iterdir())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(served.public)


def _quietly(served: Served) -> bytes:
    try:
        return served.ops("/readyz")[2]
    except (HTTPException, OSError):
        return b""


def test_no_request_of_a_busy_client_is_cut_by_a_drain(start: Callable[..., Served]) -> None:
    served = start("workers=2")
    served.until_ready()
    cut: list[str] = []
    answered = [0] * 8

    def ask(number: int) -> None:
        """One client over kept connections, until the listener is gone."""
        count = 0
        while True:
            connection = HTTPConnection(*served.public, timeout=PATIENCE_S)
            try:
                connection.connect()
            except OSError:
                return
            try:
                closing = False
                while not closing:
                    count += 1
                    asked = {
                        "request_id": f"r-{number}-{count}", "distributor_id": DISTRIBUTOR, "terminal_id": "T",
                        "product_ids": ["PAY"],
                    }  # fmt: skip
                    headers = {"Authorization": f"Bearer {served.token}", "Content-Type": "application/json"}
                    connection.request("POST", PATH, json.dumps(asked), headers)
                    answer = connection.getresponse()
                    closing = answer.getheader("connection") == "close"
                    answer.read()
                    assert answer.status == 200
                    answered[number] += 1
            except (HTTPException, OSError) as error:
                if answered[number] and connection.sock is not None and count > 1:
                    cut.append(f"{type(error).__name__} after {count}")
                return
            finally:
                connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answered))]
    for thread in threads:
        thread.start()
    until(lambda: all(count > 20 for count in answered), "answers to everyone")
    served.process.terminate()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert served.process.wait(PATIENCE_S) == 0
    assert cut == []


def test_process_that_does_not_drain_is_killed(start: Callable[..., Served]) -> None:
    served = start("drain_s=1")
    served.until_ready()
    [worker] = served.workers()
    worker.suspend()
    served.process.terminate()
    assert served.process.wait(PATIENCE_S) == 1
    assert gone(worker)


def test_processes_never_outlive_a_killed_parent(start: Callable[..., Served]) -> None:
    served = start("workers=2")
    served.until_ready()
    workers = served.workers()
    served.process.kill()
    served.process.wait(PATIENCE_S)
    until(lambda: all(gone(worker) for worker in workers), "the end of the processes")
    assert not list(served.temporary.iterdir())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(served.public)


def test_what_killed_processes_leave_is_gone_with_the_next_start_and_nothing_of_those_that_live(
    start: Callable[..., Served],
) -> None:
    first = start()
    first.until_ready()
    [left] = first.temporary.iterdir()
    first.process.send_signal(signal.SIGSTOP)  # it starts nobody who would clean up after it
    first.end()
    assert left.exists()
    second = start(temporary=first.temporary)
    second.until_ready()
    [own] = first.temporary.iterdir()
    assert own != left
    third = start(temporary=first.temporary)
    third.until_ready()
    assert own.exists()
    assert second.voucher("req-1")[0] == 200
    until(lambda: second.value("voucherd_requests_total") == 1, "a request in the metrics")


def test_process_told_to_end_drains_and_is_replaced(start: Callable[..., Served]) -> None:
    served = start()
    served.until_ready()
    [worker] = served.workers()
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(served.voucher("req-1", "wait 1")[0]))
    thread.start()
    until(lambda: served.value("voucherd_connections") >= 1, "the request")
    worker.terminate()
    thread.join(PATIENCE_S)
    assert answers == [200]
    until(lambda: [other.pid for other in served.workers()] not in ([], [worker.pid]), "another process")
    served.until_ready()
    assert served.voucher("req-2")[0] == 200
    served.process.terminate()
    assert served.process.wait(PATIENCE_S) == 0
