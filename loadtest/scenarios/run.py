"""Locust, while it runs a scenario, and what is done to the service meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec
import psutil

from loadtest.processes import cpu_us, module
from loadtest.scenarios import place as places
from loadtest.scenarios.pictures import Event
from loadtest.scenarios.place import Place
from loadtest.scenarios.plan import FILE_VARIABLE, Plan
from loadtest.scenarios.scenario import PARTNER, Scenario
from loadtest.scenarios.watch import Watch
from loadtest.servers import free_port
from service.cli.embedded import write_private

ROOT: Final = Path(__file__).parents[2]
USERS: Final = Path(__file__).with_name("users.py")
LOOPBACK: Final = "127.0.0.1"
LOOK_S: Final = 0.2
LOCUST_S_MAX: Final = 90.0  # more than the scenario: its start, the sales that are under way, its statistics
STOP_S: Final = 30  # that a sale may take which is under way when all are over
WORKERS_S_MAX: Final = 300  # until workers that are started by hand are there
SWITCH_S: Final = 2.0  # from another token being there to the old one being revoked
MASTER_PORT: Final = 5557  # locust's own
LOCUST: Final = "python -m locust -f loadtest/scenarios/users.py"


class Run:
    """Locust, and what is done to the service meanwhile.  Then ``revoked`` tokens, ``events``, the ``cores`` that each
    group of processes took on average, and locust's own ``page``."""

    def __init__(
        self,
        scenario: Scenario,
        plan: Plan,
        place: Place,
        watch: Watch,
        folder: Path,
        *,
        workers: int = 0,
        await_workers: int = 0,
        bind: str = LOOPBACK,
    ) -> None:
        self.revoked: dict[str, float] = {}
        self.events: list[Event] = []
        self.cores: dict[str, float] = {}
        self.page = folder / "locust.html"
        self._scenario, self._plan, self._place, self._watch = scenario, plan, place, watch
        self._plan_file, self._log = folder / "plan.json", folder / "locust.log"
        self._workers, self._await_workers, self._bind = workers, await_workers, bind

    def until_over(self, say: Callable[[str], None]) -> None:
        """Raises SystemExit if locust fails, or does not end in time."""
        self._tell(self._plan)
        if self._await_workers:
            say(
                f"on each other machine, with a copy of {self._plan_file}: {FILE_VARIABLE}=COPY {LOCUST} "
                f"--worker --master-host ADDRESS --master-port {self._port}"
            )
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                self._command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, FILE_VARIABLE: str(self._plan_file)}, start_new_session=True,
            )  # fmt: skip
        with ThreadPoolExecutor(1) as aside:
            try:
                self._accompany(process, aside)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its workers too
                    process.wait()
        self._watch.look(self._plan.seconds, self._plan.seconds)
        if process.returncode or not self._watch.attempts:
            raise SystemExit(f"locust ended with {process.returncode}:\n{self._log.read_text()[-2_000:]}")

    def _accompany(self, process: subprocess.Popen[bytes], aside: Executor) -> None:
        deadline = time.monotonic() + self._plan.seconds + LOCUST_S_MAX
        if self._await_workers:
            deadline += WORKERS_S_MAX
        groups = {**self._place.groups, "locust": [process.pid]}
        rotation: Future[None] | None = None
        before, since = dict[str, float](), 0.0
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"locust does not end:\n{self._log.read_text()[-2_000:]}")
            elapsed = time.time() - self._watch.attempts[0].began if self._watch.attempts else 0.0
            self._watch.look(elapsed, self._plan.seconds)
            with contextlib.suppress(OSError, psutil.Error):  # it has ended just now
                groups["locust"] = [process.pid, *(one.pid for one in psutil.Process(process.pid).children())]
                spent = {name: cpu_us(pids) for name, pids in groups.items()}
                if elapsed and not before:
                    before, since = spent, time.monotonic()
                elif 0 < elapsed < self._plan.seconds and time.monotonic() > since:
                    took_us = (time.monotonic() - since) * 1e6
                    self.cores = {name: (spent[name] - before[name]) / took_us for name in before}
            if self._scenario.rotates and rotation is None and elapsed > self._scenario.rotation(self._plan.seconds):
                rotation = aside.submit(self._rotate)
            time.sleep(LOOK_S)
        if rotation is not None:
            rotation.result()

    def _rotate(self) -> None:
        old = self._plan.sellers[PARTNER]
        new = places.rotated(self._place, old)
        self._tell(msgspec.structs.replace(self._plan, sellers={**self._plan.sellers, PARTNER: new}))
        self.events.append(Event(time.time(), "another token"))
        time.sleep(SWITCH_S)
        self.revoked[old.token_name] = places.revoke(self._place, old)
        self.events.append(Event(time.time(), "the old one is revoked"))

    def _tell(self, plan: Plan) -> None:
        write_private(self._plan_file, msgspec.json.encode(plan).decode())

    def _command(self) -> list[str]:
        command = [
            *module("locust", "--locustfile", str(USERS)), "--headless", "--only-summary", "--loglevel", "WARNING",
            "--stop-timeout", str(STOP_S), "--exit-code-on-error", "0", "--html", str(self.page),
        ]  # fmt: skip
        if self._await_workers:
            command += [
                "--master", "--expect-workers", str(self._await_workers), "--expect-workers-max-wait",
                str(WORKERS_S_MAX), "--master-bind-host", self._bind, "--master-bind-port", str(self._port),
            ]  # fmt: skip
        elif self._workers:
            command += [
                "--processes", str(self._workers), "--master-bind-host", LOOPBACK, "--master-host", LOOPBACK,
                "--master-bind-port", str(self._port), "--master-port", str(self._port),
            ]  # fmt: skip
        return command

    @cached_property
    def _port(self) -> int:
        """Where workers find their master."""
        return MASTER_PORT if self._await_workers else free_port()
