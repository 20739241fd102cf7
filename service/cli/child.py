"""The processes below ``voucherd up``: each in a session of its own, on a leash, its output in a log file."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from service.cli import leash
from service.errors import Misconfigured

# A log that nobody reads must not fill a disk: past this size it becomes <name>.log.1 at the next start.
LOG_BYTES_MAX: Final = 10_000_000
# How often to look at something that can't be waited for, such as a process that is not our child.
LOOK_S: Final = 0.02


class Child:
    """One command that ``up`` keeps running."""

    def __init__(self, name: str, data_dir: Path) -> None:
        self.name = name
        self.log = data_dir / "log" / f"{name}.log"
        self.lock = lock_of(name, data_dir)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """It runs ``command`` (an absolute path first), with nothing left of an earlier run."""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _appending(self.log) as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", leash.__file__, str(self.lock), str(os.getpid()), *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                start_new_session=True,  # the terminal's Ctrl-C is for `up`, which stops its children in order
            )  # fmt: skip

    async def ended(self) -> str:
        """Waits until it has ended; says how."""
        assert self._process is not None
        status = await self._process.wait()
        return f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"

    async def stop(self, patience_s: float) -> bool:
        """It has ended: asked by SIGTERM, killed after ``patience_s``.  True if it ended by itself."""
        if self._process is None or self._process.returncode is not None:
            return True
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), patience_s)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            return False
        return True

    def last_words(self) -> str:
        """The last line of its log that says something, '' if there is none."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 4_000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")


def lock_of(name: str, data_dir: Path) -> Path:
    """The file that the child of this name holds locked while it runs, with its pid inside."""
    return data_dir / f"{name}.lock"


def held(lock: Path) -> int | None:
    """The pid of the process that holds ``lock``, 0 if it has not written it yet, None if nobody holds it.

    A file left behind means nothing.
    """
    try:
        file = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return int(os.read(file, 20) or b"0")
    finally:
        os.close(file)
    return None


async def end_orphan(name: str, data_dir: Path, patience_s: float) -> None:
    """No process of this name is left from an earlier ``up`` on ``data_dir``.

    Asked by SIGTERM, killed after ``patience_s``.  Raises Misconfigured if one is there that can't be ended.
    """
    lock = lock_of(name, data_dir)
    for request in (signal.SIGTERM, signal.SIGKILL):
        pid = held(lock)
        if pid is None:
            return
        try:
            if pid:
                os.kill(pid, request)
        except PermissionError:
            raise Misconfigured(f"{name} of an earlier start (pid {pid}) is another user's: stop it first") from None
        except ProcessLookupError:
            pass  # it ended since
        if await until_free(lock, patience_s):
            return
    raise Misconfigured(f"{name} of an earlier start (pid {held(lock)}) does not end: stop it first")


async def until_free(lock: Path, wait_s: float) -> bool:
    """True as soon as nobody holds ``lock``, False if that takes longer than ``wait_s``."""
    deadline = asyncio.get_running_loop().time() + wait_s
    while held(lock) is not None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(LOOK_S)
    return True


def _appending(log: Path) -> BinaryIO:
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(log.with_suffix(".log.1"))
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
