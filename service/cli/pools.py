"""``voucherd pool``: where codes are kept."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import instant, print_facts, print_json, print_table, say
from service.cli.withdrawing import withdraw
from service.store import control, register
from service.store.register import Pool
from service.worker import forms

app = typer.Typer(help="Pools: where codes are kept.", no_args_is_help=True)
app.command("withdraw")(withdraw)

Id = Annotated[str, typer.Argument(metavar="ID", help="The pool: 1 to 64 of A-Z a-z 0-9 . _ -")]


@app.command("create")
def create(
    id: Id,
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
    expires_at = None if expires is None else options.typed(forms.expiry_of, expires)
    least_life_s = options.typed(forms.seconds, least_life)

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


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the pools and what the store has of their codes; `voucherd status` adds windows and burn rates."""

    async def run() -> list[Pool]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.all_pools(conn)

    found = asyncio.run(run())
    if as_json:
        print_json([_fields(one) for one in found])
        return
    print_table(
        ["pool", "imported", "stored", "leased", "withdrawn", "first expiry"],
        [
            (
                one.id, one.codes("imported"), one.codes("stored"), one.codes("leased"), one.codes("withdrawn"),
                next((instant(lot.expires_at) for lot in one.lots if lot.stored), None),
            )
            for one in found
        ],
        numbers=["imported", "stored", "leased", "withdrawn"],
        whole=["first expiry"],
    )  # fmt: skip


@app.command("show")
def show(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Show a pool: what holds for its codes, and its lots, one for each expiry, in the order of issuing."""

    async def run() -> Pool:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.pool(conn, id)

    found = asyncio.run(run())
    if as_json:
        lots = [
            {
                "lot": lot.lot, "expires_at": instant(lot.expires_at), "imported": lot.imported,
                "stored": lot.stored, "leased": lot.leased, "withdrawn": lot.withdrawn,
            }
            for lot in found.lots
        ]  # fmt: skip
        print_json({**_fields(found), "lots": lots})
        return
    print_facts({
        "pool": found.id,
        "default expiry": "each code brings its own" if (at := found.default_expires_at) is None else instant(at),
        "least life": forms.duration_told(found.least_life_s),
        "created": instant(found.created_at),
        "imported": found.codes("imported"),
        "stored": found.codes("stored"),
        "leased": found.codes("leased"),
        "withdrawn": found.codes("withdrawn"),
    })  # fmt: skip
    if found.lots:
        print_table(
            ["lot", "expires", "imported", "stored", "leased", "withdrawn"],
            [
                (str(lot.lot), instant(lot.expires_at), lot.imported, lot.stored, lot.leased, lot.withdrawn)
                for lot in found.lots
            ],
            numbers=["lot", "imported", "stored", "leased", "withdrawn"],
            whole=["expires"],
        )
    else:
        say(f"It is empty: fill it with `voucherd codes import {id} FILE`.")


def _fields(pool: Pool) -> dict[str, object]:
    return {
        "pool": pool.id,
        "default_expires_at": None if pool.default_expires_at is None else instant(pool.default_expires_at),
        "least_life_s": pool.least_life_s,
        "created_at": instant(pool.created_at),
        "imported": pool.codes("imported"),
        "stored": pool.codes("stored"),
        "leased": pool.codes("leased"),
        "withdrawn": pool.codes("withdrawn"),
    }
