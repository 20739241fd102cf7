"""``voucherd apply``: a plan that is shown, one publication, nothing the second time, and nothing of a bad file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from service.catalogue import CANDIDATES_MAX, Cap, Snapshot
from service.domain import instant
from service.store import campaigns, control, schema
from service.worker import applying, patience
from service.worker.applying import WRITES_MAX
from tests.integration.stage import Stage
from tests.integration.test_control_commands import fits, shown
from tests.integration.typed import OnStage, fence, ok, refused, run, snapshot

FILE = """\
pools:
- id: WEEKEND
  expires: 2035-12-31
  least_life: 7d
distributors:
- id: DIST-001
  name: A partner
- id: DIST-002
  active: false
campaigns:
- id: SUMMER
  category: TELCO
  products: [PAY, MOB]
  pool: WEEKEND
  priority: 7
  from: 2034-07-01
  until: 2034-07-31
  time_zone: Europe/Berlin
  caps: {total: 5000, terminal: {hour: 1}}
  assigned:
  - distributor: DIST-001
    caps: {day: 10, terminal: {total: 1}}
  - distributor: DIST-002
- id: PLAIN
  category: TELCO
  products: [PAY]
  pool: WEEKEND
  paused: true
"""

Write = Callable[[str], str]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Writes a file, and says where it is."""

    def write(text: str) -> str:
        (tmp_path / "wanted.yaml").write_text(text)
        return str(tmp_path / "wanted.yaml")

    return write


def as_it_is(found: Snapshot) -> tuple[object, ...]:
    """All of a snapshot but its number."""
    return found.tokens, found.distributors, found.pools, found.campaigns


async def logged(stage: Stage) -> list[tuple[str, str, str]]:
    async with stage.database.read() as conn:
        columns = (schema.audit_log.c.action, schema.audit_log.c.subject, schema.audit_log.c.detail)
        made = select(*columns).where(schema.audit_log.c.refused.is_(False)).order_by(schema.audit_log.c.id)
        return [tuple(row) for row in await conn.execute(made)]


def nothing_of(store: OnStage, path: str, says: str) -> None:
    """The file is refused in one line, to be looked at as to be applied, and leaves no trace."""
    before, published, log = store(snapshot), store(fence), store(logged)
    for options in ((), ("--dry-run",), ("--json",)):
        refused("apply", path, *options, says=says)
    assert (store(snapshot), store(fence), store(logged)) == (before, published, log)


def test_everything_is_made_in_one_publication_and_nothing_the_second_time(store: OnStage, written: Write) -> None:
    path = written(FILE)
    planned = shown("apply", path, "--dry-run")
    assert planned["applied"] is False
    assert [(step["action"], step["kind"], step["id"], step["path"]) for step in planned["steps"]] == [
        ("create", "pool", "WEEKEND", "pools[0]"), ("create", "distributor", "DIST-001", "distributors[0]"),
        ("create", "distributor", "DIST-002", "distributors[1]"), ("create", "campaign", "SUMMER", "campaigns[0]"),
        ("create", "campaign", "PLAIN", "campaigns[1]"),
    ]  # fmt: skip
    assert "5 entries to apply; nothing was changed" in ok("apply", path, "--dry-run").stdout
    assert (store(fence), store(logged)) == ((0, 0), []), "a dry run leaves no trace"
    assert as_it_is(store(snapshot)) == ({}, {}, (), ())

    page = fits("apply", path)
    assert "5 entries applied, in one publication" in page and "caps.terminal.hour" in page
    assert store(fence) == (1, 1)
    found = store(snapshot)
    assert found.distributors == {"DIST-001": True, "DIST-002": False}
    assert [(pool.id, pool.least_life_s) for pool in found.pools] == [("WEEKEND", 7 * 86_400)]
    assert shown("pool", "show", "WEEKEND")["default_expires_at"] == "2035-12-31T23:59:59Z"
    [plain, summer] = found.campaigns
    assert (plain.paused, plain.priority, plain.until, plain.time_zone) == (True, campaigns.PRIORITY, 0, "UTC")
    assert abs(plain.starts_at - time.time()) < 60
    assert (instant(summer.starts_at), instant(summer.until)) == ("2034-06-30T22:00:00Z", "2034-07-31T22:00:00Z")
    assert (summer.priority, summer.time_zone) == (7, "Europe/Berlin")
    assert set(summer.caps) == {Cap("campaign", "total", 5_000), Cap("terminal", "hour", 1)}
    assert {name: set(caps) for name, caps in summer.assigned.items()} == {
        "DIST-001": {Cap("distributor", "day", 10), Cap("terminal", "total", 1)}, "DIST-002": set(),
    }  # fmt: skip

    for options in ((), ("--dry-run",)):
        assert "Nothing is to be done" in ok("apply", path, *options).stdout
    again = shown("apply", path)
    assert (again["applied"], {step["action"] for step in again["steps"]}) == (False, {"keep"})
    assert store(fence) == (1, 1), "nothing is published the second time"
    [(action, subject, detail)] = store(logged)
    assert (action, subject) == ("apply", "wanted.yaml")
    assert "create campaign SUMMER: " in detail and "assigned.DIST-001.caps.day – -> 10" in detail


def test_only_what_the_file_names_is_changed_and_the_rest_is_told(store: OnStage, written: Write) -> None:
    ok("apply", written(FILE))
    ok("distributor", "create", "OTHER")
    ok("campaign", "assign", "PLAIN", "OTHER", "--cap", "day=5")
    before = {one.id: one for one in store(snapshot).campaigns}
    untouched = shown("campaign", "show", "PLAIN")["version"]
    path = written("""
pools:
- {id: WEEKEND, expires: null, least_life: 8d}
distributors:
- {id: DIST-002, name: Somebody, active: true}
campaigns:
- id: SUMMER
  category: OTHER
  products: [MOB, NET]
  from: 2034-07-02
  until: null
  caps: {total: 4000, terminal: {hour: null}}
  assigned:
  - {distributor: DIST-001, caps: {day: 20}}
  - {distributor: OTHER}
- {id: PLAIN, priority: 100}
""")
    page = ok("apply", path, "--dry-run").stdout
    assert "  caps.total                5,000 -> 4,000\n" in page
    assert "As the file says already: campaign PLAIN." in page
    assert "Not in the file and left alone: campaign SUMMER:" in page
    assert "Not in the file and left alone: distributors: DIST-001, OTHER." in page
    steps = {step["id"]: step for step in shown("apply", path)["steps"]}
    changed = {
        id: {change["field"]: (change["from"], change["to"]) for change in step["changes"]}
        for id, step in steps.items()
    }
    assert changed == {
        "WEEKEND": {"expires": ("2035-12-31T23:59:59Z", None), "least_life": ("7d", "8d")},
        "DIST-002": {"name": ("DIST-002", "Somebody"), "active": (False, True)},
        "SUMMER": {
            "category": ("TELCO", "OTHER"), "products": (["MOB", "PAY"], ["MOB", "NET"]),
            "from": ("2034-06-30T22:00:00Z", "2034-07-01T22:00:00Z"), "until": ("2034-07-31T22:00:00Z", None),
            "caps.total": (5_000, 4_000), "caps.terminal.hour": (1, None),
            "assigned.DIST-001.caps.day": (10, 20), "assigned.OTHER": (None, True),
        },
        "PLAIN": {},
    }  # fmt: skip
    assert steps["SUMMER"]["left_alone"] == ["assigned.DIST-001.caps.terminal.total", "assigned.DIST-002"]
    now = {one.id: one for one in store(snapshot).campaigns}
    assert now["SUMMER"].caps == (Cap("campaign", "total", 4_000),)
    assert {name: set(caps) for name, caps in now["SUMMER"].assigned.items()} == {
        "DIST-001": {Cap("distributor", "day", 20), Cap("terminal", "total", 1)}, "DIST-002": set(), "OTHER": set(),
    }  # fmt: skip
    assert now["PLAIN"] == before["PLAIN"]
    assert shown("campaign", "show", "PLAIN")["version"] == untouched, "what is kept was not changed"
    assert shown("campaign", "show", "SUMMER")["version"] == store(fence)[1]
    assert store(snapshot).distributors == {"DIST-001": True, "DIST-002": True, "OTHER": True}
    assert shown("distributor", "list")[1]["name"] == "Somebody"
    assert shown("apply", path)["applied"] is False


def test_json_and_standard_input_are_read_as_well(store: OnStage, tmp_path: Path) -> None:
    wanted = {"distributors": [{"id": "D"}], "pools": [{"id": "P"}]}
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    ok("apply", str(tmp_path / "wanted.json"))
    assert "Nothing is to be done" in ok("apply", "-", typed=json.dumps(wanted)).stdout
    ok("apply", "-", typed="distributors: [{id: E}]")
    assert store(snapshot).distributors == {"D": True, "E": True}
    assert store(logged)[-1][:2] == ("apply", "standard input")
    refused("apply", "-", says="standard input is empty")
    closed = subprocess.run(
        ["sh", "-c", '"$0" -m service.cli.main apply - <&-', sys.executable], capture_output=True, text=True
    )
    assert (closed.returncode, closed.stdout) == (1, "")
    assert closed.stderr.startswith("voucherd: standard input is empty") and closed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "wanted.yaml is empty"),
        ("campaigns: [", "is no YAML: line 1"),
        ("pools: [{id: P, expiry: 2035-12-31}]", "pools[0].expiry: there is no such field"),
        ("pools: [{id: P, expires: soon}]", "pools[0].expires: 'soon' is neither a day"),
        ("pools: [{id: P, expires: 2020-01-01}]", "pools[0]: the default expiry of pool P has to be in the future"),
        ("pools: [{id: WEEKEND, least_life: 1d}]", "pools[0]: the least life of a code of pool WEEKEND is 604800 s"),
        ("distributors: [{id: N, name: ''}]", "distributors[0]: a distributor's name has 1 to 200"),
        ("distributors: [{id: DIST-001, name: ''}]", "distributors[0]: a distributor's name has 1 to 200"),
        ("campaigns: [{id: N, category: C, products: [P], pool: NONE}]", "campaigns[0].pool: there is no pool NONE"),
        ("campaigns: [{id: N, category: C, products: [], pool: WEEKEND}]", "campaigns[0]: campaign N needs 1 to 256"),
        ("campaigns: [{id: PLAIN, products: []}]", "campaigns[0]: campaign PLAIN needs 1 to 256 products"),
        ("campaigns: [{id: PLAIN, priority: 9000000}]", "campaigns[0]: the priority of campaign PLAIN has to lie"),
        ("campaigns: [{id: PLAIN, pool: P}]\npools: [{id: P}]", "campaigns[0]: campaign PLAIN keeps its pool, WEEKEND"),
        ("campaigns: [{id: PLAIN, time_zone: Asia/Tokyo}]", "campaigns[0]: campaign PLAIN keeps its time zone, UTC"),
        ("campaigns: [{id: SUMMER, until: 2034-06-01}]", "campaigns[0]: campaign SUMMER has to start before it ends"),
        ("campaigns: [{id: PLAIN, from: 2020-01-01, until: 2020-01-02}]", "`voucherd campaign end PLAIN` ends it now"),
        ("campaigns: [{id: PLAIN, assigned: [{distributor: NONE}]}]", "campaigns[0].assigned[0].distributor: there is"),
        ("distributors: [{id: GOOD}]\ncampaigns: [{id: NONE, paused: true}]", "the file has to say its category, prod"),
    ],
)
def test_nothing_of_a_bad_file_is_applied(store: OnStage, written: Write, text: str, says: str) -> None:
    ok("apply", written(FILE))
    nothing_of(store, written(text), says)


def test_faults_of_several_entries_are_told_together(store: OnStage, written: Write) -> None:
    ok("apply", written(FILE))
    before = store(snapshot)
    result = run("apply", written("campaigns: [{id: PLAIN, products: []}, {id: SUMMER, until: 2020-01-01}]"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.split("\n") == [
        "voucherd: campaigns[0]: campaign PLAIN needs 1 to 256 products",
        "campaigns[1]: campaign SUMMER has to start before it ends",
        "",
    ]
    assert store(snapshot) == before


def test_file_that_is_not_there_is_one_line(store: OnStage, tmp_path: Path) -> None:
    refused("apply", str(tmp_path / "nothing.yaml"), says="No such file or directory")
    assert run("apply", str(tmp_path)).exit_code == 2


def test_no_more_campaigns_compete_than_may(store: OnStage, written: Write) -> None:
    def competing(*numbers: int, product: str = "PAY") -> str:
        return "pools: [{id: P}]\ndistributors: [{id: D}]\ncampaigns:\n" + "".join(
            f"- {{id: C{number}, category: C, products: [{product}], pool: P, assigned: [{{distributor: D}}]}}\n"
            for number in numbers
        )

    says = "more than 16 campaigns that are not over would serve product PAY to D"
    nothing_of(store, written(competing(*range(CANDIDATES_MAX + 1))), says)
    ok("apply", written(competing(*range(CANDIDATES_MAX))))
    nothing_of(store, written(competing(CANDIDATES_MAX)), says)
    ok("apply", written(competing(CANDIDATES_MAX, product="MOB")))
    nothing_of(store, written("campaigns: [{id: C16, products: [MOB, PAY]}]"), says)
    ok("apply", written("campaigns: [{id: C16, products: [PAY]}, {id: C3, products: [MOB]}]"))  # they change places


def test_ended_campaign_is_not_brought_back_by_a_file(store: OnStage, written: Write) -> None:
    path = written(FILE)
    ok("apply", path)
    ok("campaign", "end", "SUMMER")
    nothing_of(store, path, "campaigns[0]: campaign SUMMER is over since")
    nothing_of(store, written("campaigns: [{id: SUMMER, until: null}]"), "campaigns[0]: campaign SUMMER is over since")
    ended = shown("campaign", "show", "SUMMER")["until"]
    assert shown("apply", written(f"campaigns: [{{id: SUMMER, until: {ended}}}]"))["applied"] is False


def test_cap_that_stays_goes_on_counting(store: OnStage, written: Write) -> None:
    ok("apply", written(FILE))

    async def age(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(schema.caps.update().values(counted_from=1_000))

    async def counted(stage: Stage) -> dict[tuple[str, str], int]:
        async with stage.database.read() as conn:
            found = await control.caps_counted_from(conn)
            return {(distributor, period): at for (_, distributor, _, period), at in found.items()}

    store(age)
    assigned = "assigned: [{distributor: DIST-001, caps: {day: 11}}]"
    ok("apply", written(f"campaigns: [{{id: SUMMER, caps: {{total: 9, day: 1}}, {assigned}}}]"))
    found = store(counted)
    assert found.pop(("", "day")) > 1_000
    assert found == dict.fromkeys([("", "total"), ("", "hour"), ("DIST-001", "day"), ("DIST-001", "total")], 1_000)


def test_what_was_applied_decides_who_gets_a_voucher(store: OnStage, written: Write, tmp_path: Path) -> None:
    text = """
pools: [{id: P, expires: 2035-12-31}]
distributors: [{id: DIST-001}]
campaigns: [{id: C, category: CAT, products: [PAY], pool: P, caps: {total: LIMIT}, assigned: [{distributor: DIST-001}]}]
"""
    ok("apply", written(text.replace("LIMIT", "2")))
    (tmp_path / "codes.csv").write_text("code\n" + "".join(f"CODE-{number}\n" for number in range(40)))
    ok("codes", "import", "P", str(tmp_path / "codes.csv"))

    async def ask(stage: Stage) -> list[str]:
        await stage.refill.run_once()
        answers = await stage.issue(*(f"req-{time.monotonic_ns()}-{number}" for number in range(3)))
        await stage.flush.run_once()
        return [str(answer.status) for answer in answers]

    assert store(ask) == ["ISSUED", "ISSUED", "NONE"]
    ok("apply", written(text.replace("LIMIT", "3")))
    assert store(ask) == ["ISSUED", "NONE", "NONE"], "a new limit does not begin to count anew"
    ok("apply", written("campaigns: [{id: C, caps: {total: null}, paused: true}]"))
    assert store(ask) == ["NONE"] * 3
    ok("apply", written("campaigns: [{id: C, paused: false}]"))
    assert store(ask) == ["ISSUED"] * 3
    ok("apply", written("distributors: [{id: DIST-001, active: false}]"))
    in_force, stored = store(fence)
    assert in_force == stored
    assert store(snapshot).distributors == {"DIST-001": False}


# --- two operators, and a command that dies ------------------------------------------------------------------


def test_plan_that_is_not_the_one_shown_any_more_is_not_carried_out(
    store: OnStage, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("apply", written(FILE))
    path = written("campaigns: [{id: SUMMER, priority: 2}, {id: PLAIN, priority: 1}]")
    rehearse, between = applying.rehearse, [("campaign", "pause", "PLAIN")]

    async def and_then_somebody_else(*arguments: Any) -> Any:
        plan = await rehearse(*arguments)
        for command in between:
            subprocess.run([sys.executable, "-m", "service.cli.main", *command], check=True, capture_output=True)
        return plan

    monkeypatch.setattr(applying, "rehearse", and_then_somebody_else)
    ok("campaign", "resume", "PLAIN")
    refused("apply", path, "--json", says="somebody else has changed this meanwhile, and nothing was applied")
    assert [(one.priority, one.paused) for one in store(snapshot).campaigns] == [(100, True), (7, False)]
    between[:] = [("distributor", "create", "ELSE")]
    ok("apply", path)  # what the file does not name is no matter
    assert [(one.priority, one.paused) for one in store(snapshot).campaigns] == [(1, True), (2, False)]


def test_two_operators_at_once_lose_no_update(store: OnStage, written: Write, tmp_path: Path) -> None:
    ok("apply", written(FILE))
    files = []
    for name, text in (("day", "{id: PLAIN, caps: {day: 1}}"), ("hour", "{id: PLAIN, caps: {hour: 1}}")):
        (tmp_path / f"{name}.yaml").write_text(f"campaigns: [{text}]")
        files.append(str(tmp_path / f"{name}.yaml"))
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "apply", file, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for file in files
    ]  # fmt: skip
    ended = [(*command.communicate(timeout=60), command.returncode) for command in both]
    for (said, complained, status), file in zip(ended, files, strict=True):
        if status:  # the plan of one lay between the other's plan and its execution
            assert (said, complained.count("\n")) == ("", 1)
            assert "somebody else has changed this" in complained
            ok("apply", file)
    assert 0 in {status for *_, status in ended}
    assert {one.id: set(one.caps) for one in store(snapshot).campaigns}["PLAIN"] == {
        Cap("campaign", "day", 1), Cap("campaign", "hour", 1),
    }  # fmt: skip


@pytest.mark.parametrize("last", ["check_candidates", "place"])
def test_command_killed_in_the_middle_leaves_nothing(store: OnStage, written: Write, last: str) -> None:
    path, before = written(FILE), (store(snapshot), store(fence))
    dying = f"""
import os, signal
from service.cli import main
from service.store import campaigns
from service.worker import applying

rehearse = applying.rehearse
async def then_die(*arguments):
    plan = await rehearse(*arguments)
    async def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)
    campaigns.{last} = die
    return plan
applying.rehearse = then_die
main.main()
"""
    ended = subprocess.run([sys.executable, "-c", dying, "apply", path], capture_output=True, env=dict(os.environ))
    assert ended.returncode == -9, ended.stderr
    assert (store(snapshot), store(fence), store(logged)) == (*before, [])
    ok("apply", path)
    assert store(fence) == (1, 1)


def test_file_of_too_many_entries_is_refused(store: OnStage, written: Write) -> None:
    def pools(count: int) -> str:
        return "pools:\n" + "".join(f"- id: P{at}\n" for at in range(count))

    one_of_each = (
        "distributors: [{id: D}]\n"
        "campaigns: [{id: C, category: C, products: [P], pool: P0, assigned: [{distributor: D}]}]\n"
    )
    nothing_of(store, written(pools(WRITES_MAX - 2) + one_of_each), f"{WRITES_MAX + 1} entries and assignments would")
    ok("apply", written(pools(WRITES_MAX - 3) + one_of_each))
    assert len(store(snapshot).pools) == WRITES_MAX - 3
    ok("apply", written(pools(WRITES_MAX) + one_of_each))  # what is kept does not count


def test_nobody_is_asked_but_at_a_terminal(store: OnStage, written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.apply._is_terminal", lambda: True)
    result = run("apply", written(FILE), typed="n\n")
    assert result.exit_code == 1
    assert "Apply this?" in result.stderr and "create pool WEEKEND" in result.stdout
    assert store(fence) == (0, 0)
    assert run("apply", written(FILE), typed="").exit_code == 1, "no answer is no"
    assert store(fence) == (0, 0)
    ok("apply", written(FILE), typed="y\n")
    ok("apply", written("pools: [{id: P}]"), "--yes", typed="")
    ok("apply", written("pools: [{id: Q}]"), "--json", typed="")
    assert store(fence) == (3, 3)


def test_change_without_redis_is_said_not_to_be_in_force(
    store: OnStage, written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNREACHED_S", 0.2)
    monkeypatch.setenv("VOUCHERD_REDIS_URL", "redis://127.0.0.1:1/0")
    result = run("apply", written(FILE), "--json")
    assert result.exit_code == 1
    assert "NOT YET IN FORCE" in result.stderr
    assert orjson.loads(result.stdout)["applied"] is True
    assert store(fence) == (0, 1)


def test_a_generated_pool_is_made_and_stays_what_it_is(store: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text("pools:\n- {id: ENDLESS, pattern: 'E-####-####*', expires_after: 30}\n")
    ok("apply", str(file), "--yes")
    made = shown("pool", "show", "ENDLESS")
    assert (made["pattern"], made["expires_after_days"]) == ("E-####-####*", 30)
    assert "Nothing is to be done" in ok("apply", str(file), "--yes").stdout
    file.write_text("pools:\n- {id: ENDLESS, least_life: 1d}\n")
    ok("apply", str(file), "--yes")
    assert shown("pool", "show", "ENDLESS")["pattern"] == "E-####-####*"
    ok("pool", "create", "PLAIN")
    for entry, says in (
        ("{id: ENDLESS, pattern: 'F-####-####*'}", "is for good"),
        ("{id: ENDLESS, expires_after: 31}", "is for good"),
        ("{id: PLAIN, pattern: 'E-####-####*'}", "is for good"),
        ("{id: NEW, pattern: 'E-##', expires_after: 30}", "1,000,000 are wanted"),
        ("{id: NEW, pattern: 'E-####-####*'}", "need an expiry"),
        ("{id: NEW, expires_after: 30}", "goes with a pattern"),
    ):
        file.write_text(f"pools:\n- {entry}\n")
        refused("apply", str(file), "--yes", says=says)
    ok("pool", "create", "DATED", "--expires", "2040-01-01", "--pattern", "E-####-####*")
    file.write_text("pools:\n- {id: DATED, expires: null}\n")
    refused("apply", str(file), "--yes", says="no other expiry")
