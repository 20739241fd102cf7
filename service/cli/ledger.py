"""``voucherd ledger``: what was issued, for good."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import typer

from service import zones
from service.cli import options
from service.cli.connections import Connected, connected
from service.cli.console import complain, instant, print_facts, print_json, print_table, progress_bar, say
from service.errors import RedisUnreachable
from service.store import ledger
from service.store.ledger import Found, Wanted
from service.worker import export as exporting
from service.worker import forms, settlement
from service.worker.export import Format, PeriodIncomplete, fields, whole_file
from service.worker.settlement import Day, Manifest

# An export reads the whole ledger, and waits for whoever reads the pipe.
STATEMENT_S: Final = 3_600.0

TimeZone = Annotated[str, typer.Option("--time-zone", metavar="ZONE", help="Whose days are meant.")]
FileFormat = Annotated[Format, typer.Option("--format", help="CSV is safe to open in a spreadsheet, NDJSON is exact.")]
Incomplete = Annotated[
    bool, typer.Option("--incomplete", help="Go on although vouchers of the period may not be in the ledger yet.")
]

app = typer.Typer(help="The ledger: what was issued, for good.", no_args_is_help=True)


@app.command("find")
def find(
    request_id: Annotated[
        str | None, typer.Option(metavar="ID", help="The request's id, or that of its answer.", show_default=False)
    ] = None,
    code: Annotated[str | None, typer.Option(metavar="CODE", help="The voucher code.", show_default=False)] = None,
    voucher_id: Annotated[
        str | None, typer.Option(metavar="UUID", help="The id of a voucher of Client API v3.", show_default=False)
    ] = None,
    distributor: Annotated[str | None, typer.Option(metavar="ID", help="Who asked.", show_default=False)] = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="TRACE", help="The trace id or traceparent of the call that asked.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Show at most so many, the latest ones.")] = 20,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Find issued vouchers that fit all that is given; without anything, the latest ones.

    Exit status 1 if nothing fits. What was issued a moment ago may still be on its way here.
    """

    wanted = None if voucher_id is None else options.typed(forms.voucher_id_of, voucher_id)
    trace_id = None if trace is None else options.typed(forms.trace_id_of, trace)

    async def run() -> list[Found]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await ledger.find(
                conn, request_id=request_id, code=code, voucher_id=wanted, distributor=distributor, trace_id=trace_id,
                limit=limit,
            )  # fmt: skip

    found = asyncio.run(run())
    if as_json:
        print_json([fields(one) for one in found])
    elif len(found) == 1:
        print_facts(fields(found[0]))
    elif found:
        print_table(
            ["issued at", "distributor", "request", "code", "serial number"],
            [(instant(one.issued_at), one.distributor, one.request_id, one.code, one.serial) for one in found],
            whole=["issued at", "code"],
        )
    if not found:
        complain("nothing in the ledger fits; what was issued a moment ago may still be on its way there")
        raise typer.Exit(1)


@app.command("export")
def export(
    starts: Annotated[
        str | None,
        typer.Option("--from", metavar="T", help="A day (its start in the time zone) or a time.", show_default="all"),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="T", help="A day (the whole of it) or a time (exclusive).", show_default="open"),
    ] = None,
    time_zone: TimeZone = "UTC",
    campaign: Annotated[str | None, typer.Option(metavar="ID", help="Of this campaign.", show_default=False)] = None,
    distributor: Annotated[str | None, typer.Option(metavar="ID", help="Of this one.", show_default=False)] = None,
    file_format: FileFormat = "csv",
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to; - is standard output.", allow_dash=True)
    ] = Path("-"),
    incomplete: Incomplete = False,
    data_dir: options.DataDir = None,
) -> None:
    """Write issued vouchers as CSV or NDJSON, by the time they were issued at.

    A period is complete when it is over and the outbox is past it. With --until this is checked first, and a period
    that is not complete is refused (exit status 1) unless --incomplete is given. Without --until the ledger is
    written as it is now. FILE is whole or not there: it is written beside it, as
    FILE.(something).part, and renamed at the end.
    """
    zone = options.typed(zones.zone, time_zone)
    wanted = Wanted(
        0 if starts is None else options.typed(forms.start_of, starts, zone),
        0 if until is None else options.typed(forms.end_of, until, zone),
        campaign,
        distributor,
    )
    if wanted.until and wanted.until <= wanted.since:
        raise typer.BadParameter("the period ends before it begins: --until has to be later than --from")

    async def run(file: BinaryIO) -> None:
        async with connected(data_dir, statement_s=STATEMENT_S) as here:
            if wanted.until and not incomplete:
                await _refuse_incomplete(here, wanted.until)
            with progress_bar("vouchers written") as progress:
                await exporting.export(here.database, wanted, file_format, file, progress=progress)

    if str(output) != "-":
        with whole_file(output) as file:
            asyncio.run(run(file))
        return
    try:
        asyncio.run(run(sys.stdout.buffer))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        raise typer.Exit(1) from None


@app.command("settle")
def settle(
    day: Annotated[str, typer.Option("--day", metavar="DAY", help="The day to settle: 2026-11-25.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="DIR", help="Where the files go.", file_okay=False)
    ],
    time_zone: TimeZone = "UTC",
    distributor: Annotated[
        str | None, typer.Option(metavar="ID", help="Settle this one alone.", show_default="all")
    ] = None,
    file_format: FileFormat = "csv",
    incomplete: Incomplete = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files of a manifest that says otherwise.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Write one settlement file per distributor for a day, and a manifest with the count and SHA-256 of each.

    The same day settled again gives the same bytes. A distributor that was given nothing has a file with the head
    alone, and count 0. A day is complete when it is over and the outbox is past it; one that is not is refused.
    A partner checks a file with `sha256sum FILE`, and its lines (less one for the head of a CSV) are the count.
    """
    zone = options.typed(zones.zone, time_zone)
    meant = Day(day, time_zone, *options.typed(forms.day_of, day, zone))

    async def run() -> tuple[Manifest, Path]:
        async with connected(data_dir, statement_s=STATEMENT_S) as here:
            if not incomplete:
                await _refuse_incomplete(here, meant.until)
            return await settlement.settle(
                here.database, meant, output_dir, distributor=distributor, file_format=file_format, force=force
            )

    manifest, path = asyncio.run(run())
    if as_json:
        print_json(manifest)
        return
    print_table(
        ["distributor", "vouchers", "file"],
        [(one.distributor_id, one.vouchers, one.file) for one in manifest.files],
        numbers=["vouchers"],
    )
    say(f"{manifest.totals.vouchers:,} vouchers in {manifest.totals.files:,} files; manifest: {path}")


async def _refuse_incomplete(here: Connected, until: int) -> None:
    try:
        await exporting.refuse_incomplete(here.database, here.scripts, until)
    except (PeriodIncomplete, RedisUnreachable) as fault:
        raise PeriodIncomplete(f"{str(fault).rstrip('.')}; try again, or say --incomplete to go on anyway") from fault
