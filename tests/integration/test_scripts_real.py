"""The script suite on Valkey, and on Redis 7 where one is installed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from redis.asyncio import Redis

from loadtest.servers import RedisServer
from service.domain import RateLimit
from service.errors import RedisUnreachable, ScriptFailed
from service.issuance import BATCH_VOUCHERS_MAX
from service.line import connect
from service.scripts import Routed, Scripts
from tests.scripting import NO_REPLID, Bench, Produced, candidate, cap, own_server, plan, request
from tests.scripting_cases import ScriptCases

TIMEOUT_MS = 5_000


class TestScriptsOnRealServers(ScriptCases):
    exempt: ClassVar[set[tuple[str, str]]] = set()

    @pytest.fixture(scope="class", params=["valkey", "redis-server"])
    @classmethod
    def server(cls, request: pytest.FixtureRequest, servers_dir: Path) -> Iterator[RedisServer]:
        """A server of this class's own: its identity changes and its memory limit is reached."""
        server = own_server(request.param, servers_dir)
        yield server
        server.stop()

    @pytest.fixture
    async def bench(self, server: RedisServer, produced: Produced) -> AsyncIterator[Bench]:
        redis = connect(server.url, timeout_ms=TIMEOUT_MS)
        await redis.flushall()
        bench = Bench(redis, produced=produced)
        await bench.open()
        yield bench
        await bench.check()
        await redis.aclose()

    async def test_a_missing_right_is_named(self, bench: Bench, server: RedisServer) -> None:
        await bench.redis.acl_setuser(
            "clerk", enabled=True, nopass=True, commands=["+@all", "-lrem", "-info"], keys=["*"]
        )
        clerk = Redis.from_url(server.url.replace("//", "//clerk:any@"), decode_responses=True)
        bench.scripts.redis = clerk
        try:
            assert await bench.scripts.rights(["get", "lrem", "lpop", "info"]) == ["lrem", "info"]
            with pytest.raises(ScriptFailed):
                await bench.issue(Routed(request(), plan()))
        finally:
            bench.scripts.redis = bench.redis
            await clerk.aclose()
            await bench.redis.acl_deluser("clerk")

    async def test_the_largest_batch_never_passes_what_lua_can_hand_over(self, bench: Bench) -> None:
        """Nothing in it is shared but the campaign, so each command of the script has as many arguments as can be."""
        for _ in range(2):
            await bench.restock(count=BATCH_VOUCHERS_MAX)
        caps = [cap(10**6, holder=holder, period="day") for holder in ("campaign", "distributor", "terminal")]
        wanted = plan(candidate(*caps))
        for half in "ab":  # the second finds counters that are there
            batch = [
                Routed(
                    request(f"{half}-{n}", terminal=f"T-{n}", distributor=f"D-{n}"), wanted, limit=RateLimit(100, 100)
                )
                for n in range(BATCH_VOUCHERS_MAX)
            ]
            assert await bench.words(*batch, outbox_max=10**6) == BATCH_VOUCHERS_MAX * ["ISSUED"]

    async def test_a_script_that_writes_is_refused_by_a_server_that_follows_another(self, bench: Bench) -> None:
        await bench.restock()
        before = await bench.contents()
        await bench.redis.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(RedisUnreachable):
                await bench.issue(Routed(request(), plan()))
        finally:
            await bench.redis.replicaof("NO", "ONE")
        assert await bench.contents() == before
        assert (await bench.issue(Routed(request(), plan()))).status == "LOST"
        assert await bench.open() == "OK"


async def test_a_server_that_never_followed_another_is_told_from_one_that_did(servers_dir: Path) -> None:
    server = own_server("valkey", servers_dir)
    redis = connect(server.url, timeout_ms=TIMEOUT_MS)
    bench = Bench(redis)
    await bench.open()
    seen = await Scripts(redis).generation()
    assert seen.agrees
    assert (seen.server_role, seen.server_replid2, seen.run_id) == ("master", NO_REPLID, seen.server_run_id)
    await bench.change_identity()
    seen = await Scripts(redis).generation()
    assert not seen.agrees
    assert (seen.server_role, seen.server_replid2, seen.run_id) == ("master", seen.replid, seen.server_run_id)
    await redis.aclose()
    server.stop()


async def test_a_server_that_is_away_is_unreachable(servers_dir: Path) -> None:
    server = own_server("valkey", servers_dir)
    redis = connect(server.url, timeout_ms=300)
    bench = Bench(redis)
    await bench.open()
    await bench.restock()
    assert await bench.words(Routed(request(), plan())) == ["ISSUED"]
    server.kill()
    with pytest.raises(RedisUnreachable):
        await bench.scripts.replay([], generation=1, version=1)
    with pytest.raises(RedisUnreachable):
        await bench.scripts.generation()
    server.start()
    assert (await bench.scripts.replay([], generation=1, version=1)).status == "LOST"
    assert await bench.open() == "OK"
    assert await bench.words(Routed(request(), plan())) == ["REPLAY"], "what was answered was on the disk"
    await redis.aclose()
    server.stop()
