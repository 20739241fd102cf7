"""``voucherd distributor``: the partners."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import instant, print_json, print_table, say
from service.domain import BURST_MIN, RateLimit
from service.store import control, register
from service.store.register import Distributor

app = typer.Typer(help="Distributors: the partners whose terminals ask for vouchers.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The distributor: 1 to 64 of A-Z a-z 0-9 . _ -")]
Burst = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Vouchers that it may have at once.",
        show_default=f"what RATE gives in a second, at least {BURST_MIN}",
    ),
]


@app.command("create")
def create(
    id: Id,
    name: Annotated[str | None, typer.Option(help="What people call it.", show_default="the id")] = None,
    rate: Annotated[int | None, typer.Option(min=1, help="Vouchers a second.", show_default="no limit")] = None,
    burst: Burst = None,
    data_dir: options.DataDir = None,
) -> None:
    """Make a distributor; `voucherd token issue` lets it in, `voucherd campaign assign` lets it issue."""
    if rate is None and burst is not None:
        raise typer.BadParameter("--burst goes with --rate")
    limit = None if rate is None else RateLimit.of(rate, burst)

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())

            async def edit(conn: AsyncConnection) -> None:
                await control.create_distributor(conn, id, name or id, now)
                await control.set_limit(conn, id, limit)

            await put_in_force(
                here,
                edit,
                action="distributor create",
                subject=id,
                told=lambda _: say(f"distributor {id} is there; next: `voucherd token issue {id}`"),
            )

    asyncio.run(run())


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the distributors, how many valid tokens each has and how many campaigns it is assigned to."""

    async def run() -> list[Distributor]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.all_distributors(conn)

    found = asyncio.run(run())
    if as_json:
        print_json([
            {
                "distributor_id": one.id, "name": one.name, "active": one.active, "tokens": one.tokens,
                "rate": one.rate, "burst": one.burst, "campaigns": one.campaigns, "created_at": instant(one.created_at),
            }
            for one in found
        ])  # fmt: skip
        return
    print_table(
        ["distributor", "name", "state", "limit", "tokens", "campaigns"],
        [
            (
                one.id, one.name, "active" if one.active else "suspended", _told(one.limit), one.tokens,
                one.campaigns,
            )
            for one in found
        ],
        numbers=["tokens", "campaigns"],
        whole=["state", "limit"],
    )  # fmt: skip


@app.command("limit")
def limit(
    id: Id,
    rate: Annotated[str, typer.Argument(metavar="RATE|none", help="Vouchers a second, or none for no limit.")],
    burst: Burst = None,
    data_dir: options.DataDir = None,
) -> None:
    """Let a distributor be issued only so many vouchers a second, from when this returns; replays are not counted."""
    if rate != "none" and not (rate.isascii() and rate.isdigit()):
        raise typer.BadParameter("RATE is a number of vouchers a second, or none")
    if rate == "none" and burst is not None:
        raise typer.BadParameter("--burst goes with a rate")
    wanted = None if rate == "none" else RateLimit.of(int(rate), burst)

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                lambda conn: control.set_limit(conn, id, wanted),
                action="distributor limit",
                subject=id,
                detail=_told(wanted),
                told=lambda _: say(f"limit of distributor {id}: {_told(wanted)}"),
            )

    asyncio.run(run())


def _told(limit: RateLimit | None) -> str:
    return "none" if limit is None else f"{limit.rate:,}/s, {limit.burst:,} at once"


@app.command("suspend")
def suspend(id: Id, data_dir: options.DataDir = None) -> None:
    """Stop a distributor: when this returns, no request of it begun later gets a voucher. Its tokens stay."""
    _set_active(id, False, data_dir)


@app.command("resume")
def resume(id: Id, data_dir: options.DataDir = None) -> None:
    """Let a suspended distributor go on, at once."""
    _set_active(id, True, data_dir)


def _set_active(id: str, active: bool, data_dir: Path | None) -> None:
    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                lambda conn: control.set_active(conn, id, active),
                action="distributor resume" if active else "distributor suspend",
                subject=id,
                told=lambda _: say(f"distributor {id} {'goes on' if active else 'is suspended'}"),
            )

    asyncio.run(run())
