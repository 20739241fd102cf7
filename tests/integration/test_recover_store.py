"""`voucherd recover-store`: a store that came back older knows again what Redis does, and nothing is given twice."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import copyfile

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from loadtest.servers import PostgresServer
from service import tokens
from service.catalogue import Cap
from service.domain import RateLimit, Request
from service.errors import StoreIsOlder
from service.scripts import Answer
from service.store import campaigns, clients, control, inspection, ledger, recreation, schema
from service.store.database import Database
from service.store.flush import RECREATED
from service.store.stock import Row
from service.worker import repair as repairing
from service.worker.publish import change
from service.worker.repair import Repair
from service.worker.stocking import import_codes
from tests.integration.stage import DISTRIBUTOR, IDS, Stage, staged
from tests.scripting import record_of

LOST = [f"lost-{n}" for n in range(30)]


class Older:
    """A stage, and its store as it once was."""

    def __init__(self, stage: Stage, keep: Callable[[], None], put_back: Callable[[], None]) -> None:
        self.stage = stage
        self._keep, self._put_back = keep, put_back

    async def keep(self) -> None:
        await self._alone(self._keep)

    async def put_back(self) -> None:
        await self._alone(self._put_back)

    async def _alone(self, step: Callable[[], None]) -> None:
        await self.stage.database.close()  # it opens new connections when it is used again
        step()

    async def repair(self) -> Repair:
        stage = self.stage
        return await repairing.repair(stage.database, stage.scripts, stage.flush, stage.recover, ids=IDS, actor="test")


@pytest.fixture
async def older(
    store_url: str, valkey_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Older]:
    """A campaign with 100 codes, and 10 vouchers in the ledger."""
    async with _opened(store_url, valkey_url, tmp_path, request) as one:
        await one.stage.campaign(caps=(Cap("campaign", "total", 1_000),))
        await _import(one.stage, "first", 100)
        await one.stage.refill.run_once()
        await one.stage.issue(*(f"kept-{n}" for n in range(10)))
        await one.stage.flush.run_once()
        yield one


@asynccontextmanager
async def _opened(
    store_url: str, valkey_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Older]:
    database = Database.connect(store_url)
    name = str(database.url.database)
    if database.is_sqlite:
        copy = tmp_path / "copy.db"
        keep, put_back = lambda: _copied(Path(name), copy), lambda: _copied(copy, Path(name))
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")

        def keep() -> None:
            postgres.sql(f"create database {name}_copy template {name}")

        def put_back() -> None:
            postgres.sql(f"drop database {name}")
            postgres.sql(f"alter database {name}_copy rename to {name}")

    try:
        async with staged(database, valkey_url) as stage:
            yield Older(stage, keep, put_back)
    finally:
        await database.close()


def _copied(source: Path, target: Path) -> None:
    for end in ("-wal", "-shm"):
        assert not Path(f"{source}{end}").exists(), "somebody has the file open"
    copyfile(source, target)


async def _import(stage: Stage, name: str, codes: int) -> int:
    rows = [Row(line, f"{name}-{line:04}", None, None) for line in range(1, codes + 1)]
    report = await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id=name)
    return report.inserted


def _codes(answers: list[Answer]) -> list[str]:
    assert {answer.status for answer in answers} <= {"ISSUED", "REPLAY"}
    return [answer.detail for answer in answers]


async def _lose_30(older: Older) -> list[str]:
    """30 vouchers are issued and in the ledger, then the store is as it was before; their records."""
    await older.keep()
    records = _codes(await older.stage.issue(*LOST))
    await older.stage.flush.run_once()
    await older.stage.refill.run_once()
    await older.put_back()
    return records


async def test_vouchers_that_the_store_lost_are_in_the_ledger_again_and_nothing_is_given_twice(older: Older) -> None:
    records = await _lose_30(older)
    with pytest.raises(StoreIsOlder):
        await _import(older.stage, "second", 5)
    done = await older.repair()
    assert (done.vouchers, done.unreadable, done.rolled_to) == (30, 0, 2)
    await older.stage.open()
    assert _codes(await older.stage.issue(*LOST)) == records
    async with older.stage.database.read() as conn:
        found = await ledger.lookup(conn, "v1", DISTRIBUTOR, LOST)
    assert [found[key].pack() for key in LOST] == records
    await older.stage.refill.run_once()
    before = {record.rsplit("\n", 1)[1] for record in records}
    after = {record.rsplit("\n", 1)[1] for record in _codes(await older.stage.issue(*(f"n{n}" for n in range(20))))}
    assert not before & after
    await older.stage.flush.run_once()
    assert await _import(older.stage, "second", 5) == 5
    assert (await older.stage.audit()).findings == []


async def test_rehearsal_says_the_same_and_changes_nothing(older: Older) -> None:
    await _lose_30(older)
    tables = [schema.requests, schema.leases, schema.generations, schema.audit_log, schema.catalogue_versions]

    async def rows() -> list[int | None]:
        async with older.stage.database.read() as conn:
            return [await conn.scalar(select(func.count()).select_from(table)) for table in tables]

    before, seen = await rows(), await older.stage.scripts.generation()
    shown = await repairing.rehearse(older.stage.database, older.stage.scripts)
    assert (await rows(), await older.stage.scripts.generation()) == (before, seen)
    done = await older.repair()
    assert (shown.vouchers, shown.published, shown.rolled_to) == (done.vouchers, done.published, 0)
    assert [(one.lot, one.seq_from, one.seq_to) for one in shown.moved] == [
        (one.lot, one.seq_from, one.seq_to) for one in done.moved
    ]


async def test_store_that_is_not_older_is_left_alone(older: Older) -> None:
    assert await repairing.rehearse(older.stage.database, older.stage.scripts) == Repair("")
    assert await older.repair() == Repair("")
    await _lose_30(older)
    assert (await older.repair()).older
    assert await older.repair() == Repair("")


async def test_codes_that_were_imported_and_issued_after_the_backup_are_not_imported_again(older: Older) -> None:
    await older.stage.issue(*(f"before-{n}" for n in range(30)))
    await older.stage.flush.run_once()
    await older.keep()
    assert await _import(older.stage, "late", 100) == 100
    for _ in range(5):
        await older.stage.refill.run_once()
        await older.stage.issue(*(f"late-{time.monotonic_ns()}-{n}" for n in range(20)))
    await older.stage.flush.run_once()
    issued = await _issued(older.stage)
    late = sum(code.startswith("late-") for code in issued)
    assert late, "the test means codes of the second import"
    await older.put_back()
    await older.repair()
    assert await _issued(older.stage) == issued
    await older.stage.open()
    # What was issued is known again; of the others, what was in a window by then, which is more on a slow machine.
    assert await _reimport(older.stage) <= 100 - late
    await older.stage.refill.run_once()
    new = _codes(await older.stage.issue(*(f"new-{n}" for n in range(10))))
    assert not issued & {record.split("\t")[-2] for record in new}
    await older.stage.flush.run_once()
    assert (await older.stage.audit()).findings == []


async def _reimport(stage: Stage) -> int:
    rows = [Row(line, f"late-{line:04}", None, None) for line in range(1, 101)]
    return (await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="late-again")).inserted


async def _issued(stage: Stage) -> set[str]:
    async with stage.database.read() as conn:
        return set(await conn.scalars(select(schema.issuances.c.code)))


async def test_nothing_that_was_revoked_paused_or_lowered_after_the_backup_comes_back(older: Older) -> None:
    stage, now = older.stage, int(time.time())
    revoked, kept, made = (tokens.digest(tokens.new_token()) for _ in range(3))

    async def before(conn: AsyncConnection) -> None:
        for token in (revoked, kept):
            await control.add_credential(conn, DISTRIBUTOR, token, now)
        await clients.create(conn, "CLIENT-1", DISTRIBUTOR, "0" * 64, ["issue_vouchers"], now)

    async def after(conn: AsyncConnection) -> None:
        await control.revoke_credentials(conn, token_sha256=revoked, now=now)
        await control.add_credential(conn, DISTRIBUTOR, made, now)
        await control.create_distributor(conn, "DIST-002", "Another", now)
        for distributor in (DISTRIBUTOR, "DIST-002"):
            await control.set_limit(conn, distributor, RateLimit(5, 20))
        await clients.set_active(conn, "CLIENT-1", False)
        await campaigns.set_caps(conn, "CAMP-001", "", {("campaign", "total"): 12}, now)
        await campaigns.set_paused(conn, "CAMP-001", True, now)

    await change(stage.database, stage.scripts, before, actor="test", action="test", subject="before")
    await older.keep()
    await change(stage.database, stage.scripts, after, actor="test", action="test", subject="after")
    async with stage.database.read() as conn:
        in_force = await control.snapshot(conn, 0)
    await older.put_back()
    done = await older.repair()
    async with stage.database.read() as conn:
        assert await control.snapshot(conn, 0) == in_force
    assert {(one.kind, one.id, one.field) for one in done.differences} == {
        ("token", revoked[:12], f"of {DISTRIBUTOR}"), ("token", made[:12], f"of {DISTRIBUTOR}"),
        ("distributor", "DIST-002", ""), ("distributor", DISTRIBUTOR, "rate"), ("distributor", DISTRIBUTOR, "burst"),
        ("client", "CLIENT-1", "active"),
        ("campaign", "CAMP-001", "paused"), ("campaign", "CAMP-001", "caps.campaign.total"),
    }  # fmt: skip
    assert (await stage.scripts.generation()).fence == done.published > in_force.version


async def test_vouchers_of_the_other_api_come_back_with_their_ids(older: Older) -> None:
    stage = older.stage
    await older.keep()
    record = await stage.issue_v3("0d3a2a52-7a0c-4d5b-9d2a-4e2f2c1b7a11", client=DISTRIBUTOR)
    voucher_id = select(schema.issuances.c.voucher_id).where(schema.issuances.c.seq == record.codes[0].seq)
    await stage.flush.run_once()
    async with stage.database.read() as conn:
        before = await conn.scalar(voucher_id)
    await older.put_back()
    assert (await older.repair()).vouchers == 1
    async with stage.database.read() as conn:
        found = await ledger.lookup(conn, "v3", DISTRIBUTOR, [record.key])
        after = await conn.scalar(voucher_id)
    assert found[record.key] == record
    assert before == after is not None


async def test_outbox_entry_that_comes_after_its_request_was_recreated_takes_the_place(older: Older) -> None:
    """A worker that slept flushes what another one had flushed into the store that is gone: no code is given twice."""
    stage = older.stage
    (record,) = _codes(await stage.issue("slow"))
    whole = record_of(Request("v1", DISTRIBUTOR, "slow", DISTRIBUTOR, ("PAY",), "T1\tPAY"), record)
    for written in (1, 0):
        assert await recreation.recreate(stage.database, 0, [whole], int(time.time())) == (written, 0)
    assert await _generations(stage, "slow") == [RECREATED]
    assert (await stage.flush.run_once()).incidents == 0
    assert await _generations(stage, "slow") == [1]
    assert await recreation.recreate(stage.database, 0, [whole], int(time.time())) == (0, 0)
    assert (await stage.audit()).findings == []


async def test_code_of_a_recreated_request_that_another_request_has_is_an_incident(older: Older) -> None:
    """A stand-in gives way to its own request alone."""
    stage = older.stage
    (record,) = _codes(await stage.issue("first"))
    await stage.flush.run_once()
    other = record_of(Request("v1", DISTRIBUTOR, "other", DISTRIBUTOR, ("PAY",), "T1\tPAY"), record)
    assert await recreation.recreate(stage.database, 0, [other], int(time.time())) == (1, 0)
    async with stage.database.read() as conn:
        assert [one.kind for one in await inspection.open_incidents(conn)] == ["double_issue"]
    assert await _generations(stage, "first") == [1]


async def _generations(stage: Stage, key: str) -> list[int]:
    async with stage.database.read() as conn:
        return list(await conn.scalars(select(schema.requests.c.generation).where(schema.requests.c.key == key)))
