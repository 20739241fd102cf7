"""Bad arguments on Valkey, and on Redis 7 where one is installed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from loadtest.servers import RedisServer
from service.line import connect
from tests.scripting import Bench, own_server
from tests.scripting_arguments import BadArguments, Ground, prepare


class TestBadArgumentsOnRealServers(BadArguments):
    @pytest.fixture(scope="class", params=["valkey", "redis-server"])
    @classmethod
    def server(cls, request: pytest.FixtureRequest, servers_dir: Path) -> Iterator[RedisServer]:
        server = own_server(request.param, servers_dir)
        yield server
        server.stop()

    @pytest.fixture
    async def ground(self, server: RedisServer) -> AsyncIterator[Ground]:
        redis = connect(server.url, timeout_ms=5_000)
        await redis.flushall()
        await redis.config_set("appendonly", "no")  # what is on the disk is not asked here
        bench = Bench(redis)
        ground = await Ground(
            bench, await prepare(bench), url=server.url, share=1 if "valkey" in server.binary.name else 4
        ).begin()
        yield ground
        await ground.end()
