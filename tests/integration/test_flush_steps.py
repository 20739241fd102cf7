"""How much of the outbox one step of the flush takes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.store.database import Database
from service.store.stock import Row
from service.worker import flush
from service.worker.stocking import import_codes
from tests.integration.stage import Stage, staged


@pytest.fixture
async def stage(migrated_sqlite_url: str, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """Eight entries of a code each are in the outbox, and a read takes three."""
    monkeypatch.setattr(flush, "ENTRIES_MAX", 3)
    database = Database.connect(migrated_sqlite_url)
    try:
        async with staged(database, valkey_url) as stage:
            await stage.campaign()
            rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 101)]
            await import_codes(database, stage.scripts, "CAMP-001", rows, import_id="first")
            await stage.refill.run_once()
            for number in range(8):
                await stage.issue(f"k{number}")
            yield stage
            await stage.balanced()
    finally:
        await database.close()


async def test_small_entries_never_take_a_transaction_each(stage: Stage) -> None:
    assert (await stage.flush.run_once()).entries == 8
    assert not stage.flush.behind
    assert (await stage.flush.run_once()).entries == 0


async def test_a_step_never_takes_much_more_than_a_transaction_may(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "CODES_MAX", 4)
    assert (await stage.flush.run_once()).entries == 6
    assert stage.flush.behind
    assert (await stage.flush.run_once()).entries == 2
    assert not stage.flush.behind


async def test_what_was_read_before_a_read_failed_is_never_left_to_others(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = stage.scripts.redis
    read, reads = redis.xreadgroup, 0

    async def failing(group: str, consumer: str, streams: dict[str, str], **options: object) -> object:
        nonlocal reads
        reads += ">" in streams.values()
        if reads == 2:
            reads += 1
            raise flush.RedisError("the connection is gone")
        return await read(group, consumer, streams, **options)

    monkeypatch.setattr(redis, "xreadgroup", failing)
    with pytest.raises(flush.RedisUnreachable):
        await stage.flush.run_once()
    assert (await stage.flush.run_once()).entries == 3, "its own come first"
    assert stage.flush.behind
    assert (await stage.flush.run_once()).entries == 5
