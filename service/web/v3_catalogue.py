"""GET /v3/products: what is assigned to a client, with the stock that is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from service.catalogue import Campaign, Catalogue
from service.catalogue import Product as Sold
from service.domain import Busy
from service.errors import RedisUnreachable, ReplyMismatch, StoreUnreachable
from service.messages import Product, ProductAnswer, ProductsAnswer
from service.scripts import Scripts
from service.store import stock
from service.store.database import Database
from service.vouchers import local_time
from service.web.access import Access
from service.web.problems import Answer
from service.web.v1 import Issuing
from service.web.v3_errors import answered, new_request_id, refusal

# Seconds that a look at the stock is good for: whatever the clients ask, one process looks this often.
LOOK_S: Final = 1.0

# The part of a request's deadline that a look may take: the request has waited for the catalogue to be confirmed
# before, and is to be told in time if nobody answers.
LOOK_PART: Final = 0.5

Left = Callable[[], Awaitable[dict[str, int]]]


class ProductCatalogue:
    """The products, by a catalogue that is in force, and ``left``, the codes of each pool that can be issued."""

    def __init__(self, issuer: Issuing, left: Left) -> None:
        self._issuer = issuer
        self._left = left

    async def products(self, access: Access) -> Answer:
        """Those that are assigned to the client, by their codes."""

        def judge(catalogue: Catalogue) -> list[tuple[Sold, Campaign]] | str:
            return out_of_force(access, catalogue) or catalogue.products_of(access.distributor)

        found = await self._issuer.confirm(judge)
        if isinstance(found, Busy):
            return refusal(found.code)
        if isinstance(found, str):
            return refusal(found)
        left = await self._stock([product for product, _ in found])
        if left is None:
            return refusal("store_unreachable")
        told = tuple(_told(product, campaign, left) for product, campaign in found)
        return answered(ProductsAnswer(new_request_id(), told))

    async def product(self, access: Access, code: str) -> Answer:
        """One that is assigned to the client."""

        def judge(catalogue: Catalogue) -> tuple[Sold, Campaign] | str:
            found = catalogue.product(code)
            if refused := out_of_force(access, catalogue):
                return refused
            if found is None:
                return "no_product"
            return found if access.distributor in found[1].assigned else "not_assigned"

        found = await self._issuer.confirm(judge)
        if isinstance(found, Busy):
            return refusal(found.code)
        if isinstance(found, str):
            return refusal(found)
        left = await self._stock([found[0]])
        if left is None:
            return refusal("store_unreachable")
        return answered(ProductAnswer(new_request_id(), _told(*found, left)))

    async def _stock(self, products: list[Sold]) -> dict[str, int] | None:
        """What is left per pool; None if it can't be told and somebody wants to know."""
        if all(product.unlimited for product in products):
            return {}
        try:
            return await self._left()
        except (StoreUnreachable, RedisUnreachable, ReplyMismatch):
            return None


def out_of_force(access: Access, catalogue: Catalogue) -> str:
    """'' if the client may ask, by this catalogue; else the name of the refusal."""
    distributor = catalogue.distributor(access.credential)
    if distributor is None:
        return "token_unknown"
    return "" if catalogue.active(distributor) else "suspended"


class Stock:
    """The codes of each pool that are in the store or in its window, looked at once a second at most.

    ``deadline_s``: longest wait of one request, all in all.
    """

    def __init__(
        self, database: Database, scripts: Scripts, *, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._look_s = LOOK_PART * deadline_s
        self._clock = clock
        self._look: asyncio.Task[dict[str, int]] | None = None
        self._looked_at = float("-inf")

    async def left(self) -> dict[str, int]:
        """Codes per pool, as of a second ago at most.

        Raises StoreUnreachable, also if a look takes longer than LOOK_PART of the deadline, RedisUnreachable,
        ReplyMismatch.
        """
        if self._look is None or (self._look.done() and self._clock() - self._looked_at >= LOOK_S):
            self._looked_at = self._clock()
            self._look = asyncio.ensure_future(self._looked())
        return await asyncio.shield(self._look)

    async def _looked(self) -> dict[str, int]:
        try:
            async with asyncio.timeout(self._look_s):
                return await self._counted()
        except TimeoutError:
            raise StoreUnreachable from None

    async def _counted(self) -> dict[str, int]:
        async with self._database.read() as conn:
            left = await stock.left(conn, int(time.time()))
        seen = await self._scripts.generation()
        held = await self._scripts.books(sorted(left), generation=seen.open) if seen.open else None
        windows = {} if held is None else {pool: window.length for pool, window in held.windows.items()}
        return {pool: codes + windows.get(pool, 0) for pool, codes in left.items()}


def _told(product: Sold, campaign: Campaign, left: dict[str, int]) -> Product:
    terms, zone = product.terms, campaign.time_zone
    return Product(
        product_code=product.code, name=terms.name, description=product.description,
        is_value_based=terms.is_value_based, is_open_value=terms.is_open_value,
        is_status_available=terms.is_status_available, is_multiple_use=terms.is_multiple_use, currency=terms.currency,
        amount=terms.amount, quantity=None if product.unlimited else left.get(campaign.pool, 0),
        expiry_scheme=product.expiry_scheme, valid_from=local_time(campaign.starts_at, zone),
        valid_until=local_time(campaign.until - 1, zone) if campaign.until else None, image=product.image,
        terms_and_conditions=product.terms_and_conditions,
    )  # fmt: skip
