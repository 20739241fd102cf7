"""The audit finds nothing in a clean run, and names each kind of damage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import delete, insert, select, update

from service import keys
from service.catalogue import Cap
from service.domain import Code
from service.errors import StoreIsOlder
from service.store import control, generations, schema
from service.store.database import Database
from service.store.stock import Row
from service.worker import balance
from service.worker.audit import Report
from service.worker.balance import Finding
from service.worker.stocking import import_codes
from tests.integration.stage import Stage, staged


@pytest.fixture(autouse=True)
def _few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is off stays off: looking for four seconds would only prove that again.
    monkeypatch.setattr(balance, "LOOKS_MAX", 3)


@asynccontextmanager
async def _stocked(store_url: str, redis_url: str) -> AsyncIterator[Stage]:
    database = Database.connect(store_url)
    try:
        async with staged(database, redis_url) as stage:
            await stage.campaign(caps=(Cap("campaign", "day", 50),))
            rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 101)]
            await import_codes(database, stage.scripts, "CAMP-001", rows, import_id="first")
            assert (await stage.refill.run_once()).codes == 40
            await stage.issue(*(f"a{n}" for n in range(5)))
            await stage.flush.run_once()
            await stage.issue("b1", "b2")
            await stage.issue("b3")
            yield stage
    finally:
        await database.close()


@pytest.fixture
async def stage(migrated_sqlite_url: str, valkey_url: str) -> AsyncIterator[Stage]:
    """A pool of 100 codes, 40 of them leased, of which 5 are in the ledger and 3 in the outbox."""
    async with _stocked(migrated_sqlite_url, valkey_url) as stage:
        yield stage


@pytest.fixture
async def either(store_url: str, valkey_url: str) -> AsyncIterator[Stage]:
    """The same, once on each of the two stores: for what is about the store's rows."""
    async with _stocked(store_url, valkey_url) as stage:
        yield stage


def _window(stage: Stage, generation: int = 1) -> str:
    return keys.window(0, generation, "CAMP-001")


def _told(report: Report, promise: str) -> list[Finding]:
    assert report.findings, "the damage was not found"
    return [finding for finding in report.findings if finding.promise == promise]


async def test_clean_run_has_no_finding(either: Stage) -> None:
    report = await either.audit()
    assert report.findings == []
    assert [(one.imported, one.stored, one.leased) for one in report.pools] == [(100, 60, 40)]
    figures = report.partition
    assert figures is not None
    assert figures.at_rest
    assert (figures.leased, figures.restocked, figures.popped) == (40, 40, 8)
    assert (figures.windows, figures.outbox, figures.outbox_entries, figures.accounted) == (32, 3, 2, 5)
    await either.flush.run_once()
    assert (await either.audit()).findings == []


async def test_nothing_ever_started_has_no_finding(database: Database, valkey_url: str) -> None:
    async with staged(database, valkey_url) as stage:
        await stage.scripts.redis.flushall()
        async with database.write() as conn:
            await conn.execute(delete(schema.generations))
        assert await stage.audit() == Report([], [], None, [])


async def test_codes_on_the_move_are_no_finding(either: Stage) -> None:
    """A service under load balances at every moment, though its numbers never stand still."""
    going = True

    async def load() -> None:
        number = 0
        while going:
            number += 1
            await either.issue(f"m{number}")
            await either.refill.run_once()
            await either.flush.run_once()

    loading = asyncio.create_task(load())
    try:
        for _ in range(3):
            assert (await either.audit()).findings == []
    finally:
        going = False
        await loading


async def test_flush_between_commit_and_acknowledgement_is_no_finding(stage: Stage) -> None:
    entries = await stage.scripts.redis.xrange(keys.outbox(0, 1))
    flushed = stage.scripts.flushed

    async def dies(*args: object, **kwargs: object) -> int:
        raise ConnectionError

    stage.scripts.flushed = dies  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await stage.flush.settle(1, entries)
    stage.scripts.flushed = flushed  # type: ignore[method-assign]
    report = await stage.audit()
    assert report.findings == []
    assert report.partition is not None
    assert (report.partition.outbox, report.partition.accounted) == (3, 8)


async def test_code_removed_from_window_is_found_and_named(stage: Stage) -> None:
    code = Code.unpack(await stage.scripts.redis.lpop(_window(stage)))
    found = _told(await stage.audit(), "P5")
    assert any(one.figures.get("windows") == 31 for one in found)
    assert any(f"lot {code.lot} seq {code.seq}" in one.detail for one in found)


async def test_code_put_back_into_window_is_found_and_named(stage: Stage) -> None:
    """What was issued and is in the ledger must never be issued again."""
    async with stage.database.read() as conn:
        row = (await conn.execute(select(schema.issuances).limit(1))).one()
    await stage.scripts.redis.rpush(_window(stage), Code(row.expires_at, row.lot, row.seq, row.code, row.serial).pack())
    found = _told(await stage.audit(), "P1")
    assert any(f"lot {row.lot} seq {row.seq}" in one.detail and "issued" in one.detail for one in found)


async def test_code_twice_in_window_is_found_though_the_sums_agree(stage: Stage) -> None:
    await stage.scripts.redis.lpop(_window(stage))
    twice = await stage.scripts.redis.lindex(_window(stage), 0)
    await stage.scripts.redis.rpush(_window(stage), twice)
    found = _told(await stage.audit(), "P1")
    assert any(f"seq {Code.unpack(twice).seq}" in one.detail and "more than once" in one.detail for one in found)


async def test_code_in_outbox_and_window_is_found(stage: Stage) -> None:
    record = (await stage.scripts.redis.xrange(keys.outbox(0, 1)))[0][1]["issued"].split("\x1e")[0]
    await stage.scripts.redis.lpush(_window(stage), record.split("\n")[-1])
    assert any("more than once" in one.detail for one in _told(await stage.audit(), "P1"))


async def test_foreign_code_in_window_is_found(stage: Stage) -> None:
    await stage.scripts.redis.lpush(_window(stage), Code(10**10, 1, 99, "CODE-0100", "S").pack())
    assert any("never leased" in one.detail for one in _told(await stage.audit(), "P1"))


async def test_deleted_issuance_is_found_and_named(either: Stage) -> None:
    table = schema.issuances
    async with either.database.write() as conn:
        row = (await conn.execute(select(table).limit(1))).one()
        await conn.execute(delete(table).where(table.c.lot == row.lot, table.c.seq == row.seq))
    report = await either.audit()
    assert any(one.figures.get("missing") == 1 for one in _told(report, "P5"))
    assert any(f"lot {row.lot} seq {row.seq}" in one.detail for one in _told(report, "P5"))
    assert any(one.subject == f"entry 1/{row.outbox_seq}.{row.ordinal}" for one in _told(report, "P2"))


async def test_deleted_request_is_found(either: Stage) -> None:
    table = schema.requests
    async with either.database.write() as conn:
        await conn.execute(delete(table).where(table.c.ordinal == 0))
    assert any("without their request" in one.detail for one in _told(await either.audit(), "P2"))


@pytest.mark.parametrize("counter", ["restocked", "popped", "set_aside", "taken_back"])
async def test_changed_counter_is_found(stage: Stage, counter: str) -> None:
    await stage.scripts.redis.hincrby(keys.totals(0, 1), counter, 2)
    assert any("length of the windows" in one.detail for one in _told(await stage.audit(), "P5"))


@pytest.mark.parametrize("by", [1, -1])
async def test_changed_count_of_the_outbox_is_found(stage: Stage, by: int) -> None:
    await stage.scripts.redis.hincrby(keys.totals(0, 1), "codes", by)
    found = _told(await stage.audit(), "P5")
    assert any(one.figures.get("counted") == 3 + by and one.figures.get("in_entries") == 3 for one in found)


async def test_entry_deleted_from_the_outbox_is_found_and_named(stage: Stage) -> None:
    """As XTRIM or MAXLEN would do it."""
    entry_id, fields = (await stage.scripts.redis.xrange(keys.outbox(0, 1)))[-1]
    await stage.scripts.redis.xdel(keys.outbox(0, 1), entry_id)
    await stage.scripts.redis.hincrby(keys.totals(0, 1), "codes", -1)
    code = Code.unpack(fields["issued"].split("\n")[-1])
    found = _told(await stage.audit(), "P5")
    assert any(one.figures.get("missing") == 1 for one in found)
    assert any(f"lot {code.lot} seq {code.seq}" in one.detail for one in found)


async def test_stock_that_vanished_is_found(either: Stage) -> None:
    async with either.database.write() as conn:
        await conn.execute(delete(schema.codes).where(schema.codes.c.seq == 99))
    [found] = _told(await either.audit(), "P5")
    assert (found.subject, found.figures) == ("pool CAMP-001", {"imported": 100, "stored": 59, "leased": 40})


async def test_lease_that_redis_never_saw_is_found(either: Stage) -> None:
    """Two leases ahead is no refill on its way: codes were leased and are nowhere."""
    async with either.database.write() as conn:
        end = (await conn.execute(select(schema.leases))).one()._mapping
        for number in (1, 2):
            row = {**end, "id": f"x{number}", "predecessor": end["id"] if number == 1 else "x1"}
            await conn.execute(
                insert(schema.leases), {**row, "seq_from": 35 + 5 * number, "seq_to": 40 + 5 * number, "codes": 5}
            )
        await conn.execute(update(schema.lots).values(leased_to=50))
    found = _told(await either.audit(), "P5")
    assert any("last lease" in one.detail for one in found)
    assert any("lot 1 seq 40" in one.detail for one in found)


async def test_lease_on_its_way_is_no_finding(stage: Stage) -> None:
    async with stage.database.write() as conn:
        end = (await conn.execute(select(schema.leases))).one()._mapping
        await conn.execute(
            insert(schema.leases),
            {**end, "id": "x1", "predecessor": end["id"], "seq_from": 40, "seq_to": 45, "codes": 5},
        )
        await conn.execute(update(schema.lots).values(leased_to=45))
    assert (await stage.audit()).findings == []


async def test_code_issued_by_two_requests_is_found_as_double_issue(either: Stage) -> None:
    """A second record of the same code, as a wrong restore would bring it about, meets the wall at its flush."""
    await either.flush.run_once()
    async with either.database.read() as conn:
        row = (await conn.execute(select(schema.issuances).limit(1))).one()
    code = Code(row.expires_at, row.lot, row.seq, row.code, row.serial).pack()
    await either.scripts.redis.lpush(_window(either), code)
    [answer] = await either.issue("again")
    assert answer.status == "ISSUED"
    await either.flush.run_once()
    assert any(one.subject == f"lot {row.lot} seq {row.seq}" for one in _told(await either.audit(), "P1"))


async def test_key_with_two_requests_is_found(either: Stage) -> None:
    await either.scripts.redis.delete(keys.replay(0, 1, "v1", "DIST-001", "a1"))
    await either.issue("a1")
    await either.flush.run_once()
    [found] = _told(await either.audit(), "P3")
    assert "a1" in found.detail
    assert found.figures == {"requests": 2}


async def test_exceeded_cap_is_found(either: Stage) -> None:
    async with either.database.write() as conn:
        await conn.execute(update(schema.caps).values(limit=4))
    [found] = _told(await either.audit(), "P8")
    assert found.subject == "campaign CAMP-001"
    assert found.figures == {"limit": 4, "issued": 5}


async def test_parked_entry_is_found(either: Stage) -> None:
    await either.scripts.redis.xadd(keys.outbox(0, 1), {"codes": "2", "what": "is this"})
    await either.flush.run_once()
    [found] = _told(await either.audit(), "P2")
    assert found.subject.startswith("parked ")


async def test_older_store_is_found(stage: Stage) -> None:
    async with stage.database.write() as conn:
        await conn.execute(update(schema.catalogue_head).values(version=schema.catalogue_head.c.version - 1))
    assert any("older than Redis" in one.detail for one in _told(await stage.audit(), "P1"))


async def test_store_that_lost_ledger_rows_is_found_however_much_is_flushed_afterwards(either: Stage) -> None:
    await either.flush.run_once()
    async with either.database.write() as conn:
        for table in (schema.issuances, schema.requests):
            await conn.execute(delete(table))
    for i in range(40):
        await either.issue(f"later-{i}")
        await either.flush.run_once()
        with contextlib.suppress(StoreIsOlder):  # it leases only until its window is low
            await either.refill.run_once()
    books = await either.scripts.books([], generation=1)
    assert books is not None
    assert books.lost == 1
    assert books.flushed == tuple(range(books.seq - 15, books.seq + 1))
    assert any("its ledger lacks outbox entry 1" in one.detail for one in _told(await either.audit(), "P1"))


async def test_change_not_in_force_is_found(stage: Stage) -> None:
    async with stage.database.write() as conn:
        await control.raise_version(conn)
    assert [one.promise for one in (await stage.audit()).findings] == ["P6"]


async def test_lost_redis_is_quarantine_and_no_finding(either: Stage) -> None:
    """Everything in Redis is gone: what was unflushed or in the window is nobody's, counted, and the books balance."""
    await either.scripts.redis.flushall()
    assert await either.open() == 2
    await either.refill.run_once()
    report = await either.audit()
    assert report.findings == []
    assert [(one.pool, one.generation, one.codes) for one in report.quarantine] == [("CAMP-001", 1, 35)]


async def test_closed_partition_is_found(stage: Stage) -> None:
    await stage.scripts.redis.flushall()
    assert any("no generation is open" in one.detail for one in _told(await stage.audit(), "P5"))


async def test_audit_says_nothing_of_codes(stage: Stage) -> None:
    await stage.scripts.redis.lpop(_window(stage))
    await stage.scripts.redis.hincrby(keys.totals(0, 1), "codes", 1)
    assert "CODE-" not in repr(await stage.audit())


async def test_closing_a_generation_by_hand_is_found(stage: Stage) -> None:
    """Nothing is lost by it, but what Redis issues from must not be in quarantine at the same time."""
    async with stage.database.write() as conn:
        await generations.close(conn, 0, 1, int(time.time()))
    assert any("closed in the store" in one.detail for one in _told(await stage.audit(), "P5"))
