"""``voucherd ledger``: what was issued, for good."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, instant, print_facts, print_json, print_table
from service.store import ledger
from service.store.ledger import Found

app = typer.Typer(help="The ledger: what was issued, for good.", no_args_is_help=True)


@app.command("find")
def find(
    request_id: Annotated[str | None, typer.Option(metavar="ID", help="The request's id.", show_default=False)] = None,
    code: Annotated[str | None, typer.Option(metavar="CODE", help="The voucher code.", show_default=False)] = None,
    distributor: Annotated[str | None, typer.Option(metavar="ID", help="Who asked.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Show at most so many, the latest ones.")] = 20,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Find issued vouchers that fit all that is given; without anything, the latest ones.

    Exit status 1 if nothing fits. What was issued a moment ago may still be on its way here.
    """

    async def run() -> list[Found]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await ledger.find(conn, request_id=request_id, code=code, distributor=distributor, limit=limit)

    found = asyncio.run(run())
    if as_json:
        print_json([_fields(one) for one in found])
    elif len(found) == 1:
        print_facts(_fields(found[0]))
    elif found:
        print_table(
            ["issued at", "distributor", "request", "code", "serial number"],
            [(instant(one.issued_at), one.distributor, one.request_id, one.code, one.serial) for one in found],
            whole=["issued at", "code"],
        )
    if not found:
        complain("nothing in the ledger fits; what was issued a moment ago may still be on its way there")
        raise typer.Exit(1)


def _fields(one: Found) -> dict[str, object]:
    """Names and forms of the API, and where the voucher came from and went."""
    expires_at = min(one.expires_at, one.until) if one.until else one.expires_at
    return {
        "voucher_code": one.code,
        "serial_number": one.serial,
        "expiry_date": instant(expires_at),
        "issued_at": instant(one.issued_at),
        "request_id": one.request_id,
        "distributor_id": one.distributor,
        "terminal_id": one.terminal,
        "campaign_id": one.campaign,
        "category_id": one.category,
        "product_id": one.product,
        "api": one.api,
        "pool": one.pool,
        "lot": one.lot,
        "seq": one.seq,
        "outbox": f"{one.partition}/{one.generation}/{one.outbox_seq}.{one.ordinal}",
        "flushed_at": instant(one.flushed_at),
        "double": one.double,
    }
