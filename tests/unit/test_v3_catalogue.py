"""GET /v3/products: who is told what, and what is left of the stock, however the store and Redis are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from service.catalogue import Campaign, Catalogue, Client, Pool, Product, SigningKey, Snapshot, encode, load
from service.domain import Busy, Terms
from service.errors import Fault, RedisUnreachable, ReplyMismatch, StoreUnreachable
from service.scripts import Scripts
from service.store.database import Database
from service.web.access import Access
from service.web.problems import Answer
from service.web.v3_catalogue import LOOK_PART, LOOK_S, ProductCatalogue, Stock
from tests.issuers import DISTRIBUTOR, FakeIssuer

ACCESS = Access("CLIENT", DISTRIBUTOR, "kid:CLIENT", frozenset({"read_catalogue"}), 0)
TERMS = Terms("Ten", True, False, True, False, "EUR", 1_000, "", "UTC", "https://v.example/", "")
STARTS_AT = 1_800_000_000
PATIENT_S = 60.0  # for what is not about waiting


def product(code: str, *, unlimited: bool = False) -> Product:
    return Product(code, TERMS, "", "as the code", "", "", unlimited)


def campaign(code: str, pool: str, *distributors: str) -> Campaign:
    return Campaign(code, "", (), pool, 100, STARTS_AT, 0, False, "UTC", (), dict.fromkeys(distributors, ()))


def published(*, client_active: bool = True, distributor_active: bool = True, **changed: Any) -> Catalogue:
    """GIFT and its pool P are assigned, so is ENDLESS, which never runs dry; OTHERS is another's."""
    snapshot = Snapshot(
        version=1, tokens={}, distributors={DISTRIBUTOR: distributor_active, "E": True},
        pools=(Pool("P", 0), Pool("Q", 0)),
        campaigns=(
            campaign("GIFT", "P", DISTRIBUTOR), campaign("ENDLESS", "Q", DISTRIBUTOR), campaign("OTHERS", "P", "E"),
        ),
        products=(product("GIFT"), product("ENDLESS", unlimited=True), product("OTHERS")),
        clients={"CLIENT": Client(DISTRIBUTOR, "", ("read_catalogue",), client_active)},
        signing_keys=(SigningKey("kid", "", "", 0),),
    )  # fmt: skip
    return cast(Catalogue, list(load(encode(msgspec.structs.replace(snapshot, **changed))))[-1])


class Store:
    """Holds 40 codes of P; counts its readers, fails or hangs as a test says."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.gate: asyncio.Event | None = None
        self.reads = 0
        self.reading = 0

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Any]:
        self.reads += 1
        self.reading += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.fault is not None:
                raise self.fault
            yield self
        finally:
            self.reading -= 1

    async def execute(self, _: object) -> list[tuple[str, int]]:
        return [("P", 40), ("Q", 0)]


class Windows:
    """Redis has 2 codes of P in its window; fails or hangs as a test says."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.gate: asyncio.Event | None = None

    async def generation(self) -> Any:
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return SimpleNamespace(open=1)

    async def books(self, pools: list[str], *, generation: int) -> Any:
        assert (pools, generation) == (["P", "Q"], 1)
        return SimpleNamespace(windows={"P": SimpleNamespace(length=2), "Q": SimpleNamespace(length=0)})


class Shop:
    """The catalogue of products over all this, and the clock that tells how old a look is."""

    def __init__(self, deadline_s: float = PATIENT_S) -> None:
        self.store, self.windows, self.issuer = Store(), Windows(), FakeIssuer()
        self.issuer.catalogue = published()
        self.now = 0.0
        self.stock = Stock(
            cast(Database, self.store), cast(Scripts, self.windows), deadline_s=deadline_s, clock=lambda: self.now
        )
        self.products = ProductCatalogue(self.issuer, self.stock.left)

    async def quantities(self) -> dict[str, int | None]:
        answer = await self.products.products(ACCESS)
        assert answer.status == 200
        return {one["product_code"]: one["quantity"] for one in msgspec.json.decode(answer.body)["products"]}


def error(answer: Answer) -> tuple[int, str]:
    return answer.status, msgspec.json.decode(answer.body)["error"]["code"]


async def test_quantity_is_what_is_in_the_store_and_in_the_window_and_none_where_stock_never_ends() -> None:
    shop = Shop()
    assert await shop.quantities() == {"ENDLESS": None, "GIFT": 42}
    answer = await shop.products.product(ACCESS, "GIFT")
    assert (answer.status, msgspec.json.decode(answer.body)["product"]["quantity"]) == (200, 42)


@pytest.mark.parametrize(
    ("code", "told"), [("OTHERS", (403, "403-F03")), ("NONE", (404, "404-D01")), ("P", (404, "404-D01"))]
)
async def test_a_product_that_is_not_the_clients_is_refused_without_a_look_at_stock(
    code: str, told: tuple[int, str]
) -> None:
    shop = Shop()
    assert error(await shop.products.product(ACCESS, code)) == told
    assert shop.store.reads == 0


@pytest.mark.parametrize(
    ("catalogue", "told"),
    [
        (published(client_active=False), (403, "403-F02")),
        (published(distributor_active=False), (403, "403-F02")),
        (published(clients={}), (401, "401-A04")),
        (published(signing_keys=()), (401, "401-A04")),
    ],
)
async def test_who_is_not_in_force_is_told_nothing_of_any_product(catalogue: Catalogue, told: tuple[int, str]) -> None:
    shop = Shop()
    shop.issuer.catalogue = catalogue
    assert error(await shop.products.products(ACCESS)) == told
    for code in ("GIFT", "OTHERS", "NONE"):
        assert error(await shop.products.product(ACCESS, code)) == told
    assert shop.store.reads == 0


async def test_a_catalogue_that_can_t_be_confirmed_is_not_told() -> None:
    class Away(FakeIssuer):
        async def confirm(self, judge: Any) -> Any:
            return Busy("store_unreachable")

    products = ProductCatalogue(Away(), Shop().stock.left)
    assert error(await products.products(ACCESS)) == (503, "503-B07")
    assert error(await products.product(ACCESS, "GIFT")) == (503, "503-B07")


@pytest.mark.parametrize(
    ("part", "fault"), [("store", StoreUnreachable()), ("windows", RedisUnreachable()), ("windows", ReplyMismatch())]
)
async def test_stock_that_can_t_be_looked_at_is_503_and_no_number(part: str, fault: Fault) -> None:
    shop = Shop()
    getattr(shop, part).fault = fault
    assert error(await shop.products.products(ACCESS)) == (503, "503-B07")
    assert error(await shop.products.product(ACCESS, "GIFT")) == (503, "503-B07")
    assert (await shop.products.product(ACCESS, "ENDLESS")).status == 200  # nobody needs to look
    getattr(shop, part).fault = None
    shop.now += LOOK_S
    assert await shop.quantities() == {"ENDLESS": None, "GIFT": 42}


@pytest.mark.parametrize("part", ["store", "windows"])
async def test_a_look_that_hangs_is_503_and_given_up(part: str) -> None:
    assert 0 < LOOK_PART < 1  # of the deadline
    shop = Shop(deadline_s=0.05)
    getattr(shop, part).gate = asyncio.Event()  # which nobody sets
    async with asyncio.timeout(PATIENT_S):
        told = await asyncio.gather(*(shop.products.product(ACCESS, "GIFT") for _ in range(20)))
    assert {error(answer) for answer in told} == {(503, "503-B07")}
    assert (shop.store.reads, shop.store.reading) == (1, 0)
    assert (await shop.products.product(ACCESS, "GIFT")).status == 503  # the look of this second
    assert shop.store.reads == 1
    shop.now += LOOK_S
    await shop.products.product(ACCESS, "GIFT")
    assert shop.store.reads == 2


async def test_the_stock_is_looked_at_once_a_second_however_many_ask() -> None:
    shop = Shop()
    shop.store.gate = asyncio.Event()
    asking = [asyncio.ensure_future(shop.products.products(ACCESS)) for _ in range(100)]
    await asyncio.sleep(0)
    shop.now += 10 * LOOK_S  # whoever comes while a look is under way joins it
    asking += [asyncio.ensure_future(shop.products.product(ACCESS, "GIFT")) for _ in range(100)]
    await asyncio.sleep(0)
    shop.store.gate.set()
    assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
    assert shop.store.reads == 1
    for later_s, reads in ((LOOK_S, 2), (0.999 * LOOK_S, 2), (0.001 * LOOK_S, 3)):
        shop.now += later_s
        await asyncio.gather(*(shop.quantities() for _ in range(20)))
        assert shop.store.reads == reads


async def test_a_client_that_goes_away_takes_nobody_s_look_along() -> None:
    shop = Shop()
    shop.store.gate = asyncio.Event()
    gone, stays = (asyncio.ensure_future(shop.products.product(ACCESS, "GIFT")) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    shop.store.gate.set()
    assert (await stays).status == 200
    assert shop.store.reads == 1
