"""``voucherd up``: the whole service on one machine with nothing to install.

    up ── valkey           the embedded server, data in DATA_DIR/valkey
       ├─ voucherd serve   public API and ops port
       └─ voucherd work    the background worker

Each child is in a session of its own, holds its own lock (``leash``) and ends with `up`, however that ends.  A
child that ends by itself is started again with back-off.  Stopping goes in order: serve answers what is in flight,
work brings the outbox to the ledger, Valkey closes its file.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
import typer
from rich.console import Console

from service import exposition, keyring, metrics, scripts
from service.cli import demo
from service.cli.child import Child, end_orphan
from service.cli.embedded import Embedded, free_port, try_port, write_private
from service.cli.lock import only_one
from service.errors import Misconfigured, RedisUnreachable
from service.line import connect
from service.settings import PREFIX, Settings, load
from service.store.database import Database
from service.store.migration import migrate

# Vouchers per second that `up` is ready for unless the environment says otherwise: windows then hold a few hundred
# codes, and a demo pool of 20,000 stays mostly where an operator can see it.
PLANNED_RATE: Final = 5
READY_S: Final = 60.0
LOOK_S: Final = 0.05
LOOK_ANSWER_S: Final = 1.0
# Processes below an earlier serve that was killed close their port as soon as they notice.
PORT_WAIT_S: Final = 2.0
# A child that ends is started again after 0.5 s, then 1 s, 2 s ... 30 s; one that ran for a minute begins anew.
BACKOFF_LEAST_S: Final = 0.5
BACKOFF_MOST_S: Final = 30.0
STEADY_S: Final = 60.0
# Beyond what its own drain may take.
STOP_MARGIN_S: Final = 5.0
WORK_STOP_S: Final = 15.0


def up(
    data_dir: Annotated[Path, typer.Option(help="Where all data is kept.", file_okay=False)] = Path("var"),
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the API, 0 picks a free one.", show_default="8080")
    ] = None,
    ops_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of metrics and health, 0 picks a free one.", show_default="8081"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that serve the API.", show_default="1")
    ] = None,
) -> None:
    """Start everything on this machine: an embedded Valkey and SQLite, the API, the worker, and demo data."""
    rate = None if f"{PREFIX}PLANNED_RATE" in os.environ else PLANNED_RATE
    settings = load(port=port, ops_port=ops_port, workers=workers, planned_rate=rate)
    asyncio.run(Up(data_dir, settings).run())


class Up:
    """One run of ``voucherd up``."""

    def __init__(self, data_dir: Path, settings: Settings) -> None:
        self._given = data_dir  # as the operator wrote it, for what is printed
        self._data_dir = data_dir.absolute()
        self._metrics = self._data_dir / "metrics"
        self._settings = settings
        self._console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._valkey = Embedded(self._data_dir)
        self._serve = Child("serve", self._data_dir)
        self._work = Child("work", self._data_dir)
        self._starting = True
        self._demo = demo.Prepared("", "")
        self._store_url = f"sqlite+aiosqlite:///{self._data_dir / 'voucherd.db'}"

    async def run(self) -> None:
        """Returns after an orderly stop by SIGINT, SIGTERM or SIGHUP.  Raises Fault if it could not start."""
        stopping = _stop_signals()
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = f"{self._given} is in use by another `voucherd up` (pid {{pid}})"
        with only_one(self._data_dir / "up.lock", taken):
            running = asyncio.create_task(self._start_and_keep())
            stopped = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    self._say("stopping: answering what is in flight, then writing it to the ledger")
            finally:
                stopped.cancel()
                running.cancel()
                await asyncio.wait({running})
                await self._stop()
            if not running.cancelled():
                running.result()

    async def _start_and_keep(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as keepers:
                await self._start(keepers)
                self._greet(time.monotonic() - began)
        except ExceptionGroup as group:  # the first of them is what went wrong; the boundary of commands says it
            first: Exception = group
            while isinstance(first, ExceptionGroup):
                first = first.exceptions[0]
            raise first from group

    async def _start(self, keepers: asyncio.TaskGroup) -> None:
        for name in (self._serve.name, self._work.name):
            await end_orphan(name, self._data_dir, self._settings.drain_s + STOP_MARGIN_S)
        self._settings = msgspec.structs.replace(
            self._settings,
            port=await _port(self._settings.host, self._settings.port, "--port"),
            ops_port=await _port(self._settings.ops_host, self._settings.ops_port, "--ops-port"),
        )
        if self._settings.port == self._settings.ops_port:
            raise Misconfigured("--port and --ops-port are the same: they have to differ")
        (self._data_dir / "demo.json").unlink(missing_ok=True)  # names the ports of an earlier start
        shutil.rmtree(self._metrics, ignore_errors=True)  # of processes that are gone
        self._metrics.mkdir(mode=0o700)
        await self._valkey.prepare()
        await self._valkey.start()
        keepers.create_task(self._keep(self._valkey.child, self._valkey.start))
        write_private(
            self._data_dir / "connection.json",
            _json(
                {
                    "redis_url": self._valkey.url,
                    "store_url": self._store_url,
                    "planned_rate": self._settings.planned_rate,
                    "secrets_file": self._secrets_file(),
                }
            ),
        )
        database = Database.connect(self._store_url)
        try:
            await migrate(database)
            for child, start in ((self._work, self._start_work), (self._serve, self._start_serve)):
                await start()
                keepers.create_task(self._keep(child, start))
            await self._until_ready(database)
        finally:
            await database.close()

    def _secrets_file(self) -> str:
        """The one of the settings, or one in the data directory, which is made the first time."""
        if self._settings.secrets_file:
            return self._settings.secrets_file
        file = self._data_dir / "secrets.json"
        if not file.exists():
            write_private(file, keyring.new())
        return str(file)

    async def _start_serve(self) -> None:
        await self._serve.start(
            self._command(
                "serve", "--port", str(self._settings.port), "--ops-port", str(self._settings.ops_port),
                "--workers", str(self._settings.workers),
            ),
            self._environment(),
        )  # fmt: skip

    async def _start_work(self) -> None:
        await self._work.start(self._command("work"), self._environment())

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "service.cli.main", name, "--data-dir", str(self._data_dir), *arguments]

    def _environment(self) -> dict[str, str]:
        # One directory for both, so that the ops port shows the worker's metrics beside the serving processes'.
        return {
            **os.environ,
            f"{PREFIX}PLANNED_RATE": str(self._settings.planned_rate),
            metrics.DIRECTORY_VARIABLE: str(self._metrics),
        }

    async def _keep(self, child: Child, start: Callable[[], Awaitable[None]]) -> None:
        """``child`` runs; whenever it ends it is started again."""
        backoff_s = BACKOFF_LEAST_S
        while True:
            began = time.monotonic()
            how = await child.ended()
            await asyncio.to_thread(exposition.forget_ended, self._metrics)  # and of what a killed `serve` left
            if time.monotonic() - began > STEADY_S:
                backoff_s = BACKOFF_LEAST_S
            if self._starting:
                raise Misconfigured(f"{child.name} {how}: {child.last_words()} (see {child.log})")
            self._say(f"{child.name} {how}: starting it again in {backoff_s:g} s (see {child.log})")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)
            try:
                await start()
            except Misconfigured as fault:
                self._say(str(fault))

    async def _until_ready(self, database: Database) -> None:
        """The demo is made, the API is ready and the partition open: the first curl gets a voucher."""
        try:
            async with (
                asyncio.timeout(READY_S),
                connect(self._valkey.url, timeout_ms=self._settings.redis_timeout_ms) as redis,
            ):
                partition = scripts.Scripts(redis)
                while not await _is_open(partition):
                    await asyncio.sleep(LOOK_S)
                self._demo = await demo.prepare(
                    database, partition, self._data_dir, keyring.load(Path(self._secrets_file())), int(time.time()),
                    self._settings.token_lifetime_s,
                )  # fmt: skip
                while not (await _is_ready(self._ops_url) and await _is_open(partition)):
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise Misconfigured(f"not ready after {READY_S:g} s: see {self._serve.log} and {self._work.log}") from None
        self._starting = False

    async def _stop(self) -> None:
        for child, patience_s in (
            (self._serve, self._settings.drain_s + STOP_MARGIN_S),
            (self._work, WORK_STOP_S),
        ):
            if not await child.stop(patience_s):
                self._say(f"{child.name} did not end in {patience_s:g} s and was killed; nothing is lost by that")
        if not await self._valkey.stop():
            self._say("valkey did not end in time and was killed; nothing is lost by that")

    def _greet(self, took_s: float) -> None:
        base_url, program = _url(self._settings.host, self._settings.port), _program()
        described = {
            "base_url": base_url,
            "ops_url": self._ops_url,
            "distributor_id": demo.DISTRIBUTOR,
            "token": self._demo.token,
            "client_id": demo.CLIENT,
            "client_secret": self._demo.client_secret,
            "product_code": demo.PRODUCT,
        }
        write_private(self._data_dir / "demo.json", _json(described))
        self._say(f"voucherd is ready at {base_url} after {took_s:.1f} s (metrics and health: {self._ops_url})")
        self._say("\nA voucher, and the same one again if you repeat it:\n")
        self._say(CURL.format(base_url=base_url, token=self._demo.token, distributor=demo.DISTRIBUTOR))
        self._say("\nThe same by Client API v3: a token, the catalogue, a voucher, and what became of it:\n")
        self._say(
            CURLS.format(base_url=base_url, client=demo.CLIENT, secret=self._demo.client_secret, product=demo.PRODUCT)
        )
        self._say(f"\nBoth are described at {base_url}/docs")
        self._say("\nThen, from another terminal:\n")
        self._say(f"{program} ledger find --request-id req-1001 --data-dir {shlex.quote(str(self._given))}")
        self._say(f"{program} audit --data-dir {shlex.quote(str(self._given))}")
        self._say(f"\nCtrl-C stops everything; what was issued stays in {self._given}.")

    @property
    def _ops_url(self) -> str:
        return _url(self._settings.ops_host, self._settings.ops_port)

    def _say(self, text: str) -> None:
        self._console.print(text)


# The source's sample, to be pasted as it is.
CURL: Final = """\
curl \\
  -X POST "{base_url}/api/v1/voucher/request" \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer {token}" \\
  -d '{{
    "request_id": "req-1001",
    "distributor_id": "{distributor}",
    "terminal_id": "AT-998877",
    "product_ids": ["PAY", "MOB"]
  }}'"""


# The same of Client API v3; each line can be pasted by itself, after those above it.
CURLS: Final = """\
TOKEN=$(curl -s -u "{client}:{secret}" -d grant_type=client_credentials {base_url}/oauth2/token | cut -d '"' -f 4)
curl -s -H "Authorization: Bearer $TOKEN" {base_url}/v3/products; echo
VOUCHER=$(curl -s -X POST {base_url}/v3/products/{product} -H "Authorization: Bearer $TOKEN" \
  -H "Idempotency-Key: 30c40ad6-f135-4aad-97d5-79f195680458" -H "Content-Type: application/json" \
  -d '{{"quantity": 1}}'); echo "$VOUCHER"
curl -s -H "Authorization: Bearer $TOKEN" \
  {base_url}/v3/vouchers/$(echo "$VOUCHER" | sed 's/.*"voucher_id":"//; s/".*//'); echo"""


def _stop_signals() -> asyncio.Event:
    """Set when the operator, the service manager or the closing terminal asks to stop."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


async def _port(host: str, port: int, option: str) -> int:
    """A port to listen on: the one asked for, or a free one for 0.  Raises Misconfigured if it is taken."""
    if port == 0:
        return free_port(host)
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            try_port(host, port)
            return port
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            reason = "is in use" if in_use else f"can't be used on {host} ({error.strerror})"
        if not in_use or time.monotonic() > deadline:
            raise Misconfigured(f"port {port} {reason}: choose another with {option}, 0 picks a free one")
        await asyncio.sleep(LOOK_S)


def _url(host: str, port: int) -> str:
    """Where to reach a server that listens on ``host``, from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _is_ready(ops_url: str) -> bool:
    parts = urlsplit(ops_url)
    try:
        async with asyncio.timeout(LOOK_ANSWER_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(f"GET /readyz HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.readline()).split(b" ")[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def _is_open(partition: scripts.Scripts) -> bool:
    try:
        return (await partition.generation()).agrees
    except RedisUnreachable:
        return False


def _program() -> str:
    """How this terminal calls voucherd."""
    called = Path(sys.argv[0])
    if called.name != "voucherd":
        return f"{sys.executable} -m service.cli.main"
    return "voucherd" if shutil.which("voucherd") == str(called.absolute()) else str(called)


def _json(values: Mapping[str, object]) -> str:
    return msgspec.json.format(msgspec.json.encode(values), indent=2).decode() + "\n"
