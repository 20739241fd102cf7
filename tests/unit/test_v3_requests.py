"""Client API v3, POST /v3/products/{code}: every rule of the contract that is about the request, and every outcome."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import (
    Authenticated,
    Busy,
    Code,
    Considered,
    Issued,
    KeyReused,
    Outcome,
    RateLimit,
    RateLimited,
    Record,
    Request,
    Rule,
    Suspended,
    Terms,
    Unauthorized,
    Unavailable,
)
from service.identity import IdKeys
from service.messages import PartAnswer, VouchersAnswer
from service.web.access import Access
from service.web.app import App
from service.web.incoming import BODY_MAX
from service.web.v3 import ClientApi, idempotency_key
from service.web.v3_errors import REFUSALS
from tests.calling import Seen, answer
from tests.issuers import DISTRIBUTOR, FakeIssuer

IDS = IdKeys("k1", {"k1": b"k" * 32})
PATH = "/v3/products/MAMVDDMMYY01"
KEY = "30c40ad6-f135-4aad-97d5-79f195680458"
ISSUED_AT = 1_760_875_200  # 2025-10-19T12:00:00Z
NAME = "$10 UNIQGIFT Value Based Test Voucher"
TERMS = Terms(
    NAME, True, False, True, True, "SGD", 1000, "until:1888156799", "Asia/Singapore", "https://v.example/",
    "https://s.example/v/",
)  # fmt: skip
HEADERS = (
    (b"authorization", b"Bearer t"), (b"content-type", b"application/json"), (b"idempotency-key", KEY.encode()),
)  # fmt: skip


class Tokens:
    """Admits whoever sends a header, or refuses as a test says."""

    def __init__(self) -> None:
        self.refused = ""
        self.scopes: list[str] = []

    def remembered(self, authorization: bytes, scope: str) -> Access | None:
        return None

    async def admit(self, authorization: bytes, scope: str) -> Access | str:
        self.scopes.append(scope)
        return self.refused or Access("CLIENT", DISTRIBUTOR, "kid:CLIENT", frozenset({scope}))


class Reading:
    """Nothing here reads."""

    async def products(self, access: Access, *_: Any) -> Any:
        raise AssertionError("not asked for")

    product = vouchers = voucher = products


class V3Issuer(FakeIssuer):
    """Issues ``limit`` vouchers at most, and takes whatever credential there is."""

    limit = 20
    terms = TERMS

    async def issue(self, credential: str, request: Request) -> Outcome:
        assert credential == "kid:CLIENT"
        self.asked.append(request)
        if self.fault is not None:
            raise self.fault
        if self.outcome is not None:
            return self.outcome(request) if callable(self.outcome) else self.outcome
        codes = tuple(
            Code(1_900_000_000, 3, number, f"UG{number:09}", str(number))
            for number in range(min(self.limit, request.quantity))
        )
        rule = Rule(request.products[0], "POOL", "", request.products[0], 0, "k1", self.terms.pack())
        record = Record(
            request.payload, "v3", DISTRIBUTOR, request.client, request.key, ISSUED_AT, rule, codes
        )  # fmt: skip
        known = self._records.setdefault(request.key, record.pack())
        return Issued(known, replayed=len([one for one in self.asked if one.key == request.key]) > 1)

    async def authenticate(self, credential: str) -> Any:
        self.authenticated += 1
        return self.authentication or Authenticated(DISTRIBUTOR)


class Call:
    """The application over a fake issuer, called without a server."""

    def __init__(self) -> None:
        self.issuer, self.tokens = V3Issuer(), Tokens()
        self.app = App(self.issuer, ClientApi(self.issuer, self.tokens, Reading(), Reading(), IDS))

    async def __call__(
        self, body: bytes | None = None, *, method: str = "POST", path: str = PATH,
        headers: Iterable[tuple[bytes, bytes]] = HEADERS, **fields: Any,
    ) -> Seen:  # fmt: skip
        sent = json.dumps({"quantity": 1} | fields).encode() if body is None else body
        return await answer(self.app, method, path, headers=headers, body=sent)


@pytest.fixture
def call() -> Call:
    return Call()


def without(name: bytes, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [header for header in HEADERS if header[0] != name] + list(more)


def assert_refused(seen: Seen, name: str) -> None:
    """``seen`` is the whole answer for this row of the table."""
    row = REFUSALS[name]
    assert seen.status == row.status == int(row.code[:3]), seen
    body = seen.problem
    assert body["error"]["code"] == row.code
    assert body["error"].keys() - {"details"} == {"code", "message", "documentation"}
    assert uuid.UUID(body["request_id"]).version == 4
    assert seen.headers["content-type"] == "application/json; charset=utf-8"
    assert seen.headers["content-length"] == str(len(seen.body))
    assert ("retry-after" in seen.headers) == row.retryable
    assert ("www-authenticate" in seen.headers) == (row.status == 401 or name == "scope_missing")


# --- 200 and 207


async def test_a_trace_reaches_the_issuer_and_a_bad_one_is_none(call: Call) -> None:
    good = b"00-" + b"ab" * 16 + b"-00f067aa0ba902b7-01"
    for sent, trace in (([], ""), ([good], good.decode()), ([b"00-" + good], ""), ([good, good], "")):
        await call(headers=[*HEADERS, *((b"traceparent", one) for one in sent)])
        assert call.issuer.asked[-1].trace == trace


async def test_voucher_has_the_fields_of_the_contract_in_their_order(call: Call) -> None:
    seen = await call()
    assert seen.status == 200
    assert list(seen.problem) == ["request_id", "vouchers"]
    assert uuid.UUID(seen.problem["request_id"]).version == 4
    (voucher,) = seen.problem["vouchers"]
    identity = IDS.identity("k1", 3, 0)
    assert list(voucher.items()) == list(
        {
            "voucher_code": "UG000000000",
            "voucher_id": identity.voucher_id,
            "name": NAME,
            "status": "active",
            "expiration": "2029-10-31T23:59:59+08:00",
            "currency": "SGD",
            "remaining_amount": 1000,
            "product_code": "MAMVDDMMYY01",
            "product_name": NAME,
            "is_value_based": True,
            "is_status_available": True,
            "is_multiple_use": True,
            "url": f"https://v.example/{identity.voucher_id}",
            "short_url": f"https://s.example/v/{identity.short}",
            "short_url_pin": identity.pin,
        }.items()
    )
    assert seen.headers == {
        "content-type": "application/json; charset=utf-8",
        "content-length": str(len(seen.body)),
        "idempotency-key": KEY,
    }
    msgspec.json.decode(seen.body, type=VouchersAnswer)


async def test_replay_never_differs_and_says_that_it_is_one(call: Call) -> None:
    first, second = await call(quantity=20), await call(quantity=20)
    assert second.body == first.body
    assert second.headers == {**first.headers, "idempotency-record": "true"}
    assert len({one["voucher_id"] for one in first.problem["vouchers"]}) == 20


async def test_part_of_the_quantity_is_207_and_so_is_its_replay(call: Call) -> None:
    call.issuer.limit = 3
    first, second = await call(quantity=5), await call(quantity=5)
    assert (first.status, second.status) == (207, 207)
    assert list(first.problem) == ["request_id", "error", "vouchers"]
    assert first.problem["error"]["code"] == "207-762"
    assert len(first.problem["vouchers"]) == 3
    assert second.body == first.body
    assert second.headers["idempotency-record"] == "true"
    msgspec.json.decode(first.body, type=PartAnswer)


async def test_open_value_voucher_carries_the_face_value_in_its_name(call: Call) -> None:
    call.issuer.terms = msgspec.structs.replace(TERMS, name='${FV} "Gift" Ω', is_open_value=True, amount=None)
    for cents, shown in ((1051, "$10.51"), (15000, "$150"), (100, "$1"), (1050, "$10.50")):
        seen = await call(face_value=cents, headers=without(b"idempotency-key", (b"idempotency-key", _key())))
        (voucher,) = seen.problem["vouchers"]
        assert voucher["name"] == f'{shown} "Gift" Ω'
        assert voucher["remaining_amount"] == cents


def _key() -> bytes:
    return str(uuid.uuid4()).encode()


async def test_request_reaches_the_issuer_as_it_was_asked(call: Call) -> None:
    await call(quantity=7, face_value=500, client_reference="a_B/1#2:3.4-5")
    (asked,) = call.issuer.asked
    assert asked == Request(
        "v3", "CLIENT", KEY, DISTRIBUTOR, ("MAMVDDMMYY01",), "\tMAMVDDMMYY01\t7\t500\ta_B/1#2:3.4-5", 7, 500
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quantity": 1}, {"quantity": 2}),
        ({"face_value": 500}, {"face_value": 501}),
        ({"face_value": 500}, {}),
        ({"client_reference": "a"}, {"client_reference": "b"}),
    ],
)
async def test_requests_that_differ_never_have_one_payload(call: Call, one: Any, other: Any) -> None:
    await call(**one)
    await call(**other)
    await call(path="/v3/products/OTHER", **one)
    assert len({asked.payload for asked in call.issuer.asked}) == 3


# --- what the issuer says


@pytest.mark.parametrize(
    ("outcome", "name"),
    [
        (Unauthorized("token_unknown"), "token_unknown"),
        (Unauthorized("distributor_mismatch"), "token_unknown"),
        (Suspended(), "suspended"),
        (KeyReused(), "key_reused"),
        (RateLimited(RateLimit(50, 200), 3, 1_400_000), "rate_limited"),
        (Unavailable("no_product", ()), "no_product"),
        (Unavailable("not_assigned", ()), "not_assigned"),
        (Unavailable("face_value", ()), "face_value"),
        (Unavailable("not_running", (Considered("P", "P", "paused"),)), "paused"),
        (Unavailable("not_running", (Considered("P", "P", "before"),)), "not_valid"),
        (Unavailable("not_running", (Considered("P", "P", "after"),)), "not_valid"),
        (Unavailable("cap_reached", (Considered("P", "P", "cap_reached"),)), "cap_reached"),
        (Unavailable("exhausted", (Considered("P", "P", "exhausted"),)), "exhausted"),
        (Busy("overloaded"), "overloaded"),
        (Busy("store_unreachable"), "store_unreachable"),
        (Busy("refilling"), "refilling"),
        (Busy("draining"), "draining"),
    ],
)
async def test_every_outcome_has_its_answer(call: Call, outcome: Outcome, name: str) -> None:
    call.issuer.outcome = outcome
    seen = await call()
    assert_refused(seen, name)
    if name not in ("token_unknown", "suspended"):
        assert seen.headers["idempotency-key"] == KEY


async def test_a_limit_says_in_its_fields_when_to_come_back(call: Call) -> None:
    call.issuer.outcome = RateLimited(RateLimit(3, 100), 7, 2_000_001)
    seen = await call(quantity=20)
    assert_refused(seen, "rate_limited")
    assert seen.headers["ratelimit-policy"] == '"vouchers";q=100;w=34'
    assert seen.headers["ratelimit"] == '"vouchers";r=7;t=3'
    assert seen.headers["retry-after"] == "3"


async def test_a_defect_is_500_and_says_nothing_of_it(call: Call) -> None:
    call.issuer.fault = RuntimeError("a secret")
    seen = await call()
    assert_refused(seen, "internal")
    assert b"secret" not in seen.body


# --- what is refused before


@pytest.mark.parametrize(
    "name", ["token_missing", "token_malformed", "token_expired", "token_unknown", "scope_missing"]
)
async def test_a_token_that_does_not_do_is_refused_before_the_body_is_read(call: Call, name: str) -> None:
    call.tokens.refused = name
    seen = await call(b"no json", headers=without(b"content-type"))
    assert_refused(seen, name)
    assert seen.received == 0


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (without(b"content-type"), "unsupported_media_type"),
        (without(b"content-type", (b"content-type", b"text/plain")), "unsupported_media_type"),
        (without(b"idempotency-key"), "key_missing"),
        (without(b"idempotency-key", (b"idempotency-key", b"")), "key_malformed"),
        (without(b"idempotency-key", (b"idempotency-key", b"1234")), "key_malformed"),
        (without(b"", (b"idempotency-key", KEY.encode())), "key_malformed"),
        (without(b"", (b"authorization", b"Bearer other")), "malformed_request"),
        (without(b"", (b"content-type", b"application/json")), "malformed_request"),
    ],
)
async def test_bad_headers_are_refused_and_nothing_is_issued(
    call: Call, headers: list[tuple[bytes, bytes]], name: str
) -> None:
    assert_refused(await call(headers=headers), name)
    assert call.issuer.asked == []


QUANTITIES = [None, 0, 21, -1, 1.0, 1.5, "1", True, [1], {}, 10**30]


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
async def test_a_quantity_that_is_not_1_to_20_is_refused(call: Call, quantity: Any) -> None:
    seen = await call(json.dumps({"quantity": quantity, "client_reference": "?" if quantity == 0 else "a"}).encode())
    assert_refused(seen, "quantity")
    assert_refused(await call(b"{}"), "quantity")
    assert call.issuer.asked == []


BODIES = [
    b"", b"null", b"[]", b'"x"', b"{", b'{"quantity":1', b'{"quantity":1}x', b"\xff", b'{"quantity":1,"a":"\xff"}',
    b"[" * 5_000, b'{"quantity":1,"client_reference":null}', b'{"quantity":1,"client_reference":""}',
    b'{"quantity":1,"client_reference":"a b"}', b'{"quantity":1,"client_reference":"a\\n"}',
    b'{"quantity":1,"client_reference":5}', b'{"quantity":1,"client_reference":"' + b"a" * 51 + b'"}',
    b'{"quantity":1,"client_reference":"\\u00e9"}', b'{"quantity":1,"face_value":null}',
    b'{"quantity":1,"face_value":"5"}', b'{"quantity":1,"face_value":1.5}', b'{"quantity":1,"face_value":true}',
    b'{"quantity":1,"face_value":' + b"9" * 400 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
async def test_a_body_that_is_not_the_schema_s_is_refused(call: Call, body: bytes) -> None:
    assert_refused(await call(body), "body")
    assert call.issuer.asked == []


async def test_a_body_at_the_bound_is_read_and_one_above_it_is_not(call: Call) -> None:
    body = b'{"quantity":1}'
    assert (await call(body + b" " * (BODY_MAX - len(body)))).status == 200
    assert_refused(await call(body + b" " * (BODY_MAX - len(body) + 1)), "too_large")
    seen = await call(body, headers=without(b"", (b"content-length", b"99999")))
    assert_refused(seen, "too_large")
    assert seen.received == 0


async def test_what_is_malformed_is_told_only_to_clients_in_force(call: Call) -> None:
    for authentication, name in ((Suspended(), "suspended"), (Unauthorized("token_unknown"), "token_unknown")):
        call.issuer.authentication = authentication
        for seen in (
            await call(b"x"), await call(b"x" * (BODY_MAX + 1)), await call(headers=without(b"idempotency-key")),
            await call(headers=without(b"content-type")),
        ):  # fmt: skip
            assert_refused(seen, name)


@given(st.uuids(), st.sampled_from(["{}", '"{}"']), st.booleans())
def test_a_key_is_any_uuid_bare_or_quoted_and_its_case_never_matters(key: uuid.UUID, form: str, upper: bool) -> None:
    text = str(key).upper() if upper else str(key)
    assert idempotency_key(form.format(text).encode()) == str(key)


@pytest.mark.parametrize(
    "text",
    [KEY.replace("-", ""), f"{{{KEY}}}", f"urn:uuid:{KEY}", f'"{KEY}', f'{KEY}"', f" {KEY}", f"{KEY}\n", KEY[:-1],
     KEY + "0", KEY.replace("3", "g"), f"{KEY},{KEY}", f"'{KEY}'"],
)  # fmt: skip
def test_what_is_no_uuid_of_the_one_spelling_is_no_key(text: str) -> None:
    assert idempotency_key(text.encode()) is None


# --- routes


@pytest.mark.parametrize(
    "path",
    ["/v3/", "/v3/nothing", "/v3/products/", "/v3/products/A/B", "/v3/vouchers/", "/v3/vouchers/a/b", "/v3/Products"],
)
async def test_unknown_paths_are_404_in_the_form_of_this_api(call: Call, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert_refused(await call(path=path, method=method), "not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v3/products", "GET"), ("/v3/products/A", "GET, POST"), ("/v3/vouchers", "GET"), ("/v3/vouchers/a", "GET"),
    ],
)  # fmt: skip
async def test_methods_that_a_path_does_not_take_are_405_and_say_which_it_does(
    call: Call, path: str, allowed: str
) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"} - set(allowed.split(", ")):
        seen = await call(path=path, method=method)
        assert_refused(seen, "method_not_allowed")
        assert seen.headers["allow"] == allowed


async def test_every_endpoint_asks_for_its_own_scope(call: Call) -> None:
    call.tokens.refused = "scope_missing"
    for method, path in (("GET", "products"), ("GET", "products/A"), ("POST", "products/A"), ("GET", "vouchers")):
        await call(method=method, path=f"/v3/{path}")
    assert call.tokens.scopes == ["read_catalogue", "read_catalogue", "issue_vouchers", "read_vouchers"]


def test_codes_are_those_of_the_contract_and_none_is_given_twice() -> None:
    codes = [row.code for row in REFUSALS.values()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"\d{3}-[0-9A-F]{3}", code) for code in codes)
    published = {
        "207-762", "400-056", "400-0C6", "400-4C3", "400-5DC", "400-9A0", "400-BB4", "400-215", "400-67B", "400-B32",
        "404-D4E",
    }  # fmt: skip
    assert published <= set(codes)
