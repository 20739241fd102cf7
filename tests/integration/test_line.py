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
from tests.relay import Relay

TIMEOUT_MS = 300
ECHO = "return ARGV[1]"
LARGE = 3_000_000  # bytes: the kernel hands it over in many pieces


@pytest.fixture
async def relay(valkey_url: str) -> AsyncIterator[Relay]:
    relay = Relay(urlsplit(valkey_url).port or 0)
    async with relay.running():
        yield relay


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Any]:
    client = connect(relay.url, timeout_ms=TIMEOUT_MS)
    yield client
    relay.release()
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
    relay.hold()
    began = time.monotonic()
    with pytest.raises(RedisTimeoutError):
        await client.evalsha(sha, 0, "late")
    assert time.monotonic() - began < 3 * TIMEOUT_MS / 1000
    relay.release()
    assert [await client.evalsha(sha, 0, word) for word in ("one", "two")] == ["one", "two"]


async def test_the_reply_to_a_call_that_was_given_up_is_not_the_next_calls(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.hold()
    given_up = asyncio.ensure_future(client.evalsha(sha, 0, "given up"))
    await asyncio.sleep(0)  # it has been sent
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    relay.release()
    assert [await client.evalsha(sha, 0, word) for word in ("one", "two")] == ["one", "two"]


async def test_a_reply_that_nobody_asked_for_is_nobodys(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.say(b"$6\r\nothers\r\n")
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
    relay.hold()
    for _ in range(CONNECTIONS_MAX + 1):
        with pytest.raises(RedisTimeoutError):
            await client.evalsha(sha, 0, "late")
    relay.release()
    words = [f"word-{number}" for number in range(2 * CONNECTIONS_MAX)]
    assert await asyncio.gather(*(client.evalsha(sha, 0, word) for word in words)) == words


async def test_a_call_on_its_way_when_the_connection_ends_says_so(relay: Relay, client: Any) -> None:
    sha = await client.script_load(ECHO)
    assert await client.evalsha(sha, 0, "early") == "early"
    relay.hold()
    under_way = asyncio.ensure_future(client.evalsha(sha, 0, "unknown"))
    await asyncio.sleep(0.01)
    relay.cut()
    with pytest.raises(RedisConnectionError):
        await under_way
    relay.release()
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
