"""``python -m tests.chaos.mutations``: each of six faults in our own code makes its test red.

A test that stays green when what it looks for is broken looks for nothing.  Each mutation is made in a copy of the
tree, and its test is run there; first all of these tests on the copy as it is, where they have to be green.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console

ROOT: Final = Path(__file__).parents[2]
COPIED: Final = ("service", "lua", "loadtest", "tests", "pyproject.toml")
TEST_S: Final = 600.0

ROWS: Final = "tests/chaos/test_rows.py::"


class Mutation(msgspec.Struct, frozen=True):
    """In ``file`` stands ``then`` in place of ``now``; ``test`` fails then, and says what ``red`` matches."""

    name: str
    row: int
    file: str
    now: str
    then: str
    test: str
    red: str = r"E +AssertionError: P\d: "


MUTATIONS: Final = (
    Mutation(
        "everysec for always",
        5,
        "loadtest/servers.py",
        '"appendfsync": "always"',
        '"appendfsync": "everysec"',
        f"{ROWS}test_row_05_no_power_cut_loses_what_was_told_and_one_that_does_is_seen[always]",
    ),
    Mutation(
        "synchronous_commit off",
        13,
        "service/store/database.py",
        """        "select set_config('synchronous_commit', 'on', false) "
        "where current_setting('synchronous_commit') not in ('on', 'remote_apply')"
""",
        """        "select set_config('synchronous_commit', 'off', false)"
""",
        f"{ROWS}test_row_13_what_was_committed_is_there_after_the_store_died[postgresql-valkey]",
        red=r"E +AssertionError: (P\d: |the store lost what it had committed)",
    ),
    Mutation(
        "MAXLEN on XADD",
        12,
        "lua/issue.lua",
        "redis.call('XADD', outbox_key, '*',",
        "redis.call('XADD', outbox_key, 'MAXLEN', '50', '*',",
        f"{ROWS}test_row_12_issuing_goes_on_while_the_store_is_away_and_nothing_is_lost[postgresql-valkey]",
    ),
    Mutation(
        "no replay check in the script",
        3,
        "lua/issue.lua",
        "local record = issued[key] or replays[i]",
        "local record = issued[key]",
        f"{ROWS}test_row_03_no_key_gets_two_codes_when_redis_stands_still[postgresql-valkey]",
    ),
    Mutation(
        "a token cache without the fence",
        17,
        "service/catalogue.py",
        "        self._owners: dict[str, str] = {}\n",
        "        self._owners: dict[str, str] = vars(Catalogue.distributor)\n",
        f"{ROWS}test_row_17_nothing_is_issued_after_a_revocation_or_a_pause_has_returned[postgresql-valkey]",
    ),
    Mutation(
        "a bare ON CONFLICT DO NOTHING",
        16,
        "service/store/flush.py",
        "        await insert_records(conn, table, _INSERTED[table], some)\n",
        """        if some:
            insert = (sqlite if conn.dialect.name == "sqlite" else postgresql).insert(table).on_conflict_do_nothing()
            await conn.execute(insert, [dict(zip(_INSERTED[table], row, strict=True)) for row in some])
""",
        f"{ROWS}test_row_16_what_nobody_should_have_written_holds_nothing_up[postgresql-valkey]",
        red=r"Stuck: a pause of the campaign",
    ),
)


def mutated(text: str, mutation: Mutation) -> str:
    """``text`` with the mutation.  Raises ValueError unless its place is there, once."""
    found = text.count(mutation.now)
    if found != 1:
        raise ValueError(f"{mutation.name}: its text is in {mutation.file} {found} times")
    return text.replace(mutation.now, mutation.then)


def main(
    only: Annotated[int | None, typer.Option(help="the mutation for this row of the table of faults alone")] = None,
    control: Annotated[bool, typer.Option(help="run the tests on the tree as it is first")] = True,
) -> None:
    """Each mutation turns its test red."""
    console = Console()
    chosen = [one for one in MUTATIONS if only in (None, one.row)]
    with tempfile.TemporaryDirectory(prefix="voucherd-mutations-") as folder:
        copy = Path(folder)
        copy.chmod(0o755)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
            else:
                shutil.copy(ROOT / name, copy / name)
        if control:
            status, said = _run(copy, *(one.test for one in chosen))
            if status != 0:
                console.print(said, markup=False, highlight=False)
                raise typer.Exit(_tell(console, False, "the tests are not green without any mutation"))
            _tell(console, True, f"{len(chosen)} tests are green without any mutation")
        failed = 0
        for one in chosen:
            file = copy / one.file
            before = file.read_text()
            file.write_text(mutated(before, one))
            try:
                status, said = _run(copy, one.test)
            finally:
                file.write_text(before)
            found = re.search(rf"{one.red}.*", said)
            red = status == 1 and found is not None
            failed += _tell(console, red, f"row {one.row}, {one.name}: {found[0] if found else 'green'}")
            if not red:
                console.print(said[-4_000:], markup=False, highlight=False)
    raise typer.Exit(bool(failed))


def _run(tree: Path, *tests: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--chaos", "all", *tests], cwd=tree,
        capture_output=True, text=True, timeout=TEST_S,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _tell(console: Console, good: bool, what: str) -> int:
    console.print(f"{'as it must be' if good else 'NOT as it must be'}: {what}", markup=False, soft_wrap=True)
    return 0 if good else 1


if __name__ == "__main__":
    typer.run(main)
