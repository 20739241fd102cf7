"""The Voucher Request API without servers: every row of the contract's table, and whatever else may be sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from service.domain import (
    Authenticated,
    Busy,
    Considered,
    Issued,
    KeyReused,
    Outcome,
    RateLimit,
    RateLimited,
    Request,
    Suspended,
    Unauthorized,
    Unavailable,
)
from service.messages import PRODUCTS_MAX
from service.tokens import LENGTH, digest, new_token, well_formed
from service.web.app import App
from service.web.incoming import BODY_MAX
from service.web.problems import PROBLEMS
from service.web.v1 import PATH
from tests.calling import Seen, answer
from tests.issuers import DISTRIBUTOR, EXPIRES_AT, TOKEN, FakeIssuer, record

ASKED: dict[str, Any] = {
    "request_id": "req-1001",
    "distributor_id": DISTRIBUTOR,
    "terminal_id": "AT-998877",
    "product_ids": ["PAY", "MOB"],
}
JSON_TYPE = (b"content-type", b"application/json")
AUTHORIZATION = (b"authorization", b"Bearer " + TOKEN.encode())

# The answer of the contract, byte for byte.
SHOWN = (
    b'{"status":"success","campaign_id":"CAMP-001","category_id":"PAY","product_id":"PAY",'
    b'"voucher_code":"PSCF-XYZ-987654","serial_number":"SER-000001","expiry_date":"2025-12-31T00:00:00Z",'
    b'"request_id":"req-1001","issued_at":"2025-10-19T12:00:00Z"}'
)


class Call:
    """The application over a fake issuer, called without a server."""

    def __init__(self) -> None:
        self.issuer = FakeIssuer()
        self.app = App(self.issuer)
        self.received = 0  # messages of the body that the application asked for

    async def __call__(
        self,
        body: bytes | Iterable[bytes] | None = None,
        *,
        method: str = "POST",
        path: str = PATH,
        headers: Iterable[tuple[bytes, bytes]] = (JSON_TYPE, AUTHORIZATION),
        disconnects: bool = False,
        **changed: Any,
    ) -> Seen:
        """Sends ``body``, whole or in pieces; by default ASKED with some fields changed."""
        if body is None:
            body = json.dumps(
                {name: value for name, value in {**ASKED, **changed}.items() if value is not None}
            ).encode()
        seen = await answer(self.app, method, path, headers=headers, body=body, disconnects=disconnects)
        self.received += seen.received
        return seen


@pytest.fixture
def call() -> Call:
    return Call()


def assert_problem(seen: Seen, code: str, *, request_id: str | None = None) -> dict[str, Any]:
    """``seen`` is the whole answer for ``code``, in the contract's form."""
    assert seen.problem["code"] == code, seen
    row = PROBLEMS[code]
    assert seen.status == seen.problem["status"] == row.status
    assert seen.headers["content-type"] == "application/problem+json"
    assert seen.headers["content-length"] == str(len(seen.body))
    assert seen.problem["error"] == row.error
    assert seen.problem["retryable"] is row.retryable
    assert seen.problem["title"]
    assert seen.problem["detail"]
    assert seen.problem["type"].endswith(code)
    assert seen.problem.get("request_id") == request_id
    assert ("retry-after" in seen.headers) == (seen.status in (429, 503))
    assert seen.headers.get("www-authenticate") == ("Bearer" if seen.status == 401 else None)
    assert TOKEN not in seen.body.decode()
    return seen.problem


# --- 200


async def test_voucher_is_answered_byte_for_byte_as_the_contract_shows(call: Call) -> None:
    seen = await call()
    assert seen.status == 200
    assert seen.body == SHOWN
    assert seen.headers == {"content-type": "application/json", "content-length": str(len(SHOWN))}


async def test_replay_never_differs_and_says_that_it_is_one(call: Call) -> None:
    first, second = await call(), await call()
    assert second.status == 200
    assert second.body == first.body
    assert second.headers == {**first.headers, "idempotent-replayed": "true"}


async def test_request_reaches_the_issuer_as_it_was_asked(call: Call) -> None:
    await call(product_ids=["PAY", "MOB", "PAY"], terminal_id="shop 7, till 2")
    assert call.issuer.asked == [
        Request("v1", DISTRIBUTOR, "req-1001", DISTRIBUTOR, ("PAY", "MOB"), "shop 7, till 2\tPAY,MOB,PAY")
    ]
    assert call.issuer.authenticated == 0  # a whole request brings its token along with its batch


@pytest.mark.parametrize("plain", [True, False])
async def test_a_trace_reaches_the_issuer_and_a_bad_one_is_none(call: Call, plain: bool) -> None:
    """Both ways into the application."""
    good = "00-" + "ab" * 16 + "-00f067aa0ba902b7-01"
    if plain:
        body = json.dumps(ASKED).encode()
        head = call.app.head(PATH.encode(), dict([JSON_TYPE, AUTHORIZATION, (b"content-length", b"%d" % len(body))]))
        assert head is not None
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        assert call.app.begin(head, b"", body, answered.set_result, good)
        assert (await answered).status == 200
        assert call.issuer.asked[-1].trace == good
        return
    for sent, trace in (([good], good), ([good.upper()], ""), ([good, good], ""), (["00-" + good], "")):
        headers = [JSON_TYPE, AUTHORIZATION, *((b"traceparent", one.encode()) for one in sent)]
        assert (await call(headers=headers)).status == 200
        assert call.issuer.asked[-1].trace == trace


@pytest.mark.parametrize(
    ("expires_at", "until", "expected"),
    [
        (EXPIRES_AT, 0, "2025-12-31T00:00:00Z"),
        (EXPIRES_AT, EXPIRES_AT + 1, "2025-12-31T00:00:00Z"),
        (EXPIRES_AT, EXPIRES_AT - 1, "2025-12-30T23:59:59Z"),
        (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
    ],
)
async def test_expiry_is_never_later_than_the_codes_or_the_campaigns(
    call: Call, expires_at: int, until: int, expected: str
) -> None:
    call.issuer.outcome = lambda request: Issued(record(request, expires_at=expires_at, until=until), False)
    assert (await call()).problem["expiry_date"] == expected


@settings(max_examples=100)
@given(
    code=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128),
    serial=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64),
    key=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128),
)
def test_no_code_breaks_the_json_of_its_answer(code: str, serial: str, key: str) -> None:
    call = Call()
    call.issuer.outcome = lambda request: Issued(record(request, code=code, serial=serial), False)
    seen = asyncio.run(call(request_id=key))
    assert seen.status == 200
    assert seen.headers["content-length"] == str(len(seen.body))
    answer = json.loads(seen.body)
    assert list(answer) == [
        "status", "campaign_id", "category_id", "product_id", "voucher_code", "serial_number", "expiry_date",
        "request_id", "issued_at",
    ]  # fmt: skip
    assert (answer["voucher_code"], answer["serial_number"], answer["request_id"]) == (code, serial, key)


async def test_quotes_and_backslashes_are_escaped_in_the_code_and_nowhere_else(call: Call) -> None:
    call.issuer.outcome = lambda request: Issued(record(request, code='A"B\\C'), False)
    assert (await call()).body == SHOWN.replace(b"PSCF-XYZ-987654", b'A\\"B\\\\C')


async def test_record_of_an_unknown_layout_is_no_voucher(call: Call) -> None:
    call.issuer.outcome = Issued("99\nwhatever", True)
    assert_problem(await call(), "internal")


# --- the table: what the issuer decides


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (KeyReused(), "key_reused"),
        (Suspended(), "distributor_suspended"),
        (Unauthorized("token_unknown"), "token_unknown"),
        (Unauthorized("distributor_mismatch"), "distributor_mismatch"),
        (Busy("overloaded"), "overloaded"),
        (Busy("store_unreachable"), "store_unreachable"),
        (Busy("refilling"), "refilling"),
        (Busy("draining"), "draining"),
        (Unavailable("no_campaign", ()), "no_campaign"),
        (Unavailable("not_running", ()), "not_running"),
        (Unavailable("cap_reached", ()), "cap_reached"),
        (Unavailable("exhausted", ()), "exhausted"),
    ],
)
async def test_every_refusal_of_the_issuer_has_its_row(call: Call, outcome: Outcome, code: str) -> None:
    call.issuer.outcome = outcome
    assert_problem(await call(), code, request_id="req-1001")


async def test_unavailable_lists_every_product_with_what_stopped_it(call: Call) -> None:
    call.issuer.outcome = Unavailable(
        "cap_reached",
        (Considered("PAY", "CAMP-001", "paused"), Considered("PAY", "CAMP-002", "cap_reached")),
    )
    problem = assert_problem(await call(), "cap_reached", request_id="req-1001")
    assert problem["considered"] == [
        {
            "product_id": "PAY",
            "campaigns": [
                {"campaign_id": "CAMP-001", "stopped_by": "paused"},
                {"campaign_id": "CAMP-002", "stopped_by": "cap_reached"},
            ],
        },
        {"product_id": "MOB", "campaigns": []},
    ]


async def test_defect_leaks_nothing(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    call.issuer.fault = RuntimeError("PSCF-SECRET")
    seen = await call()
    assert_problem(seen, "internal")
    assert b"SECRET" not in seen.body
    printed = capsys.readouterr()
    assert "SECRET" not in printed.out + printed.err
    assert "RuntimeError" in printed.out + printed.err


async def test_a_limit_says_in_its_fields_when_to_come_back(call: Call) -> None:
    call.issuer.outcome = RateLimited(RateLimit(50, 200), 0, 20_000)
    seen = await call()
    assert_problem(seen, "rate_limited", request_id=ASKED["request_id"])
    assert seen.headers["ratelimit-policy"] == '"vouchers";q=200;w=4'
    assert seen.headers["ratelimit"] == '"vouchers";r=0;t=1'
    assert seen.headers["retry-after"] == "1"


def test_table_covers_the_contract() -> None:
    assert {(row.status, row.error) for row in PROBLEMS.values()} == {
        (400, "invalid request"), (401, "unauthorized"), (403, "forbidden"), (404, "not found"),
        (405, "method not allowed"), (408, "request timeout"), (409, "voucher unavailable"),
        (413, "payload too large"), (415, "unsupported media type"), (422, "idempotency key reused"),
        (429, "rate limited"), (431, "invalid request"), (500, "internal server error"), (503, "service unavailable"),
    }  # fmt: skip


# --- path and method


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "X"])
async def test_other_methods_are_refused_before_anything_else(call: Call, method: str) -> None:
    seen = await call(b"\xff", method=method, headers=[])
    assert_problem(seen, "method_not_allowed")
    assert seen.headers["allow"] == "POST"
    assert call.received == 0


@pytest.mark.parametrize("path", ["/", "/api/v1/voucher/request/", "/api/v1/voucher", "/API/v1/voucher/request", "/é"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_other_paths_are_not_found(call: Call, path: str, method: str) -> None:
    assert_problem(await call(method=method, path=path), "not_found")


# --- token


@pytest.mark.parametrize(
    "authorization",
    [None, b"", b"Bearer", b"Bearer ", b"Bearer    ", b"Basic dXNlcjpwYXNz", TOKEN.encode(), b"Basic " + b"x" * 10_000],
)
async def test_without_a_bearer_token_nothing_is_looked_at(call: Call, authorization: bytes | None) -> None:
    headers = [] if authorization is None else [(b"authorization", authorization)]
    assert_problem(await call(b"\xff", headers=headers), "token_missing")
    assert call.received == call.issuer.authenticated == 0


@pytest.mark.parametrize(
    "token",
    [
        "x", TOKEN[:-1], TOKEN + "0", TOKEN[:-1] + "!", TOKEN[4:], "vcx_" + TOKEN[4:], TOKEN[:-1] + "\x00",
        "é" * LENGTH, f"{TOKEN} {TOKEN}", "x" * 100_000, TOKEN.swapcase(),
    ],
)  # fmt: skip
async def test_token_that_can_not_be_ours_is_unknown_without_a_look_up(call: Call, token: str) -> None:
    headers = [JSON_TYPE, (b"authorization", b"Bearer " + token.encode())]
    assert_problem(await call(headers=headers), "token_unknown")
    assert call.issuer.authenticated == len(call.issuer.asked) == 0


@pytest.mark.parametrize("scheme", [b"bearer ", b"BEARER ", b"Bearer   "])
async def test_scheme_is_known_in_any_case(call: Call, scheme: bytes) -> None:
    assert (await call(headers=[JSON_TYPE, (b"authorization", scheme + TOKEN.encode())])).status == 200


async def test_well_formed_token_is_asked_about_with_the_request(call: Call) -> None:
    headers = [JSON_TYPE, (b"authorization", b"Bearer " + new_token().encode())]
    assert_problem(await call(headers=headers), "token_unknown", request_id="req-1001")
    assert len(call.issuer.asked) == 1


def test_tokens_have_one_form_and_no_two_are_the_same() -> None:
    tokens = {new_token() for _ in range(1_000)}
    assert len(tokens) == 1_000
    assert len({digest(token) for token in tokens}) == 1_000
    for token in tokens:
        assert len(token) == LENGTH == 53
        assert token.startswith("vch_")
        assert well_formed(token)


@given(st.integers(4, LENGTH - 1), st.sampled_from("09azAZ"))
def test_token_with_a_wrong_character_is_malformed(position: int, character: str) -> None:
    other = TOKEN[:position] + character + TOKEN[position + 1 :]
    assert well_formed(other) == (other == TOKEN)


MALFORMED: dict[str, dict[str, Any]] = {
    "unsupported_media_type": {"headers": [AUTHORIZATION]},
    "too_large": {"body": b"x" * (BODY_MAX + 1)},
    "invalid_json": {"body": b"{"},
    "invalid_field": {"body": b"{}"},
    "key_mismatch": {"headers": [JSON_TYPE, AUTHORIZATION, (b"idempotency-key", b"other")]},
}


@pytest.mark.parametrize("malformed", MALFORMED)
async def test_malformed_request_is_never_refused_before_its_token(call: Call, malformed: str) -> None:
    call.issuer.authentication = Unauthorized("token_unknown")
    seen = await call(**MALFORMED[malformed])
    assert_problem(seen, "token_unknown", request_id="req-1001" if malformed == "key_mismatch" else None)
    assert not call.issuer.asked


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.parametrize("answer", [Authenticated(DISTRIBUTOR), Busy("store_unreachable"), Busy("draining")])
async def test_malformed_request_is_refused_also_when_nobody_can_tell_about_its_token(
    call: Call, malformed: str, answer: Authenticated | Busy
) -> None:
    call.issuer.authentication = answer
    seen = await call(**MALFORMED[malformed])
    assert_problem(seen, malformed, request_id="req-1001" if malformed == "key_mismatch" else None)
    assert call.issuer.authenticated == 1
    assert not call.issuer.asked


# --- media type and headers


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json; charset=utf-8", b"Application/JSON", b"application/json;charset=UTF-8",
        b"application/json ;", b'application/json; charset="utf-8"; v=1',
    ],
)  # fmt: skip
async def test_json_is_known_with_parameters(call: Call, content_type: bytes) -> None:
    assert (await call(headers=[(b"content-type", content_type), AUTHORIZATION])).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None, b"", b"text/plain", b"application/jsonx", b"application/json, text/html",
        b"application/json charset=utf-8", b"application/x-www-form-urlencoded", b"application/problem+json",
        b"application/json; =", b"application/json;\xff", b"application/json;" + b" ;" * 5_000 + b"x",
    ],
)  # fmt: skip
async def test_what_is_not_json_is_refused_unread(call: Call, content_type: bytes | None) -> None:
    headers = [AUTHORIZATION] if content_type is None else [(b"content-type", content_type), AUTHORIZATION]
    assert_problem(await call(headers=headers), "unsupported_media_type")
    assert call.received == 0


@pytest.mark.parametrize("name", [b"authorization", b"content-type", b"content-length"])
async def test_header_that_must_be_single_is_refused_twice(call: Call, name: bytes) -> None:
    headers = [JSON_TYPE, AUTHORIZATION, (b"content-length", b"5")]
    twice = [*headers, next(header for header in headers if header[0] == name)]
    assert_problem(await call(headers=twice), "malformed_request")
    assert not call.issuer.asked


async def test_other_headers_may_come_twice(call: Call) -> None:
    headers = [JSON_TYPE, AUTHORIZATION, (b"x-forwarded-for", b"10.0.0.1"), (b"x-forwarded-for", b"10.0.0.2")]
    assert (await call(headers=headers)).status == 200


# --- size


@pytest.mark.parametrize("length", [b"16385", b"10000000", b"9" * 5_000, b"00016385", b"1e999", b"-1000"])
async def test_large_body_is_refused_without_reading_any_of_it(call: Call, length: bytes) -> None:
    seen = await call(headers=[JSON_TYPE, AUTHORIZATION, (b"content-length", length)])
    assert_problem(seen, "too_large")
    assert call.received == 0


async def test_endless_body_is_refused_once_it_is_too_large(call: Call) -> None:
    seen = await call([b"x" * 1_000] * 10_000)
    assert_problem(seen, "too_large")
    assert call.received == 17


async def test_body_of_just_the_limit_is_read(call: Call) -> None:
    body = json.dumps(ASKED).encode()
    assert (await call(body + b" " * (BODY_MAX - len(body)))).status == 200
    assert_problem(await call(body + b" " * (BODY_MAX - len(body) + 1)), "too_large")


async def test_body_in_pieces_is_one_body(call: Call) -> None:
    body = json.dumps(ASKED).encode()
    assert (await call([body[i : i + 1] for i in range(len(body))])).body == SHOWN


async def test_client_that_goes_away_is_not_answered(call: Call) -> None:
    seen = await call([b'{"request_id":'], disconnects=True)
    assert seen.status == 0
    assert not call.issuer.asked


# --- JSON


WHOLE = json.dumps(ASKED)[:-1].encode()


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"}", b"null", b"[]", b'"x"', b"1", b"NaN", b"\xff\xfe", b"\x00", WHOLE, WHOLE + b"}x",
        WHOLE + b",}", b"\xef\xbb\xbf" + WHOLE + b"}", WHOLE + b',"x":"\xff"}', WHOLE + b',"\xc3\x28":1}',
        WHOLE + b',"x":NaN}', WHOLE + b',"x":"\x01"}', b"[" * 16_000, b'{"x":' * 3_000,
        WHOLE + b',"x":' + b"[" * 7_000 + b"]" * 7_000 + b"}", b'{"request_id":"\\ud800"}', b'{"request_id":"a\x00b"}',
        json.dumps(ASKED).encode("utf-16"), b"request_id=req-1001", b"<xml/>",
    ],
)  # fmt: skip
async def test_what_is_no_json_object_is_refused(call: Call, body: bytes) -> None:
    assert_problem(await call(body), "invalid_json")
    assert not call.issuer.asked


@pytest.mark.parametrize("extra", [b'"x":1e999999', b'"x":' + b"9" * 5_000, b'"x":{"y":[null]}', '"é":"€"'.encode()])
async def test_unknown_fields_are_ignored_whatever_they_hold(call: Call, extra: bytes) -> None:
    assert (await call(WHOLE + b"," + extra + b"}")).body == SHOWN


# --- fields

WRONG_TYPES: list[Any] = [1, 1.5, True, {}, ["x"], 10**400, -0.0]
NAMES_WRONG: list[Any] = [*WRONG_TYPES, "", "x" * 65, "a b", "a/b", "é", "a\n", "\n", "a\x00", "a\t", "a,b"]
FIELDS_WRONG: dict[str, list[Any]] = {
    "request_id": [*WRONG_TYPES, "", "x" * 129, "a b", "é", "a\n", "a\x00", "\x7f", "a\x1f"],
    "distributor_id": NAMES_WRONG,
    "terminal_id": [*WRONG_TYPES, "", "x" * 65, "é", "a\n", "a\x00", "\x7f", "a\tb", "\x1e"],
    "product_ids": [1, 1.5, True, {}, "PAY", [], [[]], [None], ["PAY"] * (PRODUCTS_MAX + 1)]
    + [[name] for name in NAMES_WRONG]
    + [["PAY", name] for name in NAMES_WRONG],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELDS_WRONG.items() for value in values]
)
async def test_bad_field_is_named_with_its_rule(call: Call, field: str, value: Any) -> None:
    seen = await call(**{field: value})
    problem = assert_problem(seen, "invalid_field", request_id=None if field == "request_id" else "req-1001")
    assert problem["field"].partition("[")[0] == field
    assert f"`{problem['field']}` must be " in problem["detail"]
    assert not call.issuer.asked


@pytest.mark.parametrize("field", ASKED)
@pytest.mark.parametrize("null", [False, True])
async def test_no_field_may_be_missing(call: Call, field: str, null: bool) -> None:
    asked = {**ASKED, field: None} if null else {name: value for name, value in ASKED.items() if name != field}
    problem = assert_problem(
        await call(json.dumps(asked).encode()), "invalid_field",
        request_id=None if field == "request_id" else "req-1001",
    )  # fmt: skip
    assert problem["field"] == field
    assert ("is missing" in problem["detail"]) is not null


@pytest.mark.parametrize(
    "changed",
    [
        {"request_id": "x" * 128}, {"request_id": "!~\"\\'{}"}, {"terminal_id": " " * 64}, {"terminal_id": "~" * 64},
        {"product_ids": ["x" * 64] * PRODUCTS_MAX}, {"product_ids": ["._-"]},
    ],
)  # fmt: skip
async def test_longest_and_oddest_valid_fields_are_taken(call: Call, changed: dict[str, Any]) -> None:
    assert (await call(**changed)).status == 200


async def test_bad_request_ids_are_never_echoed(call: Call) -> None:
    seen = await call(request_id="é<script>", terminal_id="")
    assert b"script" not in seen.body


# --- distributor and key


@pytest.mark.parametrize("key", [b"req-1001", b'"req-1001"'])
async def test_idempotency_key_that_equals_the_request_id_is_taken(call: Call, key: bytes) -> None:
    assert (await call(headers=[JSON_TYPE, AUTHORIZATION, (b"idempotency-key", key)])).status == 200


@pytest.mark.parametrize("key", [b"", b'""', b"req-1002", b"'req-1001'", b'"req-1001', b'"req-1001";a=1', b"REQ-1001"])
async def test_idempotency_key_that_differs_is_refused(call: Call, key: bytes) -> None:
    seen = await call(headers=[JSON_TYPE, AUTHORIZATION, (b"idempotency-key", key)])
    assert_problem(seen, "key_mismatch", request_id="req-1001")
    assert not call.issuer.asked


async def test_of_two_idempotency_keys_none_may_differ(call: Call) -> None:
    same, other = (b"idempotency-key", b"req-1001"), (b"idempotency-key", b"req-1002")
    for keys in ((same, other), (other, same)):
        assert_problem(await call(headers=[JSON_TYPE, AUTHORIZATION, *keys]), "key_mismatch", request_id="req-1001")
    assert (await call(headers=[JSON_TYPE, AUTHORIZATION, same, same])).status == 200


async def test_quoted_key_is_unescaped(call: Call) -> None:
    quoted = (b"idempotency-key", rb'"a\"b\\c"')
    assert (await call(headers=[JSON_TYPE, AUTHORIZATION, quoted], request_id='a"b\\c')).status == 200


async def test_distributor_is_looked_at_before_the_key(call: Call) -> None:
    headers = [JSON_TYPE, AUTHORIZATION, (b"idempotency-key", b"other")]
    seen = await call(headers=headers, distributor_id="DIST-002")
    assert_problem(seen, "distributor_mismatch", request_id="req-1001")
    call.issuer.authentication = Suspended()
    assert_problem(await call(headers=headers), "distributor_suspended", request_id="req-1001")


async def test_other_distributors_token_gets_nothing(call: Call) -> None:
    assert_problem(await call(distributor_id="DIST-002"), "distributor_mismatch", request_id="req-1001")


# --- anything at all


def assert_contract(seen: Seen) -> None:
    if seen.status == 200:
        assert json.loads(seen.body)["status"] == "success"
    else:
        assert_problem(seen, seen.problem["code"], request_id=seen.problem.get("request_id"))
        assert seen.status != 500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["PAY", DISTRIBUTOR]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.one_of(st.binary(), st.text().map(str.encode), values.map(lambda value: json.dumps(value).encode())))
def test_no_body_gets_anything_but_a_voucher_or_a_problem(body: bytes) -> None:
    assert_contract(asyncio.run(Call()(body)))


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(ASKED, values)), st.dictionaries(st.text(), values))
def test_no_fields_get_anything_but_a_voucher_or_a_problem(changed: dict[str, Any], others: dict[str, Any]) -> None:
    body = json.dumps({**others, **ASKED, **changed}).encode("utf-8", "surrogatepass")
    assert_contract(asyncio.run(Call()(body)))


@settings(max_examples=100)
@given(st.data())
def test_no_damage_to_a_body_gets_anything_but_a_voucher_or_a_problem(data: st.DataObject) -> None:
    body = bytearray(json.dumps(ASKED).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(body) - 1))
        body[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    assert_contract(asyncio.run(Call()(bytes(body))))


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"authorization", b"content-type", b"content-length", b"idempotency-key", b"transfer-encoding", b"x"]
            ),
            st.binary() | st.sampled_from([AUTHORIZATION[1], JSON_TYPE[1]]),
        )
    )
)
def test_no_headers_get_anything_but_a_voucher_or_a_problem(headers: list[tuple[bytes, bytes]]) -> None:
    assert_contract(asyncio.run(Call()(headers=headers)))


async def test_counts_of_answers_reach_the_metrics_once(call: Call) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"api": "v1", **labels}) or 0.0

    call.app.flush_tallies()
    issued = value("voucherd_requests_total", status="200", code="issued")
    refused = value("voucherd_requests_total", status="400", code="invalid_json")
    seconds = value("voucherd_request_seconds_count")
    await call()
    await call(b"")
    for _ in range(2):
        call.app.flush_tallies()
    assert value("voucherd_requests_total", status="200", code="issued") == issued + 1
    assert value("voucherd_requests_total", status="400", code="invalid_json") == refused + 1
    assert value("voucherd_request_seconds_count") == seconds + 2
    assert value("voucherd_request_seconds_bucket", le="+Inf") == seconds + 2


async def test_nobody_is_counted_under_a_name_that_was_only_claimed(call: Call) -> None:
    def by_distributor() -> dict[tuple[str, str], float]:
        return {
            (sample.labels["distributor"], sample.labels["code"]): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "voucherd_distributor_requests_total"
        }

    call.app.flush_tallies()
    before = by_distributor()
    await call(request_id="counted")
    await call(request_id="claimed", distributor_id="DIST-CLAIMED")
    call.issuer.outcome = Suspended()
    await call(request_id="suspended", distributor_id="DIST-CLAIMED")
    considered = (Considered("PAY", "CAMP-FIRST", "exhausted"), Considered("PAY", "CAMP-002", "exhausted"))
    call.issuer.outcome = Unavailable("exhausted", considered)
    await call(request_id="refused")
    call.app.flush_tallies()
    counted = {key: answers - before.get(key, 0) for key, answers in by_distributor().items()}
    assert {key for key, answers in counted.items() if answers} == {
        (DISTRIBUTOR, "issued"),
        (DISTRIBUTOR, "exhausted"),
    }
    labels = {"campaign": "CAMP-FIRST", "code": "exhausted"}
    assert REGISTRY.get_sample_value("voucherd_campaign_requests_total", labels) == 1
