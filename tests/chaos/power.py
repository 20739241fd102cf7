"""A power cut, as a disk sees it: what was written after the last completed fdatasync is gone.

``kill -9`` is none: the kernel keeps what a dead process has written.  So strace says how far each append-only file had
been written when an fdatasync of it began, and after the kill each is cut back to what the last one that was completed
has on the disk.  What was there when the server started is taken to be on the disk, and so is what the server syncs
before it renames it.  Nothing else of what a disk may do in a power cut is tried, least of all one that lies.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from loadtest.servers import STOP_S, RedisServer, until

FILES: Final = "appendonlydir/*.incr.aof"
CALLS: Final = "system-calls"
END_BYTES: Final = 4_096  # of the trace: enough for the ends of all threads

_BEGAN: Final = re.compile(r"(\d+) +(write|fdatasync|fsync|ftruncate)\(\d+<([^>]*)>")
_RESUMED: Final = re.compile(r"(\d+) +<\.\.\. (write|fdatasync|fsync|ftruncate) resumed>")
_RESULT: Final = re.compile(r"= (-?\d+)")


def missing() -> str:
    """Why power can't be cut on this machine; '' if it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is missing (Debian's package is strace): no power can be cut"
    options = ("-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null")
    tried = subprocess.run([strace, *options, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip():.200}"


def watched(directory: Path) -> Sequence[str]:
    """What a server whose data is in ``directory`` is started through, so that its power can be cut."""
    directory.mkdir(parents=True, exist_ok=True)
    return (
        "strace", "-D", "-f", "-qq", "-y", "-s", "0", "--seccomp-bpf", "-e", "trace=write,fdatasync,fsync,ftruncate",
        "-o", str(directory / CALLS),
    )  # fmt: skip


def cut(server: RedisServer) -> int:
    """The server is dead, and its files as the disk has them; how many bytes that were written are gone."""
    assert server.process is not None
    pid, calls = server.process.pid, server.directory / CALLS
    server.kill()
    ended = re.compile(rf"^{pid} +\+\+\+ killed".encode(), re.MULTILINE)
    until(lambda: ended.search(_end(calls)) is not None, "the end of the trace", STOP_S)
    with calls.open() as lines:
        gone = not_on_disk(lines)
    total = 0
    for file in server.directory.glob(FILES):
        total += gone[str(file)]
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - gone[str(file)])
    return total


def _end(calls: Path) -> bytes:
    with calls.open("rb") as file:
        file.seek(max(0, calls.stat().st_size - END_BYTES))
        return file.read()


def not_on_disk(calls: Iterable[str]) -> Counter[str]:
    """How many bytes at the end of each file were written by these ``calls`` and are not on the disk for certain."""
    size, synced = Counter[str](), Counter[str]()
    under_way: dict[str, tuple[str, int]] = {}  # by thread: the file of its call, and its size when that began
    for line in calls:
        if began := _BEGAN.match(line):
            thread, call, file = began.groups()
            under_way[thread] = (file, size[file])
        elif resumed := _RESUMED.match(line):
            thread, call = resumed.groups()
        else:
            continue
        result = _RESULT.search(line)
        if result is None or thread not in under_way:
            continue  # not completed yet, or of something that is no file
        (file, then), done = under_way.pop(thread), int(result[1])
        if call == "write" and done > 0:
            size[file] += done
        elif call in ("fdatasync", "fsync") and done == 0:
            synced[file] = max(synced[file], then)
        elif call == "ftruncate" and file.endswith(".aof"):
            raise AssertionError("the file was cut by the server itself: what is on the disk is not known")
    return size - synced
