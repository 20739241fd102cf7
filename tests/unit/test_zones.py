"""Time zones come from the pinned tzdata package, whatever is on the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from service import zones

ROOT = Path(__file__).parents[2]

# What the machine's zone says, then what is computed by ours: an expiry, a voucher's time, a day that is counted, a
# campaign's end.
ASKED = """
from datetime import date, datetime
from zoneinfo import ZoneInfo
from service import vouchers, zones
from service.catalogue import period_start
from service.domain import Terms
from service.worker import forms

name = "Asia/Singapore"
terms = Terms("Gift", True, False, True, True, "SGD", 1000, "days:1", name, "https://v/", "")
print(datetime.fromtimestamp(1_800_000_000, ZoneInfo(name)).utcoffset())
print(
    vouchers.expires_at(terms, 1_800_000_000, 1 << 40), vouchers.local_time(1_800_000_000, name),
    period_start("day", name, 1_800_000_000), forms.end_of("2027-01-31", zones.zone(name)),
)
"""


def test_a_falsified_zone_on_the_machine_changes_nothing(tmp_path: Path) -> None:
    def answers(tz_path: Path) -> list[str]:
        environment = {**os.environ, "PYTHONTZPATH": str(tz_path)}
        asked = [sys.executable, "-c", ASKED]
        return subprocess.run(
            asked, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    nothing, falsified = tmp_path / "nothing", tmp_path / "falsified"
    nothing.mkdir()
    (falsified / "Asia").mkdir(parents=True)
    other = files("tzdata") / "zoneinfo" / "Pacific" / "Honolulu"
    (falsified / "Asia" / "Singapore").write_bytes(other.read_bytes())
    machine_right, right = answers(nothing)
    machine_false, ours = answers(falsified)
    assert machine_false != machine_right  # the machine's files do deceive
    assert ours == right


def test_every_name_is_a_zone_and_one_object_of_that_name() -> None:
    assert len(zones.names()) > 500
    for name in zones.names():
        assert zones.zone(name).key == name
        assert zones.zone(name) is zones.zone(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "Mars/Olympus", "../zones", "Asia/../UTC", "/etc/localtime", "Asia", "asia/singapore",
             "__init__.py", "tzdata.zi", "Asia/Singapore\0", "UTC/", "\udcff"],
)  # fmt: skip
def test_what_is_no_zone_is_told_in_a_line(name: str) -> None:
    with pytest.raises(ValueError, match="is no time zone: take a name like Europe/Berlin") as refused:
        zones.zone(name)
    assert refused.value.args[0].startswith(repr(name))


def test_no_other_module_makes_a_zone() -> None:
    makes = re.compile(r"\bZoneInfo\s*[(.]|\breset_tzpath\b|\bastimezone\(\)")
    modules = sorted((ROOT / "service").rglob("*.py"))
    assert ROOT / "service" / "zones.py" in modules
    makers = [str(path.relative_to(ROOT)) for path in modules if makes.search(path.read_text())]
    assert makers == ["service/zones.py"]
