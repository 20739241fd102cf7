"""Exports and settlements through the real command line, on real servers: whole, safe, the same again."""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import update

from service import keys
from service.store import schema
from service.store.ledger import Found
from service.worker import settlement
from service.worker.export import FIELDS, lines, part_of, whole_file
from tests.integration.stage import Stage
from tests.integration.typed import ok, refused, run, stocked, three_issued

OnStage = Callable[[Callable[[Stage], Any]], Any]

LAST_WEEK = int(time.time()) // 86_400 * 86_400 - 7 * 86_400
DAY = datetime.fromtimestamp(LAST_WEEK, UTC).strftime("%Y-%m-%d")


async def _a_week_ago(stage: Stage) -> None:
    """Three vouchers, the first two of them a week old."""
    await three_issued(stage)
    async with stage.database.write() as conn:
        for number, second in ((1, 0), (2, 86_399)):
            await conn.execute(
                update(schema.requests)
                .where(schema.requests.c.key == f"req-{number}")
                .values(issued_at=LAST_WEEK + second)
            )


def _ids(text: str) -> list[str]:
    return [row["request_id"] for row in csv.DictReader(io.StringIO(text, newline=""))]


def test_export_holds_what_find_says_in_the_order_of_issuing(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    found = orjson.loads(ok("ledger", "find", "--json").stdout)
    exported = [orjson.loads(line) for line in ok("ledger", "export", "--format", "ndjson").stdout.splitlines()]
    assert exported == sorted(found, key=lambda one: one["request_id"])
    as_csv = ok("ledger", "export").stdout
    assert as_csv.splitlines()[0] == ",".join(FIELDS)
    assert _ids(as_csv) == ["req-1", "req-2", "req-3"]
    assert _ids(ok("ledger", "export", "--from", DAY, "--until", DAY).stdout) == ["req-1", "req-2"]
    before = f"{DAY}T23:59:59Z"
    assert _ids(ok("ledger", "export", "--until", before).stdout) == ["req-1"]
    assert _ids(ok("ledger", "export", "--from", before).stdout) == ["req-2", "req-3"]
    assert _ids(ok("ledger", "export", "--campaign", "CAMP-001", "--distributor", "DIST-001").stdout) == _ids(as_csv)
    assert _ids(ok("ledger", "export", "--campaign", "NONE").stdout) == []
    assert _ids(ok("ledger", "export", "--distributor", "NONE").stdout) == []


def test_cell_is_never_a_formula_and_ndjson_stays_exact() -> None:
    for start in ("=", "+", "-", "@", "\t", "\r"):
        code = f'{start}SUM(A1),"B"\r\n'
        one = Found(0, 1, 1, 0, "v1", "D", "D", "r", "", "", "C", "P", "C", "P", 0, 0, 0, 1, 1, 0, code, "s", 0, False)
        row = next(csv.reader(io.StringIO(lines([one], "csv").decode(), newline="")))
        assert row[0] == "'" + code
        assert orjson.loads(lines([one], "ndjson"))["voucher_code"] == code


def test_period_with_vouchers_in_the_outbox_is_refused(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)

    async def unflushed(stage: Stage) -> None:
        await stage.refill.run_once()
        await stage.issue("req-1")

    store(unflushed)
    soon = datetime.fromtimestamp(int(time.time()) + 2, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    refused("ledger", "export", "--until", "2099-01-01", says="the period is not over")
    deadline = time.monotonic() + 10
    while "still in the outbox" not in (said := run("ledger", "export", "--until", soon)).stderr:
        assert said.exit_code == 1
        assert time.monotonic() < deadline
    refused("ledger", "export", "--until", soon, says="say --incomplete")
    assert _ids(ok("ledger", "export", "--until", soon, "--incomplete").stdout) == []
    assert _ids(ok("ledger", "export", "--until", DAY).stdout) == []  # the outbox is past that
    store(lambda stage: stage.flush.run_once())
    assert _ids(ok("ledger", "export", "--until", soon).stdout) == ["req-1"]


def test_without_redis_nobody_knows_whether_a_period_is_complete(
    store: OnStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VOUCHERD_REDIS_URL", "redis://127.0.0.1:1/0")
    refused("ledger", "export", "--until", DAY, says="say --incomplete")
    refused("ledger", "settle", "--day", DAY, "--output-dir", str(tmp_path), says="say --incomplete")
    assert ok("ledger", "export", "--until", DAY, "--incomplete").stdout.splitlines() == [",".join(FIELDS)]


def test_file_that_could_not_be_finished_is_not_there(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    target = tmp_path / "ledger.csv"
    target.write_text("before\n")
    refused("ledger", "export", "--until", "2099-01-01", "--output", str(target), says="not over")
    assert target.read_text() == "before\n"
    ok("ledger", "export", "--output", str(target))
    assert _ids(target.read_text()) == ["req-1", "req-2", "req-3"]
    assert not list(tmp_path.glob("*.part"))
    refused("ledger", "export", "--output", str(tmp_path / "none" / "ledger.csv"), says="No such file or directory")
    if Path("/dev/full").exists():
        part_of(tmp_path / "full.csv").symlink_to("/dev/full")
        refused("ledger", "export", "--output", str(tmp_path / "full.csv"), says="No space left on device")
        assert not (tmp_path / "full.csv").exists()


def test_interrupted_export_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "ledger.csv"
    target.write_text("before\n")

    def interrupted() -> None:
        with whole_file(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"ledger.csv": "before\n"}


def test_closed_pipe_ends_in_silence(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli.main", "ledger", "export"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_what_was_typed_wrong_is_said(store: OnStage, tmp_path: Path) -> None:
    for arguments in (
        ("export", "--from", "2026-01-02", "--until", "2026-01-01"),
        ("export", "--from", "yesterday"),
        ("export", "--format", "xml"),
        ("export", "--time-zone", "Mars"),
        ("settle", "--day", "today", "--output-dir", str(tmp_path)),
        ("settle", "--day", "2026-02-30", "--output-dir", str(tmp_path)),
    ):
        result = run("ledger", *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments


def test_settlement_is_the_same_again_and_a_partner_can_check_it(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    ok("distributor", "create", "DIST-002", "--name", "Another one")
    store(_a_week_ago)
    folder = tmp_path / "out"
    told = orjson.loads(ok("ledger", "settle", "--day", DAY, "--output-dir", str(folder), "--json").stdout)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(content) == {
        f"settlement-{DAY}.DIST-001.csv",
        f"settlement-{DAY}.DIST-002.csv",
        f"settlement-{DAY}.manifest.json",
    }
    assert orjson.loads(content[f"settlement-{DAY}.manifest.json"]) == told
    assert [(one["distributor_id"], one["vouchers"]) for one in told["files"]] == [("DIST-001", 2), ("DIST-002", 0)]
    for one in told["files"]:
        assert hashlib.sha256(content[one["file"]]).hexdigest() == one["sha256"]
        assert content[one["file"]].count(b"\n") == one["vouchers"] + 1
    assert told["totals"] == {"files": 2, "vouchers": 2, "bytes": sum(one["bytes"] for one in told["files"])}
    ok("ledger", "settle", "--day", DAY, "--output-dir", str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_settlement_that_says_otherwise_is_not_overwritten(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    folder = tmp_path / "out"
    settle = ("ledger", "settle", "--day", DAY, "--output-dir", str(folder))
    refused(*settle, "--distributor", "NONE", says="there is no distributor NONE")
    ok(*settle)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}

    async def later(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(update(schema.requests).values(issued_at=LAST_WEEK + 5))

    store(later)
    refused(*settle, says="--force")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    ok(*settle, "--force")
    assert (folder / f"settlement-{DAY}.DIST-001.csv").read_bytes().count(b"\n") == 4
    ok(*settle, "--distributor", "DIST-001")
    assert (folder / f"settlement-{DAY}.DIST-001.manifest.json").exists()
    (folder / f"settlement-{DAY}.manifest.json").write_text("{}")
    refused(*settle, says="is no manifest")
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    refused("ledger", "settle", "--day", today, "--output-dir", str(folder), says="the period is not over")


def test_settlement_on_a_full_disk_is_told_and_leaves_nothing(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    folder = tmp_path / "out"
    folder.mkdir()
    part_of(folder / f"settlement-{DAY}.DIST-001.csv").symlink_to("/dev/full")
    refused("ledger", "settle", "--day", DAY, "--output-dir", str(folder), says="No space left on device")
    assert list(folder.iterdir()) == []


def test_a_manifest_is_there_only_while_it_is_true(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(tmp_path)
    ok("distributor", "create", "DIST-002", "--name", "Another one")
    store(_a_week_ago)
    folder = tmp_path / "out"
    settle = ("ledger", "settle", "--day", DAY, "--output-dir", str(folder))
    ok(*settle)

    async def later(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(update(schema.requests).values(issued_at=LAST_WEEK + 5))

    store(later)
    finish = settlement._Growing.finish

    def killed(self: Any) -> None:
        finish(self)
        raise SystemExit(9)  # after the first file

    with monkeypatch.context() as patched:
        patched.setattr(settlement._Growing, "finish", killed)
        assert run(*settle, "--force").exit_code == 9
    assert not (folder / f"settlement-{DAY}.manifest.json").exists()
    told = orjson.loads(ok(*settle, "--json").stdout)
    for one in told["files"]:
        assert hashlib.sha256((folder / one["file"]).read_bytes()).hexdigest() == one["sha256"]


def test_a_period_with_vouchers_of_a_generation_that_was_left_is_refused(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)

    async def left_behind(stage: Stage) -> None:
        await stage.refill.run_once()
        await stage.issue("req-1")
        redis, outbox = stage.scripts.redis, keys.outbox(0, 1)
        _, entry = (await redis.xrange(outbox))[0]
        other = {"replid": "0" * 40, "run_id": "0" * 40}  # another server, as far as anybody can tell
        await redis.hset(keys.generation(0), mapping=other)
        assert await stage.open() == 2
        await redis.xadd(outbox, entry)  # a write of the old server that came late

    store(left_behind)
    soon = datetime.fromtimestamp(int(time.time()) + 1, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    deadline = time.monotonic() + 10
    while "is not over" in (said := run("ledger", "export", "--until", soon)).stderr:
        assert time.monotonic() < deadline
    assert "still in the outbox" in said.stderr
    store(lambda stage: stage.flush.drain(1))
    assert _ids(ok("ledger", "export", "--until", soon).stdout) == ["req-1"]


def test_a_code_that_was_wrongly_issued_twice_is_exported_twice_and_marked(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)

    async def twice(stage: Stage) -> None:
        await stage.refill.run_once()
        window = keys.window(0, 1, "CAMP-001")
        code = await stage.scripts.redis.lindex(window, 0)
        await stage.issue("req-1")
        await stage.scripts.redis.lpush(window, code)  # nothing of ours does that
        await stage.issue("req-2")
        assert (await stage.flush.run_once()).incidents == 1

    store(twice)
    exported = [orjson.loads(line) for line in ok("ledger", "export", "--format", "ndjson").stdout.splitlines()]
    assert [(one["request_id"], one["double"]) for one in exported] == [("req-1", False), ("req-2", True)]
    assert exported[0]["voucher_code"] == exported[1]["voucher_code"]


def test_a_whole_day_s_manifest_stays_true_when_one_distributor_is_settled_alone(
    store: OnStage, tmp_path: Path
) -> None:
    stocked(tmp_path)
    store(_a_week_ago)
    folder = tmp_path / "out"
    settle = ("ledger", "settle", "--day", DAY, "--output-dir", str(folder))
    whole, one = folder / f"settlement-{DAY}.manifest.json", folder / f"settlement-{DAY}.DIST-001.manifest.json"
    ok(*settle)
    ok(*settle, "--distributor", "DIST-001")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {whole.name, one.name} <= set(content)

    async def later(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(update(schema.requests).values(issued_at=LAST_WEEK + 5))

    store(later)
    refused(*settle, "--distributor", "DIST-001", says="says otherwise")
    refused(*settle, says="says otherwise")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    ok(*settle, "--distributor", "DIST-001", "--force")
    assert not whole.exists()
    ok(*settle)
    for manifest in (whole, one):
        for file in orjson.loads(manifest.read_bytes())["files"]:
            assert hashlib.sha256((folder / file["file"]).read_bytes()).hexdigest() == file["sha256"]
