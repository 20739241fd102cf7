"""Processes that a benchmark starts, and what the kernel says of their CPU time."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_S_MAX = 60.0
STOP_S_MAX = 30.0
LOOK_S = 0.05


def cpu_us(pids: Sequence[int]) -> float:
    """CPU time of these processes so far, all their threads included, in microseconds.

    By the scheduler's own clock (nanoseconds); the counters that ``ps`` reads move in steps of 10,000 us.
    """
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e3


def rss_mb(pid: int) -> float:
    """Memory of a process that nobody else has, MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """``command``, which listens on ``port`` meanwhile; its process id.  Raises SystemExit if it does not start."""
    process = subprocess.Popen(
        command, env=None if environment is None else dict(environment), stdout=subprocess.DEVNULL
    )
    try:
        wait_for_port(port, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait(STOP_S_MAX)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when somebody listens.  Raises SystemExit if the process ended or nobody does in time."""
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{' '.join(map(str, process.args))[:80]} did not start") from None  # type: ignore[arg-type]
            time.sleep(LOOK_S)


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation."""
    return [sys.executable, "-m", name, *arguments]
