"""`voucherd capacity`: what it says follows from the factors, grows with the load, and is what the runbook shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.settings import Settings
from service.store.database import connections_most
from tests.unit.test_documents import ROOT, rows


def asked(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["capacity", *arguments, "--json"], prog_name="voucherd")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def figures(*arguments: str) -> dict[str, float]:
    return {f"{one['group']}: {one['name']}": one["value"] for one in asked(*arguments)["figures"]}


def test_figures_follow_from_the_load_and_the_factors() -> None:
    said = asked("--rate", "1000", "--mean", "200", "--retention", "24h", "--outage", "10m")
    found = {f"{one['group']}: {one['name']}": one["value"] for one in said["figures"]}
    factor = {one["name"]: one["value"] for one in said["factors"]}
    assert found["Redis: replay records"] == 200 * 86_400 * factor["replay record, Valkey 9"]
    assert found["Redis: windows"] == 2 * 1_000 * 600 * factor["code in a window, Valkey 9"]
    assert found["Redis: outbox in an outage"] == Settings(planned_rate=1_000, store_outage_s=600).outbox_bytes_max
    assert found["CPU at the peak: serve"] == pytest.approx(1_000 * factor["voucher, serving process"] / 1e6)
    assert found["PostgreSQL: issuances a day"] == 200 * 86_400
    workers = int(found["CPU at the peak: serving processes"])
    assert found["PostgreSQL: connections"] == connections_most(workers, works=2)


def test_no_maxmemory_is_named_on_which_production_mode_would_not_start() -> None:
    for arguments in (("--rate", "50"), ("--rate", "5000", "--mean", "10", "--outage", "1h")):
        settings = Settings(planned_rate=int(arguments[1]))
        assert figures(*arguments)["Redis: maxmemory"] >= settings.records_bytes


def test_a_peak_that_one_redis_does_not_carry_is_said_and_a_smaller_one_is_not() -> None:
    most = int(figures("--rate", "50")["CPU at the peak: what one Redis carries"])
    for rate, says in ((most, ""), (most + 1, f"more than one Redis carries here ({most:,}")):
        done = CliRunner().invoke(app, ["capacity", "--rate", str(rate), "--json"], prog_name="voucherd")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["load"]["rate"] == rate
        assert (says in done.stderr) if says else not done.stderr


def test_the_disk_has_room_for_the_old_file_and_the_new_one_during_a_rewrite() -> None:
    said = asked("--rate", "1000", "--retention", "24h")
    factor = {one["name"]: one["value"] for one in said["factors"]}
    rewritten = 1_000 * 86_400 * factor["replay record in a rewritten append-only file"]
    assert figures("--rate", "1000", "--retention", "24h")["Disk: append-only file"] == 3 * rewritten


def test_more_load_never_takes_less() -> None:
    small, large = figures("--rate", "50"), figures("--rate", "20000")
    assert {name for name in small if large[name] < small[name]} == set()
    assert figures("--rate", "50", "--server", "redis")["Redis: replay records"] > small["Redis: replay records"]
    slower = figures("--rate", "50", "--noop", str(2 * asked("--rate", "50")["load"]["noop_us"]))
    assert slower["CPU at the peak: serve"] == pytest.approx(2 * small["CPU at the peak: serve"])


def test_no_factor_is_without_a_value_and_a_source() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for one in asked("--rate", "1")["factors"]:
        assert one["value"] > 0, one
        if one["source"].startswith("make "):
            assert f"\n{one['source'].removeprefix('make ')}: " in makefile, one
        else:
            document, _, section = one["source"].partition(", ")
            assert f"\n## {section}\n" in (ROOT / document).read_text(), one


def test_the_runbook_has_these_factors_and_no_other() -> None:
    listed = rows((ROOT / "docs" / "runbook.md").read_text(), "factor")
    assert listed == [
        [one["name"], f"{one['value']:,g} {one['unit']}", one["source"]] for one in asked("--rate", "1")["factors"]
    ]


def test_the_table_of_the_runbook_is_what_the_command_says() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    (heading,) = [line for line in text.splitlines() if line.startswith("| at the default retention and outage |")]
    rates = [cell.strip().removesuffix("/s").replace(",", "") for cell in heading.strip("|").split("|")[1:]]
    shown = [CliRunner().invoke(app, ["capacity", "--rate", rate], env={"COLUMNS": "200"}).stdout for rate in rates]
    for name, *cells in rows(text, "at the default retention and outage"):
        for cell, page in zip(cells, shown, strict=True):
            lines = [line for line in page.splitlines() if line.strip().startswith(f"{name} ")]
            assert any(cell in line for line in lines), (name, cell, lines)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--rate", "0"), 2, "rate"),
        (("--rate", "10", "--mean", "20"), 2, "not above its peak"),
        (("--rate", "10", "--retention", "soon"), 2, "is no duration"),
        (("--rate", "10", "--retention", "1m", "--outage", "15m"), 1, "VOUCHERD_REPLAY_RETENTION_S"),
        (("--rate", "10", "--retention", "90d"), 1, "2592000"),
        ((), 2, "--rate"),
    ],
)  # fmt: skip
def test_a_load_that_no_service_takes_is_refused_by_what_is_wrong(
    arguments: tuple[str, ...], status: int, says: str
) -> None:
    done = CliRunner().invoke(app, ["capacity", *arguments], prog_name="voucherd", env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    assert says in done.output
