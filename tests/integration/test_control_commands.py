"""The commands that show and change the control plane: what they print, and what is in force when they return."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import select, update

from service.catalogue import Cap
from service.domain import RateLimit, instant
from service.store import schema
from service.tokens import digest
from tests.integration.stage import Stage
from tests.integration.typed import OnStage, fence, ok, refused, run, snapshot

WIDTH = 80  # columns of the narrowest terminal that tables have to fit


def shown(*arguments: str) -> Any:
    return orjson.loads(ok(*arguments, "--json").stdout)


def fits(*arguments: str) -> str:
    """What the command prints into a terminal of 80 columns."""
    printed = ok(*arguments, columns=WIDTH).stdout
    assert max(map(len, printed.splitlines())) <= WIDTH, printed
    return printed


def furnish(*campaigns: str) -> None:
    """Distributors D and E, and campaigns for PAY on one pool; D may issue by all of them."""
    ok("distributor", "create", "D", "--name", "A partner")
    ok("distributor", "create", "E")
    ok("pool", "create", "P", "--expires", "2035-12-31", "--least-life", "7d")
    for id in campaigns or ("C",):
        ok("campaign", "create", id, "--category", "CAT", "--product", "PAY", "--pool", "P")
        ok("campaign", "assign", id, "D")


# --- lists and shows -----------------------------------------------------------------------------------------


def test_nothing_is_listed_where_nothing_is(store: OnStage) -> None:
    for noun in ("pool", "campaign", "distributor", "token"):
        assert shown(noun, "list") == []
        assert ok(noun, "list").stdout


def test_pool_shows_every_lot_and_no_code(store: OnStage, tmp_path: Path) -> None:
    furnish()
    lines = [f"CODE-{number:03},{'2034-01-01' if number < 30 else ''}\n" for number in range(50)]
    (tmp_path / "codes.csv").write_text("code,expires_at\n" + "".join(lines))
    ok("codes", "import", "P", str(tmp_path / "codes.csv"))

    async def lease(stage: Stage) -> None:
        await stage.refill.run_once()

    (tmp_path / "leaked.csv").write_text("code\nCODE-049\nCODE-048\n")
    ok("pool", "withdraw", "P", "--codes", str(tmp_path / "leaked.csv"), "--reason", "leaked", "--yes")
    store(lease)
    [listed] = shown("pool", "list")
    assert (listed["imported"], listed["withdrawn"]) == (50, 2)
    assert listed["imported"] == listed["stored"] + listed["leased"] + listed["withdrawn"]
    found = shown("pool", "show", "P")
    assert (found["pool"], found["default_expires_at"], found["least_life_s"]) == (
        "P", "2035-12-31T23:59:59Z", 604_800,
    )  # fmt: skip
    assert [(lot["expires_at"], lot["imported"], lot["withdrawn"]) for lot in found["lots"]] == [
        ("2034-01-01T23:59:59Z", 30, 0), ("2035-12-31T23:59:59Z", 20, 2),
    ]  # fmt: skip
    assert found["lots"][0]["leased"] == 30
    for lot in (*found["lots"], found):
        assert lot["imported"] == lot["stored"] + lot["leased"] + lot["withdrawn"]
    [audited] = orjson.loads(ok("audit", "--json").stdout)["pools"]
    assert {name: found[name] for name in ("imported", "stored", "leased", "withdrawn")} == {
        name: audited[name] for name in ("imported", "stored", "leased", "withdrawn")
    }
    page = fits("pool", "show", "P")
    assert "7d" in page and "2034-01-01T23:59:59Z" in page and "CODE-" not in page
    assert "P" in fits("pool", "list")
    ok("pool", "create", "EMPTY")
    page = ok("pool", "show", "EMPTY").stdout
    assert "each code brings its own" in page and "codes import EMPTY" in page
    refused("pool", "show", "NONE", says="there is no pool NONE")


def test_campaign_shows_all_there_is(store: OnStage) -> None:
    furnish()
    ok(
        "campaign", "create", "A-CAMPAIGN", "--category", "CAT", "--product", "PAY", "--product", "MOB", "--pool", "P",
        "--priority", "7", "--from", "2034-07-01", "--until", "2034-07-31", "--time-zone", "Europe/Berlin",
        "--cap", "total=5000", "--cap", "terminal:hour=1",
    )  # fmt: skip
    ok("campaign", "assign", "A-CAMPAIGN", "D", "--cap", "day=10", "--terminal-cap", "total=1")
    ok("campaign", "assign", "A-CAMPAIGN", "E")
    ok("distributor", "suspend", "E")
    found = shown("campaign", "show", "A-CAMPAIGN")
    assert {name: found[name] for name in ("category", "products", "pool", "priority", "time_zone", "paused")} == {
        "category": "CAT", "products": ["MOB", "PAY"], "pool": "P", "priority": 7, "time_zone": "Europe/Berlin",
        "paused": False,
    }  # fmt: skip
    assert (found["from"], found["until"], found["state"]) == (
        "2034-06-30T22:00:00Z", "2034-07-31T22:00:00Z", "not yet",
    )  # fmt: skip
    assert found["caps"] == [
        {"holder": "campaign", "period": "total", "limit": 5_000}, {"holder": "terminal", "period": "hour", "limit": 1},
    ]  # fmt: skip
    assert [(one["distributor_id"], one["active"], len(one["caps"])) for one in found["assigned"]] == [
        ("D", True, 2), ("E", False, 0),
    ]  # fmt: skip
    page = fits("campaign", "show", "A-CAMPAIGN")
    assert "campaign:total=5000, terminal:hour=1" in page and "suspended" in page and str(found["version"]) in page
    listed = shown("campaign", "list")
    assert [one["campaign_id"] for one in listed] == ["A-CAMPAIGN", "C"]
    assert (listed[1]["state"], listed[1]["until"], listed[1]["distributors"]) == ("running", None, ["D"])
    assert "A-CAMPAIGN" in fits("campaign", "list")
    refused("campaign", "show", "NONE", says="there is no campaign NONE")


def test_distributor_is_stopped_and_goes_on(store: OnStage) -> None:
    furnish()
    ok("token", "issue", "D")
    for command, active in (("suspend", False), ("resume", True)):
        ok("distributor", command, "D")
        assert store(snapshot).distributors == {"D": active, "E": True}
        in_force, stored = store(fence)
        assert in_force == stored
        assert [(one["distributor_id"], one["active"]) for one in shown("distributor", "list")] == [
            ("D", active), ("E", True),
        ]  # fmt: skip
    assert [(one["name"], one["tokens"], one["campaigns"]) for one in shown("distributor", "list")] == [
        ("A partner", 1, 1), ("E", 0, 0),
    ]  # fmt: skip
    assert "A partner" in fits("distributor", "list")
    refused("distributor", "suspend", "NONE", says="there is no distributor NONE")


def test_limit_is_in_force_when_the_command_returns_and_goes_as_it_came(store: OnStage) -> None:
    furnish()
    ok("distributor", "limit", "D", "50")
    ok("distributor", "create", "F", "--rate", "2", "--burst", "7200")
    assert store(snapshot).limits == {"D": RateLimit(50, 50), "F": RateLimit(2, 7_200)}
    assert "50/s, 200 at once" in ok("distributor", "limit", "D", "50", "--burst", "200").stdout
    in_force, stored = store(fence)
    assert in_force == stored
    assert [(one["rate"], one["burst"]) for one in shown("distributor", "list")] == [
        (50, 200),
        (None, None),
        (2, 7_200),
    ]
    assert "50/s" in fits("distributor", "list")
    ok("distributor", "limit", "D", "3")
    assert store(snapshot).limits["D"] == RateLimit(3, 20), "a whole order could never be filled"
    ok("distributor", "limit", "D", "none")
    assert store(snapshot).limits == {"F": RateLimit(2, 7_200)}


def test_limit_that_could_not_be_kept_is_refused(store: OnStage) -> None:
    furnish()
    for wrong in (("5", "--burst", "19"), ("5", "--burst", "18001"), ("0",), ("1000001",)):
        refused("distributor", "limit", "D", *wrong, says="at least 20" if len(wrong) > 1 else "1 to 1,000,000")
    refused("distributor", "limit", "NONE", "5", says="there is no distributor NONE")
    for typed in (("5.5",), ("-1",), ("many",), ("none", "--burst", "20")):
        assert run("distributor", "limit", "D", *typed).exit_code == 2
    assert run("distributor", "create", "G", "--burst", "20").exit_code == 2
    refused("distributor", "create", "G", "--rate", "5", "--burst", "1", says="at least 20")
    assert store(snapshot).limits == {}
    assert "G" not in store(snapshot).distributors


def test_no_token_is_ever_listed(store: OnStage) -> None:
    furnish()
    first = shown("token", "issue", "D")["token"]
    second = shown("token", "rotate", "D")["token"]
    third = shown("token", "issue", "E")["token"]
    listed = shown("token", "list")
    assert [(one["distributor_id"], one["revoked_at"] is not None) for one in listed] == [
        ("D", True), ("D", False), ("E", False),
    ]  # fmt: skip
    for one, token in zip(listed, (first, second, third), strict=True):
        assert digest(token).startswith(one["sha256_begins"])
        assert len(one["sha256_begins"]) < 64
    assert [one["id"] for one in shown("token", "list", "--distributor", "E")] == [listed[2]["id"]]
    page = fits("token", "list")
    assert listed[0]["sha256_begins"] in page
    for token in (first, second, third):
        assert token not in page + str(listed)
        assert digest(token) not in page + str(listed)
    refused("token", "list", "--distributor", "NONE", says="there is no distributor NONE")


# --- changes -------------------------------------------------------------------------------------------------


def test_unassigned_distributor_gets_nothing_of_the_campaign(store: OnStage) -> None:
    furnish("C", "OTHER")
    ok("campaign", "assign", "C", "D", "--cap", "day=1")
    ok("campaign", "unassign", "C", "D")
    found = {one.id: one for one in store(snapshot).campaigns}
    assert (found["C"].assigned, list(found["OTHER"].assigned)) == ({}, ["D"])
    in_force, stored = store(fence)
    assert in_force == stored
    refused("campaign", "unassign", "C", "D", says="distributor D is not assigned to campaign C")
    refused("campaign", "unassign", "NONE", "D", says="there is no campaign NONE")
    ok("campaign", "assign", "C", "D")
    assert {one.id: one for one in store(snapshot).campaigns}["C"].assigned == {"D": ()}, "its caps were gone"


def test_single_caps_change_and_no_other(store: OnStage) -> None:
    furnish()
    ok("campaign", "cap", "C", "total=5000", "terminal:hour=2")
    ok("campaign", "cap", "C", "D", "day=10", "terminal:total=1")
    ok("campaign", "assign", "C", "E", "--cap", "day=7")

    async def counted_from(stage: Stage) -> dict[tuple[str, str], int]:
        async with stage.database.write() as conn:
            await conn.execute(update(schema.caps).values(counted_from=1_000))
            return {(row.distributor, row.period): row.counted_from for row in await conn.execute(select(schema.caps))}

    store(counted_from)
    assert "campaign:day=100" in ok("campaign", "cap", "C", "day=100", "total=none").stdout
    ok("campaign", "cap", "C", "D", "distributor:day=20", "hour=3")
    [campaign] = store(snapshot).campaigns
    assert set(campaign.caps) == {Cap("campaign", "day", 100), Cap("terminal", "hour", 2)}
    assert set(campaign.assigned["D"]) == {
        Cap("distributor", "day", 20), Cap("distributor", "hour", 3), Cap("terminal", "total", 1),
    }  # fmt: skip
    assert campaign.assigned["E"] == (Cap("distributor", "day", 7),)

    async def rows(stage: Stage) -> dict[tuple[str, str, str], int]:
        async with stage.database.read() as conn:
            found = await conn.execute(select(schema.caps))
            return {(row.distributor, row.holder, row.period): row.counted_from for row in found}

    counted = store(rows)
    assert counted["D", "distributor", "day"] == 1_000, "a new limit does not begin to count anew"
    assert counted["D", "distributor", "hour"] > 1_000
    ok("campaign", "cap", "C", "hour=none")
    assert store(snapshot).campaigns == (campaign,), "taking away what is not there changes nothing"


def test_caps_that_can_not_be_are_refused(store: OnStage) -> None:
    furnish()
    before = store(snapshot)
    refused("campaign", "cap", "C", "E", "day=1", says="distributor E is not assigned to campaign C")
    refused("campaign", "cap", "C", "D", "campaign:day=1", says="can't have a cap per campaign and day")
    refused("campaign", "cap", "C", "D", "campaign:day=none", says="can't have a cap per campaign and day")
    refused("campaign", "cap", "C", "day=9999999999999999", says="has to lie within")
    refused("campaign", "cap", "NONE", "day=1", says="there is no campaign NONE")
    assert store(snapshot) == before
    for arguments in (
        ["C"], ["C", "D"], ["C", "week=1"], ["C", "day=-1"], ["C", "day=1", "day=2"],
        ["C", "day=1", "campaign:day=none"], ["C", "D", "E", "day=1"], ["C", "day="],
        ["C", "day=1", "--if-version", "x"],
    ):  # fmt: skip
        result = run("campaign", "cap", *arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


def test_ended_campaign_is_over_for_good(store: OnStage, tmp_path: Path) -> None:
    async def prepare(stage: Stage) -> None:
        await stage.campaign("C")

    store(prepare)
    (tmp_path / "codes.csv").write_text("code\n" + "".join(f"CODE-{number}\n" for number in range(40)))
    ok("codes", "import", "C", str(tmp_path / "codes.csv"))

    async def ask(stage: Stage) -> str:
        await stage.refill.run_once()
        [answer] = await stage.issue(f"req-{time.monotonic_ns()}")
        await stage.flush.run_once()
        return str(answer.status)

    assert store(ask) == "ISSUED"
    said = ok("campaign", "end", "C").stdout
    assert store(ask) == "NONE", "in force when it returns"
    in_force, stored = store(fence)
    assert in_force == stored
    found = shown("campaign", "show", "C")
    assert (found["state"], found["paused"]) == ("over", False)
    assert found["until"] in said
    refused("campaign", "resume", "C", says=f"campaign C is over since {found['until']} and can't go on")
    ok("campaign", "pause", "C")
    refused("campaign", "resume", "C", says="is over since")
    assert found["until"] in ok("campaign", "end", "C").stdout
    assert shown("campaign", "show", "C")["until"] == found["until"], "it does not end twice"
    refused("campaign", "end", "NONE", says="there is no campaign NONE")


def test_campaign_that_has_not_begun_ends_as_well(store: OnStage) -> None:
    furnish()
    ok("campaign", "create", "LATER", "--category", "C", "--product", "PAY", "--pool", "P", "--from", "2034-07-01")
    ok("campaign", "end", "LATER")
    assert shown("campaign", "show", "LATER")["state"] == "over"
    refused("campaign", "resume", "LATER", says="is over since")


def test_end_counts_by_the_clock_that_decides(store: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's clock that is ahead must not leave the campaign open for as long."""
    furnish()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3_600)
    ok("campaign", "end", "C")
    monkeypatch.setattr(time, "time", real)
    assert shown("campaign", "show", "C")["until"] <= instant(int(real()) + 1)


# --- two operators -------------------------------------------------------------------------------------------


def test_change_of_what_somebody_else_has_changed_is_refused(store: OnStage) -> None:
    furnish("C", "OTHER")
    seen = str(shown("campaign", "show", "C")["version"])
    ok("campaign", "pause", "OTHER")
    ok("token", "issue", "D")
    assert str(shown("campaign", "show", "C")["version"]) == seen, "only its own changes count"
    ok("campaign", "cap", "C", "day=5", "--if-version", seen)
    before = store(snapshot)
    for command in (
        ["cap", "C", "day=6"], ["cap", "C", "D", "day=6"], ["assign", "C", "E"], ["unassign", "C", "D"],
        ["pause", "C"], ["resume", "C"], ["end", "C"],
    ):  # fmt: skip
        refused("campaign", *command, "--if-version", seen, says=f"not at {seen}: nothing was changed")
    assert store(snapshot) == before
    for command in (
        ["cap", "C", "D", "day=6"], ["assign", "C", "E"], ["unassign", "C", "E"], ["pause", "C"], ["resume", "C"],
        ["end", "C"],
    ):  # fmt: skip
        version = shown("campaign", "show", "C")["version"]
        ok("campaign", *command, "--if-version", str(version))
        assert shown("campaign", "show", "C")["version"] == store(fence)[1] > version


def test_two_operators_at_once_lose_no_update(store: OnStage) -> None:
    furnish()
    for _ in range(3):
        seen = shown("campaign", "show", "C")
        both = [
            subprocess.Popen(
                [sys.executable, "-m", "service.cli.main", "campaign", "cap", "C", f"{period}={seen['version']}",
                 "--if-version", str(seen["version"])],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for period in ("day", "hour")
        ]  # fmt: skip
        ended = [(command.communicate(timeout=60), command.returncode) for command in both]
        assert sorted(status for _, status in ended) == [0, 1], ended
        [(said, _)] = [each for each in ended if each[1] == 1]
        assert said[0] == ""
        assert said[1].startswith(f"voucherd: campaign C is at version {seen['version'] + 1}, not at {seen['version']}")
        assert said[1].count("\n") == 1
        now = {cap["period"]: cap["limit"] for cap in shown("campaign", "show", "C")["caps"]}
        then = {cap["period"]: cap["limit"] for cap in seen["caps"]}
        assert len([period for period in ("day", "hour") if now.get(period) != then.get(period)]) == 1


def test_changes_of_two_operators_without_a_version_are_both_made(store: OnStage) -> None:
    furnish()
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "campaign", "cap", "C", cap],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for cap in ("day=1", "hour=1")
    ]  # fmt: skip
    assert [(command.communicate(timeout=60), command.returncode)[1] for command in both] == [0, 0]
    assert {cap.period for cap in store(snapshot).campaigns[0].caps} == {"day", "hour"}
