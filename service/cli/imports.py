"""``voucherd codes import``: a file's codes come into a pool, and the terminal sees how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import os
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, print_json, print_table, say
from service.errors import Misconfigured
from service.store.stock import Refused
from service.worker.codes_file import CodesFile, Format
from service.worker.rehearsal import rehearse_import
from service.worker.stocking import ImportReport, Listener, Progress, import_codes

# Refused lines shown in the terminal; --report writes all of them to a file.
SHOWN_MAX: Final = 20

INTERRUPTED: Final = 130  # exit status, as the shell has it for SIGINT

_ABOUT: Final = re.compile(rb'(?:\{"line":)?(\d+),')  # a line of a report: the number that it begins with

RATE_S: Final = 10.0  # the rate shown is that of these last seconds: a resumed import passes over the first lines fast

PIPED: Final = "-"


def import_(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Where the codes go.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV or NDJSON, plain or gzip; - reads what is piped in.")
    ],
    id: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Name the import: the same ID is imported once.", show_default="SHA-256 of the content"
        ),
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="What FILE holds.", show_default="by its first character")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing, and say what would be imported and refused.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every refused line's number, kind and reason to FILE: CSV if it ends in .csv, else NDJSON. "
            "A resumed import goes on in it.",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Put the codes of a file into a pool. They can be issued when this returns.

    CSV has a header, its columns in any order: code, and as you like
    serial_number and expires_at. NDJSON has an object of the same names a
    line. expires_at is a day (its end in UTC) or a time such as
    2027-01-31T12:00:00Z; without one, the pool's expiry holds.

    A bad line costs that line: it is reported by its number, and the rest is
    imported. Interrupted, the same command goes on where it was; content that
    was imported before is recognised and changes nothing.

    FILE is read twice, once to see that it is whole. What is piped in is kept
    in a temporary file (see TMPDIR) for that, at most 4 GiB.

    Exit status 1 if lines were refused and none was imported, or if the report
    could not be written.
    """
    try:
        with contextlib.ExitStack() as closing:
            refusals = closing.enter_context(_Refusals(report, file)) if report is not None else None
            bar = closing.enter_context(_bar())
            terminal = _Terminal(bar, refusals)
            source = sys.stdin.buffer if str(file) == PIPED else file
            codes = closing.enter_context(contextlib.closing(CodesFile(source, form, terminal.looked_at)))
            done = asyncio.run(_import(pool, codes, id or codes.id, dry_run, terminal, data_dir))
    except KeyboardInterrupt:
        what = "nothing was written" if dry_run else "what was imported is in stock, and the same command goes on there"
        complain(f"interrupted: {what}")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(done)
    else:
        _show(done, file, report)
    failed = refusals.failed if refusals is not None else ""
    if failed:
        complain(f"{failed}; the import itself is whole")
    if done.unreached:
        complain(
            f"the codes are in stock, but partition {', '.join(done.unreached)} could not be told: it may take "
            "the pool for exhausted until `voucherd work` has told it"
        )
    if failed or done.unreached or (done.refused and not done.inserted and not done.inserted_before):
        raise typer.Exit(1)


async def _import(
    pool: str, codes: CodesFile, import_id: str, dry_run: bool, terminal: _Terminal, data_dir: Path | None
) -> ImportReport:
    terminal.codes = codes
    async with connected(data_dir) as here:
        if dry_run:
            return await rehearse_import(
                here.database, pool, codes.rows(), import_id=import_id, content=codes.id, listener=terminal
            )
        return await import_codes(
            here.database, here.scripts, pool, codes.rows(), import_id=import_id, content=codes.id, listener=terminal,
            actor=here.actor,
        )  # fmt: skip


class _Refusals:
    """The file of refused lines.  ``failed`` says why it is not whole: its disk may be full, and the import goes on."""

    def __init__(self, path: Path, source: Path) -> None:
        """Raises Misconfigured if ``path`` can't be written, BadParameter if it is ``source``; nothing in it has
        changed by then."""
        self.failed = ""
        self._path = path
        if path.exists() and source.exists() and path.samefile(source):
            raise typer.BadParameter("the report would overwrite the file that is imported", param_hint="--report")
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise Misconfigured(f"the report {path} can't be written: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begun(self, resumed_after: int) -> None:
        """What an earlier run of the same import has written stays as far as that run had come; all else goes."""
        if os.fstat(self._file.fileno()).st_size:
            self._file.truncate(self._end_of(resumed_after) if resumed_after else 0)
        if self._path.suffix == ".csv" and not os.fstat(self._file.fileno()).st_size:
            self._write("line,kind,reason\n")

    def _end_of(self, last: int) -> int:
        """Where in the file the first line begins that is about a line after ``last``, or that is not whole."""
        end = 0
        with self._path.open("rb") as before:
            for written in before:
                about = _ABOUT.match(written)
                if not written.endswith(b"\n") or (about is not None and int(about[1]) > last):
                    break
                end += len(written)
        return end

    def add(self, lines: Sequence[Refused]) -> None:
        if self._path.suffix == ".csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows((one.line, one.kind, one.reason) for one in lines)
            self._write(text.getvalue())
        else:
            self._write("".join(orjson.dumps(msgspec.to_builtins(one)).decode() + "\n" for one in lines))

    def _write(self, text: str) -> None:
        left = b"" if self.failed else text.encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failed = f"the report {self._path} is not whole: {error.strerror}"


class _Terminal(Listener):
    """Keeps the bar at what is done, and the report at what was refused."""

    def __init__(self, bar: Bar, refusals: _Refusals | None) -> None:
        self.codes: CodesFile | None = None
        self._bar = bar
        self._task = bar.add_task("", total=None, text="looking whether it is whole", left="")
        self._refusals = refusals
        self._seen = deque[tuple[float, int]]()

    def looked_at(self, read: int, size: int) -> None:
        """Of the content, while it is read the first time."""
        self._bar.update(self._task, completed=read, total=size or None)

    def begun(self, resumed_after: int) -> None:
        if self._refusals is not None:
            self._refusals.begun(resumed_after)
        assert self.codes is not None
        self._bar.reset(self._task, total=self.codes.size)
        self._seen.append((time.monotonic(), 0))

    def refused(self, lines: Sequence[Refused]) -> None:
        if self._refusals is not None:
            self._refusals.add(lines)

    def progress(self, so_far: Progress) -> None:
        assert self.codes is not None
        self._bar.update(self._task, completed=self.codes.read, text=self._text(so_far), left="left")

    def _text(self, so_far: Progress) -> str:
        now = time.monotonic()
        while len(self._seen) > 1 and now - self._seen[0][0] > RATE_S:
            self._seen.popleft()
        before, lines = self._seen[0]
        self._seen.append((now, so_far.lines))
        rate = int((so_far.lines - lines) / max(now - before, 0.001))
        return f"{so_far.inserted:,} codes · {so_far.refused:,} refused · {rate:,}/s"


def _bar() -> Bar:
    """At most 77 characters wide, with ten million codes."""
    console = Console(stderr=True)
    return Bar(
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show(done: ImportReport, file: Path, report: Path | None) -> None:
    name = "what was piped in" if str(file) == PIPED else str(file)
    if done.known:
        say(f"{name} was imported into pool {done.pool} before (import {done.import_id}): nothing was done")
        return
    columns = ["lines", "would be imported" if done.dry_run else "imported"]
    kinds = ["twice in file", "in pool already", "in another pool", "invalid"]
    counts = [done.kinds[kind] for kind in ("duplicate_in_file", "duplicate_in_pool", "duplicate_elsewhere", "invalid")]
    columns += kinds
    print_table(["pool", *columns], [(done.pool, done.lines, done.inserted, *counts)], numbers=columns)
    if done.dry_run:
        say("This was a dry run: nothing was written.")
    if done.resumed_after:
        went = "It would go" if done.dry_run else "Went"
        say(
            f"{went} on after line {done.resumed_after:,}, where an earlier run had come; "
            f"{done.inserted_before:,} codes were in stock by then."
        )
    elif done.inserted_before:
        say(f"Another run of the same import put {done.inserted_before:,} more codes of this file in stock meanwhile.")
    if done.refused:
        print_table(["line", "refused because"], [(str(one.line), one.reason) for one in done.reasons[:SHOWN_MAX]])
        if done.refused > SHOWN_MAX:
            where = f"all are in {report}" if report else "with --report FILE all of them are written to a file"
            say(f"and {done.refused - SHOWN_MAX:,} more lines; {where}")
