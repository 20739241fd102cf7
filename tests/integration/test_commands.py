"""The operator's commands, on real servers: what they print, how they end, and what is in force when they return."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from loadtest.servers import RedisServer, free_port
from service import keys
from service.catalogue import Cap
from service.cli.lock import only_one
from service.errors import Misconfigured
from service.store import schema
from service.tokens import digest, well_formed
from service.worker import balance, patience
from tests.integration.conftest import sqlite_url
from tests.integration.stage import Stage
from tests.integration.typed import OnStage, fence, ok, refused, run, snapshot, stocked, three_issued


def test_from_nothing_to_an_audited_voucher(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(three_issued)
    found = orjson.loads(ok("ledger", "find", "--request-id", "req-2", "--json").stdout)
    assert [one["request_id"] for one in found] == ["req-2"]
    assert (found[0]["distributor_id"], found[0]["campaign_id"], found[0]["pool"]) == (
        "DIST-001",
        "CAMP-001",
        "CAMP-001",
    )
    code = found[0]["voucher_code"]
    assert found == orjson.loads(ok("ledger", "find", "--code", code, "--json").stdout)
    shown = ok("ledger", "find", "--code", code).stdout
    assert code in shown
    assert "AT-" not in shown
    everything = ok("ledger", "find", "--distributor", "DIST-001").stdout
    assert all(f"req-{number}" in everything for number in (1, 2, 3))
    assert max(map(len, everything.splitlines())) <= 90
    audited = ok("audit").stdout
    assert "The books balance." in audited
    assert max(map(len, audited.splitlines())) <= 90
    as_json = orjson.loads(ok("audit", "--json").stdout)
    assert as_json["balanced"] is True
    assert as_json["partition"]["popped"] == 3
    status = orjson.loads(ok("status", "--json").stdout)
    assert status["partition"]["issuing"] is True
    assert (status["pools"][0]["left"], status["pools"][0]["window"], status["pools"][0]["low_water"]) == (10, 37, 20)
    # 37 codes in the window and 10 in the store, at 50 vouchers a second: less than a second
    assert status["partition"]["outage_s"] == 0
    assert "CAMP-001" in ok("status").stdout


def test_what_is_not_in_the_ledger_is_not_found(store: OnStage) -> None:
    result = run("ledger", "find", "--request-id", "none", "--json")
    assert (result.exit_code, result.stdout) == (1, "[]\n")


def test_campaign_comes_with_its_pool_in_one_publication(store: OnStage) -> None:
    ok("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY", "--product", "PAY2")
    found = store(snapshot)
    assert (found.version, found.pools[0].id, found.campaigns[0].pool) == (1, "CAMP-001", "CAMP-001")
    assert (found.campaigns[0].products, found.campaigns[0].until) == (("PAY", "PAY2"), 0)
    assert store(fence) == (1, 1)

    async def expiry(stage: Stage) -> int:
        async with stage.database.read() as conn:
            return int(await conn.scalar(select(schema.pools.c.default_expires_at)) or 0)

    days = (store(expiry) - time.time()) / 86_400
    assert 364 < days < 367
    assert store(expiry) % 86_400 == 86_399
    refused("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY", says="--pool CAMP-001")
    refused(
        "campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY", "--pool", "CAMP-001",
        says="campaign CAMP-001 exists already",
    )  # fmt: skip
    assert store(fence) == (1, 1)


def test_campaign_takes_all_its_options(store: OnStage) -> None:
    ok("pool", "create", "SHARED", "--expires", "2031-12-31", "--least-life", "7d")
    ok(
        "campaign", "create", "C", "--category", "CAT", "--product", "P", "--pool", "SHARED", "--priority", "7",
        "--from", "2030-07-01", "--until", "2030-07-31", "--time-zone", "Europe/Berlin",
        "--cap", "total=5000", "--cap", "distributor:day=100", "--cap", "terminal:hour=1",
    )  # fmt: skip
    ok("distributor", "create", "D")
    ok("campaign", "assign", "C", "D", "--cap", "day=10", "--terminal-cap", "total=1")
    found = store(snapshot)
    assert (found.pools[0].id, found.pools[0].least_life_s) == ("SHARED", 7 * 86_400)
    campaign = found.campaigns[0]
    assert (campaign.priority, campaign.time_zone) == (7, "Europe/Berlin")
    assert campaign.starts_at == 1_909_087_200  # 2030-06-30T22:00:00Z: midnight in Berlin
    assert campaign.until - campaign.starts_at == 31 * 86_400
    assert set(campaign.caps) == {
        Cap("campaign", "total", 5_000), Cap("distributor", "day", 100), Cap("terminal", "hour", 1),
    }  # fmt: skip
    assert set(campaign.assigned["D"]) == {Cap("distributor", "day", 10), Cap("terminal", "total", 1)}
    ok("campaign", "assign", "C", "D")
    assert store(snapshot).campaigns[0].assigned == {"D": ()}


def test_pause_and_resume_are_in_force_when_they_return(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    for command, paused in (("pause", True), ("resume", False)):
        ok("campaign", command, "CAMP-001")
        assert store(snapshot).campaigns[0].paused is paused
        in_force, stored = store(fence)
        assert in_force == stored


def test_token_is_shown_once_and_kept_as_its_digest(store: OnStage) -> None:
    ok("distributor", "create", "DIST-001")
    issued = orjson.loads(ok("token", "issue", "DIST-001", "--json").stdout)
    token = issued["token"]
    assert issued["distributor_id"] == "DIST-001"
    assert well_formed(token)
    assert store(snapshot).tokens == {digest(token): "DIST-001"}

    plain = ok("token", "issue", "DIST-001")
    second = plain.stdout.strip()
    assert well_formed(second)
    assert "shown once" in plain.stderr
    assert len(store(snapshot).tokens) == 2

    third = orjson.loads(ok("token", "rotate", "DIST-001", "--json").stdout)
    assert third["revoked"] == 2
    assert store(snapshot).tokens == {digest(third["token"]): "DIST-001"}

    assert "1 token revoked" in ok("token", "revoke", "--token", "-", typed=third["token"] + "\n").stdout
    assert store(snapshot).tokens == {}
    assert "revoked already" in ok("token", "revoke", "--token", third["token"]).stdout
    ok("token", "issue", "DIST-001")
    assert "1 token revoked" in ok("token", "revoke", "--distributor", "DIST-001").stdout
    assert store(snapshot).tokens == {}

    async def logged(stage: Stage) -> list[Any]:
        async with stage.database.read() as conn:
            return list(await conn.execute(select(schema.audit_log)))

    log = store(logged)
    assert [row.action for row in log] == [
        "distributor create", "token issue", "token issue", "token rotate", "token revoke", "token revoke",
        "token issue", "token revoke",
    ]  # fmt: skip
    assert all(row.actor for row in log)
    assert "vch_" not in repr(log)


def test_audit_says_what_is_off(store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "LOOKS_MAX", 3)
    stocked(tmp_path)

    async def damage(stage: Stage) -> None:
        await three_issued(stage)
        await stage.scripts.redis.lpop(keys.window(0, 1, "CAMP-001"))

    store(damage)
    result = run("audit")
    assert result.exit_code == 1
    assert "The books balance" not in result.stdout
    assert "lot 1 seq 3" in " ".join(result.stdout.split())
    assert result.stderr.startswith("voucherd: the books do not balance: ")
    assert max(map(len, result.stdout.splitlines())) <= 90
    as_json = run("audit", "--json")
    assert as_json.exit_code == 1
    report = orjson.loads(as_json.stdout)
    assert report["balanced"] is False
    assert {one["promise"] for one in report["findings"]} == {"P5"}


def test_quarantine_is_named_and_no_finding(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)

    async def lose(stage: Stage) -> None:
        await three_issued(stage)
        await stage.issue("unflushed")
        await stage.scripts.redis.flushall()
        await stage.open()

    store(lose)
    report = orjson.loads(ok("audit", "--quarantine", "--json").stdout)
    assert [one["codes"] for one in report["quarantine"]] == [37]
    assert len(report["quarantined_codes"]) == 37
    assert {"lot", "seq", "serial_number", "pool", "generation"} <= set(report["quarantined_codes"][0])
    shown = ok("audit", "--quarantine").stdout
    assert report["quarantined_codes"][-1]["serial_number"] in shown
    assert orjson.loads(ok("status", "--json").stdout)["quarantined"] == 37


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["pool"],
        ["pool", "create"],
        ["pool", "create", "P", "--least-life", "a while"],
        ["pool", "create", "P", "--expires", "31.12.2030"],
        ["campaign", "create", "C"],
        ["campaign", "create", "C", "--category", "C", "--product", "P", "--cap", "week=1"],
        ["campaign", "create", "C", "--category", "C", "--product", "P", "--cap", "day=-1"],
        ["campaign", "create", "C", "--category", "C", "--product", "P", "--time-zone", "Berlin"],
        ["campaign", "create", "C", "--category", "C", "--product", "P", "--time-zone", "../etc"],
        ["campaign", "create", "C", "--category", "C", "--product", "P", "--from", "soon"],
        ["token", "revoke"],
        ["token", "revoke", "--token", "vch_x"],
        ["token", "revoke", "--token", "vch_x", "--distributor", "D"],
    ],
)
def test_mistyped_command_ends_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_faults_are_one_line(store: OnStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused("campaign", "pause", "NONE", says="there is no campaign NONE")
    refused("campaign", "assign", "NONE", "D", says="there is no campaign NONE")
    refused("token", "issue", "NONE", says="there is no distributor NONE")
    refused("token", "rotate", "NONE", says="there is no distributor NONE")
    refused("distributor", "create", "no good", says="can't name a distributor")
    refused("pool", "create", "P", "--expires", "2020-01-01", says="in the future")
    ok("pool", "create", "P")
    refused("pool", "create", "P", says="exists already")
    refused("audit", "--data-dir", str(tmp_path), says="start `voucherd up")
    monkeypatch.setenv("VOUCHERD_PORT", "many")
    refused("status", says="VOUCHERD_PORT")
    monkeypatch.delenv("VOUCHERD_PORT")
    monkeypatch.setenv("VOUCHERD_STORE_URL", "mysql://x")
    refused("status", says="VOUCHERD_STORE_URL")
    monkeypatch.setenv("VOUCHERD_STORE_URL", sqlite_url(tmp_path / "nothing.db"))
    refused("audit", says="run `voucherd migrate`")
    assert not (tmp_path / "nothing.db").exists()
    monkeypatch.setenv("VOUCHERD_STORE_URL", f"postgresql+asyncpg://me:secret@127.0.0.1:{free_port()}/x")
    refused("audit", says="see that the store runs")


@pytest.mark.parametrize(
    "typed",
    [
        ("product", "pause", "caf\udce9"), ("distributor", "suspend", "caf\udce9"), ("pool", "show", "caf\udce9"),
        ("ledger", "find", "--request-id", "caf\udce9"), ("client", "create", "C", "--distributor", "caf\udce9"),
    ],
)  # fmt: skip
def test_a_name_in_another_encoding_is_one_line_that_says_so(store: OnStage, typed: tuple[str, ...]) -> None:
    refused(*typed, says="what was typed is not text in UTF-8")


def test_migrate_makes_a_store(store: OnStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VOUCHERD_STORE_URL", sqlite_url(tmp_path / "new" / "voucherd.db"))
    for _ in range(2):
        ok("migrate")
    assert "there is no campaign C" in run("campaign", "pause", "C").stderr


def test_change_without_redis_is_stored_and_said_not_to_be_in_force(
    store: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNREACHED_S", 0.2)
    monkeypatch.setenv("VOUCHERD_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    result = run("distributor", "create", "DIST-001")
    assert result.exit_code == 1
    assert "NOT YET IN FORCE" in result.stderr
    token = run("token", "issue", "DIST-001", "--json")
    assert token.exit_code == 1
    assert well_formed(orjson.loads(token.stdout)["token"])  # stored, so it must not be lost
    assert store(snapshot).distributors == {"DIST-001": True}
    assert store(fence) == (0, 2)
    refused("audit", says="see that Redis runs")
    status = run("status")
    assert status.exit_code == 1
    assert "Redis did not answer" in status.stderr


def test_status_without_the_store_says_how_long_it_lasts(
    store: OnStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stocked(tmp_path)
    store(three_issued)
    monkeypatch.setenv("VOUCHERD_STORE_URL", f"postgresql+asyncpg://me@127.0.0.1:{free_port()}/x")
    monkeypatch.setenv("VOUCHERD_PLANNED_RATE", "5")
    result = run("status", "--json")
    assert result.exit_code == 1
    found = orjson.loads(result.stdout)
    assert found["catalogue"] is None
    assert found["partition"]["outage_s"] == 7
    assert found["pools"][0]["window"] == 37
    assert "the store did not answer" in found["wrong"][0]


def test_lock_has_one_holder_and_a_file_left_behind_means_nothing(tmp_path: Path) -> None:
    path, taken = tmp_path / "{0}.worker", "taken by {pid}"
    with (
        only_one(path, taken),
        pytest.raises(Misconfigured, match=f"taken by {os.getpid()}"),
        only_one(path, taken),
    ):
        pass
    with only_one(path, taken):
        pass
    with pytest.raises(Misconfigured, match="can't be had"), only_one(tmp_path / "none" / "here", taken):
        pass


def test_commands_of_a_data_dir_use_its_servers(
    new_valkey: Callable[[], RedisServer], migrated_sqlite_url: str, tmp_path: Path
) -> None:
    """Through a process of its own, as a terminal does it: whatever the environment says, --data-dir wins."""
    server = new_valkey()
    server.start()
    data_dir = tmp_path / "var"
    data_dir.mkdir()
    urls = {"redis_url": server.url, "store_url": migrated_sqlite_url}
    (data_dir / "connection.json").write_bytes(orjson.dumps(urls))
    environment = {**os.environ, "VOUCHERD_REDIS_URL": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-m", "service.cli.main", "status", "--json", "--data-dir", str(data_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert orjson.loads(done.stdout)["wrong"] == [
        "no generation is open in Redis, nothing can be issued: see that `voucherd work` runs"
    ]


def test_status_shows_the_burn_rate_and_when_the_pool_is_empty(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(three_issued)
    [pool] = orjson.loads(ok("status", "--json").stdout)["pools"]
    assert (pool["last_minute"], pool["empty_in_s"]) == (3, 60 * 47 // 3)
    shown = ok("status").stdout
    assert "15 min 40 s" in shown
    assert "outbox lag" in shown
    assert max(map(len, shown.splitlines())) <= 90


def test_status_shows_the_pools_that_need_somebody_and_says_how_many_more_there_are(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(tmp_path)
    for number in range(3):
        ok("pool", "create", f"AAA-{number}")
    store(three_issued)
    monkeypatch.setattr("service.cli.status.POOLS_SHOWN", 1)
    shown = ok("status").stdout
    assert "CAMP-001" in shown, "the one that is asked, not the first by name"
    assert "AAA-" not in shown
    assert "and 3 pools more" in shown
    ok("campaign", "create", "EMPTY", "--category", "EMPTY", "--product", "EMPTY", "--pool", "AAA-2")
    ok("campaign", "assign", "EMPTY", "DIST-001")
    shown = ok("status").stdout
    assert "AAA-2" in shown and "exhausted" in shown, "one that is asked and empty comes before one that will be"
    assert "CAMP-001" not in shown
    assert [pool["pool"] for pool in orjson.loads(ok("status", "--json").stdout)["pools"]] == [
        "AAA-0", "AAA-1", "AAA-2", "CAMP-001",
    ]  # fmt: skip


def test_status_that_watches_goes_on_until_it_is_interrupted(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(tmp_path)
    looks = 0

    async def third_time_interrupted(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("service.cli.status.asyncio", SimpleNamespace(run=asyncio.run, sleep=third_time_interrupted))
    result = run("status", "--watch", "--json")
    assert result.exit_code == 0
    assert [orjson.loads(line)["catalogue"] for line in result.stdout.splitlines()] == [3, 3, 3]
    looks = 0
    assert "CAMP-001" in ok("status", "--watch").stdout
