"""``voucherd token``: what lets a distributor in.  A token is shown once; only its SHA-256 is kept."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import complain, instant, print_json, print_table, say
from service.store import control, register
from service.store.register import Token
from service.tokens import digest, new_token, well_formed

app = typer.Typer(help="Tokens: what lets a distributor in.", no_args_is_help=True)

Distributor = Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help="Whose token it is.")]


@app.command("issue")
def issue(distributor: Distributor, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Make a token; it works when this returns. It is shown this once and can't be shown again."""
    _give(distributor, as_json, data_dir, rotate=False)


@app.command("rotate")
def rotate(distributor: Distributor, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Make a token and revoke all others of the distributor: when this returns, only the new one works."""
    _give(distributor, as_json, data_dir, rotate=True)


@app.command("revoke")
def revoke(
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="This token; - reads it from standard input, where no `ps` sees it.",
            show_default=False,
        ),
    ] = None,
    distributor: Annotated[
        str | None, typer.Option(metavar="ID", help="All tokens of this distributor.", show_default=False)
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Revoke one token or all of a distributor: when this returns, they are refused everywhere."""
    if (token is None) == (distributor is None):
        raise typer.BadParameter("say either --token or --distributor")
    if token == "-":
        token = sys.stdin.readline().strip()
    if token is not None and not well_formed(token):
        raise typer.BadParameter("this is no token of voucherd: one has 53 characters and begins with vch_")
    sha256 = None if token is None else digest(token)

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here,
                lambda conn: control.revoke_credentials(conn, distributor=distributor, token_sha256=sha256, now=now),
                action="token revoke",
                subject=distributor or "one token",
                detail="" if sha256 is None else f"sha256 {sha256}",
                told=lambda revoked: say(
                    f"{revoked} token{'' if revoked == 1 else 's'} revoked"
                    if revoked
                    else "revoked already, nothing changed"
                ),
            )

    asyncio.run(run())


@app.command("list")
def list_(
    distributor: Annotated[
        str | None, typer.Option(metavar="ID", help="Only those of this distributor.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """List what is known of tokens, revoked ones too. A token itself is nowhere: it was shown when it was made.

    `printf %s TOKEN | sha256sum` says which of these a token is.
    """

    async def run() -> list[Token]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.tokens(conn, distributor)

    found = asyncio.run(run())
    if as_json:
        print_json([
            {
                "id": one.id, "distributor_id": one.distributor, "sha256_begins": one.sha256,
                "created_at": instant(one.created_at),
                "revoked_at": None if one.revoked_at is None else instant(one.revoked_at),
            }
            for one in found
        ])  # fmt: skip
        return
    print_table(
        ["id", "distributor", "sha256", "made", "revoked"],
        [
            (
                str(one.id), one.distributor, one.sha256, instant(one.created_at),
                None if one.revoked_at is None else instant(one.revoked_at),
            )
            for one in found
        ],
        numbers=["id"],
        whole=["sha256", "made", "revoked"],
    )  # fmt: skip


def _give(distributor: str, as_json: bool, data_dir: Path | None, *, rotate: bool) -> None:
    token = new_token()

    async def edit(conn: AsyncConnection) -> int:
        now = int(time.time())
        revoked = await control.revoke_credentials(conn, distributor=distributor, now=now) if rotate else 0
        await control.add_credential(conn, distributor, digest(token), now)
        return revoked

    def told(revoked: int) -> None:
        if as_json:
            print_json({"distributor_id": distributor, "token": token, "revoked": revoked})
            return
        sys.stdout.write(token + "\n")
        sys.stdout.flush()
        complain(
            "this token is shown once; only its SHA-256 is kept"
            + (f"; {revoked} older one{'' if revoked == 1 else 's'} revoked" if rotate else "")
        )

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here,
                edit,
                action="token rotate" if rotate else "token issue",
                subject=distributor,
                detail=f"sha256 {digest(token)}",
                told=told,
            )

    asyncio.run(run())
