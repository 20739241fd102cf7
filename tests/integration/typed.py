"""The operator's command line in tests: commands as typed, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from service.catalogue import Snapshot
from service.cli.main import app
from service.store import control
from tests.integration.stage import Stage

OnStage = Callable[[Callable[[Stage], Any]], Any]


def run(*arguments: str, typed: str | None = None, columns: int = 90) -> Result:
    """One command, as typed into a terminal of so many columns."""
    return CliRunner().invoke(app, list(arguments), input=typed, env={"COLUMNS": str(columns)})


def ok(*arguments: str, typed: str | None = None, columns: int = 90) -> Result:
    result = run(*arguments, typed=typed, columns=columns)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str, says: str) -> None:
    """The command fails with one line on standard error, and nothing else."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("voucherd: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


async def snapshot(stage: Stage) -> Snapshot:
    async with stage.database.read() as conn:
        return await control.snapshot(conn, await control.version(conn))


async def fence(stage: Stage) -> tuple[int, int]:
    """The fence and the store's version."""
    async with stage.database.read() as conn:
        return (await stage.scripts.generation()).fence, await control.version(conn)


def stocked(tmp_path: Path, codes: int = 50) -> None:
    """A campaign that DIST-001 may issue by, from ``codes`` codes."""
    ok("distributor", "create", "DIST-001", "--name", "A partner")
    ok("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY")
    ok("campaign", "assign", "CAMP-001", "DIST-001")
    (tmp_path / "codes.csv").write_text("code\n" + "".join(f"CODE-{number:04}\n" for number in range(codes)))
    ok("codes", "import", "CAMP-001", str(tmp_path / "codes.csv"))


async def three_issued(stage: Stage) -> None:
    await stage.refill.run_once()
    answers = await stage.issue("req-1", "req-2", "req-3")
    assert {answer.status for answer in answers} == {"ISSUED"}
    await stage.flush.run_once()
