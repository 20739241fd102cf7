"""``voucherd reconcile``: what a partner says it received, against the ledger; nothing is passed over in silence."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from loadtest.servers import until
from service import keys
from service.cli import reconcile as cli
from service.domain import Record
from service.store import schema
from service.worker import reconcile
from service.worker.partner_file import Line
from service.worker.refill import Refill
from tests.acceptance.test_up import ROOT
from tests.chaos.stage import POINTS
from tests.integration.stage import IDS, Stage
from tests.integration.typed import OnStage, ok, refused, run, stocked

CODES = 100


async def _four_issued(stage: Stage) -> None:
    await stage.refill.run_once()
    answers = await stage.issue("req-0", "req-1", "req-2", "req-3")  # CODE-0000 to CODE-0003
    assert {answer.status for answer in answers} == {"ISSUED"}
    await stage.flush.run_once()


async def _fifth_lost(stage: Stage) -> list[tuple[str, dict[str, str]]]:
    """The four are issued, and CODE-0004 for "late", whose outbox entry comes back."""
    await _four_issued(stage)
    await stage.issue("late")
    return await stage.lose_redis()


def _file(tmp_path: Path, text: str, name: str = "partner.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def _reconciled(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = run("reconcile", *arguments, "--distributor", "DIST-001", "--json")
    assert result.exit_code == exit_code, result.output
    found: dict[str, Any] = orjson.loads(result.stdout)
    reasons = {(one["outcome"], one["reason"]): one["vouchers"] for one in found.pop("reasons")}
    return {name: value for name, value in found.items() if name != "distributors" and value} | {"reasons": reasons}


def _of(tmp_path: Path, name: str = "off.csv") -> list[dict[str, str]]:
    with (tmp_path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_partner_that_received_all_fits_and_nothing_is_said_to_be_off(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_four_issued)
    all_of_it = _file(tmp_path, "request_id,code\n" + "".join(f"req-{n},CODE-{n:04}\n" for n in range(4)))
    assert _reconciled(all_of_it) == {"lines": 4, "matched": 4, "reasons": {}}
    assert "say the same" in ok("reconcile", all_of_it, "--distributor", "DIST-001").output
    exported = str(tmp_path / "exported.csv")
    ok("ledger", "export", "--output", exported)
    assert _reconciled(exported) == {"lines": 4, "matched": 4, "reasons": {}}  # our own export is a partner's file too
    logged = store(_logged)
    assert logged[-1][:2] == ("reconcile", "DIST-001")
    assert "4 matched" in logged[-1][2]


async def _logged(stage: Stage) -> list[tuple[str, str, str]]:
    log = schema.audit_log
    async with stage.database.read() as conn:
        return [tuple(row) for row in await conn.execute(select(log.c.action, log.c.subject, log.c.detail))]


def test_whatever_is_off_is_named_with_its_reason(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_four_issued)
    ok("pool", "withdraw", "CAMP-001", "--lot", "1", "--reason", "x", "--yes")  # 60 in stock
    store(lambda stage: stage.flush.run_once())
    ok("campaign", "create", "OTHER", "--category", "PAY", "--product", "MOB")
    (tmp_path / "more.csv").write_text("code\nMORE-0001\n")
    ok("codes", "import", "OTHER", str(tmp_path / "more.csv"))
    off = _file(
        tmp_path,
        "code,request_id,voucher_id,received_at,what ever\n"
        "CODE-0000,req-0,,2099-01-01T00:00:00Z,x\n"
        "CODE-0001,req-9,,,x\n"  # another request
        "CODE-0002,,00000000-0000-0000-0000-000000000001,,x\n"
        "CODE-0003,req-3,,2001-01-01T00:00:00Z,x\n"
        "CODE-0000,req-0,,,x\n"
        "CODE-0050,,,,x\n"
        "MORE-0001,,,,x\n"
        "=NOBODY+KNOWS,=req,,,x\n"
        "CODE-0004\n"
        ",,,,\n"
        "CODE-0005,,,yesterday,x\n",
    )
    output = str(tmp_path / "off.csv")
    assert _reconciled(off, "--output", output, exit_code=1) == {
        "lines": 11, "matched": 1, "different": 3, "missing_here": 3, "repeated": 1, "unreadable": 3,
        "reasons": {
            ("different", "another request_id"): 1, ("different", "another voucher_id"): 1,
            ("different", "received before it was issued"): 1,
            ("missing_here", "withdrawn"): 1, ("missing_here", "stored"): 1, ("missing_here", "unknown code"): 1,
            ("unreadable", "1 fields, where the header names 5"): 1, ("unreadable", "no code"): 1,
            ("unreadable", "received_at has to be a time with its zone (2027-01-31T12:00:00Z)"): 1,
        },
    }  # fmt: skip
    found = _of(tmp_path)
    assert len(found) == 10
    assert [row["line"] for row in found] == [str(number) for number in range(3, 13)]
    assert (found[6]["code"], found[6]["request_id"]) == ("'=NOBODY+KNOWS", "'=req")  # no formula for a spreadsheet
    assert (found[0]["code"], found[0]["request_id"], found[0]["distributor"]) == ("CODE-0001", "req-1", "DIST-001")
    shown = run("reconcile", off, "--distributor", "DIST-001", columns=80)
    assert shown.exit_code == 1
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "CODE-" not in shown.output


def test_what_the_partner_lacks_is_missing_there_within_the_period(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_four_issued)
    two = _file(tmp_path, '{"code":"CODE-0001"}\n{"voucher_code":"CODE-0003","request_id":"req-3"}\n', "two.ndjson")
    output = tmp_path / "off.ndjson"
    assert _reconciled(two, "--output", str(output), exit_code=1) == {
        "lines": 2, "matched": 2, "missing_there": 2, "reasons": {}
    }  # fmt: skip
    assert [orjson.loads(line)["code"] for line in output.read_text().splitlines()] == ["CODE-0000", "CODE-0002"]
    assert _reconciled(two, "--until", "2001-01-01") == {
        "lines": 2, "matched": 2, "reasons": {("matched", "issued outside of the period"): 2}
    }  # fmt: skip


def test_another_distributors_voucher_is_different_and_one_of_a_lost_window_quarantined(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path, CODES)

    async def lose(stage: Stage) -> None:
        await _four_issued(stage)
        answers = await stage.issue("lost")
        assert Record.unpack(answers[0].detail).codes[0].code == "CODE-0004"
        await stage.scripts.redis.flushall()
        assert await stage.open() == 2
        await stage.refill.run_once()

    store(lose)
    ok("distributor", "create", "DIST-002", "--name", "Another")
    file = _file(tmp_path, "code\nCODE-0000\nCODE-0004\nCODE-0045\n")
    result = run("reconcile", file, "--distributor", "DIST-002", "--json")
    assert result.exit_code == 1
    found = {(one["outcome"], one["reason"]) for one in orjson.loads(result.stdout)["reasons"]}
    assert found == {
        ("different", "issued to another distributor"), ("missing_here", "quarantined"), ("missing_here", "out")
    }  # fmt: skip


def test_many_lines_take_no_more_memory_than_a_few(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines come from nowhere, so that only what is kept of them counts."""
    stocked(tmp_path, CODES)
    lines = 300_000
    told = list[int]()

    async def look(stage: Stage) -> reconcile.Reconciled:
        def come() -> Any:
            for number in range(1, lines + 1):
                yield Line(number, f"NOWHERE-{number:09}")

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = await reconcile.reconcile(
            stage.database, come(), reconcile.Wanted(), ["DIST-001"], progress=told.append, tell=lambda _: None
        )
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kb < 60_000, f"{grown_kb} kB for {lines} lines"
        return done

    done = store(look)
    assert done.counts == {("missing_here", "unknown code"): lines}
    assert told[-1] == lines


def test_what_can_not_be_used_is_refused_and_quotes_nothing(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    here = ("--distributor", "DIST-001")
    refused("reconcile", _file(tmp_path, ""), *here, says="is empty")
    refused("reconcile", _file(tmp_path, "CODE-0001\nCODE-0002\n"), *here, says="has to name its columns")
    refused("reconcile", str(tmp_path / "none.csv"), *here, says="there is no file")
    refused("reconcile", _file(tmp_path, "code\n"), "--distributor", "NOBODY", says="there is no distributor NOBODY")
    wrong = run("reconcile", _file(tmp_path, "code\n"), *here, "--from", "2027-01-02", "--until", "2027-01-01")
    assert wrong.exit_code == 2
    assert keys.tag(0) not in wrong.output


# --- what nobody received -------------------------------------------------------------------------------------------

UNTIL = ("--until", "2999-01-01")


async def _lost(stage: Stage) -> None:
    """Four are in the ledger; two more were issued and 34 in the window when Redis lost everything."""
    await _four_issued(stage)
    await stage.issue("lost-1", "lost-2")  # CODE-0004 and CODE-0005
    await stage.scripts.redis.flushall()
    assert await stage.open() == 2


def _unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *codes: int, more: tuple[str, ...] = ()) -> Any:
    monkeypatch.setattr(cli, "time", SimpleNamespace(time=lambda: 2**40))  # what the file ends with has passed
    received = _file(tmp_path, "code\n" + "".join(f"CODE-{number:04}\n" for number in codes))
    return run(
        "reconcile", received, "--distributor", "DIST-001", *UNTIL, "--return-unseen", "CAMP-001", "--reason", "lost",
        "--json", *more,
    )  # fmt: skip


def test_codes_that_nobody_received_are_issued_again_and_those_received_never(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    seen = (0, 1, 2, 3, 5)  # the partner got CODE-0005, and not CODE-0004
    shown = orjson.loads(_unseen(tmp_path, monkeypatch, *seen).stdout)
    assert (shown["unseen"], shown["returned"], shown["matched"]) == (35, False, 4)
    assert orjson.loads(ok("codes", "count", "--json").stdout)[0]["quarantined"] == 36
    done = orjson.loads(_unseen(tmp_path, monkeypatch, *seen, more=("--yes",)).stdout)
    assert (done["unseen"], done["returned"]) == (35, True)
    [counted] = orjson.loads(ok("codes", "count", "--json").stdout)
    assert (counted["quarantined"], counted["taken_back"], counted["stored"]) == (1, 35, 95)
    assert orjson.loads(_unseen(tmp_path, monkeypatch, *seen, more=("--yes",)).stdout)["unseen"] == 0
    store(Stage.balanced)
    given = store(Stage.issue_everything)
    assert sorted(given) == ["CODE-0004", *(f"CODE-{number:04}" for number in range(6, CODES))]
    store(Stage.balanced)
    assert [one[0] for one in store(_logged)].count("return unseen") == 1, "the second changed nothing"


def test_a_late_flush_of_a_returned_code_is_an_incident_and_no_second_voucher(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the lost outbox turns up: a worker that slept, or an old server."""
    stocked(tmp_path, CODES)

    entries = store(_fifth_lost)
    done = orjson.loads(_unseen(tmp_path, monkeypatch, 0, 1, 2, 3, more=("--yes",)).stdout)
    assert done["unseen"] == 36
    assert store(Stage.issue_everything).count("CODE-0004") == 1

    async def late(stage: Stage) -> None:
        done = await stage.flush.settle(1, entries)
        assert (done.codes, done.incidents) == (0, 1)
        assert await stage.scripts.redis.exists(keys.replay(0, 2, "v1", "DIST-001", "late")) == 0

    store(late)
    [doubled] = [one for one in store(lambda stage: stage.audit()).findings if one.promise == "P1"]
    assert "was issued here, but before it was set aside" in doubled.detail


LOST = 2_500  # codes in quarantine: some pages of what is returned at a time


def test_return_that_was_killed_half_way_loses_no_code_and_returns_none_twice(store: OnStage, tmp_path: Path) -> None:
    """A real process dies when the first page is in stock, before Redis knows."""
    stocked(tmp_path, LOST + 10)

    async def lose(stage: Stage) -> None:
        refill = Refill(stage.database, stage.scripts, low_water=LOST, store_outage_s=1, clock=lambda: 0.0)
        await refill.run_once()
        answers = await stage.issue("req-0", "req-1", "req-2", "req-3")  # CODE-0000 to CODE-0003
        assert {answer.status for answer in answers} == {"ISSUED"}
        await stage.flush.run_once()
        await stage.scripts.redis.flushall()
        assert await stage.open() == 2

    store(lose)
    end = int(time.time()) + 1  # later than the loss
    until(lambda: time.time() > end, "the end of the second")
    over = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
    received = _file(tmp_path, "code\n" + "".join(f"CODE-{number:04}\n" for number in range(4)))
    command = (
        "reconcile", received, "--distributor", "DIST-001", "--until", over, "--return-unseen", "CAMP-001",
        "--reason", "lost", "--json", "--yes",
    )  # fmt: skip
    (tmp_path / "stock-before").touch()
    died = subprocess.run(
        [sys.executable, "-m", "service.cli.main", *command], capture_output=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(POINTS), str(ROOT))), "CHAOS_POINTS": str(tmp_path)},
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    [half] = orjson.loads(ok("codes", "count", "--json").stdout)
    assert 0 < half["taken_back"] < half["taken_back"] + half["quarantined"], "it died half-way"
    said = sum(int(detail.split()[0]) for action, _, detail in store(_logged) if action == "return unseen")
    assert said == half["taken_back"], "what a killed command had done is in the audit log"
    store(Stage.balanced)
    rest = orjson.loads(ok(*command).stdout)["unseen"]
    [whole] = orjson.loads(ok("codes", "count", "--json").stdout)
    assert (whole["quarantined"], whole["taken_back"]) == (0, half["taken_back"] + rest)
    assert rest == half["quarantined"]
    store(Stage.balanced)

    async def everything(stage: Stage) -> list[str]:
        async with stage.database.read() as conn:
            return list(await conn.scalars(select(schema.codes.c.code)))

    assert sorted(store(everything)) == [f"CODE-{number:04}" for number in range(LOST + 10)]


def test_what_is_no_proof_returns_nothing(store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    lacking = _unseen(tmp_path, monkeypatch, 0, 1, 2, more=("--yes",))
    assert (lacking.exit_code, "no proof" in lacking.stderr) == (1, True)
    ok("distributor", "create", "DIST-002", "--name", "Another")
    ok("campaign", "assign", "CAMP-001", "DIST-002")
    other = _unseen(tmp_path, monkeypatch, 0, 1, 2, 3, more=("--yes",))
    assert (other.exit_code, "DIST-002 could have received" in other.stderr) == (1, True)

    async def full(stage: Stage) -> None:
        await stage.scripts.redis.xadd(keys.outbox(0, 1), {"some": "entry"})

    store(full)
    both = ("--distributor", "DIST-002", "--yes")
    unsealed = _unseen(tmp_path, monkeypatch, 0, 1, 2, 3, more=both)
    assert (unsealed.exit_code, "still holds what is not in the ledger" in unsealed.stderr) == (1, True)
    assert orjson.loads(ok("codes", "count", "--json").stdout)[0]["quarantined"] == 36
    received = _file(tmp_path, "code\n")
    for wrong in (
        ("--yes",),
        ("--return-unseen", "CAMP-001", "--reason", "x"),
        (*UNTIL, "--return-unseen", "CAMP-001"),
    ):
        assert run("reconcile", received, "--distributor", "DIST-001", *wrong).exit_code == 2


# --- what a partner received all the same ---------------------------------------------------------------------------


def _adopted(tmp_path: Path, text: str, *more: str) -> dict[str, Any]:
    """By a file that lacks other vouchers."""
    return _reconciled(_file(tmp_path, text), "--adopt", "CAMP-001", "--reason", "lost", *more, exit_code=1)


def test_codes_that_a_partner_received_by_one_request_are_no_finding_of_the_audit(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    done = _adopted(tmp_path, "code,request_id\nCODE-0004,lost-1\nCODE-0005,lost-1\n", "--yes")
    assert (done["adoptable"], done["adopted"]) == (2, True)
    store(Stage.balanced)


def test_a_code_that_a_partner_received_is_in_the_ledger_once_and_nobody_elses(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    lines = (
        "code,request_id,voucher_id,received_at\nCODE-0000,req-0,,\n"
        "CODE-0004,lost-1,,2027-01-01T00:00:00Z\nCODE-0005,lost-2,00000000-0000-4000-8000-000000000001,\n"
    )
    without_request = "CODE-0006,,,\n"
    shown = _adopted(tmp_path, lines + without_request)
    assert (shown["adoptable"], shown.get("adopted", False)) == (2, False)
    assert orjson.loads(ok("codes", "count", "--json").stdout)[0]["quarantined"] == 36, "nothing was changed"
    done = _adopted(tmp_path, lines + without_request, "--yes")
    assert (done["adoptable"], done["adopted"]) == (2, True)
    again = _adopted(tmp_path, lines, "--yes")
    assert (again["reasons"], again.get("adoptable", 0)) == ({("matched", "adopted"): 2}, 0), "it was done before"
    assert orjson.loads(ok("codes", "count", "--json").stdout)[0]["quarantined"] == 34
    store(Stage.balanced)
    [found] = orjson.loads(ok("ledger", "find", "--code", "CODE-0004", "--json").stdout)
    assert (found["request_id"], found["distributor_id"], found["campaign_id"]) == ("lost-1", "DIST-001", "CAMP-001")

    async def asked_again(stage: Stage) -> str:
        [answer] = await stage.issue("lost-1")
        await stage.flush.run_once()
        return Record.unpack(answer.detail).codes[0].code

    other = _adopted(tmp_path, "code,request_id\nCODE-0004,req-9\n", "--yes")
    assert other["reasons"] == {("different", "another request_id"): 1}
    store(lambda stage: stage.refill.run_once())
    assert store(asked_again) == "CODE-0040", "nobody knows the answer that was lost, so the key gets another voucher"
    given = store(Stage.issue_everything)
    assert not {"CODE-0004", "CODE-0005"} & set(given)
    store(Stage.balanced)
    assert [one[:2] for one in store(_logged) if one[0] == "adopt"] == [("adopt", "CAMP-001")], (
        "only one changed something"
    )


KEY = "0b9a5f3e-7c1d-4e2a-9f00-00000000abcd"


def test_a_voucher_of_client_api_v3_is_known_by_its_key_and_by_the_request_id_of_its_answer(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path, 8)

    async def issued(stage: Stage) -> tuple[str, str]:
        await stage.refill.run_once()
        record = await stage.issue_v3(KEY)
        await stage.flush.run_once()
        answered = IDS.request_id(record.rule.id_key, record.client, record.key, record.issued_at)
        return record.codes[0].code, answered

    code, answered = store(issued)
    matched = {"lines": 1, "matched": 1, "reasons": {}}
    for columns, cells in (
        ("request_id", answered),
        ("request_id", answered.upper()),
        ("request_id", KEY.upper()),
        ("request_id,idempotency_key", f"{answered},{KEY.upper()}"),
    ):
        assert _reconciled(_file(tmp_path, f"code,{columns}\n{code},{cells}\n")) == matched, cells
    other = KEY.replace("0b", "0c")
    for columns, cells, off in (
        ("request_id", other, "request_id"),
        ("idempotency_key", other, "idempotency_key"),
        ("idempotency_key", answered, "idempotency_key"),
        ("request_id,idempotency_key", f"{other},{KEY}", "request_id"),
    ):
        found = _reconciled(_file(tmp_path, f"code,{columns}\n{code},{cells}\n"), exit_code=1)
        assert found["reasons"] == {("different", f"another {off}"): 1}, cells


def test_a_code_of_client_api_v3_is_adopted_under_its_key_and_never_under_the_id_of_an_answer(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    ok(
        "product", "create", "GIFT", "--name", "Gift", "--amount", "1000", "--currency", "SGD",
        "--url", "https://v.example/", "--pool", "CAMP-001",
    )  # fmt: skip
    ok("product", "assign", "GIFT", "DIST-001")
    answered = "11111111-2222-4333-8444-555555555555"
    adopt = ("--adopt", "GIFT", "--reason", "lost", "--yes")
    by_answer = _reconciled(_file(tmp_path, f"code,request_id\nCODE-0004,{answered}\n"), *adopt, exit_code=1)
    assert by_answer.get("adoptable", 0) == 0, "nobody asks by the id of an answer"
    both = _file(tmp_path, f"code,request_id,idempotency_key\nCODE-0004,{answered},{KEY.upper()}\n")
    assert _reconciled(both, *adopt, exit_code=1)["adoptable"] == 1
    [found] = orjson.loads(ok("ledger", "find", "--code", "CODE-0004", "--json").stdout)
    assert (found["request_id"], found["campaign_id"]) == (KEY, "GIFT")
    assert _reconciled(both, exit_code=1)["reasons"][("matched", "adopted")] == 1
    store(Stage.balanced)


@pytest.mark.parametrize("by", ["DIST-001", "another key"])
def test_a_late_entry_of_an_adopted_code_takes_its_place_if_it_is_the_same_and_is_an_incident_if_not(
    store: OnStage, tmp_path: Path, by: str
) -> None:
    stocked(tmp_path, CODES)

    entries = store(_fifth_lost)
    key = "late" if by == "DIST-001" else "claimed"
    _adopted(tmp_path, f"code,request_id\nCODE-0004,{key}\n", "--yes")

    async def late(stage: Stage) -> tuple[int, int]:
        done = await stage.flush.settle(1, entries)
        again = await stage.flush.settle(1, entries)
        assert (again.codes, again.incidents) == (0, 0)
        return done.codes, done.incidents

    assert store(late) == ((1, 0) if by == "DIST-001" else (0, 1))
    found = orjson.loads(ok("ledger", "find", "--code", "CODE-0004", "--json").stdout)
    assert {(one["api"], one["request_id"], one["double"]) for one in found} == (
        {("v1", "late", False)} if by == "DIST-001" else {("adopted", "claimed", False), ("v1", "late", True)}
    )
    if by == "DIST-001":
        store(Stage.balanced)

        async def replayed(stage: Stage) -> str:
            [answer] = await stage.issue("late")
            return f"{answer.status} {Record.unpack(answer.detail).codes[0].code}"

        assert store(replayed) == "REPLAY CODE-0004"
    else:
        [doubled] = [one for one in store(lambda stage: stage.audit()).findings if one.promise == "P1"]
        assert "was issued here, but before it was issued by campaign CAMP-001 in generation 0" in doubled.detail


def test_no_adopted_request_is_restored_as_a_replay(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    _adopted(tmp_path, "code,request_id\nCODE-0004,lost-1\n", "--yes")

    async def lose_again(stage: Stage) -> set[str]:
        await stage.scripts.redis.flushall()
        assert await stage.open() == 3
        return {key async for key in stage.scripts.redis.scan_iter("*lost-1")}

    assert store(lose_again) == set()
    store(Stage.balanced)


def test_who_can_not_have_received_a_code_adopts_none(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path, CODES)
    store(_lost)
    ok("distributor", "create", "DIST-002", "--name", "Another")
    received = _file(tmp_path, "code,request_id\nCODE-0004,lost-1\n")
    adopt = ("--adopt", "CAMP-001", "--reason", "x", "--yes")
    refused("reconcile", received, "--distributor", "DIST-002", *adopt, says="is assigned to no campaign of pool")
    refused(
        "reconcile", received, "--distributor", "DIST-001", "--adopt", "NONE", "--reason", "x",
        says="there is no campaign NONE",
    )  # fmt: skip
    for wrong in (
        (*adopt, "--distributor", "DIST-002"),
        ("--adopt", "CAMP-001", "--yes"),
        (*adopt, *UNTIL, "--return-unseen", "CAMP-001"),
    ):
        assert run("reconcile", received, "--distributor", "DIST-001", *wrong).exit_code == 2
    assert orjson.loads(ok("codes", "count", "--json").stdout)[0]["quarantined"] == 36
