"""The connection past redis-py: a reply is of the call that waits for it, or the connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.line import CONNECTIONS_MAX, connect

TIMEOUT_MS = 300
ECHO = "return ARGV[1]"
LARGE = 3_000_000  # bytes: the kernel hands it over in many pieces


class Relay:
    """Between a client and Valkey.  While ``open`` is not set, what Valkey says is held back."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port
        self.open = asyncio.Event()
        self.open.set()
        self.clients: list[asyncio.StreamWriter] = []
        self._relaying: set[asyncio.Task[None]] = set()
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        yield
        server.close()
        self.open.set()
        self.cut()
        await asyncio.gather(*self._relaying)

    def cut(self) -> None:
        for client in self.clients:
            client.transport.abort()
        self.clients.clear()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._relaying.add(asyncio.current_task())  # type: ignore[arg-type]  # this is one
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self.clients.append(writer)

        async def pass_on(from_: asyncio.StreamReader, to: asyncio.StreamWriter, gate: asyncio.Event) -> None:
            with contextlib.suppress(OSError):
                while said := await from_.read(65_536):
                    await gate.wait()
                    to.write(said)

        always = asyncio.Event()
        always.set()
        ways = [
            asyncio.ensure_future(pass_on(reader, back, always)),
            asyncio.ensure_future(pass_on(there, writer, self.open)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
        for end in (back, writer):
            end.close()


@pytest.fixture
async def relay(valkey_url: str) -> AsyncIterator[Relay]:
    relay = Relay(valkey_url)
    async with relay.running():
        yield relay


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Any]:
    client = connect(relay.url, timeout_ms=TIMEOUT_MS)
    yield client
    relay.open.set()
    await client.aclose()


async def test_calls_at_the_same_time_get_their_own_replies(client: Any) -> None:
    sha = await client.script_load(ECHO)
    words = [f"word-{number}" for number in range(50)]
    assert await asyncio.gather(*(client.evalsha(sha, 0, word) for word in words)) == words


async def test_a_reply_in_many_pieces_is_one(client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "x" * LARGE) == "x" * LARGE
    assert await client.evalsha(sha, 0, "next") == "next"


async def test_bytes_that_are_no_text_come_back_as_they_went(client: Any) -> None:
    sha = await client.script_load("return '\\255'")
    assert await client.evalsha(sha, 0) == "\udcff"


async def test_an_error_is_raised_as_redis_py_raises_it_and_costs_no_connection(client: Any) -> None:
    sha = await client.script_load("return redis.error_reply('BADCALL of a test')")
    with pytest.raises(NoScriptError):
        await client.evalsha("0" * 40, 0)
    before = await client.client_id()
    for _ in range(3):
        with pytest.raises(ResponseError, match="BADCALL of a test"):
            await client.evalsha(sha, 0)
    assert await _newest(client) == before


async def test_a_late_reply_is_not_the_next_calls(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.open.clear()
    began = time.monotonic()
    with pytest.raises(RedisTimeoutError):
        await client.evalsha(sha, 0, "late")
    assert time.monotonic() - began < 3 * TIMEOUT_MS / 1000
    relay.open.set()
    assert [await client.evalsha(sha, 0, word) for word in ("one", "two")] == ["one", "two"]


async def test_the_reply_to_a_call_that_was_given_up_is_not_the_next_calls(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.open.clear()
    given_up = asyncio.ensure_future(client.evalsha(sha, 0, "given up"))
    await asyncio.sleep(0)  # it has been sent
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    relay.open.set()
    assert [await client.evalsha(sha, 0, word) for word in ("one", "two")] == ["one", "two"]


async def test_a_reply_that_nobody_asked_for_is_nobodys(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    for one in relay.clients:
        one.write(b"$6\r\nothers\r\n")
        await one.drain()
    for _ in range(20):  # until it has arrived
        await asyncio.sleep(0.01)
    with contextlib.suppress(RedisConnectionError):
        assert await client.evalsha(sha, 0, "mine") == "mine"
    assert await client.evalsha(sha, 0, "mine") == "mine"


async def test_connections_that_were_lost_are_not_missed(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    for _ in range(3 * CONNECTIONS_MAX):
        relay.cut()
        while True:  # one that was idle may be found dead only by the call
            with contextlib.suppress(RedisConnectionError):
                assert await client.evalsha(sha, 0, "x") == "x"
                break
    relay.open.clear()
    for _ in range(CONNECTIONS_MAX + 1):
        with pytest.raises(RedisTimeoutError):
            await client.evalsha(sha, 0, "late")
    relay.open.set()
    words = [f"word-{number}" for number in range(2 * CONNECTIONS_MAX)]
    assert await asyncio.gather(*(client.evalsha(sha, 0, word) for word in words)) == words


async def test_a_call_on_its_way_when_the_connection_ends_says_so(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.open.clear()
    under_way = asyncio.ensure_future(client.evalsha(sha, 0, "unknown"))
    await asyncio.sleep(0.01)
    relay.cut()
    with pytest.raises(RedisConnectionError):
        await under_way
    relay.open.set()
    assert await client.evalsha(sha, 0, "again") == "again"


async def test_closing_the_client_does_not_wait_for_the_line(valkey_url: str) -> None:
    client: Any = connect(valkey_url, timeout_ms=TIMEOUT_MS)
    sha = await client.script_load(ECHO)
    await client.evalsha(sha, 0, "x")
    began = time.monotonic()
    await client.aclose()
    assert time.monotonic() - began < TIMEOUT_MS / 1000


async def _newest(client: Any) -> int:
    return max(int(one["id"]) for one in await client.client_list())
