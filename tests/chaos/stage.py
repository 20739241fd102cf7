"""A whole service as in production, with everything replaceable while it runs: two `voucherd serve` of two processes
each, two `voucherd work` (one on SQLite), a Redis behind a relay, a store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, Self

import httpx
import msgspec
import psutil
import redis
from sqlalchemy.engine import make_url

from loadtest import servers
from loadtest.servers import PostgresServer, RedisServer, free_port
from tests.acceptance.test_up import environment, voucherd
from tests.chaos.client import Order, Plan, Progress, Source
from tests.relay import Relay

Store = Literal["postgresql", "sqlite"]

SECRETS: Final = "secrets.json"
POINTS: Final = Path(__file__).parent / "points"  # on PYTHONPATH: crash points

PLANNED_RATE: Final = 50
OUTAGE_S: Final = 10
# Twice the defaults, for a machine that runs other tests too is slow.  The client waits longer than that.
DEADLINE_MS: Final = 4_000
REDIS_TIMEOUT_MS: Final = 2_000
READY_S: Final = 60.0
DRAIN_S: Final = 90.0  # after everything is healed, until all outboxes are empty
STOP_S: Final = 30.0

# A server started through this survives reaching a limit of file size, and sees a write that fails.
UNLIMITED: Final = ("sh", "-c", 'trap "" XFSZ; exec "$@"', "sh")


def unlimited(_: Path) -> Sequence[str]:
    return UNLIMITED


class Stuck(AssertionError):
    """What has to come by itself did not."""


class Campaign(msgspec.Struct, frozen=True):
    """What the checker has to know of one.  Its pool has its name.  Caps are totals, None for none; ``codes`` in stock,
    None: as many as are wanted.  By Client API v3: the campaign of a product of its name, sold in any ``quantity`` up
    to this one."""

    id: str
    product: str
    weight: float
    codes: int | None = None
    cap: int | None = None
    distributor_cap: int | None = None
    terminal_cap: int | None = None
    terminals: int = 1_000
    api: Literal["v1", "v3"] = "v1"
    quantity: int = 1


class Paused(msgspec.Struct, frozen=True):
    """Of a campaign, Unix seconds: when the command that paused it was ``begun`` and had returned (``since``; infinite
    if it failed), when the one that resumed it was begun (``until``) and had returned (``ended``)."""

    campaign: str
    begun: float
    since: float
    until: float
    ended: float


class World(msgspec.Struct, frozen=True):
    """Who sells what.  Every distributor sells every product, each of which belongs to one campaign."""

    distributors: tuple[str, ...]
    campaigns: tuple[Campaign, ...]

    def of_product(self, product: str) -> Campaign:
        return next(one for one in self.campaigns if one.product == product)

    @property
    def sources(self) -> list[Source]:
        return self.sources_of(*(one.product for one in self.campaigns))

    def sources_of(self, *products: str) -> list[Source]:
        return [
            Source(
                distributor if one.api == "v1" else client_of(distributor), one.product, one.weight, one.terminals,
                one.api, one.quantity,
            )
            for distributor in self.distributors
            for one in self.campaigns
            if one.product in products
        ]  # fmt: skip

    @property
    def products(self) -> list[Campaign]:
        """What is sold by Client API v3."""
        return [one for one in self.campaigns if one.api == "v3"]


def client_of(distributor: str) -> str:
    return f"client-{distributor}"


def world(vouchers: int) -> World:
    """One whose small pool runs dry and whose caps are met before so many calls were made."""
    return World(
        ("DIST-1", "DIST-2", "DIST-3"),
        (
            Campaign("PLENTY", "PAY", 0.80),
            Campaign("GIFT", "GIFT", 0.04, api="v3", quantity=20),
            Campaign("TINY", "TIN", 0.04, codes=vouchers // 100),
            Campaign("CAPPED", "CAP", 0.06, cap=vouchers // 50, distributor_cap=vouchers // 100),
            Campaign("TERMINAL", "TRM", 0.06, terminal_cap=2, terminals=max(1, vouchers // 200)),
        ),
    )


class Program:
    """`voucherd serve` or `voucherd work`: it can die, sleep, and be started again."""

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.name, self.environment, self.log = name, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pids(self) -> list[int]:
        """It and its children, itself first."""
        if not self.alive:
            return []
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process.pid, *(one.pid for one in psutil.Process(self.process.pid).children())]
        return []

    def start(self) -> None:
        """Does nothing if it is alive."""
        with self._lock, self.log.open("ab") as log:
            if not self.alive:
                self.process = subprocess.Popen(
                    voucherd(self.name.split("-")[0]), env=self.environment, stdout=log, stderr=log
                )

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)

    def stop(self) -> None:
        """It ends as an operator would have it; fails unless it does so by itself and in time."""
        if self.process is not None and self.alive:
            self.process.terminate()
            assert self.process.wait(STOP_S) == 0, f"{self.name} ended with {self.process.returncode}"


class Load:
    """The load client, a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self.file = Path(plan.file)
        self.progress = Progress(0, {}, time.time(), 0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.client"], env=environment(checkout=True),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._say(plan)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def order(self, order: Order) -> None:
        """It does nothing more if it has ended meanwhile."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._say(order)

    def finish(self, within_s: float) -> Progress:
        """When every call has a final answer, or the client has lost its patience."""
        self._say(Order(finish=True))
        self._listening.join(within_s)
        if not self.progress.over:
            self.close()
            raise Stuck(f"the client did not end: {self.progress}")
        self.close()
        assert self._process.returncode == 0
        return self.progress

    def close(self) -> None:
        """It has ended."""
        self._process.kill() if not self.progress.over else self._stdin.close()
        self._process.wait(STOP_S)
        self._listening.join(STOP_S)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()

    def answered(self, count: int, within_s: float = READY_S) -> None:
        """Returns when so many calls more have been answered with a voucher."""
        kinds = self.progress.kinds
        until(lambda: self.progress.kinds.get("200", 0) - kinds.get("200", 0) >= count, f"{count} vouchers", within_s)

    def _say(self, what: Plan | Order) -> None:
        self._stdin.write(msgspec.json.encode(what) + b"\n")
        self._stdin.flush()

    def _listen(self) -> None:
        for line in self._stdout:
            self.progress = msgspec.json.decode(line, type=Progress)


def until(look: Callable[[], object], what: str, within_s: float = READY_S) -> None:
    """Returns once ``look`` is true.  Raises Stuck, saying ``what`` did not come."""
    try:
        servers.until(look, what, within_s)
    except TimeoutError as late:
        raise Stuck(str(late)) from None


class Stage:
    """Use as a context: everything that was started ends with it."""

    def __init__(
        self,
        directory: Path,
        store: Store,
        *,
        binary: Path,
        voucherd: Path,
        postgres: PostgresServer | None,
        world: World,
        redis_options: dict[str, str] | None = None,
        through: Callable[[Path], Sequence[str]] = unlimited,
        **settings: str,
    ) -> None:
        """``binary``: of Redis or Valkey, started ``through`` what this says of its directory; ``voucherd``: what
        commands are typed with; ``postgres``: not started yet, and nobody else's."""
        self.power = through is not unlimited  # it can be cut
        self.directory, self.store, self.world = directory, store, world
        self.voucherd, self.postgres = voucherd, postgres
        self._binary, self._redis_options, self._through = binary, redis_options or {}, through
        self._servers = 0
        self.redis = self.new_server()
        self.relay = Relay(self.redis.port)
        self.points = directory / "points"
        self.settings = settings
        self.ports: list[int] = []
        self.ops_ports: list[int] = []
        self.programs: list[Program] = []
        self.loads: list[Load] = []
        self.tokens: dict[str, dict[str, str]] = {}  # of each distributor by our names, as clients use them now
        self.revoking: set[str] = set()  # names of tokens that may be refused
        self.revoked: dict[str, float] = {}  # since when they must be
        self.paused: list[Paused] = []
        self._closing = contextlib.ExitStack()
        self._loop = asyncio.new_event_loop()

    # --- begin and end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.points.mkdir(parents=True)
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> None:
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        self._closing.callback(thread.join, STOP_S)
        self._closing.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        running = self.relay.running()
        asyncio.run_coroutine_threadsafe(running.__aenter__(), self._loop).result(STOP_S)
        self._closing.callback(
            lambda: asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), self._loop).result(STOP_S)
        )
        self.redis.start()
        if self.postgres is not None:
            self.postgres.start()
            self.postgres.sql("create database voucherd")
        self.succeed("keys", "create", str(self.directory / SECRETS))
        self.succeed("migrate")
        for name, ops in (("serve-1", True), ("serve-2", True), ("work-1", False), ("work-2", False)):
            if name == "work-2" and self.store == "sqlite":
                continue  # a lock says so
            ports = {}
            if ops:
                self.ports.append(free_port())
                self.ops_ports.append(free_port())
                ports = {"VOUCHERD_PORT": str(self.ports[-1]), "VOUCHERD_OPS_PORT": str(self.ops_ports[-1])}
            where = os.pathsep.join((str(POINTS), self.environment["PYTHONPATH"]))
            own = {**self.environment, **ports, "PYTHONPATH": where, "CHAOS_POINTS": str(self.points)}
            self.programs.append(Program(name, own, self.directory / f"{name}.log"))
        for program in self.works:
            program.start()
        until(self.is_open, "an open generation")
        self._furnish()
        secrets = self._furnish_products()
        self.mend()
        for client, secret in secrets.items():
            self.tokens[client] = {f"{client}/1": self._access_token(client, secret)}

    def _end(self) -> None:
        for load in self.loads:
            load.close()
        for program in self.programs:
            for pid in program.pids[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            program.kill()
        self.redis.kill()
        if self.postgres is not None:
            self.postgres.stop(signal.SIGQUIT)
        self._closing.close()
        self._loop.close()

    def new_server(self) -> RedisServer:
        """One with nothing in it, not started."""
        self._servers += 1
        directory = self.directory / f"redis-{self._servers}"
        return RedisServer(self._binary, directory, self._redis_options, through=self._through(directory))

    @property
    def store_url(self) -> str:
        if self.postgres is not None:
            return self.postgres.url("voucherd")
        return f"sqlite+aiosqlite:///{self.directory / 'store.db'}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(
            checkout=True, VOUCHERD_REDIS_URL=self.relay.url, VOUCHERD_STORE_URL=self.store_url,
            **{"VOUCHERD_WORKERS": "2", "VOUCHERD_PLANNED_RATE": str(PLANNED_RATE),
               "VOUCHERD_STORE_OUTAGE_S": str(OUTAGE_S),
               "VOUCHERD_DEADLINE_MS": str(DEADLINE_MS), "VOUCHERD_REDIS_TIMEOUT_MS": str(REDIS_TIMEOUT_MS),
               "VOUCHERD_SECRETS_FILE": str(self.directory / SECRETS), "VOUCHERD_TOKEN_LIFETIME_S": "86400",
               "VOUCHERD_ACCEPT": "fsync,replicas,version", **self.settings},
        )  # fmt: skip

    def _furnish(self) -> None:
        pools, campaigns = [], []
        for one in self.world.campaigns:
            pool: dict[str, object] = {"id": one.id, "expires": "2040-01-01"}
            if one.codes is None:
                pool = {"id": one.id, "pattern": f"{one.id[0]}%%%%-%%%%-%%%%", "expires_after": 3_000}
            caps = {
                **({} if one.cap is None else {"total": one.cap}),
                **({} if one.distributor_cap is None else {"distributor": {"total": one.distributor_cap}}),
                **({} if one.terminal_cap is None else {"terminal": {"total": one.terminal_cap}}),
            }
            pools.append(pool)
            if one.api == "v3":
                continue  # apply makes no products
            campaigns.append(
                {"id": one.id, "category": one.product, "products": [one.product], "pool": one.id, "caps": caps,
                 "assigned": [{"distributor": name} for name in self.world.distributors]}
            )  # fmt: skip
        file = self.directory / "world.json"
        distributors = [{"id": name} for name in self.world.distributors]
        file.write_text(json.dumps({"distributors": distributors, "pools": pools, "campaigns": campaigns}))
        self.succeed("apply", str(file), "--yes")
        for one in self.world.campaigns:
            if one.codes is not None:
                codes = self.directory / f"{one.id}.csv"
                codes.write_text("code\n" + "".join(f"{one.id}-{number:06}\n" for number in range(one.codes)))
                self.succeed("codes", "import", one.id, str(codes))
        for name in self.world.distributors:
            self.tokens[name] = {f"{name}/1": self.new_token(name)}

    def _furnish_products(self) -> dict[str, str]:
        """The clients that may have them, each with its secret."""
        secrets = {}
        for one in self.world.products:
            self.succeed(
                "product", "create", one.product, "--name", "A card", "--amount", "1000", "--currency", "SGD",
                "--url", "https://v.example/", "--pool", one.id,
            )  # fmt: skip
            for distributor in self.world.distributors:
                self.succeed("product", "assign", one.product, distributor)
        for distributor in self.world.distributors:
            made = self.succeed("client", "create", client_of(distributor), "--distributor", distributor, "--json")
            secrets[client_of(distributor)] = str(json.loads(made)["client_secret"])
        self.succeed("keys", "rotate")
        return secrets

    def _access_token(self, client: str, secret: str) -> str:
        told = httpx.post(
            f"http://127.0.0.1:{self.ports[0]}/oauth2/token", data={"grant_type": "client_credentials"},
            auth=(client, secret), trust_env=False, timeout=READY_S,
        )  # fmt: skip
        assert told.status_code == 200, told.text
        return str(told.json()["access_token"])

    # --- what an operator types ----------------------------------------------------------------------------------

    def command(self, *arguments: str, within_s: float = READY_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.voucherd, *arguments], env=self.environment, capture_output=True, text=True, timeout=within_s
        )

    def succeed(self, *arguments: str) -> str:
        """What it printed.  Fails if it did not succeed."""
        done = self.command(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def new_token(self, distributor: str) -> str:
        return str(json.loads(self.succeed("token", "issue", distributor, "--json"))["token"])

    def use_tokens(self, distributor: str, tokens: dict[str, str]) -> None:
        """Clients use these from now on."""
        self.tokens = {**self.tokens, distributor: tokens}
        for load in self.loads:
            if not load.progress.over:
                load.order(Order(tokens=self.tokens))

    # --- load ----------------------------------------------------------------------------------------------------

    def load(self, name: str, *, seed: int, **how: object) -> Load:
        """A client that has begun."""
        given = {
            "file": str(self.directory / f"{name}.calls"), "prefix": name, "seed": seed, "ports": self.ports,
            "sources": self.world.sources, "tokens": self.tokens, **how,
        }  # fmt: skip
        self.loads.append(Load(Plan(**given)))  # type: ignore[arg-type]
        return self.loads[-1]

    # --- what goes wrong -----------------------------------------------------------------------------------------

    @property
    def serves(self) -> list[Program]:
        return [one for one in self.programs if one.name.startswith("serve")]

    @property
    def works(self) -> list[Program]:
        return [one for one in self.programs if one.name.startswith("work")]

    def cut(self) -> None:
        """Every connection to Redis is reset."""
        self._loop.call_soon_threadsafe(self.relay.cut)

    def hold(self) -> None:
        self._loop.call_soon_threadsafe(self.relay.hold)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.relay.release)

    def switch_to(self, server: RedisServer) -> None:
        """Whoever connects from now on reaches ``server``."""
        self.redis, self.relay.upstream = server, server.port
        self.cut()

    def dies_at(self, point: str) -> Path:
        """The next process that comes to this crash point dies there; its id is added to the path returned then."""
        path = self.points / point
        path.touch()
        return path

    def admin(self) -> redis.Redis:
        """At the server itself, past the relay."""
        return redis.Redis(
            host="127.0.0.1", port=self.redis.port, decode_responses=True, socket_timeout=10.0,
            encoding_errors="surrogateescape",
        )  # fmt: skip

    def oldest_unflushed(self) -> float:
        """Unix seconds: nothing that was issued before is in the outboxes only."""
        now = time.time()
        with self.admin() as admin:
            heads = [admin.xrange(key, count=1) for key in admin.scan_iter("{0}:*:outbox")]
        return min([now, *(int(head[0][0].partition("-")[0]) / 1000 for head in heads if head)])

    @contextlib.contextmanager
    def sqlite_locked(self) -> Iterator[None]:
        """Nobody else can write to the store."""
        connection = sqlite3.connect(str(make_url(self.store_url).database), timeout=30.0, isolation_level=None)
        try:
            connection.execute("begin immediate")
            yield
        finally:
            connection.close()

    # --- heal ----------------------------------------------------------------------------------------------------

    def mend(self) -> None:
        """Every program runs and serves, whatever has been done to it; a generation is open."""

        def whole() -> bool:
            for program in self.programs:
                program.start()  # also one that comes to a crash point meanwhile
            return self._serving() and self.is_open()

        until(whole, "every process ready and an open generation")

    def _serving(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return all(
                httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
                for port in self.ops_ports
            )
        return False

    def generation(self) -> int:
        """The generation that is open."""
        with self.admin() as admin:
            return int(admin.hget("{0}:generation", "open"))

    def is_synced(self) -> bool:
        """A worker has seen that the server on which the generation was opened syncs before it answers."""
        with self.admin() as admin, contextlib.suppress(redis.RedisError):
            opened = admin.hgetall("{0}:generation")
            return self.is_open() and opened.get("synced") == opened.get("run_id")
        return False

    def is_open(self) -> bool:
        with self.admin() as admin, contextlib.suppress(redis.RedisError):
            opened = admin.hgetall("{0}:generation")
            return bool(opened) and opened.get("replid") == admin.info("replication")["master_replid"]
        return False

    def drain(self) -> None:
        """Everything that was issued is in the ledger."""

        def drained() -> bool:
            with self.admin() as admin, contextlib.suppress(redis.RedisError):
                return not any(admin.xlen(key) for key in admin.scan_iter("{0}:*:outbox"))
            return False

        until(drained, "empty outboxes", DRAIN_S)
