"""What recovery leaves alone.  That it recovers at all is shown by the simulation and by the acceptance tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from service import keys
from service.store.database import Database
from tests.integration.stage import Stage, staged


@pytest.fixture
async def stage(migrated_sqlite_url: str, valkey_url: str) -> AsyncIterator[Stage]:
    database = Database.connect(migrated_sqlite_url)
    async with staged(database, valkey_url) as one:
        yield one
    await database.close()


async def _keys_of(stage: Stage, generation: int) -> list[str]:
    found: list[str] = sorted(await stage.scripts.redis.keys(keys.of_generation(0, generation)))
    return found


async def _roll(stage: Stage) -> None:
    await stage.scripts.redis.hdel(keys.generation(0), "replid", "run_id")
    assert (await stage.recover.run_once()).rolled


async def test_a_closed_generation_is_forgotten_once_it_is_flushed(stage: Stage) -> None:
    await stage.scripts.stock("P", 3, generation=1)
    left = await _keys_of(stage, 1)
    assert left
    await _roll(stage)
    assert await stage.recover.clean_once() == len(left)
    assert await _keys_of(stage, 1) == []
    assert (await stage.scripts.generation()).open == 2


async def test_a_generation_that_is_open_where_the_address_leads_by_now_is_not_forgotten(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old primary comes back between the look at the server and the unlinking: its live window stays."""
    await stage.scripts.stock("P", 3, generation=1)
    before = await _keys_of(stage, 1)
    await _roll(stage)
    redis = stage.scripts.redis
    scan = redis.scan

    async def then_flip(*given: Any, **named: Any) -> Any:
        found = await scan(*given, **named)
        await redis.hset(keys.generation(0), "open", 1)
        return found

    monkeypatch.setattr(redis, "scan", then_flip)
    assert await stage.recover.clean_once() == 0
    assert await _keys_of(stage, 1) == before
