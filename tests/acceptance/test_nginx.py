"""nginx in front of two ``voucherd serve``, by the configuration that is shipped."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.client import run
from loadtest.vouchers import VoucherRequests
from service.web.problems import PROBLEMS
from tests.acceptance.service import DEADLINE_S, Service
from tests.acceptance.test_up import until, voucherd
from tests.servers import free_port

FILE = Path(__file__).parents[2] / "deploy" / "nginx" / "voucherd.conf"
RATE = 150.0  # requests a second: enough that every moment of a restart meets some
REQUESTS = 900
MAIN = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/voucherd.conf;
}}
"""


class Front:
    """nginx, and the ports of the two ``serve`` behind it."""

    def __init__(self, program: str, directory: Path, serving: tuple[int, int]) -> None:
        self.port = free_port()
        shipped = FILE.read_text()
        for written, port in (("8000", self.port), ("8080", serving[0]), ("8090", serving[1])):
            assert shipped.count(f"127.0.0.1:{written}") == 1
            shipped = shipped.replace(f"127.0.0.1:{written}", f"127.0.0.1:{port}")
        (directory / "voucherd.conf").write_text(shipped)
        (directory / "nginx.conf").write_text(MAIN.format(directory=directory))
        self.process = subprocess.Popen(
            [program, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(directory / "nginx.conf")]
        )

    def answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/docs", trust_env=False).status_code < 600
        except httpx.TransportError:
            return False


@pytest.fixture
def program_of_nginx() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is None:
        pytest.skip("no nginx on PATH (Debian's package is nginx-light): its configuration was not run")
    return found


@pytest.fixture
def front(program_of_nginx: str, service: Service, tmp_path: Path) -> Iterator[Front]:
    second = _second(service)
    front = Front(program_of_nginx, tmp_path, (service.port, int(second.environment["VOUCHERD_PORT"])))
    try:
        until(front.answers, "an answer of nginx")
        yield front
    finally:
        front.process.terminate()
        front.process.wait()
        second.stop()


class _Second:
    """Another ``voucherd serve`` of the same service, on ports of its own."""

    def __init__(self, service: Service) -> None:
        self.ops_port = free_port()
        self.environment = {
            **service.environment, "VOUCHERD_PORT": str(free_port()), "VOUCHERD_OPS_PORT": str(self.ops_port),
        }  # fmt: skip
        with service.log.open("ab") as log:
            self.process = subprocess.Popen(voucherd("serve"), env=self.environment, stdout=log, stderr=log)

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.ops_port}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(DEADLINE_S) == 0


def _second(service: Service) -> _Second:
    second = _Second(service)
    until(second.ready, "a second serve")
    return second


@pytest.mark.parametrize("running", ["sqlite"], indirect=True)
async def test_no_request_fails_while_one_of_two_is_restarted(service: Service, front: Front) -> None:
    await service.furnish(REQUESTS + 100)
    requests = VoucherRequests(service.token, service.distributor, service.product)
    asking = asyncio.create_task(asyncio.to_thread(run, "127.0.0.1", front.port, 16, REQUESTS, requests, RATE))
    await asyncio.sleep(1.0)  # the clients are at work
    serve = service.processes.pop("serve")
    serve.terminate()
    await asyncio.to_thread(serve.wait, DEADLINE_S)
    assert serve.returncode == 0
    await asyncio.to_thread(service.start, "serve")
    seen = await asking
    assert seen.statuses == {200: REQUESTS}
    await service.audit()


def test_a_service_that_is_gone_is_told_in_the_contracts_form(program_of_nginx: str, tmp_path: Path) -> None:
    front = Front(program_of_nginx, tmp_path, (free_port(), free_port()))
    try:
        until(front.answers, "an answer of nginx")
        answer = httpx.post(f"http://127.0.0.1:{front.port}/api/v1/voucher/request", json={}, trust_env=False)
    finally:
        front.process.terminate()
        front.process.wait()
    row = PROBLEMS["store_unreachable"]
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.headers["retry-after"] == str(row.retry_after_s)
    said = answer.json()
    assert (said["title"], said["detail"], said["error"]) == (row.title, row.detail, row.error)
    assert (said["code"], said["retryable"]) == ("store_unreachable", True)
