"""What recovery leaves alone, and what it counts.  That it recovers at all is shown by the simulation and by the
acceptance tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from service import keys
from service.catalogue import Cap
from service.errors import StoreUnreachable
from service.store import generations, inspection
from service.store.database import Database
from service.store.stock import Row
from service.worker.stocking import import_codes
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


async def test_keys_are_not_read_again_for_a_generation_that_has_none_left(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With millions of replay records, reading all keys every few seconds would be most of what Redis does."""
    await stage.scripts.stock("P", 3, generation=1)
    await _roll(stage)
    redis = stage.scripts.redis
    scan, scans = redis.scan, list[Any]()

    async def counted(*given: Any, **named: Any) -> Any:
        scans.append(named)
        return await scan(*given, **named)

    monkeypatch.setattr(redis, "scan", counted)
    assert await stage.recover.clean_once() > 0
    assert await stage.recover.clean_once() == 0, "only now it is known that nothing is left"
    scans.clear()
    for _ in range(3):
        assert await stage.recover.clean_once() == 0
    assert not scans
    await stage.scripts.redis.set(keys.replay(0, 1, "v1", "DIST-001", "came back"), "with an older copy")
    await _roll(stage)
    await stage.recover.clean_once()
    assert await _keys_of(stage, 1) == [], "another generation is open: all closed ones are looked at again"


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


async def test_what_a_generation_issued_that_the_store_never_knew_to_be_open_counts_under_caps(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker died between opening it in Redis and committing that; then Redis lost all of it (P8)."""
    await stage.campaign(caps=(Cap("campaign", "total", 3),))
    rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 91)]
    await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="first")

    async def dies(*_: object) -> None:
        raise StoreUnreachable

    monkeypatch.setattr(generations, "open_", dies)
    await stage.scripts.redis.hdel(keys.generation(0), "replid", "run_id")
    with pytest.raises(StoreUnreachable):
        await stage.recover.run_once()
    seen = await stage.scripts.generation()
    assert await stage.scripts.open(seen, 2, version=seen.fence, restoring=False) == "OK"  # there were no records
    await stage.refill.run_once()
    assert [answer.status for answer in await stage.issue("a", "b", "c", "d")] == ["ISSUED"] * 3 + ["NONE"]
    monkeypatch.undo()
    await stage.scripts.redis.flushall()
    assert await stage.open() == 3
    await stage.refill.run_once()
    assert [(answer.status, answer.detail) for answer in await stage.issue("e")] == [("NONE", "capped")]


async def test_what_a_roll_left_in_quarantine_is_on_record_once_and_no_finding(stage: Stage) -> None:
    await stage.campaign()
    rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 91)]
    await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="first")
    await stage.refill.run_once()
    await _roll(stage)
    await _roll(stage)
    async with stage.database.read() as conn:
        found = await inspection.newest_incidents(conn, 10)
        assert await inspection.count_incidents(conn) == (0, 0)
    assert [(one.kind, one.generation, one.subject, one.codes) for one in found] == [("quarantine", 1, "CAMP-001", 0)]
    assert found[0].detail.startswith("40 codes are in quarantine: ")
    assert (await stage.audit()).findings == []


async def test_a_roll_ends_with_memory_at_its_limit_and_records_wait_for_what_it_left_to_go(stage: Stage) -> None:
    """Redis was full, and somebody restarted it: nothing may have to wait until keys expire."""
    await stage.campaign(caps=(Cap("distributor", "total", 30),))
    rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 91)]
    await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="first")
    await stage.refill.run_once()
    given = await stage.issue("a", "b")
    await stage.flush.run_once()
    redis = stage.scripts.redis
    await redis.config_set("maxmemory", "1")
    try:
        await _roll(stage)
        assert (await stage.recover.run_once()).restored == 0
        seen = await stage.scripts.generation()
        assert (seen.open, seen.restoring) == (2, True), "misses are looked up in the ledger meanwhile"
        assert await stage.recover.clean_once() > 0
    finally:
        await redis.config_set("maxmemory", "0")
    assert (await stage.recover.run_once()).restored == 2
    assert await stage.open() == 2
    assert [one.detail for one in await stage.issue("a", "b")] == [one.detail for one in given]
    await stage.refill.run_once()
    answers = await stage.issue(*(f"more-{number}" for number in range(30)))
    assert [one.status for one in answers].count("ISSUED") == 28, "what was issued before counts under the cap"
