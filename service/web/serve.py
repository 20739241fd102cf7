"""``voucherd serve``: the parent that supervises the serving processes and owns the ops port.

    serve ── process 1..N   the public port, one socket that all of them accept from
          └─ ops port       metrics and health, in the parent itself

A process that ends is started again with back-off.  To stop, the parent closes its copy of the public socket, tells
the processes to drain, waits for them, and ends.  A parent that dies in any other way takes its processes along:
they drain when their control sockets close.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from service import logs, metrics
from service.errors import Misconfigured
from service.exposition import Exposition, forget
from service.settings import Settings
from service.web.ops import Readiness, listening, ops, serving_ops
from service.web.serving import TEMPORARY_PREFIX, Order, Word

log = structlog.get_logger(__name__)

COMMAND: Final = (sys.executable, "-P", "-m", "service.web.process")

# Seconds.  A process that can't start must neither be forgotten nor keep a core busy.
BACKOFF_LEAST_S: Final = 0.2
BACKOFF_MOST_S: Final = 10.0
STEADY_S: Final = 30.0  # after so long the next failure is a new one

# Seconds that a process gets beyond drain_s to close its connections to Redis and the store; then it is killed.
DRAIN_MARGIN_S: Final = 2.0

LOCK: Final = "lock"  # in the directory of the metrics: held by the parent for as long as it lives

VET_S: Final = 3.0  # Redis and the store are waited for so long before the port is opened; then they are away


class Addresses(msgspec.Struct, frozen=True):
    """Where the two ports are, host and port each."""

    public: tuple[str, int]
    ops: tuple[str, int]


Announce = Callable[[Addresses], None]
Vetted = Callable[[], Coroutine[None, None, None]]


async def serve(
    settings: Settings, *, announce: Announce, command: Sequence[str] = COMMAND, vetted: Vetted | None = None
) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status: 0, or 1 if a process had to be killed to end.

    ``announce`` is told once where the ports are, when both take connections; requests are answered as soon as a
    process has started.  ``command`` starts one process, given its two descriptors as arguments.  ``vetted`` returns
    when Redis and the store were found to be as they must be, and raises Misconfigured if they are not: at the start,
    or later if they did not answer then.  Raises Misconfigured besides if a port can't be had, or if a process says,
    before any was ready, that it can't work with these settings.
    """
    logs.configure("serve", style=settings.log_format, level=settings.log_level)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    vetting = asyncio.create_task(_nothing() if vetted is None else vetted())
    try:
        await asyncio.wait([vetting], timeout=VET_S)
        if vetting.done():
            vetting.result()
        with (
            listening(settings, "host", "port") as public,
            listening(settings, "ops_host", "ops_port") as ops_socket,
            _metrics_directory() as directory,
        ):
            supervisor = Supervisor(settings, public, directory, command)
            app = ops(Exposition(directory, supervisor.metrics).text, supervisor.readiness)
            async with serving_ops(app, ops_socket, settings):
                announce(Addresses(_address(public), _address(ops_socket)))
                return await supervisor.run(stop, vetting)
    finally:
        vetting.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _nothing() -> None: ...


class Supervisor:
    """Keeps the serving processes running until told to stop."""

    def __init__(self, settings: Settings, public: socket.socket, directory: Path, command: Sequence[str]) -> None:
        self.metrics = metrics.Supervision(settings.workers, self._ready)
        self._settings = settings
        self._public = public
        self._directory = directory
        self._command = command
        self._workers = [Worker(number) for number in range(1, settings.workers + 1)]
        self._stopping = asyncio.Event()
        self._was_ready = False
        self._killed = 0

    async def run(self, stop: asyncio.Event, vetting: asyncio.Task[None]) -> int:
        """Returns the exit status once ``stop`` is set and every process has ended.  Raises Misconfigured, also if
        ``vetting`` does."""
        keepers = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, vetting, *keepers], return_when=asyncio.FIRST_COMPLETED)
            if vetting.done() and vetting.exception() is None:
                await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            await self._drain(keepers)
        for ended in (*keepers, *([vetting] if vetting.done() else [])):
            ended.result()
        return 1 if self._killed else 0

    def readiness(self) -> Readiness:
        """Whether every process is ready, and what is missing if not."""
        missing = [f"worker {worker.number} {worker.says}" for worker in self._workers if worker.state != "ready"]
        if self._stopping.is_set():
            missing.append("shutting down")
        return Readiness(not missing, len(self._workers), self._ready(), missing)

    def _ready(self) -> int:
        return sum(worker.state == "ready" for worker in self._workers)

    async def _keep(self, worker: Worker) -> None:
        """``worker`` has a process: whenever that ends, there is another one after a pause."""
        backoff_s = BACKOFF_LEAST_S
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._one_life(worker)
            if self._stopping.is_set():
                return
            if worker.misconfigured and not self._was_ready:
                raise Misconfigured(worker.misconfigured)
            self.metrics.exits += 1
            if time.monotonic() - began > STEADY_S:
                backoff_s = BACKOFF_LEAST_S
            log.error("worker_ended", worker=worker.number, status=status, again_in_s=backoff_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)

    async def _one_life(self, worker: Worker) -> int:
        """Runs one process to its end; returns its exit status, negative if a signal ended it."""
        ours, its = socket.socketpair()
        with ours, its:
            process = await asyncio.create_subprocess_exec(
                *self._command, str(self._public.fileno()), str(its.fileno()),
                pass_fds=(self._public.fileno(), its.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, metrics.DIRECTORY_VARIABLE: str(self._directory)},
            )  # fmt: skip
            its.close()
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            worker.process, worker.control = process, writer
            self.metrics.pids[worker.number] = process.pid
            try:
                writer.write(msgspec.json.encode(self._settings) + b"\n")
                if self._stopping.is_set():
                    worker.tell_to_drain()
                await self._listen(worker, reader)
                status = await process.wait()
            finally:
                writer.close()
                worker.forget()
                del self.metrics.pids[worker.number]
        await asyncio.to_thread(forget, self._directory, process.pid)
        return status

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Notes what the process says until it ends."""
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                word = msgspec.json.decode(line, type=Word)
                if word.state == "misconfigured":
                    worker.misconfigured = word.reason
                worker.state = word.state
                self._was_ready |= word.state == "ready"
                log.info("worker", worker=worker.number, state=word.state)

    async def _drain(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        """Every process has ended: by itself, or killed when its time was up."""
        self._stopping.set()
        self._public.close()
        for worker in self._workers:
            worker.tell_to_drain()
        patience_s = self._settings.drain_s + DRAIN_MARGIN_S
        await asyncio.wait(keepers, timeout=patience_s)
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                log.error("worker_killed", worker=worker.number, after_s=patience_s)
                worker.process.kill()
                self._killed += 1
        await asyncio.wait(keepers)


class Worker:
    """One place for a serving process, and the one that fills it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.control: asyncio.StreamWriter | None = None
        self.state = "down"
        self.misconfigured = ""

    @property
    def says(self) -> str:
        """What is missing, in words."""
        return {"down": "is down", "starting": "has not loaded a catalogue yet"}.get(self.state, f"is {self.state}")

    def tell_to_drain(self) -> None:
        if self.control is not None and not self.control.is_closing():
            self.control.write(msgspec.json.encode(Order(drain=True)) + b"\n")

    def forget(self) -> None:
        """Its process has ended."""
        self.process = self.control = None
        self.state = "down"


@contextlib.contextmanager
def _metrics_directory() -> Iterator[Path]:
    """Where the processes write their metrics: the directory given, or one that goes with this parent."""
    given = metrics.given_directory()
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    _remove_orphans(Path(tempfile.gettempdir()))
    directory = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX))
    with (directory / f"{LOCK}.new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, directory / LOCK)  # so nobody ever finds it free while this parent lives
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    """No directory of ours is left whose parent has ended, as it is when all processes were killed at once."""
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):  # held, or gone meanwhile
            if path.lstat().st_uid != os.geteuid():
                continue  # nobody but its owner can have put anything into one of ours
            with (path / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


def _address(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()[:2]
    return str(host), int(port)
