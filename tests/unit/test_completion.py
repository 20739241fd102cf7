"""Shell completion: what a Tab offers, and what is said where it can't be installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Typer asks which shell runs the test; it is to take the one that is named.
NAMED_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def voucherd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.cli.main", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("voucherd camp", {"campaign"}),
        ("voucherd campaign un", {"unassign"}),
        ("voucherd campaign p", {"pause"}),
        ("voucherd campaign cap --if", {"--if-version"}),
    ],
)
def test_tab_offers_what_fits_and_nothing_else(typed: str, offered: set[str]) -> None:
    asked = voucherd(
        _VOUCHERD_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1)
    )  # fmt: skip
    assert (asked.returncode, set(asked.stdout.split())) == (0, offered)
    assert asked.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(shell: str) -> None:
    asked = voucherd("--show-completion", shell, **NAMED_SHELL)
    assert asked.returncode == 0
    assert f"_VOUCHERD_COMPLETE=complete_{shell}" in asked.stdout


def test_home_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no directory")
    asked = voucherd("--install-completion", "bash", HOME=str(tmp_path / "home"), **NAMED_SHELL)
    assert asked.returncode == 1
    assert asked.stderr.startswith("voucherd: ")
    assert asked.stderr.count("\n") == 1


def test_installed_completion_is_in_the_home_directory_and_nowhere_else(tmp_path: Path) -> None:
    asked = voucherd("--install-completion", "bash", HOME=str(tmp_path), **NAMED_SHELL)
    assert asked.returncode == 0, asked.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "complete -o default -F _voucherd_completion voucherd" in written
