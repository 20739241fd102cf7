"""``POST /api/v1/voucher/request``: one voucher for one request.

``VoucherRequests.answer`` is the whole of it, in the contract's order: method, token, media type, size, JSON,
fields, distributor, key, issue.  It is called ahead of Starlette and works on plain ASGI; what is unusual is explained
in the slower functions below it.  Most requests don't get there: ``plain`` takes those about which nothing is wrong or
unusual, and ``told`` words the answer of both.

The token comes before whatever else may be wrong, and only a script call can tell that a token is in force.  So a
request that is malformed waits for a fence check before it is refused, and a well-formed one brings its token
along with its batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope

from service.domain import (
    Authenticated,
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
    instant,
)
from service.messages import KEY, NAME, PRODUCTS_MAX, TERMINAL
from service.tokens import well_formed
from service.web.exchange import Head
from service.web.incoming import BODY_MAX, body_of, exceeds, is_json, repeated, trace_of
from service.web.problems import Answer, Headers, method_not_allowed, problem, rate_limited, unavailable

if TYPE_CHECKING:  # the parent of the serving processes needs neither it nor redis-py below it
    from service.catalogue import Catalogue

T = TypeVar("T")

PATH: Final = "/api/v1/voucher/request"
PLAIN_DIGITS_MAX: Final = 4  # of a plain request's Content-Length: below BODY_MAX whatever they are
AUTHORIZATION_MAX: Final = 256  # bytes; what is longer holds no token of ours, and only its scheme is looked at


class Issuing(Protocol):
    """What ``service.issuance.Issuer`` offers to the APIs."""

    @property
    def catalogue(self) -> Catalogue | None: ...
    @property
    def ready(self) -> bool: ...
    @property
    def queued(self) -> int: ...
    def submit(self, credential: str, request: Request, answered: Callable[[Outcome], None]) -> None: ...
    async def issue(self, credential: str, request: Request) -> Outcome: ...
    async def authenticate(self, credential: str) -> Authenticated | Unauthorized | Suspended | Busy: ...
    async def confirm(self, judge: Callable[[Catalogue], T]) -> T | Busy: ...
    def start(self) -> None: ...
    async def drain(self) -> None: ...


class VoucherRequests:
    """The Voucher Request API over an issuer."""

    name: Final = "v1"

    def __init__(self, issuer: Issuing) -> None:
        self._issuer = issuer

    async def answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer to one request to PATH; None if the client went away while it was sending.

        Nothing but an unexpected defect is raised.  Whatever is answered, the same request may be sent again.
        """
        if scope["method"] != "POST":
            return method_not_allowed("POST")
        pairs = scope["headers"]
        headers: dict[bytes, bytes] = dict(pairs)
        if len(headers) != len(pairs) and (twice := repeated(pairs)):
            return problem("malformed_request", detail=f"The header {twice} was sent more than once.")

        authorization = headers.get(b"authorization", b"")
        token, refusal = _token(authorization if len(authorization) <= AUTHORIZATION_MAX else authorization[:6] + b" -")
        if refusal:
            return problem(refusal)
        if headers.get(b"content-type") != b"application/json" and not is_json(headers.get(b"content-type", b"")):
            return await self._unless_unauthorized(token, problem("unsupported_media_type"))

        length = headers.get(b"content-length")
        if length is not None and len(length) > 4 and exceeds(length):
            return await self._unless_unauthorized(token, problem("too_large"))
        if (body := await body_of(receive)) is None:
            return None
        if len(body) > BODY_MAX:
            return await self._unless_unauthorized(token, problem("too_large"))

        request = _requested(body, trace_of(headers, pairs))
        if request is None:
            return await self._unless_unauthorized(token, _explained(body))
        if b"idempotency-key" in headers and not _same_keys(pairs, request.key):
            return await self._key_mismatch(token, request.distributor, request.key)
        return told(await self._issuer.issue(token, request), request)

    def refused(self, code: str) -> Answer:
        """A row of the error table."""
        return problem(code)

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        """What these headers say; None if anything about them is wrong or unusual.  Its body has a length below
        10,000."""
        authorization, length = headers.get(b"authorization", b""), headers.get(b"content-length", b"")
        if headers.get(b"content-type") != b"application/json" or len(authorization) > AUTHORIZATION_MAX:
            return None
        if not 0 < len(length) <= PLAIN_DIGITS_MAX:
            return None
        token, refusal = _token(authorization)
        return None if refusal else _Head(self, int(length), b"idempotency-key" in headers, token)

    def plain(self, head: Head, key: bytes, body: bytes | bytearray, trace: str = "") -> tuple[str, Request] | None:
        """The token and the request, if nothing about it is wrong or unusual."""
        assert isinstance(head, _Head)
        request = _requested(body, trace)
        if request is None or (head.keyed and key != request.key.encode()):
            return None
        return head.token, request

    def told(self, outcome: Outcome, request: Request, key: bytes = b"") -> Answer:
        """See ``told``."""
        return told(outcome, request)

    async def _unless_unauthorized(self, token: str, malformed: Answer) -> Answer:
        """``malformed``, unless the token is not in force: that is looked at first."""
        who = await self._issuer.authenticate(token)
        return problem(who.code) if isinstance(who, Unauthorized) else malformed

    async def _key_mismatch(self, token: str, distributor: str, request_id: str) -> Answer:
        """400, unless something about the token or the distributor, which are looked at first, is wrong."""
        match await self._issuer.authenticate(token):
            case Unauthorized(code):
                return problem(code, request_id=request_id)
            case Suspended():
                return problem("distributor_suspended", request_id=request_id)
            case Authenticated(owner) if owner != distributor:
                return problem("distributor_mismatch", request_id=request_id)
            case _:
                return problem("key_mismatch", request_id=request_id)


class _Head(Head, frozen=True, gc=False):
    token: str


def told(outcome: Outcome, request: Request) -> Answer:
    """What the client is told.  Raises ValueError if its record is of a layout that this version does not read."""
    match outcome:
        case Issued():
            return rendered(outcome, request.key, request.distributor)
        case Unavailable(code, considered):
            return unavailable(code, request.products, considered, request.key, request.distributor)
        case Unauthorized(code) | Busy(code):
            return problem(code, request_id=request.key)
        case KeyReused():
            return problem("key_reused", request_id=request.key, distributor=request.distributor)
        case Suspended():
            return problem("distributor_suspended", request_id=request.key)
        case RateLimited():
            return rate_limited(outcome, request.key, request.distributor)


# --- the answer, from a record

_REPLAYED: Final = (b"idempotent-replayed", b"true")
_JSON: Final = (b"content-type", b"application/json")


def rendered(issued: Issued, key: str, distributor: str) -> Answer:
    """200 with the voucher of request ``key``: the same bytes whenever it is built from the same record.

    Raises ValueError if the record is of a layout that this version does not read.
    """
    render = _RENDERERS.get(issued.record[:1])
    if render is None:
        raise ValueError("a record of an unknown layout")
    body, campaign = render(issued.record, key)
    headers = _headers(len(body), issued.replayed)
    if issued.replayed:
        return Answer(200, headers, body, "replayed", distributor, campaign)
    return Answer(200, headers, body, "issued", distributor, campaign, issued=1)


@lru_cache(maxsize=4_096)  # twice as many as there are lengths of answers
def _headers(length: int, replayed: bool) -> Headers:
    headers = (_JSON, (b"content-length", b"%d" % length))
    return (*headers, _REPLAYED) if replayed else headers


def _layout_2(record: str, key: str) -> tuple[bytes, str]:
    _, issued_at, rule, code = record.split("\n")
    expires_at, _, _, voucher, serial = code.split("\t")
    campaign, until, name = _campaign(rule)
    expiry = int(expires_at, 16)
    if until and until < expiry:
        expiry = until
    if '"' in code or "\\" in code or '"' in key or "\\" in key:
        voucher, serial, key = _escaped(voucher), _escaped(serial), _escaped(key)
    return (
        f'{{"status":"success",{campaign},"voucher_code":"{voucher}","serial_number":"{serial}",'
        f'"expiry_date":"{instant(expiry)}","request_id":"{key}","issued_at":"{instant(int(issued_at, 16))}"}}'
    ).encode(), name


@lru_cache(maxsize=16_384)  # 0.7 KB each; one a campaign and product
def _campaign(rule: str) -> tuple[str, int, str]:
    """The members of the answer that the rule gives, as JSON, when the campaign ends (0: open), and its name."""
    of = Rule.unpack(rule)
    return (
        (
            f'"campaign_id":"{_escaped(of.campaign)}","category_id":"{_escaped(of.category)}",'
            f'"product_id":"{_escaped(of.product)}"'
        ),
        of.until,
        of.campaign,
    )


def _escaped(text: str) -> str:
    """``text`` as the inside of a JSON string."""
    return msgspec.json.encode(text)[1:-1].decode()


# One renderer a layout, for ever: a record may be older than this version.  Each gives the body and the campaign.
_RENDERERS: Final[dict[str, Callable[[str, str], tuple[bytes, str]]]] = {"2": _layout_2}


# --- headers


@lru_cache(maxsize=1_024)  # a partner sends the same one all day; looking at it costs 3 us
def _token(authorization: bytes) -> tuple[str, str]:
    """The token, if it has the form of one; else '' and the code of the refusal."""
    scheme, _, token = authorization.partition(b" ")
    text = token.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""
    if not text:
        return "", "token_missing"
    return (text, "") if well_formed(text) else ("", "token_unknown")


def _same_keys(pairs: list[tuple[bytes, bytes]], request_id: str) -> bool:
    """Whether each Idempotency-Key is ``request_id``, bare or as a structured-field string."""
    bare = request_id.encode()
    quoted = b'"' + bare.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return all(value in (bare, quoted) for name, value in pairs if name == b"idempotency-key")


# --- the body


class _Asked(msgspec.Struct, gc=False):
    request_id: str
    distributor_id: str
    terminal_id: str
    product_ids: tuple[str, ...]


_DECODER: Final = msgspec.json.Decoder(_Asked)


def _requested(body: bytes | bytearray, trace: str) -> Request | None:
    """The request in ``body``; None if anything is wrong with it."""
    try:
        if not body.isascii():
            body.decode("utf-8")
        asked = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    request_id, distributor, terminal, products = (
        asked.request_id, asked.distributor_id, asked.terminal_id, asked.product_ids,
    )  # fmt: skip
    listed = ",".join(products)
    if not _FIELDS(f"{request_id}\n{distributor}\n{terminal}\n{listed}") or listed.count(",") != len(products) - 1:
        return None
    return Request(
        "v1", distributor, request_id, distributor, products if len(products) == 1 else tuple(dict.fromkeys(products)),
        f"{terminal}\t{listed}", trace=trace,
    )  # fmt: skip


_KEY: Final = f"{KEY}+"
_NAME: Final = f"{NAME}+"
_TERMINAL: Final = f"{TERMINAL}+"

# All four at once: no class holds a line feed or a comma but the terminal's and the key's, which come before.
_FIELDS: Final = re.compile(
    rf"{_KEY}\n{_NAME}\n{_TERMINAL}\n{_NAME}(?:,{_NAME}){{0,{PRODUCTS_MAX - 1}}}+"
).fullmatch  # fmt: skip

_NAME_RULE: Final = "a string of 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'"
_RULES: Final = {
    "request_id": (_KEY, "a string of 1 to 128 printable ASCII characters without space"),
    "distributor_id": (_NAME, _NAME_RULE),
    "terminal_id": (_TERMINAL, "a string of 1 to 64 printable ASCII characters"),
}
_PRODUCTS_RULE: Final = f"an array of 1 to {PRODUCTS_MAX} items, each {_NAME_RULE}"


class _Members(msgspec.Struct):
    """The body with its members undecoded: each can be looked at whatever the others are."""

    request_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    distributor_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    terminal_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    product_ids: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _explained(body: bytes) -> Answer:
    """400 for a body that was not accepted: what is wrong first, in the order of the contract."""
    try:
        body.decode("utf-8")
        members = msgspec.json.decode(body, type=_Members)
        request_id = _matching(members.request_id, _KEY)
        for field, (pattern, rule) in _RULES.items():
            if (refusal := _bad(field, getattr(members, field), pattern, rule, request_id)) is not None:
                return refusal
        products = _texts(members.product_ids)
    except UnicodeDecodeError:
        return problem("invalid_json", detail="The body is not UTF-8.")
    except RecursionError:
        return problem("invalid_json", detail="The body is nested too deeply.")
    except msgspec.ValidationError:
        return problem("invalid_json", detail="The body must be a JSON object.")
    except msgspec.DecodeError:
        return problem("invalid_json", detail="The body is not well-formed JSON.")
    if members.product_ids is msgspec.UNSET:
        return _invalid("product_ids", "is missing; it must be " + _PRODUCTS_RULE, request_id)
    if products is None or not 1 <= len(products) <= PRODUCTS_MAX:
        return _invalid("product_ids", "must be " + _PRODUCTS_RULE, request_id)
    for position, product in enumerate(products):
        if re.fullmatch(_NAME, product) is None:
            return _invalid(f"product_ids[{position}]", f"must be {_NAME_RULE}", request_id)
    return problem("invalid_json", request_id=request_id)


def _bad(
    field: str, raw: msgspec.Raw | msgspec.UnsetType, pattern: str, rule: str, request_id: str | None
) -> Answer | None:
    if raw is msgspec.UNSET:
        return _invalid(field, f"is missing; it must be {rule}", request_id)
    return _invalid(field, f"must be {rule}", request_id) if _matching(raw, pattern) is None else None


def _invalid(field: str, rule: str, request_id: str | None) -> Answer:
    return problem("invalid_field", detail=f"`{field}` {rule}.", request_id=request_id, field=field)


def _matching(raw: msgspec.Raw | msgspec.UnsetType, pattern: str) -> str | None:
    """The string in ``raw`` if it is one and matches; raises DecodeError if it is not JSON."""
    if isinstance(raw, msgspec.UnsetType):
        return None
    try:
        text = msgspec.json.decode(raw, type=str)
    except msgspec.ValidationError:
        return None
    return text if re.fullmatch(pattern, text) else None


def _texts(raw: msgspec.Raw | msgspec.UnsetType) -> list[str] | None:
    """The strings in ``raw`` if it is an array of strings; raises DecodeError if it is not JSON."""
    if isinstance(raw, msgspec.UnsetType):
        return None
    try:
        return msgspec.json.decode(raw, type=list[str])
    except msgspec.ValidationError:
        return None
