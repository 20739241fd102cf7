"""``voucherd client``: who may use Client API v3.  A secret is shown once; only its SHA-256 is kept."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import complain, instant, print_json, print_table, say
from service.store import clients
from service.store.clients import SCOPES, Known
from service.tokens import SECRET_PREFIX, digest, new_token

app = typer.Typer(help="Clients: who may use Client API v3.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The client: 1 to 64 of A-Z a-z 0-9 . _ -")]


@app.command("create")
def create(
    id: Id,
    distributor: Annotated[str, typer.Option(metavar="ID", help="Whose client it is, for good.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help=f"What it may do: {', '.join(SCOPES)}.", show_default="all"),
    ] = None,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Make a client; it gets access tokens when this returns. Its secret is shown this once."""

    async def edit(conn: AsyncConnection, secret_sha256: str, now: int) -> None:
        await clients.create(conn, id, distributor, secret_sha256, scope or SCOPES, now)

    _give(id, edit, "client create", as_json, data_dir)


@app.command("rotate-secret")
def rotate_secret(id: Id, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Make a new secret: when this returns, only it gets access tokens. Those that there are stay good."""

    async def edit(conn: AsyncConnection, secret_sha256: str, now: int) -> None:
        await clients.rotate_secret(conn, id, secret_sha256, now)

    _give(id, edit, "client rotate-secret", as_json, data_dir)


@app.command("suspend")
def suspend(id: Id, data_dir: options.DataDir = None) -> None:
    """Stop a client: when this returns, neither its secret nor its access tokens are accepted."""
    _set_active(id, False, data_dir)


@app.command("resume")
def resume(id: Id, data_dir: options.DataDir = None) -> None:
    """Let a suspended client go on, at once."""
    _set_active(id, True, data_dir)


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the clients, whose they are and what they may do. A secret is nowhere: it was shown when it was made."""

    async def run() -> list[Known]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await clients.known(conn)

    found = asyncio.run(run())
    if as_json:
        print_json([
            {
                "client_id": one.id, "distributor_id": one.distributor, "scopes": one.scopes, "active": one.active,
                "created_at": instant(one.created_at),
                "rotated_at": None if one.rotated_at is None else instant(one.rotated_at),
            }
            for one in found
        ])  # fmt: skip
        return
    print_table(
        ["client", "distributor", "state", "scopes", "secret since"],
        [
            (
                one.id, one.distributor, "active" if one.active else "suspended", " ".join(one.scopes),
                instant(one.rotated_at or one.created_at)[:10],
            )
            for one in found
        ],
        whole=["state", "secret since"],
    )  # fmt: skip


def _set_active(id: str, active: bool, data_dir: Path | None) -> None:
    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                lambda conn: clients.set_active(conn, id, active),
                action="client resume" if active else "client suspend",
                subject=id,
                told=lambda _: say(f"client {id} {'goes on' if active else 'is suspended'}"),
            )

    asyncio.run(run())


def _give(
    id: str,
    edit: Callable[[AsyncConnection, str, int], Awaitable[None]],
    action: str,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    secret = new_token(SECRET_PREFIX)

    def told(_: None) -> None:
        if as_json:
            print_json({"client_id": id, "client_secret": secret})
            return
        sys.stdout.write(secret + "\n")
        sys.stdout.flush()
        complain("this secret is shown once; only its SHA-256 is kept")

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here, lambda conn: edit(conn, digest(secret), now), action=action, subject=id,
                detail=f"sha256 {digest(secret)}", told=told,
            )  # fmt: skip

    asyncio.run(run())
