"""Prometheus and Alertmanager by the configurations that are shipped, on ports of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from loadtest.servers import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
ROUTES = DEPLOY / "alertmanager" / "alertmanager.yml"


class Monitor:
    """A program that runs by the flags of its service in ``deploy/compose.yaml``, with configuration and data in a
    directory.  Use as a context: it ends with it."""

    def __init__(self, service: str, program: str, directory: Path, configured: dict[str, Any], api: str = "") -> None:
        (directory / f"{service}.yml").write_text(yaml.safe_dump(configured))
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/{api}", trust_env=False)
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [program, *_flags(service, directory), f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


class Prometheus(Monitor):
    """One that scrapes ``serve`` and ``work`` every second by the configuration that is shipped, but for addresses."""

    def __init__(
        self, program: str, directory: Path, *, runbook: str = "", alertmanager: int = 0, **targets: int
    ) -> None:
        configured = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        configured["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        configured["global"]["external_labels"]["voucherd_runbook"] = runbook
        (listed,) = configured["alerting"]["alertmanagers"]
        listed["static_configs"] = [{"targets": [f"127.0.0.1:{alertmanager}"] if alertmanager else []}]
        configured["rule_files"] = [str(PROMETHEUS / name) for name in configured["rule_files"]]
        for job in configured["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
        super().__init__("prometheus", program, directory, configured, "api/v1/")

    def get(self, path: str, **parameters: str) -> Any:
        """The data of one answer of its API; None while it does not answer."""
        try:
            answer = self.client.get(path, params=parameters)
        except httpx.TransportError:
            return None
        said = answer.json() if answer.headers["content-type"].startswith("application/json") else {}
        assert said.get("status") != "error", said
        return said.get("data")

    def values(self, expression: str) -> list[float]:
        """What an expression gives now."""
        found = self.get("query", query=expression)["result"]
        return [float(one["value"][1]) for one in found]


class Alertmanager(Monitor):
    """One by the configuration that is shipped, with receivers filled in, that does not wait before it tells."""

    def __init__(self, program: str, directory: Path, outside: int) -> None:
        configured = yaml.safe_load(ROUTES.read_text())
        configured["route"]["group_wait"] = "2s"
        for receiver in configured["receivers"]:
            receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{outside}/{receiver['name']}"}]
        directory.mkdir()
        super().__init__("alertmanager", program, directory, configured)

    def ready(self) -> bool:
        try:
            return self.client.get("-/ready").status_code == 200
        except httpx.TransportError:
            return False


def _flags(service: str, directory: Path) -> list[str]:
    said = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]["command"]
    return [
        one.replace(f"=/etc/{service}/", f"={directory}/").replace(f"=/{service}", f"={directory}/data") for one in said
    ]
