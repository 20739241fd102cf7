"""Processes that a benchmark starts, and what the kernel says of their CPU time and memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

START_S_MAX = 60.0
STOP_S_MAX = 30.0
LOOK_S = 0.1  # between two looks at what is waited for


def cpu_us(pids: Sequence[int]) -> float:
    """CPU time of these processes so far, all their threads included, in microseconds.

    By the scheduler's own clock (nanoseconds); the counters that ``ps`` reads move in steps of 10,000 us.
    """
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e3


def resident_mb(pids: Sequence[int]) -> float:
    """Resident memory of the largest of these processes, in MB."""
    return max(int(psutil.Process(pid).memory_info().rss) for pid in pids) / 1e6


@contextmanager
def running(command: Sequence[str], port: int, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """``command``, which listens on ``port`` meanwhile; its process id.  Raises SystemExit if it does not start."""
    process = subprocess.Popen(
        command, env=None if environment is None else dict(environment), stdout=subprocess.DEVNULL
    )
    try:
        wait_for(f"an answer on port {port}", lambda: _listens(port, process))
        yield process.pid
    finally:
        process.terminate()
        process.wait(STOP_S_MAX)


def wait_for(what: str, condition: Callable[[], bool], within_s: float = START_S_MAX) -> None:
    """Returns once ``condition`` holds.  Raises SystemExit, saying ``what`` did not come, if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {within_s:g} s")
        time.sleep(LOOK_S)


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"{process.args!s:.200} ended with exit status {process.returncode}")
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation."""
    return [sys.executable, "-m", name, *arguments]
