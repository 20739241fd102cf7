"""nginx by the configuration that is shipped, in front of two ``voucherd serve``."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx

from loadtest.servers import free_port, until
from tests.acceptance.test_up import ROOT
from tests.programs import installed

FILE = ROOT / "deploy" / "nginx" / "voucherd.conf"
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

    def __init__(self, directory: Path, serving: tuple[int, int]) -> None:
        """Skips the test where there is no nginx."""
        program = installed("nginx", package="nginx-light", untried="its configuration was not run")
        self.port = free_port()
        shipped = FILE.read_text()
        for written, port in (("8000", self.port), ("8080", serving[0]), ("8090", serving[1])):
            assert shipped.count(f"127.0.0.1:{written}") == 1
            shipped = shipped.replace(f"127.0.0.1:{written}", f"127.0.0.1:{port}")
        (directory / "voucherd.conf").write_text(shipped)
        (directory / "nginx.conf").write_text(MAIN.format(directory=directory))
        self._command = [
            program,
            "-p",
            str(directory),
            "-e",
            str(directory / "error.log"),
            "-c",
            str(directory / "nginx.conf"),
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[Front]:
        process = subprocess.Popen(self._command)
        try:
            until(self._answers, "an answer of nginx")
            yield self
        finally:
            process.terminate()
            process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/docs", trust_env=False).status_code < 600
        except httpx.TransportError:
            return False
