"""A power cut, as a disk sees it: what was written after the last completed fdatasync is gone.

``kill -9`` is none: the kernel keeps what a dead process has written.  So strace says how far the append-only file had
been written when each fdatasync began, and after the kill the file is cut back to what the last one that was completed
has on the disk.  Nothing else of what a disk may do in a power cut is tried, least of all one that lies.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.servers import STOP_S, RedisServer, wait_until

FILE: Final = Path("appendonlydir", "appendonly.aof.1.incr.aof")
CALLS: Final = "system-calls"

_BEGAN: Final = re.compile(r"(\d+) +(write|fdatasync|fsync|ftruncate)\(\d+")
_RESUMED: Final = re.compile(r"(\d+) +<\.\.\. (write|fdatasync|fsync|ftruncate) resumed>")
_RESULT: Final = re.compile(r"= (-?\d+)")


def missing() -> str:
    """Why power can't be cut on this machine; '' if it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is missing (Debian's package is strace): no power can be cut"
    tried = subprocess.run([strace, "-D", "-f", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip():.200}"


def watched(directory: Path) -> Sequence[str]:
    """What a server whose data is in ``directory`` is started through, so that its power can be cut."""
    directory.mkdir(parents=True, exist_ok=True)
    return (
        "strace", "-D", "-f", "-qq", "-s", "0", "-e", "trace=write,fdatasync,fsync,ftruncate",
        "-P", str(directory / FILE), "-o", str(directory / CALLS),
    )  # fmt: skip


def cut(server: RedisServer) -> int:
    """The server is dead, and its file as the disk has it; how many bytes that were written are gone."""
    assert server.process is not None
    pid, calls = server.process.pid, server.directory / CALLS
    server.kill()
    ended = re.compile(rf"^{pid} +\+\+\+ killed", re.MULTILINE)
    wait_until(lambda: ended.search(calls.read_text()) is not None, "the end of the trace", STOP_S)
    file = server.directory / FILE
    written, synced = file.stat().st_size, on_disk(calls.read_text().splitlines())
    assert synced <= written
    with file.open("r+b") as opened:
        opened.truncate(synced)
    return written - synced


def on_disk(calls: Sequence[str]) -> int:
    """How many bytes of the one file that ``calls`` are about are on the disk for certain."""
    size = synced = 0
    begun: dict[str, int] = {}  # by thread: size when its fdatasync began
    for line in calls:
        first = _BEGAN.match(line) or _RESUMED.match(line)
        if first is None:
            continue
        thread, call = first.groups()
        if call in ("fdatasync", "fsync") and "resumed>" not in line:
            begun[thread] = size
        result = _RESULT.search(line)
        if result is None:
            continue  # not completed yet
        done = int(result[1])
        if call == "write" and done > 0:
            size += done
        elif call in ("fdatasync", "fsync") and done == 0:
            synced = max(synced, begun.pop(thread, 0))
        elif call == "ftruncate":
            raise AssertionError("the file was cut by the server itself: what is on the disk is not known")
    return synced
