"""``voucherd pool withdraw``: a leaked batch leaves stock and windows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, print_facts, print_json
from service.worker.codes_file import CodesFile
from service.worker.generating import Fill
from service.worker.refill import Refill
from service.worker.withdrawing import Withdrawal
from service.worker.withdrawing import withdraw as withdraw_from


def withdraw(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Whose codes they are.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit log.")],
    codes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="These codes: a file as `codes import` takes it.", show_default=False),
    ] = None,
    lot: Annotated[
        int | None,
        typer.Option(metavar="LOT", help="All codes of this lot; `pool show` lists the lots.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Take codes out of stock and out of windows, for good: no request begun after this returned gets one of them.

    What was issued stays issued: it is counted, and `ledger find --code` says to whom. Repeating the command changes
    nothing. Exit status 1 if a code may still be in a window, because Redis was being recovered: then repeat it.
    """
    if (codes is None) == (lot is None):
        raise typer.BadParameter("say either --codes or --lot")
    if not reason.strip() or not reason.isprintable():
        raise typer.BadParameter("--reason needs some printable text")
    named, unreadable = _named(codes) if codes is not None else ([], 0)
    if not yes:
        what = f"{len(named):,} codes" if lot is None else f"all codes of lot {lot}"
        typer.confirm(f"Withdraw {what} of pool {pool} for good?", abort=True, err=True)

    async def run() -> Withdrawal:
        async with connected(data_dir) as here:
            refill = Refill(
                here.database, here.scripts,
                low_water=here.settings.low_water, store_outage_s=here.settings.store_outage_s,
                fill=Fill(here.database, here.scripts),  # without it a generated pool might be called exhausted
            )  # fmt: skip
            return await withdraw_from(
                here.database, here.scripts, refill, pool, named=named, lot=lot, reason=reason, actor=here.actor
            )

    done = asyncio.run(run())
    if as_json:
        print_json({**_fields(done), "unreadable_lines": unreadable})
    else:
        print_facts({name.replace("_", " "): value for name, value in _fields(done).items() if name != "pool"})
    if unreadable:
        complain(f"{unreadable} lines of {codes} could not be read, and were passed over")
    if done.unreached:
        complain(f"{done.unreached} codes may still be in a window, Redis was being recovered: repeat the command")
    if done.unreached or unreadable:
        raise typer.Exit(1)


def _named(file: Path) -> tuple[list[str], int]:
    rows = list(CodesFile(file).rows())
    return [row.code for row in rows if not row.unreadable], sum(bool(row.unreadable) for row in rows)


def _fields(done: Withdrawal) -> dict[str, object]:
    return {
        "pool": done.pool,
        "withdrawn_from_stock": done.stock,
        "withdrawn_from_windows": done.windows,
        "withdrawn_before": done.before,
        "in_quarantine": done.quarantined,
        "issued_already": done.issued,
        "on_the_way_to_the_ledger": done.on_the_way,
        "not_of_this_pool": done.unknown,
        "unreached": done.unreached,
    }
