"""``voucherd codes``: stock comes in."""

from __future__ import annotations

import asyncio
import csv
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from service.cli import options
from service.cli.connections import actor, connected
from service.cli.console import complain, print_json, print_table, say
from service.store.stock import Refused
from service.worker.codes_file import CodesFile
from service.worker.stocking import ImportReport, Progress, import_codes

# Refused lines shown in the terminal; --rejects writes all of them to a file.
SHOWN_MAX: Final = 20

INTERRUPTED: Final = 130  # exit status, as the shell has it for SIGINT

app = typer.Typer(help="Codes: stock comes in.", no_args_is_help=True)


@app.command("import")
def import_(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Where the codes go.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV with a header: code[,serial_number][,expires_at]")],
    id: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Name the import: the same ID is imported once.", show_default="SHA-256 of the file"
        ),
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write every refused line's number and reason to this CSV.", show_default=False
        ),
    ] = None,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Put the codes of a CSV file into a pool. They can be issued when this returns.

    expires_at is a day (its end in UTC) or a time such as 2027-01-31T12:00:00Z; without one, the pool's expiry holds.
    A bad line costs that line: it is reported by its number, and the rest is imported. Interrupted, the same command
    goes on where it was; a file that was imported before is recognised and changes nothing.

    Exit status 1 if lines were refused and none was imported.
    """
    codes = CodesFile(file)
    try:
        report = asyncio.run(_import(pool, codes, id or codes.id, rejects, data_dir))
    except KeyboardInterrupt:
        complain("interrupted: what was imported is in stock, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(report)
    else:
        _show(report, file, rejects)
    if report.unreached:
        complain(
            f"the codes are in stock, but partition {', '.join(report.unreached)} could not be told: it may take "
            "the pool for exhausted until `voucherd work` has told it"
        )
        raise typer.Exit(1)
    if report.refused and not report.inserted and not report.inserted_before:
        raise typer.Exit(1)


async def _import(
    pool: str, codes: CodesFile, import_id: str, rejects: Path | None, data_dir: Path | None
) -> ImportReport:
    with ExitStack() as closing:
        write = None
        if rejects is not None:
            write = csv.writer(closing.enter_context(rejects.open("w", encoding="utf-8", newline="")))
            write.writerow(("line", "reason"))
        bar = closing.enter_context(_bar())
        task = bar.add_task("importing", total=codes.size, codes=0, refused=0, rate="–")
        began = time.monotonic()

        def progress(so_far: Progress) -> None:
            rate = int(so_far.lines / max(time.monotonic() - began, 0.001))
            bar.update(
                task, completed=codes.read, codes=so_far.inserted, refused=so_far.refused, rate=f"{rate:,} lines/s"
            )

        def on_refused(refused: Sequence[Refused]) -> None:
            if write is not None:
                write.writerows((one.line, one.reason) for one in refused)

        async with connected(data_dir) as here:
            return await import_codes(
                here.database, here.scripts, pool, codes.rows(), import_id=import_id,
                progress=progress, on_refused=on_refused, actor=actor(),
            )  # fmt: skip


def _bar() -> Bar:
    console = Console(stderr=True)
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[codes]:,} codes, {task.fields[refused]:,} refused, {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show(report: ImportReport, file: Path, rejects: Path | None) -> None:
    if report.known:
        say(f"{file} was imported into pool {report.pool} before: nothing was done")
        return
    print_table(
        ["pool", "lines", "imported", "refused"],
        [(report.pool, report.lines, report.inserted, report.refused)],
        numbers=["lines", "imported", "refused"],
    )
    if report.resumed_after:
        say(
            f"Went on after line {report.resumed_after:,}, where an earlier run had come; "
            f"{report.inserted_before:,} codes were in stock by then."
        )
    if report.refused:
        print_table(["line", "refused because"], [(str(one.line), one.reason) for one in report.reasons[:SHOWN_MAX]])
        if report.refused > SHOWN_MAX:
            where = f"all are in {rejects}" if rejects else "with --rejects FILE all of them are written to a file"
            say(f"and {report.refused - SHOWN_MAX:,} more lines; {where}")
