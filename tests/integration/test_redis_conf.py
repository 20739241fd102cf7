"""The configuration of Redis that is shipped: both servers take it as written, and the checks find nothing in it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from loadtest.servers import RedisServer, until
from service.settings import Settings
from tests.integration.conftest import sqlite_url
from tests.integration.test_vetting import seen
from tests.programs import server_binary

FILE = Path(__file__).parents[2] / "deploy" / "redis" / "redis.conf"
SIZES = {"mb": 2**20, "gb": 2**30}
GIVEN = ("port", "dir")  # what the test sets itself


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that was started on the file."""
    server = RedisServer(server_binary(request.param, untried="the file was loaded by Valkey alone"), tmp_path)
    arguments = ["--port", str(server.port), "--dir", str(tmp_path), "--logfile", str(tmp_path / "log")]
    server.process = subprocess.Popen([str(server.binary), str(FILE), *arguments], stdin=subprocess.DEVNULL)
    until(server._answers, f"an answer of {request.param}")
    yield server
    server.stop()


def _written() -> dict[str, str]:
    lines = [line.split(maxsplit=1) for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
    return {name: _in_bytes(value.strip('"')) for name, value in lines}


def _in_bytes(value: str) -> str:
    return str(int(value[:-2]) * SIZES[value[-2:]]) if value[-2:] in SIZES else value


def test_no_line_is_ignored_or_misread(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        for name, value in _written().items():
            if name not in GIVEN:
                assert client.config_get(name) == {name: value}


def test_no_check_objects_to_it(server: RedisServer, tmp_path: Path, sqlite_template: Path) -> None:
    shutil.copy(sqlite_template, tmp_path / "store.db")
    settings = Settings(redis_url=server.url, store_url=sqlite_url(tmp_path / "store.db"))
    assert set(seen(settings)) <= {"version"}  # a distribution's Redis may carry its corrections under an old number


def test_no_check_objects_to_the_users_that_are_shipped(
    server: RedisServer, tmp_path: Path, sqlite_template: Path
) -> None:
    """Among the checks: whether voucherd's own may run every command of every script, and read what is checked."""
    with redis.Redis.from_url(server.url) as client:
        for line in (FILE.parent / "users.acl").read_text().splitlines():
            _, name, *rules = line.split()
            if name != "default":  # who is asking here
                client.execute_command("ACL", "SETUSER", name, *rules, ">secret")
    shutil.copy(sqlite_template, tmp_path / "store.db")
    url = server.url.replace("redis://", "redis://voucherd:secret@")
    assert set(seen(Settings(redis_url=url, store_url=sqlite_url(tmp_path / "store.db")))) <= {"version"}
