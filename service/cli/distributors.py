"""``voucherd distributor``: the partners."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import say
from service.store import control

app = typer.Typer(help="Distributors: the partners whose terminals ask for vouchers.", no_args_is_help=True)


@app.command("create")
def create(
    id: Annotated[str, typer.Argument(metavar="ID", help="1 to 64 of A-Z a-z 0-9 . _ -")],
    name: Annotated[str | None, typer.Option(help="What people call it.", show_default="the id")] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Make a distributor; `voucherd token issue` lets it in, `voucherd campaign assign` lets it issue."""

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here,
                lambda conn: control.create_distributor(conn, id, name or id, now),
                action="distributor create",
                subject=id,
                told=lambda _: say(f"distributor {id} is there; next: `voucherd token issue {id}`"),
            )

    asyncio.run(run())
