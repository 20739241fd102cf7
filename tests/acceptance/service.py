"""The service as in production: own Valkey, own store, `serve` with two processes, `work`, and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from loadtest.servers import RedisServer, free_port, until
from service import tokens
from service.line import connect
from service.scripts import Scripts
from service.store import books, campaigns, control, schema, stock
from service.store.database import Database
from service.worker.audit import audit
from service.worker.publish import change
from service.worker.stocking import import_codes
from tests.acceptance.test_up import environment, voucherd
from tests.secrecy import leaks

DEADLINE_S = 60.0


class Service:
    """`voucherd serve` and `voucherd work` on one Valkey and one store, without demo data."""

    def __init__(self, valkey: RedisServer, store_url: str, log: Path, program: Path, **settings: str) -> None:
        self.program = program
        self.valkey = valkey
        self.store_url = store_url
        self.port, self.ops_port = free_port(), free_port()
        self.environment = environment(
            checkout=True, VOUCHERD_REDIS_URL=valkey.url, VOUCHERD_STORE_URL=store_url, VOUCHERD_PORT=str(self.port),
            VOUCHERD_OPS_PORT=str(self.ops_port), VOUCHERD_WORKERS="2", VOUCHERD_PLANNED_RATE="5",
            VOUCHERD_STORE_OUTAGE_S="10", VOUCHERD_ACCEPT="fsync",
            VOUCHERD_LOG_LEVEL="debug",  # no line at any level may hold a secret
            **settings,
        )  # fmt: skip
        self.log = log
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.furnished = 0
        self.distributor = self.campaign = self.product = self.token = ""
        self.at_once = asyncio.Semaphore(32)  # the client's own bookkeeping is quadratic in what waits

    def start(self, *names: str) -> None:
        for name in names:
            with self.log.open("ab") as log:
                self.processes[name] = subprocess.Popen(voucherd(name), env=self.environment, stdout=log, stderr=log)
        until(self._ready, "ready")

    def _ready(self) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name}: {self.log.read_text()}"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.ops_port}/readyz", trust_env=False).status_code == 200
        return False

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            assert process.wait(DEADLINE_S) == 0, self.log.read_text()
        self.processes.clear()

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.processes.clear()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program, *arguments], env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )

    def succeed(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    async def furnish(self, codes: int) -> None:
        """A distributor with a token, and a campaign for a product of its own with ``codes`` codes."""
        self.furnished += 1
        self.distributor, self.campaign = f"DIST-{self.furnished}", f"C-{self.furnished}"
        self.product, self.token = f"PAY-{self.furnished}", tokens.new_token()
        now = int(time.time())

        async def edit(conn: AsyncConnection) -> None:
            await control.create_distributor(conn, self.distributor, "One", now)
            await control.add_credential(conn, self.distributor, tokens.digest(self.token), now)
            await control.create_pool(conn, self.campaign, default_expires_at=now + 86_400, least_life_s=0, now=now)
            await campaigns.create(
                conn, self.campaign, category="CAT", products=[self.product], pool=self.campaign, priority=1,
                starts_at=0, until=0, time_zone="UTC", caps=(), now=now,
            )  # fmt: skip
            await campaigns.assign(conn, self.campaign, self.distributor, (), now)

        async with self.control_plane() as (database, scripts):
            await change(database, scripts, edit, actor="test", action="furnish", subject=self.campaign)
            await self.stock_up(database, scripts, "first", codes)

    async def stock_up(self, database: Database, scripts: Scripts, name: str, codes: int) -> None:
        rows = [stock.Row(line, f"{self.campaign}-{name}-{line:06}", None, None) for line in range(1, codes + 1)]
        await import_codes(database, scripts, self.campaign, rows, import_id=f"{self.campaign}-{name}")

    @contextlib.asynccontextmanager
    async def control_plane(self) -> AsyncIterator[tuple[Database, Scripts]]:
        """What the commands work on."""
        database, client = Database.connect(self.store_url), connect(self.valkey.url, timeout_ms=2_000)
        try:
            yield database, Scripts(client)
        finally:
            await client.aclose()
            await database.close()

    def furnish_by_command(self, codes: int, tmp_path: Path) -> None:
        """The same by the lines that scripts rely on."""
        self.distributor, self.campaign, self.product = "DIST-C", "C-C", "PAY-C"
        file = tmp_path / "codes.csv"
        file.write_text("code\n" + "".join(f"CODE-{number:06}\n" for number in range(codes)))
        self.succeed("distributor", "create", "DIST-C")
        self.succeed("campaign", "create", "C-C", "--category", "CAT", "--product", "PAY-C")
        self.succeed("codes", "import", "C-C", str(file))
        self.succeed("campaign", "assign", "C-C", "DIST-C")
        self.token = json.loads(self.succeed("token", "issue", "DIST-C", "--json"))["token"]

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", limits=limits, timeout=30, trust_env=False,
        )  # fmt: skip

    async def ask(
        self, client: httpx.AsyncClient, key: str, *, token: str = "", distributor: str = "", terminal: str = "T-1",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:  # fmt: skip
        body = {
            "request_id": key, "distributor_id": distributor or self.distributor, "terminal_id": terminal,
            "product_ids": [self.product],
        }  # fmt: skip
        async with self.at_once:
            sent = {"Authorization": f"Bearer {token or self.token}", **(headers or {})}
            return await client.post("/api/v1/voucher/request", headers=sent, json=body)

    async def voucher(self, client: httpx.AsyncClient, key: str, **who: str) -> httpx.Response:
        """Retries 503 with the same key, as partners do."""
        end = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await self.ask(client, key, **who)
                if response.status_code != 503:
                    return response
            assert time.monotonic() < end, f"{key}: no answer but 503"
            await asyncio.sleep(0.02)

    def quiet(self) -> None:
        """Returns when everything issued is in the ledger."""
        with redis.Redis.from_url(self.valkey.url, decode_responses=True) as client:

            def flushed() -> bool:
                generation = client.hget("{0}:generation", "open")
                return bool(generation) and client.xlen(f"{{0}}:{generation}:outbox") == 0

            until(flushed, "an empty outbox")

    def refilled(self) -> None:
        """Returns when no window that a campaign issues from is empty while there is stock for it."""

        async def filled() -> bool:
            async with self.control_plane() as (database, scripts):
                async with database.read() as conn:
                    left = await stock.left(conn, int(time.time()))
                    used = await control.pools_in_use(conn, int(time.time()))
                windows = (await scripts.books(sorted(used), generation=(await scripts.generation()).open)).windows
            return all(pool in windows and windows[pool].length for pool in used if left.get(pool))

        until(lambda: asyncio.run(filled()), "no empty window")

    async def audit(self) -> None:
        """Fails unless the books balance."""
        self.quiet()
        async with self.control_plane() as (database, scripts):
            report = await audit(database, scripts)
        assert report.findings == []

    async def secret(self) -> None:
        """Fails if the processes have logged a code of the store, a token or a secret."""
        async with self.control_plane() as (database, _), database.read() as conn:
            codes = list(await conn.scalars(select(schema.codes.c.code)))
        assert leaks(self.log.read_text(), codes) == []

    async def in_quarantine(self) -> set[str]:
        """The serial numbers of the codes in quarantine."""
        async with self.control_plane() as (database, _), database.read() as conn:
            return {one.serial_number for one in await books.quarantined_codes(conn, 10_000)}
