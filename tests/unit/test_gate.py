"""What .ci/run does where programs can't be installed: it says so and goes on; no test that fails is passed over."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["lua-check", "nginx-light", "prometheus", "prometheus-alertmanager", "redis-server", "chromium"]
TARGETS = ["test", "check", "manifests-install", "manifests"]


class Gate:
    """A machine that has nothing but what the script itself needs, and notes what is called there."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.calls = folder / "calls"
        self.script = folder / "checkout" / ".ci" / "run"
        self.programs.mkdir()
        self.script.parent.mkdir(parents=True)
        shutil.copy(ROOT / ".ci" / "run", self.script)
        for name in ("bash", "dirname"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        self.has("id", "echo 0")
        self.has("make")
        self.has("apt-get")
        self.has("dpkg")
        self.has("timeout", 'shift; exec "$@"')

    def has(self, name: str, does: str = "", *, noted: bool = True) -> None:
        note = f'echo "{name} $*" >>{self.calls}\n' if noted else ""
        (self.programs / name).write_text(f"#!/bin/sh\n{note}{does}\n")
        (self.programs / name).chmod(0o755)

    def run(self) -> tuple[int, str]:
        done = subprocess.run(
            [self.script], capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(self.programs)}
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    def called(self, program: str) -> list[str]:
        """The last word of each call."""
        lines = self.calls.read_text().splitlines()
        return [line.split()[-1] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_what_is_there_is_not_installed_again(gate: Gate) -> None:
    assert gate.run() == (0, "")
    assert gate.called("apt-get") == ["update", *PACKAGES]
    assert gate.called("dpkg") == []
    assert gate.called("make") == TARGETS
    gate.calls.unlink()
    for name in ("luacheck", "nginx", "prometheus"):
        gate.has(name)
    assert gate.run() == (0, "")
    assert gate.called("apt-get") == ["update", "prometheus-alertmanager", "redis-server", "chromium"]
    gate.calls.unlink()
    for name in ("prometheus-alertmanager", "redis-server", "chromium"):
        gate.has(name)
    assert gate.run() == (0, "")
    assert gate.called("apt-get") == []


def test_nothing_is_installed_without_a_list_of_packages(gate: Gate) -> None:
    gate.has("apt-get", "exit 100")
    status, said = gate.run()
    assert (status, said) == (0, f"apt-get update failed: going on without {' '.join(PACKAGES)}\n")
    assert gate.called("apt-get") == ["update"]
    assert gate.called("make") == TARGETS


def test_a_package_that_hangs_costs_its_own_tests_and_no_minute_more_than_all_may(gate: Gate) -> None:
    gate.has("timeout", 'shift; case "$*" in *"install"*prometheus) exit 124;; esac; exec "$@"')
    assert gate.run() == (0, "prometheus can't be installed here: going on without it\n")
    assert gate.called("dpkg") == ["-a"], "or what was cut off is in the way of the next one"
    lines = gate.calls.read_text().splitlines()
    given = [int(line.split()[1]) for line in lines if line.startswith("timeout ") and " install " in line]
    assert len(given) == len(PACKAGES)
    assert all(170 < seconds <= 180 for seconds in given), "what is left of three minutes"


def test_who_is_not_root_installs_nothing(gate: Gate) -> None:
    gate.has("id", "echo 1000")
    assert gate.run() == (0, "")
    assert gate.called("apt-get") == []


def test_manifests_that_were_not_tried_are_told_of(gate: Gate) -> None:
    gate.has("make", '[ "$1" != manifests-install ]')
    status, said = gate.run()
    assert status == 0
    assert said.startswith("NOT TRIED: deploy/kubernetes")
    assert gate.called("make") == TARGETS[:3]


@pytest.mark.parametrize("target", ["test", "check", "manifests"])
def test_no_failure_is_passed_over(gate: Gate, target: str) -> None:
    gate.has("make", f'[ "$1" != {target} ]')
    status, _ = gate.run()
    assert status != 0
    assert gate.called("make")[-1] == target
