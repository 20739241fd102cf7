"""Bad arguments on fakeredis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.scripting import Bench, MemoryServer
from tests.scripting_arguments import BadArguments, Ground, prepare


class TestBadArgumentsInMemory(BadArguments):
    @pytest.fixture
    async def ground(self) -> AsyncIterator[Ground]:
        memory = MemoryServer(now=1_750_000_000)
        bench = Bench(memory.client(), memory=memory)
        ground = await Ground(bench, await prepare(bench)).begin()
        yield ground
        await ground.end()
