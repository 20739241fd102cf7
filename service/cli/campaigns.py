"""``voucherd campaign``: rules that turn what a terminal sold into a voucher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service import zones
from service.catalogue import Cap
from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import instant, print_facts, print_json, print_table, say
from service.errors import Conflict
from service.store import campaigns, control, register, stock
from service.store.register import Registered
from service.worker import forms
from service.worker.publish import deciding_second

T = TypeVar("T")

# Expiry of codes that bring none, in a pool that was made along with its campaign.
POOL_LIFE: Final = timedelta(days=365)

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
            help=CAP_HELP
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
            if id in await stock.stock_versions(conn):
                raise Conflict(f"pool {id} exists already: say --pool {id} if the campaign is to draw from it")
            expires_at = forms.expiry_of(str(datetime.fromtimestamp(now, UTC).date() + POOL_LIFE))
            await control.create_pool(conn, id, default_expires_at=expires_at, least_life_s=0, now=now)
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
                detail=f"category {category}, products {' '.join(product)}, pool {pool or id}, caps {_told(caps)}",
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
        "caps": _told(campaign.caps),
        "created": instant(found.created_at),
    })  # fmt: skip
    if campaign.assigned:
        print_table(
            ["distributor", "state", "caps"],
            [
                (distributor, "active" if active[distributor] else "suspended", _told(caps))
                for distributor, caps in campaign.assigned.items()
            ],
            whole=["state"],
        )
    else:
        say(f"Nobody may issue by it: `voucherd campaign assign {id} DISTRIBUTOR`.")


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
    if_version: options.IfVersion = None,
    data_dir: options.DataDir = None,
) -> None:
    """Let a distributor issue by a campaign, at once. Again: these caps replace those given before."""
    caps = [
        *options.typed(forms.caps, cap or (), "distributor"),
        *options.typed(forms.caps, terminal_cap or (), "terminal"),
    ]

    _change(
        data_dir,
        lambda conn, now: campaigns.assign(conn, id, distributor, caps, now, if_version),
        action="campaign assign",
        subject=id,
        detail=f"distributor {distributor}, caps {_told(caps)}",
        told=lambda _: say(f"{distributor} may issue by campaign {id}, caps: {_told(caps)}"),
    )


@app.command("unassign")
def unassign(
    id: Id,
    distributor: Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help="Who may not issue by it any more.")],
    if_version: options.IfVersion = None,
    data_dir: options.DataDir = None,
) -> None:
    """Take a campaign from a distributor: when this returns, no request begun later gets a voucher of it."""
    _change(
        data_dir,
        lambda conn, _: campaigns.unassign(conn, id, distributor, if_version),
        action="campaign unassign",
        subject=id,
        detail=f"distributor {distributor}",
        told=lambda _: say(f"{distributor} may not issue by campaign {id} any more; its caps there are gone"),
    )


@app.command("cap")
def cap_(
    id: Id,
    caps: Annotated[
        list[str],
        typer.Argument(
            metavar="[DISTRIBUTOR] [HOLDER:]PERIOD=N...",
            help="Whose assignment it is about, the campaign's own caps without; then caps as `campaign create` takes "
            "them, day=100 or terminal:total=1 say; day=none takes one away.",
        ),
    ],
    if_version: options.IfVersion = None,
    data_dir: options.DataDir = None,
) -> None:
    """Set single caps, at once, and leave all others as they are. One that had a limit before goes on counting."""
    distributor = "" if "=" in caps[0] else caps.pop(0)
    if not caps:
        raise typer.BadParameter("say a cap: day=100, total=5000, or day=none to take it away")
    changes = options.typed(forms.cap_changes, caps, "distributor" if distributor else "campaign")
    whose = f"{distributor} in campaign {id}" if distributor else f"campaign {id}"
    _change(
        data_dir,
        lambda conn, now: campaigns.set_caps(conn, id, distributor, changes, now, if_version),
        action="campaign cap",
        subject=id,
        detail=(f"distributor {distributor}, " if distributor else "") + " ".join(caps),
        told=lambda left: say(f"caps of {whose}: {_told(left)}"),
    )


@app.command("pause")
def pause(id: Id, if_version: options.IfVersion = None, data_dir: options.DataDir = None) -> None:
    """Stop a campaign: when this returns, no request begun later gets a voucher of it."""
    _set_paused(id, True, if_version, data_dir)


@app.command("resume")
def resume(id: Id, if_version: options.IfVersion = None, data_dir: options.DataDir = None) -> None:
    """Let a paused campaign go on, at once. One that is over stays over."""
    _set_paused(id, False, if_version, data_dir)


@app.command("end")
def end(id: Id, if_version: options.IfVersion = None, data_dir: options.DataDir = None) -> None:
    """End a campaign for good: when this returns, no request begun later gets a voucher of it.

    Nothing brings it back; `campaign pause` stops one for a while. Vouchers that were issued keep their expiry.
    """

    async def run() -> None:
        async with connected(data_dir) as here:
            now = await deciding_second(here.scripts)
            await put_in_force(
                here,
                lambda conn: campaigns.end(conn, id, now, if_version),
                action="campaign end",
                subject=id,
                told=lambda since: say(f"campaign {id} is over since {instant(since)}, for good"),
            )

    asyncio.run(run())


def _set_paused(id: str, paused: bool, if_version: int | None, data_dir: Path | None) -> None:
    _change(
        data_dir,
        lambda conn, now: campaigns.set_paused(conn, id, paused, now, if_version),
        action="campaign pause" if paused else "campaign resume",
        subject=id,
        told=lambda _: say(f"campaign {id} {'is paused' if paused else 'goes on'}"),
    )


def _told(caps: Iterable[Cap]) -> str:
    return ", ".join(map(forms.cap_told, caps)) or "none"


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


def _change(
    data_dir: Path | None,
    edit: Callable[[AsyncConnection, int], Awaitable[T]],
    *,
    action: str,
    subject: str,
    detail: str = "",
    told: Callable[[T], None],
) -> None:
    """``edit``, which is given the Unix second, is made and put in force."""

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here, lambda conn: edit(conn, now), action=action, subject=subject, detail=detail, told=told
            )

    asyncio.run(run())
