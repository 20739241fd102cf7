"""Campaigns in the control plane: their rules, whom they are assigned to, and under which caps.

What issues a product is a campaign too, with the product's code for an id; ``noun`` says which of the two is meant, and
the other is not found under it.

Like every edit of ``control`` these lock the catalogue's head first.  A campaign's version is that of the catalogue in
which it was last changed: the head is locked, so it is one more than the newest.  Who says ``if_version`` changes the
campaign that was looked at and no other: a Conflict tells of a change in between, and nothing was done then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service import zones
from service.catalogue import CANDIDATES_MAX, Campaign, Cap, Period
from service.domain import CapHolder, instant
from service.errors import Conflict, NotFound
from service.store.control import TIME_MAX, check_id, lock, not_over, require_distributor
from service.store.schema import (
    assignments,
    campaign_products,
    campaigns,
    caps,
    catalogue_head,
    pools,
)

# More is a mistake in a script that calls this, and every product costs an entry in each process's memory.
PRODUCTS_MAX: Final = 256
LIMIT_MAX: Final = 2**53  # Lua counts in doubles: exact up to here
PRIORITY_MAX: Final = 1_000_000
PRIORITY: Final = 100  # of a campaign that says none: with room on both sides

# What a rule that vouchers are issued by is called, and the group of the commands that change it.
Noun = Literal["campaign", "product"]

# What a cap counts, and the limit it is to have; None: there is to be no such cap.
CapChanges = Mapping[tuple[CapHolder, Period], int | None]


async def create(
    connection: AsyncConnection,
    id: str,
    *,
    category: str,
    products: Sequence[str],
    pool: str,
    priority: int,
    starts_at: int,
    until: int,
    time_zone: str,
    caps: Sequence[Cap],
    now: int,
) -> None:
    """The campaign exists, is not paused, and nobody is assigned to it.

    ``caps`` hold for the campaign, and for each distributor and terminal in it.  ``until`` is exclusive, 0: open.
    Raises NotFound for an unknown pool, Conflict if the campaign exists or a value breaks a rule.
    """
    _check_order(id, category, priority)
    _check_products(id, products)
    await _create(
        connection, "campaign", id, category=category, pool=pool, priority=priority, starts_at=starts_at, until=until,
        time_zone=time_zone, caps=caps, now=now,
    )  # fmt: skip
    await insert_products(connection, id, products)


async def create_for_product(
    connection: AsyncConnection,
    code: str,
    *,
    pool: str,
    starts_at: int,
    until: int,
    time_zone: str,
    caps: Sequence[Cap],
    now: int,
) -> None:
    """The campaign by which a product of Client API v3 is issued exists; no terminal's sale leads to it.

    Raises as ``create`` does.
    """
    await _create(
        connection, "product", code, category="", pool=pool, priority=PRIORITY, starts_at=starts_at, until=until,
        time_zone=time_zone, caps=caps, now=now,
    )  # fmt: skip


async def _create(
    connection: AsyncConnection,
    noun: Noun,
    id: str,
    *,
    category: str,
    pool: str,
    priority: int,
    starts_at: int,
    until: int,
    time_zone: str,
    caps: Sequence[Cap],
    now: int,
) -> None:
    check_id(noun, id)
    _check_window(noun, id, starts_at, until)
    if time_zone not in zones.names():
        raise Conflict(f"{time_zone!r} is no time zone: take a name of the IANA database, Europe/Berlin say")
    _check_caps(caps, get_args(CapHolder), f"{noun} {id}")
    await lock(connection)
    if (await connection.execute(select(pools.c.id).where(pools.c.id == pool))).first() is None:
        raise NotFound(f"there is no pool {pool}: create it first")
    if (await connection.execute(select(campaigns.c.id).where(campaigns.c.id == id))).first() is not None:
        taken = {"campaign": "product of this code", "product": "campaign of this id"}[noun]
        raise Conflict(f"{noun} {id} exists already, or a {taken}")
    await connection.execute(
        insert(campaigns),
        {
            "id": id,
            "category": category,
            "pool": pool,
            "priority": priority,
            "starts_at": starts_at,
            "until": until,
            "paused": False,
            "time_zone": time_zone,
            "created_at": now,
        },
    )
    await replace_caps(connection, id, "", caps, now)
    await mark_changed(connection, [id])


async def change(connection: AsyncConnection, wanted: Campaign, now: int) -> None:
    """The campaign of this id, whose pool and time zone are for good, has the values of ``wanted``; its assignments
    stay.  A cap whose holder and period had one before goes on from its count.

    Raises NotFound; Conflict if a value breaks a rule or the campaign is over.  Whoever calls this sees to it that
    ``check_candidates`` holds in the end.
    """
    id = wanted.id
    row = await _begin(connection, "campaign", id, None)
    _refuse_over(row, now)
    for what, was, to_be in (("pool", row.pool, wanted.pool), ("time zone", row.time_zone, wanted.time_zone)):
        if was != to_be:  # what was lost with a Redis is counted by the pool, days and hours by the zone
            raise Conflict(f"campaign {id} keeps its {what}, {was}, for good: create another campaign")
    _check_order(id, wanted.category, wanted.priority)
    _check_products(id, wanted.products)
    _check_window("campaign", id, wanted.starts_at, wanted.until)
    if 0 < wanted.until <= now:
        raise Conflict(f"campaign {id} can't have ended in the past: `voucherd campaign end {id}` ends it now")
    _check_caps(wanted.caps, get_args(CapHolder), f"campaign {id}")
    names = ("category", "priority", "starts_at", "until", "paused")
    values = {name: getattr(wanted, name) for name in names}
    await connection.execute(update(campaigns).where(campaigns.c.id == id).values(values))
    await connection.execute(delete(campaign_products).where(campaign_products.c.campaign == id))
    await insert_products(connection, id, wanted.products)
    await replace_caps(connection, id, "", wanted.caps, now)


async def end(
    connection: AsyncConnection, id: str, now: int, if_version: int | None = None, noun: Noun = "campaign"
) -> int:
    """No request that begins at ``now`` or later gets a voucher of the campaign, for good; since when that is so.

    One that is over stays as it is.  Raises NotFound and Conflict.
    """
    row = await _begin(connection, noun, id, if_version)
    if _is_over(row, now):
        return int(row.until)
    await connection.execute(update(campaigns).where(campaigns.c.id == id).values(until=now))
    return now


async def set_paused(
    connection: AsyncConnection,
    id: str,
    paused: bool,
    now: int,
    if_version: int | None = None,
    noun: Noun = "campaign",
) -> None:
    """The campaign is paused or goes on.  Raises NotFound; Conflict also if it is over and were to go on."""
    row = await _begin(connection, noun, id, if_version)
    if not paused:
        _refuse_over(row, now)
    await connection.execute(update(campaigns).where(campaigns.c.id == id).values(paused=paused))


async def set_caps(
    connection: AsyncConnection,
    id: str,
    distributor: str,
    changes: CapChanges,
    now: int,
    if_version: int | None = None,
    noun: Noun = "campaign",
) -> list[Cap]:
    """These caps are changed, set or gone and all others as they were; the caps that there are now.

    The campaign's own for '', else those of the distributor's assignment.  Raises NotFound without such an assignment,
    Conflict for a bad cap.
    """
    await _begin(connection, noun, id, if_version)
    where = f"{noun} {id}"
    if distributor:
        where = f"the assignment of {distributor} to {id}"
        await _require_assignment(connection, noun, id, distributor)
    here = (caps.c.campaign == id, caps.c.distributor == distributor)
    found = await connection.execute(select(caps).where(*here).order_by(caps.c.holder, caps.c.period))
    limits: dict[tuple[CapHolder, Period], int | None] = {(row.holder, row.period): row.limit for row in found}
    limits |= changes
    wanted = [Cap(holder, period, limit) for (holder, period), limit in limits.items() if limit is not None]
    named = [Cap(holder, period, limit or 0) for (holder, period), limit in changes.items()]
    _check_caps(named, _ASSIGNED if distributor else get_args(CapHolder), where)
    await replace_caps(connection, id, distributor, wanted, now)
    return wanted


async def assign(
    connection: AsyncConnection,
    id: str,
    distributor: str,
    caps: Sequence[Cap],
    now: int,
    if_version: int | None = None,
    noun: Noun = "campaign",
) -> None:
    """The distributor may issue by the campaign, under ``caps`` (per distributor or terminal) besides its own.

    Again: these caps replace those of the assignment before.  Raises NotFound for an unknown campaign or
    distributor; Conflict for a bad cap, or if more than 16 campaigns that are not over would then compete for
    one product of this distributor.
    """
    await place(connection, id, distributor, caps, now, if_version, noun)
    await check_candidates(connection, now, distributor)


async def place(
    connection: AsyncConnection,
    id: str,
    distributor: str,
    caps: Sequence[Cap],
    now: int,
    if_version: int | None = None,
    noun: Noun = "campaign",
) -> None:
    """Like ``assign``, but whoever calls this sees to it that ``check_candidates`` holds in the end."""
    _check_caps(caps, _ASSIGNED, f"the assignment of {distributor} to {id}")
    await _begin(connection, noun, id, if_version)
    await require_distributor(connection, distributor)
    if not await _is_assigned(connection, id, distributor):
        row = {"campaign": id, "distributor": distributor, "created_at": now}
        await connection.execute(insert(assignments), row)
    await replace_caps(connection, id, distributor, caps, now)


async def unassign(
    connection: AsyncConnection, id: str, distributor: str, if_version: int | None = None, noun: Noun = "campaign"
) -> None:
    """The distributor may not issue by the campaign any more, and the caps of its assignment are gone.

    Raises NotFound if it might not, Conflict.
    """
    await _begin(connection, noun, id, if_version)
    await _require_assignment(connection, noun, id, distributor)
    for table in (caps, assignments):
        here = (table.c.campaign == id, table.c.distributor == distributor)
        await connection.execute(delete(table).where(*here))


async def touch_product(connection: AsyncConnection, code: str, now: int, if_version: int | None = None) -> None:
    """The product counts as changed, by what the caller changes of it.  Raises NotFound, and Conflict if it is over."""
    _refuse_over(await _begin(connection, "product", code, if_version), now)


async def mark_changed(connection: AsyncConnection, ids: Collection[str]) -> None:
    """These campaigns were changed by this transaction, which locked the head before."""
    await lock(connection)
    version = select(catalogue_head.c.version + 1).scalar_subquery()
    await connection.execute(update(campaigns).where(campaigns.c.id.in_(ids)).values(changed_in=version))


async def check_candidates(connection: AsyncConnection, now: int, distributor: str | None = None) -> None:
    """At most 16 campaigns that are not over compete for each product of the distributor, of all of them for None.

    Raises Conflict.
    """
    whose = () if distributor is None else (assignments.c.distributor == distributor,)
    crowded = (
        select(assignments.c.distributor, campaign_products.c.product)
        .join(campaign_products, assignments.c.campaign == campaign_products.c.campaign)
        .join(campaigns, campaigns.c.id == campaign_products.c.campaign)
        .where(*whose, not_over(now))
        .group_by(assignments.c.distributor, campaign_products.c.product)
        .having(func.count() > CANDIDATES_MAX)
        .order_by(assignments.c.distributor, campaign_products.c.product)
    )
    row = (await connection.execute(crowded)).first()
    if row is not None:
        raise Conflict(
            f"more than {CANDIDATES_MAX} campaigns that are not over would serve product {row.product} to "
            f"{row.distributor}: no more can compete"
        )


def noun_of(category: str) -> Noun:
    """Which of the two has this category: a product's rule is for none that a terminal sells."""
    return "campaign" if category else "product"


def of_the_other_kind(noun: Noun, id: str) -> NotFound:
    """What is said where ``id`` is looked for under one noun and is there under the other."""
    other = "product" if noun == "campaign" else "campaign"
    return NotFound(f"there is no {noun} {id}, but a {other}: see `voucherd {other} show {id}`")


# --- rules ---------------------------------------------------------------------------------------------------

_ASSIGNED: Final = ("distributor", "terminal")  # what caps of an assignment may count by


def _check_order(id: str, category: str, priority: int) -> None:
    check_id("category", category)
    if not -PRIORITY_MAX <= priority <= PRIORITY_MAX:
        raise Conflict(f"the priority of campaign {id} has to lie within ±{PRIORITY_MAX}")


def _check_products(id: str, products: Sequence[str]) -> None:
    if not 1 <= len(products) <= PRODUCTS_MAX:
        raise Conflict(f"campaign {id} needs 1 to {PRODUCTS_MAX} products")
    for product in products:
        check_id("product", product)


def _check_window(noun: Noun, id: str, starts_at: int, until: int) -> None:
    if not 0 <= starts_at <= TIME_MAX or not 0 <= until <= TIME_MAX or (until and until <= starts_at):
        raise Conflict(f"{noun} {id} has to start before it ends")


def _check_caps(caps: Iterable[Cap], holders: Collection[str], where: str) -> None:
    counted = set()
    for cap in caps:
        if cap.holder not in holders or cap.period not in get_args(Period):
            raise Conflict(f"{where} can't have a cap per {cap.holder} and {cap.period}")
        if not 0 <= cap.limit <= LIMIT_MAX:
            raise Conflict(f"a cap of {where} has to lie within 0 and {LIMIT_MAX}")
        if (cap.holder, cap.period) in counted:
            raise Conflict(f"{where} has two caps for the same holder and period")
        counted.add((cap.holder, cap.period))


def _is_over(row: Row[Any], now: int) -> bool:
    return bool(0 < row.until <= now)


def _refuse_over(row: Row[Any], now: int) -> None:
    if _is_over(row, now):
        noun = noun_of(row.category)
        raise Conflict(f"{noun} {row.id} is over since {instant(row.until)} and can't go on: create another one")


async def _begin(connection: AsyncConnection, noun: Noun, id: str, if_version: int | None) -> Row[Any]:
    """The campaign as it was, marked as changed; nobody else changes it until the transaction ends."""
    await lock(connection)
    row = (await connection.execute(select(campaigns).where(campaigns.c.id == id))).first()
    if row is None:
        raise NotFound(f"there is no {noun} {id}: create it first")
    if noun_of(row.category) != noun:
        raise of_the_other_kind(noun, id)
    if if_version is not None and row.changed_in != if_version:
        raise Conflict(
            f"{noun} {id} is at version {row.changed_in}, not at {if_version}: nothing was changed; "
            f"look at it again with `voucherd {noun} show {id}`"
        )
    await mark_changed(connection, [id])
    return row


async def _is_assigned(connection: AsyncConnection, id: str, distributor: str) -> bool:
    here = (assignments.c.campaign == id, assignments.c.distributor == distributor)
    return (await connection.execute(select(assignments.c.campaign).where(*here))).first() is not None


async def _require_assignment(connection: AsyncConnection, noun: Noun, id: str, distributor: str) -> None:
    if not await _is_assigned(connection, id, distributor):
        raise NotFound(f"distributor {distributor} is not assigned to {noun} {id}")


async def insert_products(connection: AsyncConnection, id: str, products: Sequence[str]) -> None:
    """The campaign, which had none, serves these products."""
    rows = [{"campaign": id, "product": product} for product in dict.fromkeys(products)]
    await connection.execute(insert(campaign_products), rows)


async def replace_caps(
    connection: AsyncConnection,
    campaign: str,
    distributor: str,
    wanted: Sequence[Cap],
    now: int,
    counted_from: int | None = None,
) -> None:
    """These are the caps now.  One whose holder and period had a cap before goes on from its count; another one counts
    since ``counted_from``, ``now`` for None."""
    here = (caps.c.campaign == campaign, caps.c.distributor == distributor)
    before = {(row.holder, row.period): row for row in await connection.execute(select(caps).where(*here))}
    await connection.execute(delete(caps).where(*here))
    rows: list[dict[str, object]] = []
    for cap in wanted:
        old = before.get((cap.holder, cap.period))
        rows.append(
            {
                "campaign": campaign,
                "distributor": distributor,
                "holder": cap.holder,
                "period": cap.period,
                "limit": cap.limit,
                "counted_from": old.counted_from if old is not None else now if counted_from is None else counted_from,
                "limited_from": now if old is None or old.limit != cap.limit else old.limited_from,
            }
        )
    if rows:
        await connection.execute(insert(caps), rows)
