"""``voucherd pool``: where codes are kept."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import say
from service.cli.withdrawing import withdraw
from service.store import control

app = typer.Typer(help="Pools: where codes are kept.", no_args_is_help=True)
app.command("withdraw")(withdraw)


@app.command("create")
def create(
    id: Annotated[str, typer.Argument(metavar="ID", help="1 to 64 of A-Z a-z 0-9 . _ -")],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DATE",
            help="Expiry of codes that bring none: a day (its end in UTC) or a time. "
            "Without it every code has to bring one.",
            show_default=False,
        ),
    ] = None,
    least_life: Annotated[
        str,
        typer.Option(metavar="DURATION", help="Codes with less life left are set aside, never issued: 7d, 12h, 45."),
    ] = "0",
    data_dir: options.DataDir = None,
) -> None:
    """Make an empty pool; `voucherd codes import` fills it."""
    expires_at = None if expires is None else options.expiry_of(expires)
    least_life_s = options.seconds(least_life)

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here,
                lambda conn: control.create_pool(
                    conn, id, default_expires_at=expires_at, least_life_s=least_life_s, now=now
                ),
                action="pool create",
                subject=id,
                detail=f"expires {expires or 'by code'}, least life {least_life_s} s",
                told=lambda _: say(f"pool {id} is there; fill it with `voucherd codes import {id} FILE`"),
            )

    asyncio.run(run())
