"""The control plane of a store that came back older is again what was in force (P6).

The published catalogue has all that issuing needs to know, and nothing else: a distributor's name, a pool's default
expiry and pattern, and what happened when are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Cap, Snapshot
from service.store import control
from service.store.campaigns import insert_products, mark_changed, replace_caps
from service.store.register import DIGEST_CHARACTERS
from service.store.schema import (
    assignments,
    campaign_products,
    campaigns,
    catalogue_head,
    catalogue_versions,
    clients,
    credentials,
    distributors,
    pools,
    products,
    signing_keys,
)

Value = Any  # of a field: text, a number, yes or no, a list of these


class Difference(msgspec.Struct, frozen=True):
    """The store says ``was`` of a ``field`` of one thing, and in force is ``now``.  None: it has none of it."""

    kind: str
    id: str
    field: str
    was: Value
    now: Value


def differences(was: Snapshot, now: Snapshot) -> list[Difference]:
    """What the store's control plane says otherwise than the catalogue in force; no secret and no whole digest."""
    found: list[Difference] = []
    for token in sorted(was.tokens.keys() ^ now.tokens.keys()):
        distributor = was.tokens.get(token) or now.tokens[token]
        states = ("valid", "revoked") if token in was.tokens else (None, "valid")
        found.append(Difference("token", token[:DIGEST_CHARACTERS], f"of {distributor}", *states))
    found += _compare("distributor", _distributors_of(was), _distributors_of(now))
    found += _compare("pool", _by_id(was.pools), _by_id(now.pools))
    found += _compare("campaign", _by_id(was.campaigns), _by_id(now.campaigns))
    found += _compare("product", {one.code: one for one in was.products}, {one.code: one for one in now.products})
    found += _compare("client", was.clients, now.clients)
    for kid in sorted({key.kid for key in was.signing_keys} ^ {key.kid for key in now.signing_keys}):
        gone = any(key.kid == kid for key in was.signing_keys)
        found.append(Difference("signing key", kid, "", *(("valid", "revoked") if gone else (None, "valid"))))
    return found


async def reinstate(conn: AsyncConnection, snapshot: Snapshot, now: int, since: int) -> list[Difference]:
    """The store's control plane says what ``snapshot`` does.  Nothing that was revoked is valid again: neither what
    the snapshot does not have, nor what the store calls revoked.  Returns what was different.

    What the snapshot does not say of a thing that the store lacks: a distributor is called by its id, a pool has
    neither default expiry nor pattern, and a cap counts since ``since``, the last moment that the store knows of.
    Campaigns, products, pools and distributors that only the store has stay.  The caller publishes.
    """
    await control.lock(conn)
    was = await control.snapshot(conn, snapshot.version)
    found = differences(was, snapshot)
    await _distributors(conn, was, snapshot, since)
    await _tokens(conn, was, snapshot, now)
    await _pools(conn, was, snapshot, since)
    await _campaigns(conn, was, snapshot, now, since)
    await _products(conn, was, snapshot)
    await _clients(conn, was, snapshot, now)
    await _signing_keys(conn, was, snapshot, now)
    return found


async def save_history(conn: AsyncConnection, published: Mapping[int, bytes], highest: int, now: int) -> None:
    """The versions in ``published`` are kept as they were published, whatever the store had made of their numbers, and
    the next version will be above ``highest``."""
    for version, blob in sorted(published.items()):
        if await control.saved_snapshot(conn, version) != blob:
            await conn.execute(delete(catalogue_versions).where(catalogue_versions.c.version == version))
            await control.save_snapshot(conn, version, blob, now)
    await conn.execute(update(catalogue_head).where(catalogue_head.c.version < highest).values(version=highest))


# --- one kind after the other --------------------------------------------------------------------------------------


async def _distributors(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, since: int) -> None:
    for id, active in snapshot.distributors.items():
        if id not in was.distributors:
            await conn.execute(insert(distributors), {"id": id, "name": id, "active": active, "created_at": since})
        elif was.distributors[id] != active:
            await control.set_active(conn, id, active)
        if was.limits.get(id) != snapshot.limits.get(id):
            await control.set_limit(conn, id, snapshot.limits.get(id))


async def _tokens(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, now: int) -> None:
    for token in was.tokens.keys() - snapshot.tokens.keys():
        await control.revoke_credentials(conn, token_sha256=token, now=now)
    for token in sorted(snapshot.tokens.keys() - was.tokens.keys()):
        known = select(credentials.c.id).where(credentials.c.token_sha256 == token)
        if (await conn.execute(known)).first() is None:  # one that the store calls revoked stays revoked
            row = {"distributor": snapshot.tokens[token], "token_sha256": token, "created_at": now}
            await conn.execute(insert(credentials), row)


async def _pools(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, since: int) -> None:
    before = _by_id(was.pools)
    for pool in snapshot.pools:
        if pool.id not in before:
            row = {"id": pool.id, "least_life_s": pool.least_life_s, "stock_version": 0, "created_at": since}
            await conn.execute(insert(pools), row)
        elif before[pool.id].least_life_s < pool.least_life_s:
            await conn.execute(update(pools).where(pools.c.id == pool.id).values(least_life_s=pool.least_life_s))


async def _campaigns(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, now: int, since: int) -> None:
    before = _by_id(was.campaigns)
    changed = [one for one in snapshot.campaigns if before.get(one.id) != one]
    for one in changed:
        values = {name: getattr(one, name) for name in _CAMPAIGN}
        if one.id not in before:
            await conn.execute(insert(campaigns), {"id": one.id, "created_at": since, **values})
        await conn.execute(update(campaigns).where(campaigns.c.id == one.id).values(values))
        await conn.execute(delete(campaign_products).where(campaign_products.c.campaign == one.id))
        if one.products:
            await insert_products(conn, one.id, one.products)
        assigned = before[one.id].assigned if one.id in before else {}
        for distributor in assigned.keys() - one.assigned.keys():
            await replace_caps(conn, one.id, distributor, (), now)
            here = (assignments.c.campaign == one.id, assignments.c.distributor == distributor)
            await conn.execute(delete(assignments).where(*here))
        for distributor in sorted(one.assigned.keys() - assigned.keys()):
            row = {"campaign": one.id, "distributor": distributor, "created_at": since}
            await conn.execute(insert(assignments), row)
        for distributor, limits in {"": one.caps, **one.assigned}.items():
            await replace_caps(conn, one.id, distributor, limits, now, counted_from=since)
    if changed:
        await mark_changed(conn, [one.id for one in changed])


async def _products(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot) -> None:
    before = {one.code: one for one in was.products}
    for one in snapshot.products:
        if before.get(one.code) == one:
            continue
        terms = {name: value for name, value in msgspec.structs.asdict(one.terms).items() if name in products.c}
        values = {**terms, **{name: getattr(one, name) for name in _PRODUCT}}
        if one.code not in before:
            await conn.execute(insert(products), {"code": one.code, **values})
        else:
            await conn.execute(update(products).where(products.c.code == one.code).values(values))


async def _clients(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, now: int) -> None:
    for id, client in snapshot.clients.items():
        values = {
            "distributor": client.distributor, "secret_sha256": client.secret_sha256,
            "scopes": " ".join(client.scopes), "active": client.active,
        }  # fmt: skip
        if id not in was.clients:
            await conn.execute(insert(clients), {"id": id, "created_at": now, **values})
        elif was.clients[id] != client:
            await conn.execute(update(clients).where(clients.c.id == id).values(values))
    for id in was.clients.keys() - snapshot.clients.keys():
        await conn.execute(update(clients).where(clients.c.id == id).values(active=False))


async def _signing_keys(conn: AsyncConnection, was: Snapshot, snapshot: Snapshot, now: int) -> None:
    before = {key.kid: key for key in was.signing_keys}
    wanted = {key.kid: key for key in snapshot.signing_keys}
    for kid in before.keys() - wanted.keys():
        await conn.execute(delete(signing_keys).where(signing_keys.c.kid == kid))
    for kid, key in wanted.items():
        values = {"public": key.public, "sealed": key.sealed, "verifies_until": key.verifies_until or None}
        if kid not in before:
            await conn.execute(insert(signing_keys), {"kid": kid, "made_at": now, **values})
        elif before[kid] != key:
            await conn.execute(update(signing_keys).where(signing_keys.c.kid == kid).values(values))


_CAMPAIGN: Final = ("category", "pool", "priority", "starts_at", "until", "paused", "time_zone")
_PRODUCT: Final = ("description", "expiry_scheme", "image", "terms_and_conditions")

# What of a client is a secret, or as good as one.
_HIDDEN: Final = ("secret_sha256",)


def _by_id(things: Iterable[Any]) -> dict[str, Any]:
    return {one.id: one for one in things}


class _Distributor(msgspec.Struct, frozen=True):
    active: bool
    rate: int | None
    burst: int | None


def _distributors_of(snapshot: Snapshot) -> dict[str, _Distributor]:
    return {
        id: _Distributor(active, None if limit is None else limit.rate, None if limit is None else limit.burst)
        for id, active in snapshot.distributors.items()
        for limit in (snapshot.limits.get(id),)
    }


def _compare(kind: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    found = []
    for id in sorted(was.keys() | now.keys()):
        old, new = (_fields(one.get(id)) for one in (was, now))
        if not old or not new:
            there = ("there", None) if old else (None, "there")
            found.append(Difference(kind, id, "", *there))
            continue
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                shown = ("another", "this") if name in _HIDDEN else (old.get(name), new.get(name))
                found.append(Difference(kind, id, name, *shown))
    return found


def _fields(thing: Any) -> dict[str, Value]:
    """A thing's fields, those in it named like ``caps.day`` (its own) and ``assigned.ACME.caps.terminal.day``."""
    fields: dict[str, Value] = {}
    for name, value in msgspec.structs.asdict(thing).items() if thing is not None else ():
        if name in ("id", "code"):
            continue
        if name == "caps":
            fields |= _limits("caps", value)
        elif name == "assigned":
            for distributor, limits in value.items():
                fields[f"assigned.{distributor}"] = True
                fields |= _limits(f"assigned.{distributor}.caps", limits)
        elif name == "terms":
            fields |= {f"terms.{one}": part for one, part in msgspec.structs.asdict(value).items()}
        else:
            fields[name] = list(value) if isinstance(value, tuple) else value
    return fields


def _limits(prefix: str, limits: Iterable[Cap]) -> dict[str, Value]:
    return {f"{prefix}.{cap.holder}.{cap.period}": cap.limit for cap in limits}
