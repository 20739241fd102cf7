"""The tree of commands: listed without being imported, and the same whichever way it is looked at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from service.cli.main import COMMANDS, app

# Runs `voucherd` with the arguments given, and prints on standard error what was imported.
TELLING = """
import sys
from service.cli.main import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def imported_by(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", TELLING, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def every_command() -> Iterator[tuple[list[str], Any]]:
    """The words that lead to each command and group, and the command itself."""
    root = get_command(app)
    with root.make_context("voucherd", [], resilient_parsing=True) as context:
        for name in COMMANDS:
            _, command, _ = root.resolve_command(context, [name])
            yield [name], command
            for below, one in getattr(command, "commands", {}).items():
                yield [name, below], one


def test_listing_the_commands_imports_none_of_them_nor_what_they_work_with() -> None:
    imported = imported_by("--help")
    assert not imported & {"sqlalchemy", "redis", "uvicorn", "starlette", "alembic", "structlog", "asyncio"}
    assert not imported & {command.where.partition(":")[0] for command in COMMANDS.values()}


def test_a_command_imports_no_other() -> None:
    modules = {command.where.partition(":")[0] for command in COMMANDS.values()}
    assert imported_by("status", "--help") & modules == {"service.cli.status"}


def test_the_parent_of_the_serving_processes_holds_nothing_of_the_apis() -> None:
    imported = imported_by("serve", "--help")
    assert {"uvicorn", "redis", "sqlalchemy"} <= imported  # it answers the ops port, and vets what it starts on
    assert not imported & {"alembic", "jwt", "service.issuance", "service.web.v3"}


def test_neither_the_worker_nor_up_holds_a_web_server() -> None:
    for command in ("work", "up"):
        assert not imported_by(command, "--help") & {"uvicorn", "starlette", "httptools"}


def test_no_command_is_listed_with_a_line_that_its_own_help_does_not_begin_with() -> None:
    helps = {words[0]: cleandoc(command.help) for words, command in every_command() if len(words) == 1}
    begun = {name: " ".join(text.partition("\n\n")[0].split()) for name, text in helps.items()}
    assert begun == {name: command.says for name, command in COMMANDS.items()}


@pytest.mark.parametrize("words", [words for words, _ in every_command()], ids=" ".join)
def test_no_command_is_without_help(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], prog_name="voucherd", env={"COLUMNS": "90"})
    assert shown.exit_code == 0, shown.output
    assert f"Usage: voucherd {' '.join(words)} [OPTIONS]" in shown.stdout


def test_a_misspelt_command_is_not_run_and_the_right_one_is_named() -> None:
    refused = CliRunner().invoke(app, ["campaigns", "list"], prog_name="voucherd", env={"COLUMNS": "90"})
    assert refused.exit_code == 2
    assert "No such command 'campaigns'. Did you mean 'campaign'?" in refused.stderr
