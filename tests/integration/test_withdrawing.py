"""``voucherd pool withdraw``: what was withdrawn reaches nobody any more, wherever it was, and the books balance."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from service import keys
from service.domain import Record
from service.store import schema, stock
from service.worker import patience, withdrawing
from service.worker.unseen import Back
from tests.integration.stage import Stage
from tests.integration.typed import OnStage, ok, refused, run, stocked

CODES = 100


def _leaked(tmp_path: Path, *numbers: int) -> str:
    path = tmp_path / "leaked.csv"
    path.write_text("code\n" + "".join(f"CODE-{number:04}\n" for number in numbers))
    return str(path)


def _withdraw(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = run("pool", "withdraw", "CAMP-001", "--reason", "leaked", "--yes", "--json", *arguments)
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = orjson.loads(result.stdout)
    return {name: value for name, value in found.items() if name != "pool" and value}


async def _issue_everything(stage: Stage) -> set[str]:
    """All codes that can still be issued, and all of them in the ledger."""
    return set(await stage.issue_everything())


def _names(*numbers: int) -> set[str]:
    return {f"CODE-{number:04}" for number in numbers}


def test_codes_leave_stock_and_windows_and_the_books_balance(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)

    async def three(stage: Stage) -> None:
        await stage.refill.run_once()
        await stage.issue("req-1", "req-2", "req-3")  # CODE-0000 to CODE-0002; 37 are in the window, 60 in stock
        await stage.flush.run_once()

    store(three)
    leaked = _leaked(tmp_path, 1, 10, 11, 30, 70, 71, 99, 4711)
    assert _withdraw("--codes", leaked) == {
        "withdrawn_from_stock": 3, "withdrawn_from_windows": 3, "issued_already": 1, "not_of_this_pool": 1,
    }  # fmt: skip
    store(Stage.balanced)
    store(lambda stage: stage.flush.run_once())
    store(Stage.balanced)
    assert _withdraw("--codes", leaked) == {"withdrawn_before": 6, "issued_already": 1, "not_of_this_pool": 1}
    audited = orjson.loads(ok("audit", "--json").stdout)
    assert (audited["partition"]["withdrawn"], audited["pools"][0]["withdrawn"]) == (3, 3)
    assert "withdrawn" in ok("audit").stdout
    given = store(_issue_everything)
    assert given == _names(*range(3, CODES)) - _names(10, 11, 30, 70, 71, 99)
    store(Stage.balanced)
    assert run("codes", "import", "CAMP-001", leaked, "--json").exit_code == 0  # 4711 is new, the others are known
    assert store(_issue_everything) == _names(4711)


def test_a_whole_lot_leaves_at_once(store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "UNREACHED_S", 0.1)
    stocked(tmp_path, CODES)
    store(lambda stage: stage.refill.run_once())
    [lot] = store(_lots)
    _withdraw("--codes", _leaked(tmp_path, 50, 51, 52, 80))
    assert _withdraw("--lot", str(lot)) == {"withdrawn_from_stock": 56, "withdrawn_from_windows": 40}
    assert _withdraw("--lot", str(lot)) == {"on_the_way_to_the_ledger": 40}
    store(lambda stage: stage.flush.run_once())
    assert _withdraw("--lot", str(lot)) == {}
    assert store(_issue_everything) == set()
    store(Stage.balanced)
    assert orjson.loads(ok("audit", "--json").stdout)["pools"][0]["stored"] == 0
    refused("pool", "withdraw", "CAMP-001", "--lot", "77", "--reason", "x", "--yes", says="has no lot 77")


async def _lots(stage: Stage) -> list[int]:
    async with stage.database.read() as conn:
        return list(await conn.scalars(select(schema.lots.c.id)))


def test_a_lease_on_its_way_is_applied_first(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)

    async def leased(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await stock.lease(
                conn, pool="CAMP-001", partition=0, generation=1, predecessor="", lease_id="on-its-way", codes=20,
                now=0, earliest_expiry=0,
            )  # fmt: skip

    store(leased)
    assert _withdraw("--codes", _leaked(tmp_path, 5, 6)) == {"withdrawn_from_windows": 2}
    given = store(_issue_everything)
    assert not given & _names(5, 6)
    store(Stage.balanced)


def test_what_was_lost_with_redis_is_said_to_be_in_quarantine_and_can_not_be_returned_from_there(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path, CODES)

    async def lose(stage: Stage) -> list[Any]:
        await stage.refill.run_once()
        await stage.issue("lost")  # CODE-0000
        return await stage.lose_redis()

    async def returned(stage: Stage) -> int:
        back = Back(
            stage.database, stage.scripts, "CAMP-001", ["DIST-001"], 2**40, reason="x", actor="test", rehearse=False
        )
        unseen = {stock.digest(code) for code in _names(0, 1, 5)}
        return await back.run(lambda mark: mark not in unseen)

    async def late(stage: Stage) -> None:
        done = await stage.flush.settle(1, entries)
        assert (done.codes, done.incidents) == (1, 0), "it had been issued before it was withdrawn"

    entries = store(lose)
    leaked = _leaked(tmp_path, 0, 5, 60)
    assert _withdraw("--codes", leaked) == {"in_quarantine": 2, "withdrawn_from_stock": 1}
    assert _withdraw("--codes", leaked) == {"withdrawn_before": 3}
    assert store(returned) == 1, "one that was not withdrawn"
    store(late)
    assert _withdraw("--codes", leaked) == {"issued_already": 1, "withdrawn_before": 2}
    assert not store(_issue_everything) & _names(0, 5, 60)
    store(Stage.balanced)


def test_a_partition_that_is_being_recovered_is_said_to_be_unreached(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(tmp_path, CODES)

    async def disowned(stage: Stage) -> None:
        await stage.refill.run_once()
        await stage.scripts.redis.hset(keys.generation(0), "replid", "0" * 40)

    store(disowned)
    monkeypatch.setattr(patience, "UNREACHED_S", 0.1)
    leaked = _leaked(tmp_path, 5, 60)
    assert _withdraw("--codes", leaked, exit_code=1) == {"unreached": 1, "withdrawn_from_stock": 1}
    assert store(lambda stage: stage.open()) == 1  # the server never stopped: its data is accepted
    assert _withdraw("--codes", leaked) == {"withdrawn_from_windows": 1, "withdrawn_before": 1}


def test_it_asks_first_and_takes_one_kind_of_naming(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    leaked = _leaked(tmp_path, 5)
    asked = run("pool", "withdraw", "CAMP-001", "--codes", leaked, "--reason", "leaked", typed="n\n")
    assert asked.exit_code == 1
    assert "Withdraw 1 codes of pool CAMP-001 for good?" in asked.output
    for wrong in (("--lot", "1", "--codes", leaked), ()):
        assert run("pool", "withdraw", "CAMP-001", "--reason", "x", "--yes", *wrong).exit_code == 2
    assert run("pool", "withdraw", "CAMP-001", "--codes", leaked, "--yes").exit_code == 2
    refused("pool", "withdraw", "NONE", "--codes", leaked, "--reason", "x", "--yes", says="there is no pool NONE")
    assert store(_issue_everything) == _names(*range(CODES))


async def _race(stage: Stage, rng: random.Random) -> None:
    """Everything is issued as fast as it goes, while half of it is withdrawn."""
    doomed = [f"CODE-{number:04}" for number in rng.sample(range(CODES), CODES // 2)]
    given: list[tuple[float, str]] = []
    withdrawn_at = float("inf")
    loop = asyncio.get_running_loop()

    async def issue() -> None:
        for number in range(400):
            begun = loop.time()
            await stage.refill.run_once()
            [answer] = await stage.issue(f"race-{number}")
            if answer.status == "ISSUED":
                given.append((begun, Record.unpack(answer.detail).codes[0].code))
            elif answer.status == "NONE":
                return

    issuing = asyncio.create_task(issue())
    while len(given) < rng.randrange(1, 30):
        await asyncio.sleep(0)
    done = await withdrawing.withdraw(
        stage.database, stage.scripts, stage.refill, "CAMP-001", named=doomed, reason="leaked", actor="test"
    )
    withdrawn_at = loop.time()
    await issuing
    early = [code for begun, code in given if begun < withdrawn_at and code in doomed]
    late = [code for begun, code in given if begun >= withdrawn_at and code in doomed]
    assert late == []
    assert done.stock + done.windows + len(early) == len(doomed)
    assert len(given) + done.stock + done.windows == CODES
    await stage.flush.run_once()
    await stage.balanced()


def test_no_withdrawn_code_is_issued_while_issuing_goes_on(store: OnStage, tmp_path: Path, rng: random.Random) -> None:
    stocked(tmp_path, CODES)
    store(lambda stage: _race(stage, rng))
