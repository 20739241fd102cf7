"""``voucherd audit``: whether the books balance, in detail."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, print_facts, print_json, print_table, say
from service.store import books
from service.store.books import QuarantinedCode
from service.worker import audit as auditing
from service.worker.audit import Report
from service.worker.balance import PartitionFigures

# An audit reads the whole ledger: some seconds for a million codes, and no hurry.
STATEMENT_S: Final = 3_600.0

# Codes named by one audit; a whole window lost at 1,000 vouchers a second is 120,000.
NAMED_MAX: Final = 1_000_000


def audit(
    as_json: options.AsJson = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Name every code in quarantine by lot, seq and serial number.")
    ] = False,
    data_dir: options.DataDir = None,
) -> None:
    """Check that the books balance: no code given twice or lost, no key answered twice, no cap exceeded.

    Reads the store and Redis and changes nothing; may run at any time. Exit status 0 if all is well, 1 and a table of
    what is off if not. Codes in quarantine were lost with a Redis: they are listed, and nobody gets them.
    """

    async def run() -> tuple[Report, list[QuarantinedCode]]:
        async with connected(data_dir, statement_s=STATEMENT_S) as here:
            report = await auditing.audit(here.database, here.scripts, retention_s=here.settings.replay_retention_s)
            if not quarantine:
                return report, []
            async with here.database.read() as conn:
                return report, await books.quarantined_codes(conn, NAMED_MAX)

    report, named = asyncio.run(run())
    if as_json:
        shown = {"balanced": not report.findings, **msgspec.to_builtins(report)}
        print_json({**shown, "quarantined_codes": named} if quarantine else shown)
    else:
        _show_audit(report, named)
    if report.findings:
        raise typer.Exit(1)


def _show_audit(report: Report, named: list[QuarantinedCode]) -> None:
    print_table(
        ["pool", "imported", "stored", "leased", "withdrawn"],
        [(one.pool, one.imported, one.stored, one.leased, one.withdrawn) for one in report.pools],
        title="Stock: imported = stored + leased + withdrawn",
        numbers=["imported", "stored", "leased", "withdrawn"],
    )
    if report.partition is not None:
        _show_partition(report.partition)
    if report.quarantine:
        print_table(
            ["pool", "partition", "generation", "codes"],
            [(one.pool, one.partition, one.generation, one.codes) for one in report.quarantine],
            title="Quarantine: lost with a Redis, and nobody's",
            numbers=["partition", "generation", "codes"],
        )
    if named:
        print_table(
            ["pool", "generation", "lot", "seq", "serial number"],
            [(one.pool, one.generation, one.lot, str(one.seq), one.serial_number) for one in named],
            numbers=["generation", "lot", "seq"],
        )
    if not report.findings:
        say("The books balance.")
        return
    print_table(
        ["promise", "where", "what is off", "figures"],
        [
            (
                one.promise,
                one.subject,
                one.detail,
                "\n".join(f"{name} {value:,}" for name, value in one.figures.items()),
            )
            for one in report.findings
        ],
        title="What is off",
    )
    many = len(report.findings)
    complain(f"the books do not balance: {many} finding{'' if many == 1 else 's'}")


def _show_partition(one: PartitionFigures) -> None:
    say(f"Generation {one.generation}, in codes")
    print_facts({
        "restocked": one.restocked, "popped": one.popped, "set aside": one.set_aside, "taken back": one.taken_back,
        "withdrawn": one.withdrawn, "in windows": one.windows, "in outbox": one.outbox, "accounted for": one.accounted,
    })  # fmt: skip
    say()
    if not one.at_rest:
        say("Codes were on the move: what balances only at rest was not checked. Audit again when it is quiet.")
