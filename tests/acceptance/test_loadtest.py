"""A load test as `make loadtest` runs it, on a service of its own: what it says is so, and its report is a picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from PIL import Image

from tests.acceptance.test_openapi import BROWSER
from tests.acceptance.test_up import ROOT, environment

SECONDS = 4  # of the scenario
SECONDS_MAX = 240.0
CODES = 400  # which are gone long before the end, however busy the machine is
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
def depletion(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return loadtest(
        "depletion", tmp_path_factory.mktemp("report"), "--seconds", str(SECONDS), "--codes", str(CODES),
        "--workers", "2", "--voucherd", str(program),
    )  # fmt: skip


def test_a_pool_that_runs_out_at_the_peak_gives_each_of_its_codes_once(depletion: Ran) -> None:
    assert depletion.status == 0, depletion.said
    report = depletion.report("depletion")
    assert report["met"] and report["audited"] and report["violations"] == []
    assert report["vouchers"] == CODES
    assert report["kinds"]["issued"][0] == CODES
    assert report["kinds"]["exhausted"][0] > CODES / 2
    assert "The books balance." in depletion.said
    assert "depletion: objective met" in depletion.said


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
def test_the_report_is_a_picture(depletion: Ran, tmp_path: Path) -> None:
    assert BROWSER is not None
    picture = tmp_path / "report.png"
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}",
            (depletion.folder / "depletion.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=SECONDS_MAX,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert image.size == (WIDTH, HEIGHT)
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(WIDTH * HEIGHT) or ()}
    assert colours.get(BLUE, 0) > 500, "no area of issued vouchers"
    assert len(colours) > 100
