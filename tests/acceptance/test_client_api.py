"""Client API v3 as in production: two serving processes, a worker, and the Python client that partners get."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import pytest

from service.client import ApiError, AsyncClient, Client, Issued
from tests.acceptance.service import Service

WHOLE = (
    "--amount", "1000", "--currency", "SGD", "--url", "https://v.example/", "--multiple-use", "--time-zone",
    "Asia/Singapore",
)  # fmt: skip


@pytest.fixture(scope="module")
def secrets_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets") / "secrets.json"


@pytest.fixture
def shop(service: Service, secrets_file: Path) -> Shop:
    """A service that sells by Client API v3; what each test sells is its own."""
    if "VOUCHERD_SECRETS_FILE" not in service.environment:
        service.environment["VOUCHERD_SECRETS_FILE"] = str(secrets_file)
    if not secrets_file.exists():
        service.succeed("keys", "create", str(secrets_file))
    if not json.loads(service.succeed("keys", "list", "--json")):
        service.stop()
        service.start("serve", "work")
        service.succeed("keys", "rotate")
    return Shop(service)


class Shop:
    """Products of a distributor of its own, and a client that may have them."""

    numbers = iter(range(1_000))

    def __init__(self, service: Service) -> None:
        self.service = service
        self.name = f"S{next(self.numbers)}"
        self.client_id = f"client-{self.name}"
        service.succeed("distributor", "create", self.name)
        made = service.succeed("client", "create", self.client_id, "--distributor", self.name, "--json")
        self.secret = json.loads(made)["client_secret"]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def product(self, code: str, codes: int, *options: str) -> str:
        """A product with so many codes, assigned to the client."""
        code = f"{self.name}-{code}"
        self.service.succeed("product", "create", code, "--name", "Gift", *(options or WHOLE))
        if codes:
            self.service.succeed("codes", "generate", code, str(codes), "--pattern", f"{self.name}-######-###")
        self.service.succeed("product", "assign", code, self.name)
        return code

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=32)
        http = httpx.AsyncClient(timeout=30, trust_env=False, verify=False, limits=limits)
        async with AsyncClient(self.base_url, self.client_id, self.secret, http=http) as made:
            yield made

    async def token(self) -> str:
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            answer = await http.post(
                f"{self.base_url}/oauth2/token", data={"grant_type": "client_credentials"},
                auth=(self.client_id, self.secret),
            )  # fmt: skip
            return str(answer.json()["access_token"])

    async def post(self, code: str, key: str, token: str, **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=30) as http:
            headers = {"authorization": f"Bearer {token}", "idempotency-key": key}
            return await http.post(f"{self.base_url}/v3/products/{code}", headers=headers, json=body)


def test_a_partner_s_first_day(shop: Shop) -> None:
    """The client that waits: catalogue, 1 and 20 vouchers, retrieval at once, a replay, and another's vouchers."""
    code = shop.product("FIRST", 50)
    with Client(shop.base_url, shop.client_id, shop.secret) as client:
        assert [(one.product_code, one.quantity) for one in client.products()] == [(code, 50)]
        key = str(uuid.uuid4())
        issued = client.issue(code, 20, key=key, client_reference="sale/1")
        assert (len(issued.vouchers), issued.partial, issued.replayed) == (20, False, False)
        again = client.issue(code, 20, key=key, client_reference="sale/1")
        assert (again.vouchers, again.request_id, again.replayed) == (issued.vouchers, issued.request_id, True)
        ids = [one.voucher_id for one in issued.vouchers]
        assert client.vouchers(ids) == issued.vouchers
        fresh = client.issue(code).vouchers[0]
        assert client.voucher(fresh.voucher_id) == fresh
        with pytest.raises(ApiError, match="422-B03"):
            client.issue(code, 19, key=key, client_reference="sale/1")
        with pytest.raises(ApiError, match="404-D4E"):
            client.voucher(str(uuid.uuid4()))
        other = Shop(shop.service)
        with Client(other.base_url, other.client_id, other.secret) as stranger:
            assert stranger.products() == ()
            with pytest.raises(ApiError, match="404-D4E"):
                stranger.voucher(fresh.voucher_id)
            with pytest.raises(ApiError, match="403-F03"):
                stranger.issue(code)
            with pytest.raises(ApiError, match="404-D01"):
                stranger.issue("NOTHING")
    found = json.loads(shop.service.succeed("ledger", "find", "--request-id", key, "--json"))
    assert {one["api"] for one in found} == {"v3"}


async def test_a_sale_is_found_by_its_trace_and_by_the_id_of_its_answer(shop: Shop) -> None:
    code, key, trace_id = shop.product("TRACED", 5), str(uuid.uuid4()), uuid.uuid4().hex
    headers = {"authorization": f"Bearer {await shop.token()}", "idempotency-key": key}
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=shop.base_url) as http:
        for parent in ("00f067aa0ba902b7", "00f067aa0ba902b8"):  # the second is a replay, which is none of its own
            headers["traceparent"] = f"00-{trace_id}-{parent}-01"
            answer = await http.post(f"/v3/products/{code}", headers=headers, json={"quantity": 2})
            assert answer.status_code == 200
    shop.service.quiet()
    told = answer.json()
    for wanted in (("--trace", trace_id), ("--request-id", told["request_id"]), ("--request-id", key)):
        found = json.loads(shop.service.succeed("ledger", "find", *wanted, "--json"))
        assert {one["voucher_code"] for one in found} == {one["voucher_code"] for one in told["vouchers"]}, wanted
        assert {(one["answer_id"], one["trace_id"], one["parent_id"]) for one in found} == {
            (told["request_id"], trace_id, "00f067aa0ba902b7")
        }


async def test_many_clients_and_mixed_quantities_get_exactly_what_there_is(shop: Shop, rng: random.Random) -> None:
    """Nothing twice, nothing of a quantity that was refused, and in the end what is left is less than was asked for."""
    codes = 600
    code = shop.product("RUSH", codes)
    asked = [rng.randint(1, 20) for _ in range(120)]
    async with shop.client() as client:
        await client.products()  # one token for all

        async def ask(quantity: int) -> Issued | ApiError:
            try:
                return await client.issue(code, quantity)
            except ApiError as refused:
                return refused

        outcomes = await asyncio.gather(*map(ask, asked))
        issued = [one for one in outcomes if isinstance(one, Issued)]
        refused = [quantity for quantity, one in zip(asked, outcomes, strict=True) if isinstance(one, ApiError)]
        assert {one.code for one in outcomes if isinstance(one, ApiError)} <= {"400-0C6"}
        given = [voucher.voucher_code for one in issued for voucher in one.vouchers]
        assert len(given) == len(set(given)) <= codes
        assert all(
            len(one.vouchers) == quantity
            for quantity, one in zip(asked, outcomes, strict=True)
            if isinstance(one, Issued)
        )
        left = codes - len(given)
        assert refused, "the rush was no rush"
        assert left < min(refused)
        for _ in range(left):
            given += [one.voucher_code for one in (await client.issue(code)).vouchers]
        with pytest.raises(ApiError, match="400-0C6"):
            await client.issue(code)
    assert len(set(given)) == codes
    await shop.service.audit()


async def test_replays_of_200_and_207_are_the_same_bytes_after_everything_was_killed(shop: Shop) -> None:
    code = shop.product("KILLED", 100, *WHOLE, "--cap", "total=12")
    token, whole, part = await shop.token(), str(uuid.uuid4()), str(uuid.uuid4())
    first = await shop.post(code, whole, token, quantity=7)
    second = await shop.post(code, part, token, quantity=20, client_reference="a")
    assert (first.status_code, second.status_code) == (200, 207)
    assert len(second.json()["vouchers"]) == 5
    refused = await shop.post(code, str(uuid.uuid4()), token, quantity=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "409-C03")
    shop.service.kill()
    shop.service.valkey.kill()
    shop.service.valkey.start()
    shop.service.start("serve", "work")
    shop.service.succeed("product", "change", code, "--name", "Another", "--amount", "5")
    shop.service.succeed("product", "pause", code)
    for key, body, before in (
        (whole, {"quantity": 7}, first), (part, {"quantity": 20, "client_reference": "a"}, second),
    ):  # fmt: skip
        end = time.monotonic() + 60
        while (again := await shop.post(code, key, token, **body)).status_code == 503:
            assert time.monotonic() < end
        assert (again.status_code, again.content) == (before.status_code, before.content)
        assert again.headers["idempotency-record"] == "true"
    assert (await shop.post(code, str(uuid.uuid4()), token, quantity=1)).json()["error"]["code"] == "409-C01"
    await shop.service.audit()


async def test_keys_rotate_under_traffic_without_one_refused_request(shop: Shop) -> None:
    code = shop.product("ROTATE", 3_000)
    over = asyncio.Event()
    statuses: list[int] = []
    kids: set[str] = set()

    async def ask() -> None:
        """A new token each time: the one that was signed by one process is shown to any of them."""
        while not over.is_set():
            token = await shop.token()
            kids.add(jwt.get_unverified_header(token)["kid"])
            statuses.append((await shop.post(code, str(uuid.uuid4()), token, quantity=1)).status_code)

    asking = [asyncio.create_task(ask()) for _ in range(6)]
    before = await shop.token()
    for _ in range(3):
        await asyncio.to_thread(shop.service.succeed, "keys", "rotate")
    over.set()
    await asyncio.gather(*asking)
    assert set(statuses) == {200}, statuses
    assert len(kids) == 4
    assert (await shop.post(code, str(uuid.uuid4()), before, quantity=1)).status_code == 200
    listed = json.loads(shop.service.succeed("keys", "list", "--json"))
    old = jwt.get_unverified_header(before)["kid"]
    assert next(one for one in listed if one["kid"] == old)["verifies_until"]
    await asyncio.to_thread(shop.service.succeed, "keys", "revoke", old)
    assert (await shop.post(code, str(uuid.uuid4()), before, quantity=1)).json()["error"]["code"] == "401-A04"


async def test_nothing_is_issued_after_a_suspension_has_returned(shop: Shop) -> None:
    code = shop.product("SUSPEND", 3_000)
    token = await shop.token()
    asked: list[tuple[float, int, str]] = []
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            began = time.monotonic()
            answer = await shop.post(code, str(uuid.uuid4()), token, quantity=2)
            asked.append((began, answer.status_code, "" if answer.is_success else answer.json()["error"]["code"]))

    async def answers_since(moment: float) -> set[tuple[int, str]]:
        """What was told to requests that began after ``moment``, when there are some."""
        end = time.monotonic() + 60
        while len(later := [(status, code) for began, status, code in asked if began > moment]) < 20:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        return set(later)

    asking = [asyncio.create_task(ask()) for _ in range(6)]
    for _ in range(2):
        assert await answers_since(time.monotonic()) == {(200, "")}
        await asyncio.to_thread(shop.service.succeed, "client", "suspend", shop.client_id)
        assert await answers_since(time.monotonic()) == {(403, "403-F02")}
        await asyncio.to_thread(shop.service.succeed, "client", "resume", shop.client_id)
    over.set()
    await asyncio.gather(*asking)
    await shop.service.audit()


async def test_a_voucher_is_readable_the_moment_it_was_answered_and_what_became_of_it_is_told(shop: Shop) -> None:
    code = shop.product("READ", 200)
    async with shop.client() as client:

        async def one() -> None:
            issued = (await client.issue(code, 3)).vouchers
            assert await client.vouchers([voucher.voucher_id for voucher in reversed(issued)]) == issued[::-1]

        await asyncio.gather(*(one() for _ in range(30)))
        (voucher,) = (await client.issue(code)).vouchers
        await client.voucher(voucher.voucher_id)
        run = shop.service.succeed
        run("voucher", "mark-used", voucher.voucher_id, "--remaining", "400")
        assert (await client.voucher(voucher.voucher_id)).remaining_amount == 400
        run("voucher", "mark-used", voucher.voucher_id)
        seen = await client.voucher(voucher.voucher_id)
        assert (seen.status, seen.remaining_amount) == ("used", 0)
        run("voucher", "void", voucher.voucher_id)
        assert (await client.voucher(voucher.voucher_id)).status == "voided"
        refused = shop.service.run("voucher", "activate", voucher.voucher_id)
        assert (refused.returncode, "final" in refused.stderr) == (1, True)


async def test_open_value_items_and_pools_that_never_run_dry(shop: Shop) -> None:
    shop.service.succeed(
        "pool", "create", f"{shop.name}-POOL", "--pattern", f"{shop.name}-######-###", "--expires-after", "400"
    )
    pool = ("--url", "https://v.example/", "--pool", f"{shop.name}-POOL")
    shop.service.succeed(
        "product", "create", f"{shop.name}-OPEN", "--name", "${FV} card", "--open-value", "--currency", "SGD", *pool,
        "--expires", "12 months", "--time-zone", "Asia/Singapore", "--short-url", "https://s.example/",
    )  # fmt: skip
    shop.service.succeed("product", "create", f"{shop.name}-ITEM", "--name", "A coffee", "--amount", "3", *pool)
    for product in ("OPEN", "ITEM"):
        shop.service.succeed("product", "assign", f"{shop.name}-{product}", shop.name)
    async with shop.client() as client:
        listed = {one.product_code.rpartition("-")[2]: one for one in await client.products()}
        assert (listed["OPEN"].amount, listed["OPEN"].quantity, listed["ITEM"].currency) == (None, None, "")
        (card,) = (await client.issue(f"{shop.name}-OPEN", face_value=1051)).vouchers
        assert (card.name, card.remaining_amount, card.product_name) == ("$10.51 card", 1051, "${FV} card")
        assert card.expiration.endswith("T23:59:59+08:00")
        assert str(card.short_url).startswith("https://s.example/")
        assert await client.voucher(card.voucher_id) == card
        for face_value in (None, 99, 100_001):
            with pytest.raises(ApiError, match="400-056"):
                await client.issue(f"{shop.name}-OPEN", face_value=face_value)
        with pytest.raises(ApiError, match="400-056"):
            await client.issue(f"{shop.name}-ITEM", face_value=500)
        (coffee,) = (await client.issue(f"{shop.name}-ITEM")).vouchers
        assert (coffee.remaining_amount, coffee.currency, coffee.is_value_based) == (3, "", False)
        assert coffee.short_url is coffee.short_url_pin is msgspec.UNSET


def test_without_a_secrets_file_there_is_no_client_api(service: Service) -> None:
    service.environment.pop("VOUCHERD_SECRETS_FILE", None)
    service.stop()
    service.start("serve", "work")
    base = f"http://127.0.0.1:{service.port}"
    with httpx.Client(trust_env=False, base_url=base) as http:
        assert http.get("/v3/products").status_code == 404
        assert http.post("/oauth2/token").status_code == 404
        paths = http.get("/openapi.json").json()["paths"]
    assert list(paths) == ["/api/v1/voucher/request"]
