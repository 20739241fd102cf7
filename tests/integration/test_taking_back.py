"""``voucherd pool take-back``: what an ended campaign left in windows is stock again, once, and the books balance."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from service import keys
from service.domain import Code, Record
from service.scripts import Scripts
from service.store import returning, schema
from service.worker import patience
from tests.integration.stage import OUTBOX_MAX, Stage
from tests.integration.typed import OnStage, ok, refused, run, stocked, three_issued

CODES = 100


class Killed(Exception):
    """Stands for kill -9: nothing of the step comes after it."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "UNREACHED_S", 0.2)  # no worker runs here by itself


def _take_back(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = run("pool", "take-back", "CAMP-001", "--reason", "over", "--json", *arguments)
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = orjson.loads(result.stdout)
    return {name: value for name, value in found.items() if name != "pool"}


def _counted() -> dict[str, int]:
    [found] = orjson.loads(ok("codes", "count", "--json").stdout)
    assert found["imported"] == sum(value for name, value in found.items() if name not in ("pool", "imported"))
    return {name: value for name, value in found.items() if name != "pool" and value}


def _on_their_way(store: OnStage, tmp_path: Path) -> None:
    """Three are issued, the other 37 of the window in the outbox, on their way back."""
    stocked(tmp_path, CODES)
    store(three_issued)
    ok("campaign", "pause", "CAMP-001")
    _take_back("--yes", exit_code=1)


async def _window(stage: Stage) -> list[Code]:
    generation = (await stage.scripts.generation()).open
    packed = await stage.scripts.redis.lrange(keys.window(0, generation, "CAMP-001"), 0, -1)
    return [Code.unpack(text) for text in packed]


def test_a_code_that_is_withdrawn_on_its_way_back_never_comes_to_stock(store: OnStage, tmp_path: Path) -> None:
    _on_their_way(store, tmp_path)

    async def lose(stage: Stage) -> tuple[list[Any], str]:
        entries = await stage.lose_redis()
        return entries, entries[0][1]["asides"].split("\x1e")[0].split("\t")[3]

    async def late(stage: Stage) -> None:
        for _ in range(2):  # the second time as after a crash before the entry was gone
            assert (await stage.flush.settle(1, entries)).incidents == 0

    entries, code = store(lose)
    leaked = tmp_path / "leaked.csv"
    leaked.write_text(f"code\n{code}\n")
    said = run("pool", "withdraw", "CAMP-001", "--reason", "leaked", "--yes", "--json", "--codes", str(leaked))
    assert orjson.loads(said.stdout)["in_quarantine"] == 1
    store(late)
    ok("campaign", "resume", "CAMP-001")
    issued = store(Stage.issue_everything)
    assert code not in issued
    assert len(issued) == CODES - 4, "three were issued before, and one was withdrawn"
    store(Stage.balanced)


def test_what_was_in_windows_is_stock_again_and_each_code_is_issued_once(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(three_issued)
    refused("pool", "take-back", "CAMP-001", "--reason", "x", "--yes", says="CAMP-001 can issue from pool CAMP-001")
    ok("campaign", "pause", "CAMP-001")
    before = store(_window)
    assert _take_back() == {"in_windows": 37, "can_issue": [], "done": False}
    assert store(_window) == before
    # No worker runs, so nothing is in stock yet, and that is said.
    assert _take_back("--yes", exit_code=1) == {
        "returned_to_stock": 0, "on_the_way_to_stock": 37, "unfinished": False
    }  # fmt: skip
    store(Stage.balanced)
    assert store(lambda stage: stage.flush.run_once()).codes == 37
    store(Stage.balanced)
    assert _counted() == {"imported": CODES + 37, "stored": CODES - 3, "issued": 3, "taken_back": 37}
    assert _take_back("--yes") == {"returned_to_stock": 0, "on_the_way_to_stock": 0, "unfinished": False}
    audited = orjson.loads(ok("audit", "--json").stdout)
    assert (audited["partition"]["taken_back"], audited["pools"][0]["imported"]) == (37, CODES + 37)
    logged = store(_logged)
    assert [action for action, _ in logged if action == "pool take-back"] == ["pool take-back"] * 2
    ok("campaign", "resume", "CAMP-001")
    given = store(Stage.issue_everything)
    assert sorted(given) == [f"CODE-{number:04}" for number in range(3, CODES)]
    store(Stage.balanced)


async def _logged(stage: Stage) -> list[tuple[str, str]]:
    log = schema.audit_log
    async with stage.database.read() as conn:
        return [tuple(row) for row in await conn.execute(select(log.c.action, log.c.detail).order_by(log.c.id))]


def test_windows_are_not_filled_again_while_no_campaign_can_issue(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(three_issued)
    ok("campaign", "end", "CAMP-001")
    _take_back("--yes", exit_code=1)

    async def work(stage: Stage) -> None:
        await stage.flush.run_once()
        for _ in range(3):
            assert (await stage.refill.run_once()).codes == 0
        assert await _window(stage) == []

    store(work)
    store(Stage.balanced)


def test_a_lease_on_its_way_is_taken_back_too(store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stocked(tmp_path, CODES)

    async def leased(stage: Stage) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scripts, "restock", _killed)
            with pytest.raises(Killed):
                await stage.refill.run_once()

    store(leased)
    ok("campaign", "pause", "CAMP-001")
    assert _take_back("--yes", exit_code=1)["on_the_way_to_stock"] == 40
    store(lambda stage: stage.flush.run_once())
    assert _counted() == {"imported": CODES + 40, "stored": CODES, "taken_back": 40}
    store(Stage.balanced)


async def _killed(*_: object, **__: object) -> Any:
    raise Killed


@pytest.mark.parametrize(
    ("owner", "step", "after"),
    [
        ("service.store.ledger.flush", "before the ledger", False),
        ("service.store.ledger.flush", "after the ledger", True),
        ("service.store.returning.put_back", "in the transaction that puts back", True),
        ("service.scripts.Scripts.stock", "before Redis knows of the stock", False),
        ("service.scripts.Scripts.flushed", "before it is acknowledged", False),
        ("service.scripts.Scripts.flushed", "after it is acknowledged", True),
    ],
)
def test_a_worker_killed_at_any_line_loses_no_code_and_doubles_none(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, step: str, after: bool
) -> None:
    _on_their_way(store, tmp_path)

    async def killed(stage: Stage) -> None:
        with monkeypatch.context() as patch:
            path, name = owner.rsplit(".", 1)
            whose: Any = Scripts if path.endswith("Scripts") else __import__(path, fromlist=["_"])
            real = getattr(whose, name)

            async def dies(*arguments: Any, **named: Any) -> Any:
                if after:
                    await real(*arguments, **named)
                raise Killed(step)

            patch.setattr(whose, name, dies)
            with pytest.raises(Killed):
                await stage.flush.run_once()

    async def again(stage: Stage) -> None:
        await stage.balanced()
        await stage.flush.run_once()  # the worker's own pending entries first, as after a restart
        await stage.balanced()

    async def killed_and_again(stage: Stage) -> None:
        await killed(stage)
        await again(stage)

    store(killed_and_again)
    assert _counted() == {"imported": CODES + 37, "stored": CODES - 3, "issued": 3, "taken_back": 37}
    ok("campaign", "resume", "CAMP-001")
    given = store(Stage.issue_everything)
    assert sorted(given) == [f"CODE-{number:04}" for number in range(3, CODES)]
    store(Stage.balanced)


def test_what_redis_lost_on_its_way_back_is_in_quarantine_and_in_nobodys_hands(store: OnStage, tmp_path: Path) -> None:
    _on_their_way(store, tmp_path)

    async def lose(stage: Stage) -> None:
        await stage.scripts.redis.flushall()
        assert await stage.open() == 2

    store(lose)
    assert _counted() == {"imported": CODES, "stored": CODES - 40, "issued": 3, "quarantined": 37}
    assert _take_back("--yes") == {"returned_to_stock": 0, "on_the_way_to_stock": 0, "unfinished": False}
    ok("campaign", "resume", "CAMP-001")
    assert sorted(store(Stage.issue_everything)) == [f"CODE-{number:04}" for number in range(40, CODES)]
    store(Stage.balanced)


def test_codes_that_a_roll_finds_in_the_outbox_come_back_as_well(store: OnStage, tmp_path: Path) -> None:
    _on_their_way(store, tmp_path)

    async def rolled(stage: Stage) -> None:
        await stage.scripts.redis.hset(keys.generation(0), mapping={"replid": "0" * 40, "run_id": "0" * 40})
        assert await stage.open() == 2
        for _ in range(3):
            await stage.recover.clean_once()

    store(rolled)
    assert _counted() == {"imported": CODES + 37, "stored": CODES - 3, "issued": 3, "taken_back": 37}
    store(Stage.balanced)


def test_codes_on_their_way_back_can_be_withdrawn_once_they_are_in_stock(store: OnStage, tmp_path: Path) -> None:
    _on_their_way(store, tmp_path)
    (tmp_path / "leaked.csv").write_text("code\nCODE-0010\nCODE-0099\n")
    withdraw = ("pool", "withdraw", "CAMP-001", "--codes", str(tmp_path / "leaked.csv"), "--reason", "x", "--yes")
    first = orjson.loads(ok(*withdraw, "--json").stdout)
    assert (first["withdrawn_from_stock"], first["on_the_way_to_the_ledger"]) == (1, 1)
    store(lambda stage: stage.flush.run_once())
    again = orjson.loads(ok(*withdraw, "--json").stdout)
    assert (again["withdrawn_from_stock"], again["withdrawn_before"]) == (1, 1)
    ok("campaign", "resume", "CAMP-001")
    assert not set(store(Stage.issue_everything)) & {"CODE-0010", "CODE-0099"}
    store(Stage.balanced)


def test_a_partition_that_is_being_recovered_is_said_to_be_unfinished(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(three_issued)
    ok("campaign", "pause", "CAMP-001")

    async def disowned(stage: Stage) -> None:
        await stage.scripts.redis.hset(keys.generation(0), "replid", "0" * 40)

    store(disowned)
    assert _take_back()["in_windows"] is None
    assert _take_back("--yes", exit_code=1) == {
        "returned_to_stock": 0, "on_the_way_to_stock": 0, "unfinished": True
    }  # fmt: skip


def test_it_is_typed_right_or_nothing_is_done(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    refused("pool", "take-back", "NONE", "--reason", "x", "--yes", says="there is no pool NONE")
    for wrong in ((), ("--reason", " ")):
        assert run("pool", "take-back", "CAMP-001", "--yes", *wrong).exit_code == 2
    assert store(_logged_actions).count("pool take-back") == 0


async def _logged_actions(stage: Stage) -> list[str]:
    return [action for action, _ in await _logged(stage)]


def test_codes_go_back_and_forth_for_long_and_each_is_issued_once(
    store: OnStage, tmp_path: Path, rng: random.Random
) -> None:
    """Positions are used up, codes are not: some are issued, the rest comes back, again and again."""
    stocked(tmp_path, CODES)

    async def forth(stage: Stage) -> list[str]:
        given: list[str] = []
        for round_number in range(6):
            await stage.refill.run_once()
            answers = await stage.issue(*(f"{round_number}-{number}" for number in range(rng.randrange(1, 12))))
            given += [Record.unpack(one.detail).codes[0].code for one in answers if one.status == "ISSUED"]
            generation = (await stage.scripts.generation()).open
            taken = await stage.scripts.take_back(
                "CAMP-001", rng.randrange(1, 60), generation=generation, outbox_max=OUTBOX_MAX
            )
            await stage.flush.run_once()
            await stage.balanced()
            async with stage.database.write() as conn:  # what is back comes back no second time
                at = [(code.lot, code.seq) for code in taken if isinstance(code, Code)]
                before = await returning.returned(conn, "CAMP-001")
                await returning.put_back(conn, at, 0)
                assert await returning.returned(conn, "CAMP-001") == before
        return given

    given = store(forth)
    given += store(Stage.issue_everything)
    assert sorted(given) == [f"CODE-{number:04}" for number in range(CODES)]
    store(Stage.balanced)
