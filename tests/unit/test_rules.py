"""The commands that campaigns and products share speak of the one that they are about."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from service.cli.main import app

SHARED = ("assign", "unassign", "cap", "pause", "resume", "end")


def helps(noun: str, command: str) -> str:
    """The help, as one line."""
    shown = CliRunner().invoke(app, [noun, command, "--help"], env={"COLUMNS": "90"})
    assert shown.exit_code == 0, shown.output
    return " ".join(shown.stdout.replace("│", " ").split())


@pytest.mark.parametrize("command", SHARED)
@pytest.mark.parametrize(
    ("noun", "name", "other"), [("campaign", "ID", "product"), ("product", "CODE", "campaign")]
)  # fmt: skip
def test_a_shared_command_names_its_noun_and_never_the_other(noun: str, name: str, other: str, command: str) -> None:
    says = helps(noun, command)
    assert f"{name} <str> The {noun}: 1 to 64" in says
    assert f"since `{noun} show` said" in says
    assert other not in says


def test_a_change_of_a_product_asks_for_the_version_that_product_show_tells() -> None:
    assert "since `product show` said" in helps("product", "change")
