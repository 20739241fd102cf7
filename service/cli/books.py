"""``voucherd audit`` and ``voucherd status``: whether all is well, in detail and at a glance."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, instant, print_facts, print_json, print_table, say
from service.store import books
from service.store.books import QuarantinedCode
from service.worker import audit as auditing
from service.worker import status as looking
from service.worker.audit import Report
from service.worker.balance import PartitionFigures
from service.worker.status import PartitionStatus, Status

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


def status(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Show pools, outbox, generation, incidents, and how long issuing would go on without the store.

    Exit status 1 if something needs attention.
    """

    async def run() -> Status:
        async with connected(data_dir, store_may_be_away=True) as here:
            return await looking.status(here.database, here.scripts, here.settings)

    found = asyncio.run(run())
    if as_json:
        print_json(found)
    else:
        _show_status(found)
    if found.wrong:
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
    figures = {
        "restocked": one.restocked, "popped": one.popped, "set aside": one.set_aside, "taken back": one.taken_back,
        "withdrawn": one.withdrawn, "in windows": one.windows, "in outbox": one.outbox, "accounted for": one.accounted,
    }  # fmt: skip
    title = f"Generation {one.generation}, in codes"
    print_table([*figures], [[*figures.values()]], title=title, numbers=[*figures])
    if not one.at_rest:
        say("Codes were on the move: what balances only at rest was not checked. Audit again when it is quiet.")


def _show_status(found: Status) -> None:
    facts: dict[str, object] = {}
    if found.partition is not None:
        facts |= _facts(found.partition, found)
    facts["catalogue"] = _catalogue(found)
    facts["incidents"] = found.incidents
    facts["parked entries"] = found.parked
    facts["quarantine"] = f"{found.quarantined:,} codes"
    print_facts(facts)
    columns = ["in stock", "in window", "low water", "quarantine"]
    print_table(
        ["pool", *columns, ""],
        [
            (
                one.pool,
                one.left,
                one.window,
                one.low_water,
                one.quarantined,
                "exhausted" if one.exhausted and not one.window else " ",
            )
            for one in found.pools
        ],
        numbers=columns,
    )
    if found.newest_incidents:
        print_table(
            ["raised at", "incident", "where", "detail"],
            [(instant(one.raised_at), one.kind, one.subject, one.detail) for one in found.newest_incidents],
        )
    for line in found.wrong:
        complain(line)


def _facts(partition: PartitionStatus, found: Status) -> dict[str, object]:
    state = "issuing" if partition.issuing else "NOT ISSUING"
    return {
        "state": f"{state}, restoring records" if partition.restoring else state,
        "generation": partition.generation,
        "outbox": f"{partition.outbox_codes:,} codes in {partition.outbox_entries:,} entries, "
        f"room for {partition.outbox_max:,}",
        "without the store": f"{partition.outage_s:,} s at {found.planned_rate:,} vouchers/s "
        f"(wanted: {found.store_outage_s:,} s)",
    }


def _catalogue(found: Status) -> str:
    store = "store away" if found.catalogue is None else f"version {found.catalogue}"
    return store if found.partition is None else f"{store}, in force from {max(found.partition.fence, 0)}"
