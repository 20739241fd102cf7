"""The control plane: who may issue what.  Edits (those of campaigns are in ``campaigns``), and the snapshot that is
published of them.

Every edit first locks the catalogue's head row, so that edits and publications happen one after the other and
the rules that look at several rows (how many campaigns compete, say) hold whoever edits at the same time.
Functions take the connection of a write transaction; the caller raises the version and publishes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Campaign, Cap, Client, Pool, Product, SigningKey, Snapshot
from service.domain import BURST_MIN, BURST_S_MAX, RATE_MAX, RateLimit, Terms
from service.errors import Conflict, NotFound
from service.logs import without_secrets
from service.store.database import chunks
from service.store.schema import (
    assignments,
    audit_log,
    campaign_products,
    campaigns,
    caps,
    catalogue_head,
    catalogue_versions,
    clients,
    credentials,
    distributors,
    pools,
    products,
    signing_keys,
)
from service.tokens import digest

ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_CHARACTERS_MAX: Final = 200  # the column's width
TIME_MAX: Final = 253_402_300_799  # 9999-12-31T23:59:59Z, the last second that RFC 3339 can write


# --- edits ---------------------------------------------------------------------------------------------------


async def create_distributor(connection: AsyncConnection, id: str, name: str, now: int) -> None:
    """The distributor exists and is active.  Raises Conflict if it did before."""
    check_id("distributor", id)
    _check_name(name)
    await lock(connection)
    if await _active(connection, id) is not None:
        raise Conflict(f"distributor {id} exists already")
    await connection.execute(insert(distributors), {"id": id, "name": name, "active": True, "created_at": now})


async def set_active(connection: AsyncConnection, distributor: str, active: bool) -> None:
    """The distributor is active or suspended.  Raises NotFound."""
    await lock(connection)
    await require_distributor(connection, distributor)
    await connection.execute(update(distributors).where(distributors.c.id == distributor).values(active=active))


async def rename(connection: AsyncConnection, distributor: str, name: str) -> None:
    """People call the distributor so.  Raises NotFound, Conflict if that can't be shown."""
    _check_name(name)
    await lock(connection)
    await require_distributor(connection, distributor)
    await connection.execute(update(distributors).where(distributors.c.id == distributor).values(name=name))


async def set_limit(connection: AsyncConnection, distributor: str, limit: RateLimit | None) -> None:
    """The distributor is issued no more than this, or as much as it asks for.

    Raises NotFound, Conflict if a value is out of its range.
    """
    if limit is not None:
        _check_limit(limit)
    await lock(connection)
    await require_distributor(connection, distributor)
    values = {"rate": None, "burst": None} if limit is None else {"rate": limit.rate, "burst": limit.burst}
    await connection.execute(update(distributors).where(distributors.c.id == distributor).values(values))


async def add_credential(connection: AsyncConnection, distributor: str, token_sha256: str, now: int) -> None:
    """The token with this SHA-256 (hex) belongs to the distributor; those it had before stay valid.

    Raises NotFound for an unknown distributor, Conflict if the token is known.
    """
    if re.fullmatch(r"[0-9a-f]{64}", token_sha256) is None:
        raise Conflict("a token is stored as its SHA-256, 64 lower-case hex digits")
    await lock(connection)
    await require_distributor(connection, distributor)
    known = select(credentials.c.id).where(credentials.c.token_sha256 == token_sha256)
    if (await connection.execute(known)).first() is not None:
        raise Conflict("this token was given out before; make a new one")
    row = {"distributor": distributor, "token_sha256": token_sha256, "created_at": now}
    await connection.execute(insert(credentials), row)


async def revoke_credentials(
    connection: AsyncConnection, *, distributor: str | None = None, token_sha256: str | None = None, now: int
) -> int:
    """The tokens of this distributor, or this one token, or both at once, are revoked; how many were not before.

    Raises NotFound for an unknown distributor, and for a token that is unknown or another distributor's.
    """
    if distributor is None and token_sha256 is None:
        raise ValueError("every token of every distributor was not meant")
    await lock(connection)
    meant = []
    if distributor is not None:
        await require_distributor(connection, distributor)
        meant.append(credentials.c.distributor == distributor)
    if token_sha256 is not None:
        meant.append(credentials.c.token_sha256 == token_sha256)
        if (await connection.execute(select(credentials.c.id).where(*meant))).first() is None:
            raise NotFound("there is no such token" + (f" of distributor {distributor}" if distributor else ""))
    revoke = update(credentials).where(*meant, credentials.c.revoked_at.is_(None)).values(revoked_at=now)
    return (await connection.execute(revoke)).rowcount


async def create_pool(
    connection: AsyncConnection,
    id: str,
    *,
    default_expires_at: int | None,
    least_life_s: int,
    now: int,
    generator: str | None = None,
) -> None:
    """The pool exists, empty.  Raises Conflict if it did before or a value is out of its range.

    ``default_expires_at`` is for imported codes that bring no expiry; codes with less than ``least_life_s``
    left are never issued.  ``generator``: what `work` fills it by (``worker.generating``), None for imports alone.
    """
    check_id("pool", id)
    _check_pool(id, default_expires_at, least_life_s, now)
    await lock(connection)
    if (await connection.execute(select(pools.c.id).where(pools.c.id == id))).first() is not None:
        raise Conflict(f"pool {id} exists already")
    await connection.execute(
        insert(pools),
        {
            "id": id,
            "default_expires_at": default_expires_at,
            "least_life_s": least_life_s,
            "stock_version": 0,
            "created_at": now,
            "generator": generator,
        },
    )


async def change_pool(
    connection: AsyncConnection, id: str, *, default_expires_at: int | None, least_life_s: int, now: int
) -> None:
    """The pool has these values: the expiry for codes that are imported from now on, the least life for all.

    Raises NotFound; Conflict if a value is out of its range, or if less life than before were enough: codes may have
    been passed over for it, and the pool may be known to be exhausted.
    """
    await lock(connection)
    row = (await connection.execute(select(pools).where(pools.c.id == id))).first()
    if row is None:
        raise NotFound(f"there is no pool {id}: create it first")
    _check_pool(id, default_expires_at if default_expires_at != row.default_expires_at else None, least_life_s, now)
    if least_life_s < row.least_life_s:
        raise Conflict(f"the least life of a code of pool {id} is {row.least_life_s} s and can only be raised")
    values = {"default_expires_at": default_expires_at, "least_life_s": least_life_s}
    await connection.execute(update(pools).where(pools.c.id == id).values(values))


async def log(
    connection: AsyncConnection,
    *,
    actor: str,
    action: str,
    subject: str,
    detail: str,
    now: int,
    version: int | None = None,
    refused: bool = False,
) -> None:
    """The audit log says who did what, and a worker's log will (``worker.changes``): as catalogue ``version`` if it is
    a change of that, or that it was ``refused``.  ``detail`` must hold no code and no token."""
    row = {
        "at": now, "actor": _kept(actor)[:128], "action": action, "subject": _kept(subject)[:128],
        "detail": _kept(detail), "version": version, "refused": refused,
    }  # fmt: skip
    await connection.execute(insert(audit_log), row)


def _kept(text: str) -> str:
    """``text`` as every store takes it, whatever was typed: a token in the place of a name, or what is no text."""
    return _CONTROL.sub("?", without_secrets(text))


_CONTROL: Final = re.compile(r"[\0-\x1f\x7f-\x9f]")


# --- versions and snapshots ----------------------------------------------------------------------------------


async def version(connection: AsyncConnection) -> int:
    """The catalogue's version; 0 before the first publication."""
    return int((await connection.execute(select(catalogue_head.c.version))).scalar_one())


async def raise_version(connection: AsyncConnection) -> int:
    """The version under which this transaction's edits are published; the head stays locked until it ends."""
    raised = update(catalogue_head).values(version=catalogue_head.c.version + 1).returning(catalogue_head.c.version)
    return int((await connection.execute(raised)).scalar_one())


async def snapshot(connection: AsyncConnection, version: int) -> Snapshot:
    """Everything issuing needs to know, as this transaction sees it, under the number ``version``."""

    async def rows(of: Select[Any]) -> Sequence[Any]:
        found: Sequence[Any] = (await connection.execute(of)).all()  # one by one takes longer
        return found

    tokens = await rows(
        select(credentials.c.token_sha256, credentials.c.distributor)
        .where(credentials.c.revoked_at.is_(None))
        .order_by(credentials.c.token_sha256)
    )
    known = await rows(select(distributors).order_by(distributors.c.id))
    stocks = await connection.execute(select(pools.c.id, pools.c.least_life_s).order_by(pools.c.id))
    served = defaultdict[str, list[str]](list)
    for campaign, product in await rows(
        select(campaign_products.c.campaign, campaign_products.c.product).order_by(campaign_products.c.product)
    ):
        served[campaign].append(product)
    limits = defaultdict[tuple[str, str], list[Cap]](list)
    for row in await rows(select(caps).order_by(caps.c.holder, caps.c.period)):
        limits[row.campaign, row.distributor].append(Cap(row.holder, row.period, row.limit))
    assigned = defaultdict[str, dict[str, tuple[Cap, ...]]](dict)
    for campaign, distributor in await rows(
        select(assignments.c.campaign, assignments.c.distributor).order_by(assignments.c.distributor)
    ):
        assigned[campaign][distributor] = tuple(limits.get((campaign, distributor), ()))
    rules = await rows(select(campaigns).order_by(campaigns.c.id))
    sold = await connection.execute(
        select(products, campaigns.c.time_zone, pools.c.generator)
        .join(campaigns, campaigns.c.id == products.c.code)
        .join(pools, pools.c.id == campaigns.c.pool)
        .order_by(products.c.code)
    )
    asking = await connection.execute(select(clients).order_by(clients.c.id))
    signing = await connection.execute(select(signing_keys).order_by(signing_keys.c.made_at, signing_keys.c.kid))
    return Snapshot(
        version=version,
        tokens=dict(tokens),
        distributors={row.id: row.active for row in known},
        pools=tuple(Pool(id, least_life_s) for id, least_life_s in stocks),
        campaigns=tuple(
            Campaign(
                id=row.id,
                category=row.category,
                products=tuple(served[row.id]),
                pool=row.pool,
                priority=row.priority,
                starts_at=row.starts_at,
                until=row.until,
                paused=row.paused,
                time_zone=row.time_zone,
                caps=tuple(limits[row.id, ""]),
                assigned=assigned[row.id],
            )
            for row in rules
        ),
        products=tuple(
            Product(
                code=row.code,
                terms=Terms(*(row._mapping[name] for name in Terms.__struct_fields__)),
                description=row.description,
                expiry_scheme=row.expiry_scheme,
                image=row.image,
                terms_and_conditions=row.terms_and_conditions,
                unlimited=row.generator is not None,
            )
            for row in sold
        ),
        clients={
            row.id: Client(row.distributor, row.secret_sha256, tuple(row.scopes.split()), row.active) for row in asking
        },
        signing_keys=tuple(SigningKey(row.kid, row.public, row.sealed, row.verifies_until or 0) for row in signing),
        limits={row.id: RateLimit(row.rate, row.burst) for row in known if row.rate is not None},
    )


async def pools_in_use(connection: AsyncConnection, now: int) -> set[str]:
    """Pools that a campaign issues from that is not over."""
    return set(await connection.scalars(select(campaigns.c.pool).where(not_over(now)).distinct()))


async def pools_asked(connection: AsyncConnection, now: int) -> set[str]:
    """Pools that a campaign issues from to somebody now (it runs, and is assigned), and that can be empty: `work` makes
    no codes for them."""
    asked = select(campaigns.c.pool).where(
        not_over(now), campaigns.c.starts_at <= now, campaigns.c.paused.is_(False),
        campaigns.c.id.in_(select(assignments.c.campaign)),
        campaigns.c.pool.in_(select(pools.c.id).where(pools.c.generator.is_(None))),
    )  # fmt: skip
    return set(await connection.scalars(asked.distinct()))


def not_over(now: int) -> ColumnElement[bool]:
    """Of campaigns: those that can still issue at ``now``, as far as their end says."""
    return or_(campaigns.c.until == 0, campaigns.c.until > now)


async def caps_counted_from(connection: AsyncConnection) -> dict[tuple[str, str, str, str], int]:
    """Per (campaign, distributor or '', holder, period), since when there has been such a cap: it counts from then."""
    found = await connection.execute(select(caps))
    return {(row.campaign, row.distributor, row.holder, row.period): row.counted_from for row in found}


async def save_snapshot(connection: AsyncConnection, version: int, blob: bytes, now: int) -> None:
    """The published form of ``version`` is kept for good: what was in force at any time can be looked up."""
    await connection.execute(insert(catalogue_versions), {"version": version, "snapshot": blob, "published_at": now})


async def load_snapshot(connection: AsyncConnection) -> tuple[int, bytes]:
    """The newest version that was saved, and its published form.  Raises NotFound if nothing was ever published."""
    newest = select(catalogue_versions.c.version, catalogue_versions.c.snapshot)
    row = (await connection.execute(newest.order_by(catalogue_versions.c.version.desc()).limit(1))).first()
    if row is None:
        raise NotFound("no catalogue was published yet")
    return int(row.version), bytes(row.snapshot)


async def saved_snapshot(connection: AsyncConnection, version: int) -> bytes | None:
    """The published form of ``version``, None if the store has none."""
    found = await connection.scalar(
        select(catalogue_versions.c.snapshot).where(catalogue_versions.c.version == version)
    )
    return None if found is None else bytes(found)


async def owners(connection: AsyncConnection, shown: Iterable[str]) -> dict[str, str]:
    """Of the credentials ``shown``, as ``Catalogue.distributor`` takes them, those in force: whose each is, if that
    distributor is active."""
    tokens: dict[str, str] = {}
    wanted: dict[str, list[tuple[str, str]]] = defaultdict(list)  # client -> signing key, credential
    for credential in shown:
        kid, colon, client = credential.partition(":")
        if colon:
            wanted[client].append((kid, credential))
        else:
            tokens[digest(credential)] = credential
    found: dict[str, str] = {}
    active = distributors.c.active.is_(True)
    for some in chunks(list(tokens)):
        valid = (
            select(credentials.c.token_sha256, credentials.c.distributor)
            .join(distributors)
            .where(credentials.c.token_sha256.in_(some), credentials.c.revoked_at.is_(None), active)
        )
        found.update({tokens[token]: owner for token, owner in await connection.execute(valid)})
    kids = set(await connection.scalars(select(signing_keys.c.kid))) if wanted else set()
    for some in chunks(list(wanted)):
        asking = (
            select(clients.c.id, clients.c.distributor)
            .join(distributors)
            .where(clients.c.id.in_(some), clients.c.active.is_(True), active)
        )
        for client, owner in await connection.execute(asking):
            found.update({credential: owner for kid, credential in wanted[client] if kid in kids})
    return found


# --- rules ---------------------------------------------------------------------------------------------------


def check_id(what: str, id: str) -> None:
    """Raises Conflict if ``id`` could break a key or a record."""
    if ID.fullmatch(id) is None:
        raise Conflict(f"{id[:80]!r} can't name a {what}: 1 to 64 of A-Z a-z 0-9 . _ -")


def check_text(what: str, text: str, characters_max: int) -> None:
    """Raises Conflict if ``text`` is longer, or no store could keep it."""
    if len(text) > characters_max:
        raise Conflict(f"{what} has at most {characters_max:,} characters")
    if _NO_TEXT.search(text):
        raise Conflict(f"{what} is not text: it has to be UTF-8, without NUL")


# What Python makes of bytes of another encoding in an argument, and what PostgreSQL has in no text.
_NO_TEXT: Final = re.compile(r"[\ud800-\udfff\0]")


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
        raise Conflict(f"a distributor's name has 1 to {NAME_CHARACTERS_MAX} printable characters")


def _check_limit(limit: RateLimit) -> None:
    if not 1 <= limit.rate <= RATE_MAX:
        raise Conflict(f"a rate is 1 to {RATE_MAX:,} vouchers a second")
    if not BURST_MIN <= limit.burst <= limit.rate * BURST_S_MAX:
        raise Conflict(
            f"a burst is at least {BURST_MIN}, the largest quantity of one request, and at most what the rate gives in "
            f"an hour: {limit.rate * BURST_S_MAX:,} vouchers at {limit.rate:,} a second"
        )


def _check_pool(id: str, default_expires_at: int | None, least_life_s: int, now: int) -> None:
    if default_expires_at is not None and not now < default_expires_at <= TIME_MAX:
        raise Conflict(f"the default expiry of pool {id} has to be in the future")
    if not 0 <= least_life_s <= TIME_MAX:
        raise Conflict(f"the least life of a code of pool {id} can't be negative")


async def lock(connection: AsyncConnection) -> None:
    """Until the transaction ends nobody else edits or publishes."""
    await connection.execute(select(catalogue_head.c.version).with_for_update())


async def _active(connection: AsyncConnection, distributor: str) -> bool | None:
    row = (await connection.execute(select(distributors.c.active).where(distributors.c.id == distributor))).first()
    return None if row is None else bool(row.active)


async def require_distributor(connection: AsyncConnection, distributor: str) -> None:
    """Raises NotFound if there is none."""
    if await _active(connection, distributor) is None:
        raise NotFound(f"there is no distributor {distributor}: create it first")
