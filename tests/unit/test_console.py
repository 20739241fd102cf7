"""Tables for people."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.cli.console import print_table

COLUMNS = ["restocked", "popped", "set aside", "taken back", "in windows", "in outbox", "accounted for"]


def test_table_of_many_numbers_fits_80_columns_and_breaks_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(COLUMNS, [(12_000_000, 3_000_000, 450_000, 0, 12_000_000, 100_000, 30_000_000)], numbers=COLUMNS)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert printed.split()[: -len(COLUMNS)].count("restocked") == 1
    assert printed.split()[-len(COLUMNS) :] == [
        "12,000,000", "3,000,000", "450,000", "0", "12,000,000", "100,000", "30,000,000",
    ]  # fmt: skip


def test_what_a_library_logs_is_never_printed_by_a_command() -> None:
    """SQLAlchemy logs a traceback when Ctrl-C falls into a rollback: it came before the one line of the command."""
    script = (
        "import logging\nfrom service.cli.main import begin\nbegin()\n"
        "logging.getLogger('sqlalchemy.pool').error('a code', exc_info=ValueError('a code'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
