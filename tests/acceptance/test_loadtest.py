"""A load test as `make loadtest` runs it, on a service of its own: what it says is so, and its report is a picture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from PIL import Image

from tests.acceptance.test_openapi import BROWSER
from tests.acceptance.test_up import ROOT, environment

SECONDS = {"depletion": 4, "retry-storm": 2}  # of load; most of the time goes into what is around it
SECONDS_MAX = 240.0
CODES = 400  # which are gone long before the end of depletion, however busy the machine is
# Other tests share the machine: everything may take so many times as long as where nothing else runs.
SLACK = 20
WIDTH, HEIGHT = 1_200, 1_700
BLUE = (0x1F, 0x5F, 0xA8)  # what issued vouchers are painted with


class Ran(NamedTuple):
    """How it ended, what it printed, and where its report is."""

    status: int
    said: str
    folder: Path

    def report(self, scenario: str) -> Any:
        return msgspec.json.decode((self.folder / f"{scenario}.json").read_bytes())


def loadtest(scenario: str, folder: Path, *arguments: str, **settings: str) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.scenarios", scenario, "--report", folder, "--slack", str(SLACK), *arguments],
        cwd=ROOT, env=environment(checkout=True, **settings), capture_output=True, text=True, timeout=SECONDS_MAX,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout + done.stderr, folder)


@pytest.fixture(scope="module")
def ran(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """Runs a scenario, the first time that it is asked for."""

    @cache
    def run(scenario: str) -> Ran:
        given = ["--seconds", str(SECONDS[scenario]), "--voucherd", str(program)]
        if scenario == "depletion":
            given += ["--codes", str(CODES), "--workers", "2"]
        return loadtest(scenario, tmp_path_factory.mktemp("report"), *given)

    return run


@pytest.mark.parametrize("scenario", SECONDS)
def test_a_scenario_meets_its_objective_and_breaks_no_promise(ran: Callable[[str], Ran], scenario: str) -> None:
    done = ran(scenario)
    assert done.status == 0, done.said
    report = done.report(scenario)
    assert report["met"] and report["audited"] and report["violations"] == []
    assert "The books balance." in done.said
    assert f"{scenario}: objective met" in done.said


def test_a_pool_that_runs_out_at_the_peak_gives_each_of_its_codes_once(ran: Callable[[str], Ran]) -> None:
    report = ran("depletion").report("depletion")
    assert report["vouchers"] == CODES
    assert report["kinds"]["issued"][0] == CODES
    assert report["kinds"]["exhausted"][0] > CODES / 2


def test_a_sale_that_is_given_up_and_asked_for_again_gets_one_voucher(ran: Callable[[str], Ran]) -> None:
    """Most hasty attempts are answered when nobody listens any more: the next one is told the same voucher again."""
    report = ran("retry-storm").report("retry-storm")
    assert report["kinds"]["timed out"][0] > 0
    assert report["kinds"]["replayed"][0] > 0
    assert report["vouchers"] == report["sales"]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize("scenario", SECONDS)
def test_the_report_is_a_picture(ran: Callable[[str], Ran], scenario: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    picture = tmp_path / "report.png"
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}",
            (ran(scenario).folder / f"{scenario}.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=SECONDS_MAX,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert image.size == (WIDTH, HEIGHT)
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(WIDTH * HEIGHT) or ()}
    assert colours.get(BLUE, 0) > 500, "no area of issued vouchers"
    assert len(colours) > 100
