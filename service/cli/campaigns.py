"""``voucherd campaign``: rules that turn what a terminal sold into a voucher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service import zones
from service.catalogue import Cap
from service.cli import options, rules
from service.cli.connections import connected, put_in_force
from service.cli.console import instant, print_facts, print_json, print_table, say
from service.store import campaigns, register
from service.store.register import Registered
from service.worker import forms

app = typer.Typer(help="Campaigns: rules that turn what a terminal sold into a voucher.", no_args_is_help=True)

Id = Annotated[str, options.id_of("campaign", "ID")]


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
    priority: Annotated[int, typer.Option(metavar="N", help="Lower goes first.")] = campaigns.PRIORITY,
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
            help=rules.CAP_HELP
            + " Counted for the whole campaign, or with distributor: or terminal: in front for each of these.",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Make a campaign, and its pool if none is named. Nobody issues by it before `campaign assign`."""
    now = int(time.time())
    zone = options.typed(zones.zone, time_zone)
    starts_at = now if starts is None else options.typed(forms.start_of, starts, zone)
    ends_at = 0 if until is None else options.typed(forms.end_of, until, zone)
    caps = options.typed(forms.caps, cap or (), "campaign")

    async def edit(conn: AsyncConnection) -> None:
        if pool is None:
            await rules.make_pool(conn, "campaign", id, now)
        await campaigns.create(
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
                detail=f"category {category}, products {' '.join(product)}, pool {pool or id}, "
                f"caps {forms.caps_told(caps)}",
                told=lambda _: say(
                    f"campaign {id} is there; next: `voucherd codes import {pool or id} FILE` and "
                    f"`voucherd campaign assign {id} DISTRIBUTOR`"
                ),
            )

    asyncio.run(run())


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the campaigns in the order in which they are tried; `voucherd explain` says which one wins."""

    async def run() -> list[Registered]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.all_campaigns(conn)

    found = sorted(asyncio.run(run()), key=lambda one: one.campaign.rank)
    now = int(time.time())
    if as_json:
        print_json([_fields(one, now) for one in found])
        return
    print_table(
        ["campaign", "state", "priority", "products", "pool", "until", "assigned to"],
        [
            (
                one.campaign.id, one.state(now), one.campaign.priority, " ".join(one.campaign.products),
                one.campaign.pool, _end(one.campaign.until)[:10], len(one.campaign.assigned),
            )
            for one in found
        ],
        numbers=["priority", "assigned to"],
        whole=["state", "until"],
    )  # fmt: skip


@app.command("show")
def show(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Show a campaign: window, products, caps, who may issue by it, and the version for --if-version."""

    async def run() -> tuple[Registered, dict[str, bool]]:
        async with connected(data_dir) as here, here.database.read() as conn:
            active = {one.id: one.active for one in await register.all_distributors(conn)}
            return await register.campaign(conn, id), active

    found, active = asyncio.run(run())
    now, campaign = int(time.time()), found.campaign
    if as_json:
        assigned = [
            {"distributor_id": distributor, "active": active[distributor], "caps": _cap_fields(caps)}
            for distributor, caps in campaign.assigned.items()
        ]
        print_json({**_fields(found, now), "assigned": assigned})
        return
    print_facts({
        "campaign": campaign.id,
        "state": found.state(now),
        "version": str(found.version),
        "category": campaign.category,
        "products": " ".join(campaign.products),
        "pool": campaign.pool,
        "priority": campaign.priority,
        "from": instant(campaign.starts_at),
        "until": _end(campaign.until),
        "time zone": campaign.time_zone,
        "caps": forms.caps_told(campaign.caps),
        "created": instant(found.created_at),
    })  # fmt: skip
    if campaign.assigned:
        print_table(
            ["distributor", "state", "caps"],
            [
                (distributor, "active" if active[distributor] else "suspended", forms.caps_told(caps))
                for distributor, caps in campaign.assigned.items()
            ],
            whole=["state"],
        )
    else:
        say(f"Nobody may issue by it: `voucherd campaign assign {id} DISTRIBUTOR`.")


rules.add_commands(app, "campaign", "ID")


def _end(until: int) -> str:
    return instant(until) if until else "open"


def _fields(found: Registered, now: int) -> dict[str, object]:
    one = found.campaign
    return {
        "campaign_id": one.id,
        "state": found.state(now),
        "version": found.version,
        "category": one.category,
        "products": one.products,
        "pool": one.pool,
        "priority": one.priority,
        "from": instant(one.starts_at),
        "until": instant(one.until) if one.until else None,
        "time_zone": one.time_zone,
        "paused": one.paused,
        "caps": _cap_fields(one.caps),
        "distributors": sorted(one.assigned),
        "created_at": instant(found.created_at),
    }


def _cap_fields(caps: Iterable[Cap]) -> list[dict[str, object]]:
    return [{"holder": cap.holder, "period": cap.period, "limit": cap.limit} for cap in caps]
