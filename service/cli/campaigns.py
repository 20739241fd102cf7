"""``voucherd campaign``: rules that turn what a terminal sold into a voucher."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Cap
from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import say
from service.errors import Conflict
from service.store import control, stock
from service.worker.codes_file import expiry

# Expiry of codes that bring none, in a pool that was made along with its campaign.
POOL_LIFE: Final = timedelta(days=365)

# Between the extremes that the store takes, so that there is room on both sides.
PRIORITY: Final = 100

CAP_HELP: Final = "At most so many vouchers: total=5000, day=100, hour=10; repeat it for several."

app = typer.Typer(help="Campaigns: rules that turn what a terminal sold into a voucher.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The campaign: 1 to 64 of A-Z a-z 0-9 . _ -")]


@app.command("create")
def create(
    id: Id,
    category: Annotated[str, typer.Option(metavar="C", help="The product category that vouchers of it belong to.")],
    product: Annotated[
        list[str], typer.Option(metavar="P", help="A product id that it serves; repeat it for several.")
    ],
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="POOL",
            help="Where its codes come from. Without it a pool of the campaign's id is made, whose codes expire in a "
            "year unless they bring an expiry.",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[int, typer.Option(metavar="N", help="Lower goes first.")] = PRIORITY,
    starts: Annotated[
        str | None,
        typer.Option("--from", metavar="T", help="A day (its start in the time zone) or a time.", show_default="now"),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="T", help="A day (the whole of it) or a time (exclusive).", show_default="open"),
    ] = None,
    time_zone: Annotated[str, typer.Option(metavar="ZONE", help="Whose days and hours caps count.")] = "UTC",
    cap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[HOLDER:]PERIOD=N",
            help=CAP_HELP
            + " Counted for the whole campaign, or with distributor: or terminal: in front for each of these.",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Make a campaign, and its pool if none is named. Nobody issues by it before `campaign assign`."""
    now = int(time.time())
    zone = options.zone_of(time_zone)
    starts_at = now if starts is None else options.start_of(starts, zone)
    ends_at = 0 if until is None else options.end_of(until, zone)
    caps = options.caps(cap, "campaign")

    async def edit(conn: AsyncConnection) -> None:
        if pool is None:
            if id in await stock.stock_versions(conn):
                raise Conflict(f"pool {id} exists already: say --pool {id} if the campaign is to draw from it")
            expires_at = expiry(str(datetime.fromtimestamp(now, UTC).date() + POOL_LIFE))
            await control.create_pool(conn, id, default_expires_at=expires_at, least_life_s=0, now=now)
        await control.create_campaign(
            conn, id, category=category, products=product, pool=pool or id, priority=priority,
            starts_at=starts_at, until=ends_at, time_zone=time_zone, caps=caps, now=now,
        )  # fmt: skip

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                edit,
                action="campaign create",
                subject=id,
                detail=f"category {category}, products {' '.join(product)}, pool {pool or id}, caps {_told(caps)}",
                told=lambda _: say(
                    f"campaign {id} is there; next: `voucherd codes import {pool or id} FILE` and "
                    f"`voucherd campaign assign {id} DISTRIBUTOR`"
                ),
            )

    asyncio.run(run())


@app.command("assign")
def assign(
    id: Id,
    distributor: Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help="Who may issue by it.")],
    cap: Annotated[
        list[str] | None,
        typer.Option(metavar="PERIOD=N", help=CAP_HELP + " Counted for this distributor.", show_default=False),
    ] = None,
    terminal_cap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PERIOD=N", help="The same, counted for each terminal of this distributor.", show_default=False
        ),
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Let a distributor issue by a campaign, at once. Again: these caps replace those given before."""
    caps = [*options.caps(cap, "distributor"), *options.caps(terminal_cap, "terminal")]

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here,
                lambda conn: control.assign(conn, id, distributor, caps, now),
                action="campaign assign",
                subject=id,
                detail=f"distributor {distributor}, caps {_told(caps)}",
                told=lambda _: say(f"{distributor} may issue by campaign {id}, caps: {_told(caps)}"),
            )

    asyncio.run(run())


@app.command("pause")
def pause(id: Id, data_dir: options.DataDir = None) -> None:
    """Stop a campaign: when this returns, no request begun later gets a voucher of it."""
    _set_paused(id, True, data_dir)


@app.command("resume")
def resume(id: Id, data_dir: options.DataDir = None) -> None:
    """Let a paused campaign go on, at once."""
    _set_paused(id, False, data_dir)


def _set_paused(id: str, paused: bool, data_dir: Path | None) -> None:
    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                lambda conn: control.set_paused(conn, id, paused),
                action="campaign pause" if paused else "campaign resume",
                subject=id,
                told=lambda _: say(f"campaign {id} {'is paused' if paused else 'goes on'}"),
            )

    asyncio.run(run())


def _told(caps: list[Cap]) -> str:
    return ", ".join(f"{cap.holder}:{cap.period}={cap.limit}" for cap in caps) or "none"
