"""``voucherd explain``: why a request gets what it gets."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import print_facts, print_json, print_table, say
from service.store.control import ID
from service.worker import explain as explaining
from service.worker.explain import Explanation


def explain(
    distributor: Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help="Who asks.")],
    products: Annotated[
        str, typer.Argument(metavar="PRODUCT[,PRODUCT...]", help="What it asks for, in the order of the request.")
    ],
    terminal: Annotated[
        str, typer.Option(metavar="ID", help="Which terminal, for caps counted per terminal.", show_default=False)
    ] = "",
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Say which campaign would win a request now, and what stops every other one.

    Reads Redis and the store and changes nothing. Exit status 0 if a voucher would be issued, 1 if not.
    """
    wanted = tuple(products.split(","))
    for product in wanted:
        if ID.fullmatch(product) is None:
            raise typer.BadParameter(f"{product[:80]!r} is no product: separate products by commas alone, PAY,MOB say")

    async def run() -> Explanation:
        async with connected(data_dir, store_may_be_away=True) as here:
            return await explaining.explain(
                here.database, here.scripts, distributor, wanted,
                terminal=terminal, outbox_max=here.settings.outbox_max,
                outbox_bytes_max=here.settings.outbox_bytes_max,
            )  # fmt: skip

    found = asyncio.run(run())
    if as_json:
        print_json(found)
    else:
        _show(found)
    if found.winner is None:
        raise typer.Exit(1)


def _show(found: Explanation) -> None:
    print_facts(
        {
            "at": found.at,
            "catalogue": found.catalogue,
            "outcome": f"a voucher of {found.winner}" if found.winner else f"no voucher: {found.outcome}",
        }
    )
    if found.campaigns:
        print_table(
            ["product", "campaign", "standing", "why"],
            [(one.product_id, one.campaign_id, one.standing.replace("_", " "), one.why) for one in found.campaigns],
            whole=["standing"],
        )
    else:
        say("No campaign serves any of these products.")
    for note in found.notes:
        say(f"Note: {note}.")
