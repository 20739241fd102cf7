"""``voucherd keys``: the secrets file, and the keys that access tokens are signed with."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from service import keyring
from service.cli import options
from service.cli.connections import Connected, connected, put_in_force
from service.cli.console import instant, print_json, print_table, say
from service.errors import Misconfigured
from service.keyring import Keyring
from service.settings import TOKEN_LIFETIME_S_MAX, refused
from service.store import clients
from service.store.clients import KnownKey

app = typer.Typer(help="Keys: the secrets file, and what access tokens are signed with.", no_args_is_help=True)


@app.command("create")
def create(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the secrets file goes.", dir_okay=False)],
) -> None:
    """Make the secrets file that VOUCHERD_SECRETS_FILE names, for its owner's eyes only.

    One for the whole installation: every `serve` and `work` needs the same.
    Back it up by itself, not along with the store: the store holds the signing
    keys sealed with it. Without it no new ids can be made of old vouchers, and
    new signing keys have to be made. A file that is there is never replaced.
    """
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Misconfigured(
            f"{file} is there already, and vouchers may have been issued with it: nothing was done"
        ) from None
    with os.fdopen(opened, "w") as made:
        made.write(keyring.new())
        made.flush()
        os.fsync(made.fileno())
    say(f"{file} is there; next: VOUCHERD_SECRETS_FILE={file.absolute()} for every process, and `voucherd keys rotate`")


@app.command("rotate")
def rotate(data_dir: options.DataDir = None) -> None:
    """Make a new signing key: when this returns, access tokens are signed with it.

    The key before goes on verifying for as long as any of its tokens may last, a
    day, so nobody is refused meanwhile; `keys revoke` ends it at once. The first
    time, it makes the first key.
    """

    async def run() -> None:
        async with connected(data_dir) as here:
            made, now = keyring.new_signing_key(_secrets(here)), int(time.time())
            lifetime_s = TOKEN_LIFETIME_S_MAX  # of those that sign, whose settings may differ from this command's
            await put_in_force(
                here,
                lambda conn: clients.add_key(conn, made.kid, made.public, made.sealed, now, lifetime_s),
                action="keys add",
                subject=made.kid,
                told=lambda _: None,
            )
            # Every process knows it by now, so none is shown a token that it can't verify.
            await put_in_force(
                here,
                lambda conn: clients.sign_with(conn, made.kid, now, lifetime_s),
                action="keys rotate",
                subject=made.kid,
                told=lambda over: say(
                    f"access tokens are signed with {made.kid}"
                    + (f"; {over} that verify no more are gone" if over else "")
                ),
            )

    asyncio.run(run())


@app.command("revoke")
def revoke(
    kid: Annotated[str, typer.Argument(metavar="KID", help="Which key.")], data_dir: options.DataDir = None
) -> None:
    """Revoke a key that was rotated away: when this returns, no access token of it is accepted."""

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here, lambda conn: clients.revoke_key(conn, kid), action="keys revoke", subject=kid,
                told=lambda _: say(f"{kid} is revoked"),
            )  # fmt: skip

    asyncio.run(run())


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the signing keys, the one that signs first."""

    async def run() -> list[KnownKey]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await clients.keys(conn)

    found = asyncio.run(run())
    if as_json:
        print_json([
            {
                "kid": one.kid, "made_at": instant(one.made_at),
                "verifies_until": None if one.verifies_until is None else instant(one.verifies_until),
            }
            for one in found
        ])  # fmt: skip
        return
    print_table(
        ["kid", "made", "verifies until"],
        [
            (one.kid, instant(one.made_at), "signs" if one.verifies_until is None else instant(one.verifies_until))
            for one in found
        ],
        whole=["kid", "made", "verifies until"],
    )


def _secrets(here: Connected) -> Keyring:
    found = keyring.named(here.settings.secrets_file)
    if found is None:
        raise refused(
            "secrets_file", "", "there is no Client API v3 without it: make one with `voucherd keys create FILE`, once"
        )
    return found
