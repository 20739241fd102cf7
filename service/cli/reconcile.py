"""``voucherd reconcile``: a partner's file against the ledger."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import orjson
import typer

from service import zones
from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, print_json, print_table, progress_bar, say
from service.store import control, register
from service.store.ledger import Wanted
from service.worker import forms
from service.worker import reconcile as reconciling
from service.worker.adoption import Adoption
from service.worker.export import csv_rows, whole_file
from service.worker.partner_file import PartnerFile
from service.worker.reconcile import Outcome, Reconciled, Result
from service.worker.unseen import Back

# It reads the whole of the distributor's ledger within one snapshot.
STATEMENT_S: Final = 3_600.0

# In this order they are shown; the first is all right, and so is what a file says twice.
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "matched", "different", "missing_here", "missing_there", "repeated", "unreadable",
)  # fmt: skip

Write = Callable[[Sequence[Result]], None]


def reconcile(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or NDJSON, plain or gzip.")],
    distributor: Annotated[
        list[str], typer.Option(metavar="ID", help="Whose file it is; give it again for each, if of several.")
    ],
    starts: Annotated[
        str | None,
        typer.Option("--from", metavar="T", help="FILE begins with this day or time.", show_default="all"),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="T", help="It ends with this day or (exclusive) time.", show_default="open"),
    ] = None,
    time_zone: Annotated[str, typer.Option("--time-zone", metavar="ZONE", help="Whose days are meant.")] = "UTC",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every voucher that is not matched to FILE: CSV if it ends in .csv, else NDJSON.",
            show_default=False,
        ),
    ] = None,
    return_unseen: Annotated[
        str | None,
        typer.Option(
            metavar="POOL",
            help="Return codes of POOL to stock that are in quarantine and not in FILE; shows how many, see --yes.",
            show_default=False,
        ),
    ] = None,
    adopt: Annotated[
        str | None,
        typer.Option(
            metavar="CAMPAIGN",
            help="Take codes in quarantine that FILE names into the ledger, as issued by CAMPAIGN; shows how many, see "
            "--yes.",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why that is done, for the audit log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="With --return-unseen and --adopt: do it.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Hold what partners say they received against the ledger: matched, missing here, missing there, different.

    CSV has a header, its columns in any order: code (or voucher_code), and as
    the partner likes request_id, idempotency_key (of Client API v3), voucher_id
    and received_at (a time with its zone); other columns are passed over.
    NDJSON has an object of the same names a line.

    matched: the ledger says the same. different: it has the code for another
    distributor, request or voucher, or issued later than it was received.
    missing here: it does not have it; the reason says where the code is
    instead. missing there: it was given to this distributor in the period, and
    FILE lacks it.

    What was issued a moment ago may be on its way to the ledger: its code is
    missing here with reason "out". Exit status 1 unless all is matched.

    --return-unseen makes FILE a proof: a code that no partner received can be
    given to somebody else. So it has to hold, in all time up to --until, all
    that every distributor received that could have got codes of POOL, and each
    is to be named by --distributor, also one that is not assigned any more. It
    is refused if one is lacking, a line is unreadable, or a voucher of the
    ledger is missing there. Only what was lost before --until comes back.

    --adopt takes FILE at its word: a code of the campaign's pool that is in
    quarantine, and that a line names with its request_id (idempotency_key, if
    it is a product of Client API v3), is in the ledger then, for the one
    --distributor whose file it is. Nobody else gets it, and nobody gets it
    again by a replay.
    """
    zone = options.typed(zones.zone, time_zone)
    wanted = Wanted(
        0 if starts is None else options.typed(forms.start_of, starts, zone),
        0 if until is None else options.typed(forms.end_of, until, zone),
    )
    if wanted.until and wanted.until <= wanted.since:
        raise typer.BadParameter("the period ends before it begins: --until has to be later than --from")
    whose = sorted(set(distributor))
    if return_unseen is not None and adopt is not None:
        raise typer.BadParameter("--adopt first, and --return-unseen when that is done")
    if return_unseen is not None and (starts is not None or not wanted.until or wanted.until > time.time()):
        raise typer.BadParameter("--return-unseen needs an --until that has passed, and no --from")
    if adopt is not None and len(whose) > 1:
        raise typer.BadParameter("--adopt needs the file of one --distributor: that is who has the codes")
    if return_unseen is None and adopt is None:
        if yes:
            raise typer.BadParameter("--yes goes with --return-unseen or --adopt")
    elif not reason.strip() or not reason.isprintable():
        raise typer.BadParameter("--return-unseen and --adopt need a --reason of printable text")
    names = ", ".join(whose)
    partner = PartnerFile(file)

    async def run(write: Write) -> Reconciled:
        async with connected(data_dir, statement_s=STATEMENT_S) as here:
            async with here.database.read() as conn:
                for one in whose:
                    await control.require_distributor(conn, one)
                if return_unseen is not None:
                    await register.pool(conn, return_unseen)
            back = None
            if return_unseen is not None:
                back = Back(
                    here.database, here.scripts, return_unseen, whose, wanted.until,
                    reason=reason, actor=here.actor, rehearse=not yes,
                )  # fmt: skip
            adoption = None
            if adopt is not None:
                adoption = Adoption(
                    here.database, here.scripts, adopt, whose[0], reason=reason, actor=here.actor, rehearse=not yes
                )
            with progress_bar("lines looked at") as progress:
                done = await reconciling.reconcile(
                    here.database, partner.lines(), wanted, whose, back=back, adoption=adoption, progress=progress,
                    tell=write,
                )  # fmt: skip
            async with here.database.write() as conn:
                told = ", ".join(f"{done.of(one)} {_told(one)}" for one in OUTCOMES)
                detail = f"file {partner.id[:16]}, {done.lines} lines: {told}"
                await control.log(
                    conn, actor=here.actor, action="reconcile", subject=names, detail=detail, now=int(time.time())
                )
            return done

    with _results(output) as write:
        done = asyncio.run(run(write))
    counted = sorted(done.counts.items(), key=lambda one: (OUTCOMES.index(one[0][0]), one[0][1]))
    if as_json:
        figures: dict[str, int] = {one: done.of(one) for one in OUTCOMES}
        reasons = [
            {"outcome": outcome, "reason": reason, "vouchers": count} for (outcome, reason), count in counted if reason
        ]
        changed: dict[str, object] = {}
        if return_unseen is not None:
            changed = {"unseen": done.returned, "returned": yes}
        elif adopt is not None:
            changed = {"adoptable": done.adopted, "adopted": yes}
        print_json({"distributors": whose, "lines": done.lines, **figures, "reasons": reasons, **changed})
    else:
        print_table(
            ["outcome", "reason", "vouchers"],
            [(_told(outcome), _told(reason), count) for (outcome, reason), count in counted],
            numbers=["vouchers"],
        )
        if return_unseen is not None and yes:
            say(f"{done.returned:,} codes of {return_unseen} that nobody received are in stock again.")
        elif return_unseen is not None:
            say(f"{done.returned:,} codes of {return_unseen} in quarantine are not in {file}: --yes returns them.")
        elif adopt is not None and yes:
            say(f"{done.adopted:,} codes that {names} received are in the ledger now, as issued by {adopt}.")
        elif adopt is not None:
            say(f"{done.adopted:,} codes in quarantine are in {file} with their key: --yes adopts them.")
    off = sum(done.of(one) for one in OUTCOMES if one not in ("matched", "repeated")) - yes * done.adopted
    if not off:
        if not as_json:
            say(f"{names} and the ledger say the same.")
        return
    where = f": see {output}" if output is not None else "; --output FILE says which"
    complain(f"{off:,} vouchers or lines of {file} do not fit the ledger{where}")
    raise typer.Exit(1)


@contextlib.contextmanager
def _results(output: Path | None) -> Iterator[Write]:
    """Writes what is not matched, if to a file: it is whole or not there."""
    if output is None:
        yield lambda page: None
        return
    as_csv = output.suffix == ".csv"
    with whole_file(output) as file:
        if as_csv:
            file.write(csv_rows([Result.__struct_fields__]))

        def write(page: Sequence[Result]) -> None:
            off = [one for one in page if one.outcome != "matched"]
            if as_csv:
                file.write(csv_rows([[getattr(one, name) for name in Result.__struct_fields__] for one in off]))
            else:
                file.write(b"".join(orjson.dumps(_fields(one), option=orjson.OPT_APPEND_NEWLINE) for one in off))

        yield write


def _fields(one: Result) -> dict[str, object]:
    return {name: getattr(one, name) for name in Result.__struct_fields__}


def _told(text: str) -> str:
    return text.replace("_", " ")
