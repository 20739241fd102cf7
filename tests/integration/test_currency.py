"""A store that came back older: what it would hide is seen before it is hidden, and nothing is built on it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import delete, update

from loadtest.servers import free_port
from service import keys
from service.errors import StoreIsOlder
from service.line import connect
from service.scripts import Scripts
from service.store import campaigns, schema, stock
from service.store.database import Database
from service.store.stock import Row
from service.worker import patience, publish
from service.worker.publish import change, republish_once
from service.worker.stocking import import_codes
from tests.integration.stage import Stage, staged


@pytest.fixture
async def stage(store_url: str, valkey_url: str) -> AsyncIterator[Stage]:
    """A campaign with 100 codes, 40 of them in the window."""
    database = Database.connect(store_url)
    try:
        async with staged(database, valkey_url) as stage:
            await stage.campaign()
            await import_codes(
                database,
                stage.scripts,
                "CAMP-001",
                [Row(n, f"CODE-{n}", None, None) for n in range(1, 101)],
                import_id="x",
            )
            await stage.refill.run_once()
            yield stage
    finally:
        await database.close()


async def _pause(stage: Stage, scripts: Scripts, paused: bool) -> publish.Published[bool]:
    return await change(
        stage.database, scripts, lambda conn: campaigns.set_paused(conn, "CAMP-001", paused, int(time.time())),
        actor="test", action="pause", subject="CAMP-001",
    )  # fmt: skip


async def test_change_made_blindly_on_an_older_store_is_never_put_in_force(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is the one of a catalogue that is in force, and the next one's is higher than that."""
    monkeypatch.setattr(patience, "UNREACHED_S", 0.2)
    before = (await stage.scripts.generation()).fence
    await _pause(stage, stage.scripts, True)
    async with stage.database.write() as conn:  # the store as it was before the pause
        await conn.execute(delete(schema.catalogue_versions).where(schema.catalogue_versions.c.version > before))
        await conn.execute(update(schema.catalogue_head).values(version=before))
        await campaigns.set_paused(conn, "CAMP-001", False, int(time.time()))
    away = connect(f"redis://127.0.0.1:{free_port()}/0", timeout_ms=200)
    try:
        for _ in range(2):
            assert (await _pause(stage, Scripts(away), False)).unreached
    finally:
        await away.aclose()
    await republish_once(stage.database, stage.scripts)
    assert (await stage.scripts.generation()).fence == before + 1
    assert await stage.scripts.redis.get(keys.catalogue(before + 2)) is None
    with pytest.raises(StoreIsOlder, match="another catalogue"):
        await _pause(stage, stage.scripts, False)


async def test_codes_that_a_lease_lost_before_they_were_read_are_not_restocked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object) -> list[object]:
        return []

    await stage.issue(*(f"r{n}" for n in range(30)))
    monkeypatch.setattr(stock, "lease_codes", lost)
    with pytest.raises(StoreIsOlder, match="lacks codes that it leased"):
        await stage.refill.run_once()
    books = await stage.scripts.books(["CAMP-001"], generation=1)
    assert books is not None
    assert books.windows["CAMP-001"].length == 10
    monkeypatch.undo()
    assert (await stage.refill.run_once()).codes == 30
    assert (await stage.audit()).findings == []


async def test_flush_notes_a_gap_before_it_hides_it(stage: Stage) -> None:
    await stage.issue("a")
    await stage.flush.run_once()
    async with stage.database.write() as conn:
        for table in (schema.issuances, schema.requests):
            await conn.execute(delete(table))
    await stage.issue("b")
    assert (await stage.flush.run_once()).codes == 1
    books = await stage.scripts.books([], generation=1)
    assert books is not None
    assert books.lost == 1
    with pytest.raises(StoreIsOlder, match="lacks outbox entry 1"):
        await import_codes(
            stage.database, stage.scripts, "CAMP-001", [Row(1, "CODE-X", None, int(time.time()) + 900)], import_id="y"
        )
