"""``voucherd voucher``: what became of vouchers of Client API v3, as whoever redeems them says."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import instant, print_facts, print_json, say
from service.domain import Terms
from service.store import vouchers
from service.store.vouchers import Change, Held
from service.vouchers import expires_at, voucher_name
from service.worker import forms

app = typer.Typer(help="Vouchers of Client API v3: what became of them.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The voucher_id.")]


@app.command("show")
def show(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The voucher_id.", show_default=False)] = None,
    code: Annotated[
        str | None, typer.Option(metavar="CODE", help="The voucher with this code.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Show a voucher: whose it is, what it is worth, and what became of it."""
    if (id is None) == (code is None):
        raise typer.BadParameter("say either the voucher's id or --code")
    wanted = None if id is None else options.typed(forms.voucher_id_of, id)

    async def run() -> Held:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await vouchers.find(conn, voucher_id=wanted, code=code)

    _print(asyncio.run(run()), as_json)


@app.command("void")
def void(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Void a voucher, for good. It gives back neither its code nor what it used of a cap."""
    _change(id, "void", as_json, data_dir)


@app.command("mark-used")
def mark_used(
    id: Id,
    remaining: Annotated[
        int,
        typer.Option(metavar="N", help="What is left of one of multiple use, cents or items.", min=0),
    ] = 0,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Say that a voucher was used, or that so much is left of it."""
    _change(id, "mark-used", as_json, data_dir, remaining)


@app.command("deactivate")
def deactivate(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Say that a voucher can't be used for the time being."""
    _change(id, "deactivate", as_json, data_dir)


@app.command("activate")
def activate(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Say that a voucher can be used again."""
    _change(id, "activate", as_json, data_dir)


def _change(id: str, what: Change, as_json: bool, data_dir: Path | None, remaining: int = 0) -> None:
    wanted, now = options.typed(forms.voucher_id_of, id), int(time.time())

    async def run() -> Held:
        async with connected(data_dir) as here, here.database.write() as conn:
            return await vouchers.change(conn, wanted, what, now, actor=here.actor, remaining=remaining)

    after = asyncio.run(run())
    if as_json:
        _print(after, as_json)
    else:
        left = "" if after.remaining is None else f", {after.remaining:,} left"
        say(f"voucher {UUID(bytes=after.voucher_id)} is {after.status}{left}")


def _print(held: Held, as_json: bool) -> None:
    terms = Terms.unpack(held.terms)
    ends = expires_at(terms, held.issued_at, held.code_expires_at)
    fields: dict[str, object] = {
        "voucher_id": str(UUID(bytes=held.voucher_id)),
        "status": "expired" if held.status in ("active", "inactive") and ends < time.time() else held.status,
        "remaining_amount": held.worth if held.remaining is None else held.remaining,
        "name": voucher_name(terms, held.face_value),
        "product_code": held.product,
        "currency": terms.currency,
        "issued_at": instant(held.issued_at),
        "expires_at": instant(ends),
        "client_id": held.client,
        "distributor_id": held.distributor,
        "client_reference": held.client_reference or None,
        "changed_at": None if held.changed_at is None else instant(held.changed_at),
    }
    if as_json:
        print_json(fields)
    else:
        print_facts({name.replace("_", " "): value for name, value in fields.items()})
