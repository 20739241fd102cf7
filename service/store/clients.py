"""Clients of Client API v3 and the keys that their access tokens are signed with, in the control plane.

Like every edit of ``control`` these lock the catalogue's head first; the caller publishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, NotFound
from service.store.control import check_id, lock, require_distributor
from service.store.schema import clients, signing_keys

# What a client may be allowed (api-v3 "Tokens").
SCOPES: Final = ("read_catalogue", "issue_vouchers", "read_vouchers")

# Seconds that the key before goes on verifying beyond the life of its last token: clocks differ by less.
MARGIN_S: Final = 60


class Known(msgspec.Struct, frozen=True):
    """A client as operators see it."""

    id: str
    distributor: str
    scopes: tuple[str, ...]
    active: bool
    created_at: int
    rotated_at: int | None


class KnownKey(msgspec.Struct, frozen=True):
    """A signing key as operators see it; ``verifies_until`` None: it signs."""

    kid: str
    made_at: int
    verifies_until: int | None


async def create(
    connection: AsyncConnection, id: str, distributor: str, secret_sha256: str, scopes: Sequence[str], now: int
) -> None:
    """The client may ask for access tokens with these scopes.  Raises NotFound for an unknown distributor, Conflict."""
    check_id("client", id)
    _check_scopes(scopes)
    await lock(connection)
    await require_distributor(connection, distributor)
    if (await connection.execute(select(clients.c.id).where(clients.c.id == id))).first() is not None:
        raise Conflict(f"client {id} exists already")
    row = {
        "id": id, "distributor": distributor, "secret_sha256": secret_sha256,
        "scopes": " ".join(scope for scope in SCOPES if scope in scopes), "active": True, "created_at": now,
    }  # fmt: skip
    await connection.execute(insert(clients), row)


async def rotate_secret(connection: AsyncConnection, id: str, secret_sha256: str, now: int) -> None:
    """Only the new secret gets access tokens; those that the old one got are good until they expire.

    Raises NotFound.
    """
    await _change(connection, id, secret_sha256=secret_sha256, rotated_at=now)


async def set_active(connection: AsyncConnection, id: str, active: bool) -> None:
    """The client is active or suspended: then neither its secret nor its access tokens do.  Raises NotFound."""
    await _change(connection, id, active=active)


async def known(connection: AsyncConnection) -> list[Known]:
    """All clients, by their ids."""
    return [_known(row) for row in await connection.execute(select(clients).order_by(clients.c.id))]


async def add_key(connection: AsyncConnection, kid: str, public: str, sealed: str, now: int, lifetime_s: int) -> None:
    """The key verifies, for as long as one that is rotated away, and signs nothing yet.

    Only when this is in force everywhere may it sign: a process loads a catalogue before it is in force, and a token
    that it signed by that would be shown to one that does not know the key.
    """
    await lock(connection)
    row = {
        "kid": kid,
        "public": public,
        "sealed": sealed,
        "made_at": now,
        "verifies_until": now + lifetime_s + MARGIN_S,
    }
    await connection.execute(insert(signing_keys), row)


async def sign_with(connection: AsyncConnection, kid: str, now: int, lifetime_s: int) -> int:
    """The key signs from now on; the one before verifies until its last token, of this life, is over.  Keys that
    verify no more are gone; how many that were.  Raises NotFound."""
    await lock(connection)
    until = now + lifetime_s + MARGIN_S
    signs = signing_keys.c.verifies_until.is_(None)
    await connection.execute(update(signing_keys).where(signs).values(verifies_until=until))
    known = update(signing_keys).where(signing_keys.c.kid == kid).values(verifies_until=None)
    if not (await connection.execute(known)).rowcount:
        raise NotFound(f"there is no signing key {kid}: `voucherd keys list` says which there are")
    over = await connection.execute(delete(signing_keys).where(signing_keys.c.verifies_until <= now))
    return over.rowcount


async def revoke_key(connection: AsyncConnection, kid: str) -> None:
    """No token of this key is accepted any more.  Raises NotFound; Conflict if it is the one that signs."""
    await lock(connection)
    found = (await connection.execute(select(signing_keys).where(signing_keys.c.kid == kid))).first()
    if found is None:
        raise NotFound(f"there is no signing key {kid}: `voucherd keys list` says which there are")
    if found.verifies_until is None:
        raise Conflict(f"{kid} is the key that signs: make another one first, with `voucherd keys rotate`")
    await connection.execute(delete(signing_keys).where(signing_keys.c.kid == kid))


async def keys(connection: AsyncConnection) -> list[KnownKey]:
    """All signing keys, the one that signs first."""
    rows = await connection.execute(select(signing_keys).order_by(signing_keys.c.made_at.desc()))
    found = [KnownKey(row.kid, row.made_at, row.verifies_until) for row in rows]
    return sorted(found, key=lambda key: key.verifies_until is not None)


def _check_scopes(scopes: Sequence[str]) -> None:
    if not scopes:
        raise Conflict("a client needs a scope, or it could ask for nothing")
    for scope in scopes:
        if scope not in SCOPES:
            raise Conflict(f"{scope[:80]!r} is no scope: there are {', '.join(SCOPES)}")


async def _change(connection: AsyncConnection, id: str, **values: object) -> None:
    await lock(connection)
    if not (await connection.execute(update(clients).where(clients.c.id == id).values(**values))).rowcount:
        raise NotFound(f"there is no client {id}: create it first")


def _known(row: Row[Any]) -> Known:
    return Known(row.id, row.distributor, tuple(row.scopes.split()), row.active, row.created_at, row.rotated_at)
