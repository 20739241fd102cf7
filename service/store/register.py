"""What the control plane holds, as operators look it up: pools, campaigns, products, distributors, and tokens by their
digests.

Read within one snapshot (``Database.read``).  Nothing here holds a code or a token.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Campaign, Product
from service.domain import RateLimit
from service.errors import NotFound
from service.store import control, stock
from service.store.campaigns import Noun, noun_of, of_the_other_kind
from service.store.schema import assignments, campaigns, credentials, distributors, lots, pools, withdrawn

# Of a token's SHA-256, hex: enough to tell apart what one distributor has, and no key to anything.
DIGEST_CHARACTERS: Final = 12

State = Literal["running", "paused", "not yet", "over"]


class Lot(msgspec.Struct, frozen=True):
    """Codes of one pool and expiry: ``imported`` = ``stored`` + ``leased`` + ``withdrawn`` (from stock)."""

    lot: int
    expires_at: int
    imported: int
    stored: int
    leased: int
    withdrawn: int


class Pool(msgspec.Struct, frozen=True):
    """``default_expires_at``: of codes that bring none; None: every code has to.  Lots, the earliest expiry first."""

    id: str
    default_expires_at: int | None
    least_life_s: int
    created_at: int
    generator: str | None  # what `work` fills it by
    lots: tuple[Lot, ...]

    def codes(self, what: Literal["imported", "stored", "leased", "withdrawn"]) -> int:
        """So many in all lots."""
        return sum(getattr(lot, what) for lot in self.lots)


class Registered(msgspec.Struct, frozen=True):
    """A campaign (that of a product too), the catalogue ``version`` in which it was last changed, and since when there
    has been one."""

    campaign: Campaign
    version: int
    created_at: int

    def state(self, now: int) -> State:
        """What time and the operators say of it; whether there is stock is another question."""
        if 0 < self.campaign.until <= now:
            return "over"
        if self.campaign.paused:
            return "paused"
        return "not yet" if now < self.campaign.starts_at else "running"


class Distributor(msgspec.Struct, frozen=True):
    """``rate`` and ``burst`` are None if there is no limit; ``tokens`` that are valid, and ``campaigns`` assigned: how
    many."""

    id: str
    name: str
    active: bool
    created_at: int
    rate: int | None
    burst: int | None
    tokens: int
    campaigns: int

    @property
    def limit(self) -> RateLimit | None:
        return None if self.rate is None or self.burst is None else RateLimit(self.rate, self.burst)


class Token(msgspec.Struct, frozen=True):
    """What is known of a token.  ``sha256`` is the beginning of its digest, which the audit log has in full."""

    id: int
    distributor: str
    sha256: str
    created_at: int
    revoked_at: int | None


async def all_pools(conn: AsyncConnection) -> list[Pool]:
    """Every pool, by its id."""
    return await _pools(conn)


async def pool(conn: AsyncConnection, id: str) -> Pool:
    """Raises NotFound."""
    for found in await _pools(conn, pools.c.id == id):
        return found
    raise NotFound(f"there is no pool {id}: see `voucherd pool list`")


async def all_campaigns(conn: AsyncConnection) -> list[Registered]:
    """Every campaign, by its id, as the catalogue would be published now."""
    rules, _ = await _rules(conn)
    return [one for one in rules.values() if noun_of(one.campaign.category) == "campaign"]


async def campaign(conn: AsyncConnection, id: str) -> Registered:
    """Raises NotFound."""
    rules, _ = await _rules(conn)
    return _called("campaign", id, rules)


async def rule(conn: AsyncConnection, id: str) -> Registered:
    """The campaign of this id, or the one that the product of this code is issued by.  Raises NotFound."""
    rules, _ = await _rules(conn)
    if id not in rules:
        raise NotFound(f"there is no campaign {id}: see `voucherd campaign list`")
    return rules[id]


async def all_products(conn: AsyncConnection) -> list[tuple[Product, Registered]]:
    """Every product, by its code, and the campaign that it is issued by, as the catalogue would be published now."""
    rules, sold = await _rules(conn)
    return [(product, rules[code]) for code, product in sold.items()]


async def product(conn: AsyncConnection, code: str) -> tuple[Product, Registered]:
    """Raises NotFound."""
    rules, sold = await _rules(conn)
    rule = _called("product", code, rules)
    return sold[code], rule


async def all_distributors(conn: AsyncConnection) -> list[Distributor]:
    """Every distributor, by its id."""
    valid = (
        select(func.count())
        .where(credentials.c.distributor == distributors.c.id, credentials.c.revoked_at.is_(None))
        .scalar_subquery()
    )
    assigned = select(func.count()).where(assignments.c.distributor == distributors.c.id).scalar_subquery()
    return [Distributor(*row) for row in await conn.execute(select(distributors, valid, assigned).order_by("id"))]


async def tokens(conn: AsyncConnection, distributor: str | None = None) -> list[Token]:
    """The tokens that were ever made, or those of one distributor, the oldest first.  Raises NotFound for an unknown
    one."""
    if distributor is not None:
        await control.require_distributor(conn, distributor)
    columns = (
        credentials.c.id, credentials.c.distributor, func.substr(credentials.c.token_sha256, 1, DIGEST_CHARACTERS),
        credentials.c.created_at, credentials.c.revoked_at,
    )  # fmt: skip
    wanted = select(*columns).order_by(credentials.c.id)
    if distributor is not None:
        wanted = wanted.where(credentials.c.distributor == distributor)
    return [Token(*row) for row in await conn.execute(wanted)]


async def _rules(conn: AsyncConnection) -> tuple[dict[str, Registered], dict[str, Product]]:
    """Campaigns and those of products by their ids, and the products by their codes."""
    known = {row.id: row for row in await conn.execute(select(campaigns))}
    snapshot = await control.snapshot(conn, 0)
    rules = {
        campaign.id: Registered(campaign, known[campaign.id].changed_in, known[campaign.id].created_at)
        for campaign in snapshot.campaigns
    }
    return rules, {product.code: product for product in snapshot.products}


def _called(noun: Noun, id: str, rules: dict[str, Registered]) -> Registered:
    if id not in rules:
        raise NotFound(f"there is no {noun} {id}: see `voucherd {noun} list`")
    if noun_of(rules[id].campaign.category) != noun:
        raise of_the_other_kind(noun, id)
    return rules[id]


async def _pools(conn: AsyncConnection, *where: ColumnElement[bool]) -> list[Pool]:
    taken = select(func.coalesce(func.sum(withdrawn.c.seq_to - withdrawn.c.seq_from), 0))
    ahead, all_of_them = stock.withdrawn_ahead(), taken.where(withdrawn.c.lot == lots.c.id).scalar_subquery()
    counted = (
        select(
            lots.c.pool, lots.c.id, lots.c.expires_at, lots.c.imported, lots.c.imported - lots.c.leased_to - ahead,
            lots.c.leased_to - (all_of_them - ahead), all_of_them,
        )
        .join(pools, pools.c.id == lots.c.pool)
        .where(*where)
        .order_by(lots.c.expires_at)
    )  # fmt: skip
    held: dict[str, list[Lot]] = {}
    for id, lot, expires_at, *figures in await conn.execute(counted):
        held.setdefault(id, []).append(Lot(lot, expires_at, *(int(figure) for figure in figures)))
    columns = (pools.c.id, pools.c.default_expires_at, pools.c.least_life_s, pools.c.created_at, pools.c.generator)
    found = await conn.execute(select(*columns).where(*where).order_by(pools.c.id))
    return [Pool(*row, tuple(held.get(row.id, ()))) for row in found]
