"""Client API v3 over an issuer: the paths, what is looked at in which order, and the answer to an issue request.

Order of checks (api-v3 "Issuing"): route, method, token, scope, media type, size, key, JSON and fields; then the key's
record, and only then the product, the face value, and stock.  What is malformed is told only after the client was found
to be in force.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Final, Protocol

import msgspec
from starlette.types import Receive, Scope

from service.domain import (
    LAYOUT,
    Busy,
    Issued,
    KeyReused,
    Outcome,
    RateLimited,
    Request,
    Rule,
    Suspended,
    Unauthorized,
    Unavailable,
)
from service.identity import IdKeys
from service.messages import QUANTITY_MAX, IssueRequest
from service.web.access import Access
from service.web.exchange import Head
from service.web.incoming import BODY_MAX, body_of, exceeds, is_json, repeated, trace_of
from service.web.problems import Answer, Headers, limit_fields
from service.web.v1 import PLAIN_DIGITS_MAX, Issuing
from service.web.v3_catalogue import out_of_force
from service.web.v3_errors import JSON, error_body, new_request_id, refusal
from service.web.v3_voucher import voucher_renderer

PREFIX: Final = "/v3/"

_Pairs = list[tuple[bytes, bytes]]


class Admitting(Protocol):
    """What ``service.web.access.AccessTokens`` offers."""

    async def admit(self, authorization: bytes, scope: str) -> Access | str: ...
    def remembered(self, authorization: bytes, scope: str) -> Access | None: ...


class Products(Protocol):
    """What ``service.web.v3_catalogue.ProductCatalogue`` offers."""

    async def products(self, access: Access) -> Answer: ...
    async def product(self, access: Access, code: str) -> Answer: ...


class Vouchers(Protocol):
    """What ``service.web.v3_retrieval.OwnVouchers`` offers."""

    async def vouchers(self, client: str, query: bytes, request_id: str) -> Answer: ...
    async def voucher(self, client: str, text: str, request_id: str) -> Answer: ...


class ClientApi:
    """Client API v3 over an issuer, access tokens, and what reads catalogue and ledger."""

    name: Final = "v3"

    def __init__(self, issuer: Issuing, tokens: Admitting, products: Products, vouchers: Vouchers, ids: IdKeys) -> None:
        self._issuer = issuer
        self._tokens = tokens
        self._products = products
        self._vouchers = vouchers
        self._ids = ids

    async def answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer to one request below PREFIX; None if the client went away while it was sending.

        Nothing but an unexpected defect is raised.  Whatever is answered, the same request may be sent again.
        """
        resource, slash, name = scope["path"].removeprefix(PREFIX).partition("/")
        issues = resource == "products" and bool(name)
        if resource not in ("products", "vouchers") or bool(slash) != bool(name) or "/" in name:
            return refusal("not_found")
        method = scope["method"]
        if method != "GET" and not (issues and method == "POST"):
            return refusal("method_not_allowed", headers=((b"allow", b"GET, POST" if issues else b"GET"),))
        pairs: _Pairs = scope["headers"]
        if twice := repeated(pairs):
            return refusal("malformed_request", f"The header {twice} was sent more than once.")
        headers = dict(pairs)
        wanted = _ISSUE_SCOPE if method == "POST" else _READ[resource]
        access = await self._tokens.admit(headers.get(b"authorization", b""), wanted)
        if isinstance(access, str):
            return refusal(access)
        if method == "POST":
            return await self._issue(access, name, pairs, headers, receive)
        match resource, name:
            case "products", "":
                return await self._products.products(access)
            case "products", _:
                return await self._products.product(access, name)
            case _:
                return await self._read_vouchers(access, name, scope["query_string"])

    def refused(self, name: str) -> Answer:
        """A row of the error table."""
        return refusal(name)

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        """What the headers of a POST to ``path`` say; None if it asks for no vouchers, or if anything about them is
        wrong or unusual.  Its body has a length below 10,000."""
        found, length = _ISSUE_PATH(path), headers.get(b"content-length", b"")
        if found is None or not 0 < len(length) <= PLAIN_DIGITS_MAX or b"idempotency-key" not in headers:
            return None
        content_type = headers.get(b"content-type", b"")
        if content_type != b"application/json" and not is_json(content_type):
            return None
        return _Head(self, int(length), True, headers.get(b"authorization", b""), found[1].decode())

    def plain(self, head: Head, key: bytes, body: bytes | bytearray, trace: str = "") -> tuple[str, Request] | None:
        """The credential and the request, if nothing about it is wrong or unusual and its token was verified before."""
        assert isinstance(head, _Head)
        access, lowered = self._tokens.remembered(head.authorization, _ISSUE_SCOPE), idempotency_key(key)
        if access is None or lowered is None or isinstance(asked := _requested(body), str):
            return None
        return access.credential, _request(access, lowered, head.code, asked, trace)

    def told(self, outcome: Outcome, request: Request, key: bytes) -> Answer:
        """See ``told``."""
        return told(outcome, request, self._ids, key)

    async def _issue(
        self, access: Access, code: str, pairs: _Pairs, headers: dict[bytes, bytes], receive: Receive
    ) -> Answer | None:
        content_type, length = headers.get(b"content-type", b""), headers.get(b"content-length", b"")
        if content_type != b"application/json" and not is_json(content_type):
            return await self._unless_out_of_force(access, refusal("unsupported_media_type"))
        if len(length) > 4 and exceeds(length):
            return await self._unless_out_of_force(access, refusal("too_large"))
        if (body := await body_of(receive)) is None:
            return None
        if len(body) > BODY_MAX:
            return await self._unless_out_of_force(access, refusal("too_large"))
        sent = [value for name, value in pairs if name == b"idempotency-key"]
        if len(sent) != 1 or (key := idempotency_key(sent[0])) is None:
            return await self._unless_out_of_force(access, refusal("key_malformed" if sent else "key_missing"))
        asked = _requested(body)
        if isinstance(asked, str):
            return await self._unless_out_of_force(access, refusal(asked, headers=((b"idempotency-key", sent[0]),)))
        request = _request(access, key, code, asked, trace_of(headers, pairs))
        outcome = await self._issuer.issue(access.credential, request)
        return told(outcome, request, self._ids, sent[0])

    async def _read_vouchers(self, access: Access, name: str, query: bytes) -> Answer:
        said = await self._issuer.confirm(partial(out_of_force, access))
        if said:
            return refusal(said.code if isinstance(said, Busy) else said)
        if name:
            return await self._vouchers.voucher(access.client, name, new_request_id())
        return await self._vouchers.vouchers(access.client, query, new_request_id())

    async def _unless_out_of_force(self, access: Access, malformed: Answer) -> Answer:
        """``malformed``, unless the client is not in force: that is looked at first."""
        match await self._issuer.authenticate(access.credential):
            case Unauthorized():
                return refusal("token_unknown")
            case Suspended():
                return refusal("suspended")
            case _:
                return malformed


class _Head(Head, frozen=True, gc=False):
    authorization: bytes
    code: str


# The path of a product whose code is sent as it is, without a query: nothing of it needs to be decoded.
_ISSUE_PATH: Final = re.compile(rb"/v3/products/([A-Za-z0-9._-]{1,64})").fullmatch

_ISSUE_SCOPE: Final = "issue_vouchers"
_READ: Final = {"products": "read_catalogue", "vouchers": "read_vouchers"}


def told(outcome: Outcome, request: Request, ids: IdKeys, key: bytes) -> Answer:
    """What the client is told; ``key`` is its Idempotency-Key as it was sent.

    Raises ValueError if the record is of a layout that this version does not read, UnknownIdKey if its ids can't be
    derived.
    """
    echoed = ((b"idempotency-key", key),)
    match outcome:
        case Issued():
            return rendered(outcome, request, ids, key)
        case Unavailable(code, considered):
            if code == "not_running":
                code_told = "paused" if considered[0].stopped_by == "paused" else "not_valid"
            else:
                code_told = code
            first = considered[0].campaign_id if considered else ""
            return refusal(code_told, headers=echoed, distributor=request.distributor, campaign=first)
        case Unauthorized():
            return refusal("token_unknown")
        case Suspended():
            return refusal("suspended")
        case KeyReused():
            return refusal("key_reused", headers=echoed, distributor=request.distributor)
        case RateLimited():
            return refusal(
                "rate_limited", headers=(*echoed, *limit_fields(outcome)), retry_after_s=outcome.retry_after_s,
                distributor=request.distributor,
            )  # fmt: skip
        case Busy(code):
            return refusal(code, headers=echoed)


# --- the answer, from a record


def rendered(issued: Issued, request: Request, ids: IdKeys, key: bytes) -> Answer:
    """200 with all vouchers, or 207 with as many as a cap left: the same bytes whenever they are of the same record.

    Raises ValueError and UnknownIdKey as ``told`` does.
    """
    payload, second, rule, *codes = issued.record.split("\n")
    if payload[:1] != LAYOUT:
        raise ValueError("a record of an unknown layout")
    _, product, quantity, face_value, _ = payload.split("\t")
    of, issued_at = Rule.unpack(rule), int(second, 16)
    voucher = voucher_renderer(of.terms, product, int(face_value) if face_value else None)
    vouchers = []
    for line in codes:
        expires_at, lot, seq, code, _ = line.split("\t")
        vouchers.append(voucher(code, ids.identity(of.id_key, int(lot), int(seq)), issued_at, int(expires_at, 16)))
    request_id = ids.request_id(of.id_key, request.client, request.key, issued_at)
    part = _PARTIAL if len(codes) < int(quantity) else ""
    body = f'{{"request_id":"{request_id}",{part}"vouchers":[{",".join(vouchers)}]}}'.encode()
    headers: Headers = (JSON, (b"content-length", b"%d" % len(body)), (b"idempotency-key", key))
    if issued.replayed:
        headers = (*headers, _REPLAYED)
    new = 0 if issued.replayed else len(codes)
    if part:
        return Answer(207, headers, body, "207-762", request.distributor, of.campaign, issued=new)
    return Answer(200, headers, body, "issued" if new else "replayed", request.distributor, of.campaign, issued=new)


_REPLAYED: Final = (b"idempotency-record", b"true")
_PARTIAL: Final = f'"error":{msgspec.json.encode(error_body("partial")).decode()},'


# --- the request

_UUID: Final = re.compile(rb'("?)([0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12})\1').fullmatch


def idempotency_key(value: bytes) -> str | None:
    """The key, in lower case, of a header value that is one UUID, bare or as a structured-field string."""
    found = _UUID(value)
    return None if found is None else found[2].decode().lower()


def _request(access: Access, key: str, code: str, asked: IssueRequest, trace: str) -> Request:
    return Request(
        "v3", access.client, key, access.distributor, (code,), payload_of(code, asked), asked.quantity,
        None if isinstance(asked.face_value, msgspec.UnsetType) else asked.face_value, trace,
    )  # fmt: skip


def payload_of(product: str, asked: IssueRequest) -> str:
    """What is compared on a replay: no terminal, then the product and each field."""
    face_value = "" if asked.face_value is msgspec.UNSET else asked.face_value
    reference = "" if asked.client_reference is msgspec.UNSET else asked.client_reference
    return f"\t{product}\t{asked.quantity}\t{face_value}\t{reference}"


class _Members(msgspec.Struct):
    """The body with its members undecoded."""

    quantity: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_DECODER: Final = msgspec.json.Decoder(IssueRequest)


def _requested(body: bytes | bytearray) -> IssueRequest | str:
    """What is asked for; if anything is wrong with it, the name of the refusal."""
    try:
        if not body.isascii():
            body.decode("utf-8")
        asked = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _explained(body)
    # A pattern's end also lies before a last line feed, and one in a record would end a line of it.
    return "body" if "\n" in (asked.client_reference or "") else asked


def _explained(body: bytes | bytearray) -> str:
    """Which refusal a body gets that was not accepted: a bad quantity is told before any other member."""
    try:
        body.decode("utf-8")
        members = msgspec.json.decode(body, type=_Members)
        if isinstance(members.quantity, msgspec.UnsetType):
            return "quantity"
        quantity = msgspec.json.decode(members.quantity)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "body"
    fits = isinstance(quantity, int) and not isinstance(quantity, bool) and 1 <= quantity <= QUANTITY_MAX
    return "body" if fits else "quantity"
