"""Every answer that is not a success: one table, one form (RFC 9457, ``application/problem+json``).

The codes are those of the contract's error table, and three more for what is refused before a route is known:
``malformed_request``, ``headers_too_large`` and ``request_timeout``.  They are stable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import orjson

from service.domain import Considered, RateLimited

Headers = tuple[tuple[bytes, bytes], ...]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One whole HTTP answer.  ``code`` is what it is counted as: an error's code, ``issued`` or ``replayed``; and of
    whom, where it is confirmed that the ``distributor`` asked: a ``campaign`` issued or was considered first.  So many
    vouchers were ``issued`` by this request, none of a replay.
    ``request_id`` is that of a refusal, where it is known."""

    status: int
    headers: Headers
    body: bytes
    code: str
    distributor: str = ""
    campaign: str = ""
    request_id: str = ""
    issued: int = 0


class Problem(msgspec.Struct, frozen=True):
    """One row of the table.  ``error`` is the source's word for it; ``retryable``: the same request, as it is,
    may succeed after ``retry_after_s`` or a little more."""

    status: int
    error: str
    title: str
    detail: str
    retryable: bool = False
    retry_after_s: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()


# Seconds.  A batch takes milliseconds and a recovery a few seconds: one second keeps a terminal's queue short
# and an overload from being fed by its own retries.
RETRY_AFTER_S: Final = 1

_BEARER = ((b"www-authenticate", b"Bearer"),)
_SAFE = "Sending the same request again, with the same request_id, is safe."

PROBLEMS: Final[dict[str, Problem]] = {
    "invalid_json": Problem(
        400, "invalid request", "The body is not a JSON object", "The body must be one JSON object in UTF-8."
    ),
    "invalid_field": Problem(
        400, "invalid request", "A field is missing or bad", "A mandatory field is missing or breaks its rule."
    ),
    "key_mismatch": Problem(
        400, "invalid request", "Idempotency-Key differs from request_id",
        "The header Idempotency-Key, if sent, must equal request_id.",
    ),
    "malformed_request": Problem(
        400, "invalid request", "Not a well-formed HTTP request", "The request breaks the rules of HTTP."
    ),
    "token_missing": Problem(
        401, "unauthorized", "No bearer token", "The header `Authorization: Bearer <token>` is required.",
        headers=_BEARER,
    ),
    "token_unknown": Problem(
        401, "unauthorized", "Unknown token", "The token is not in force.", headers=_BEARER
    ),
    "distributor_mismatch": Problem(
        401, "unauthorized", "Token of another distributor", "The token does not belong to this distributor_id.",
        headers=_BEARER,
    ),
    "distributor_suspended": Problem(
        403, "forbidden", "Distributor suspended", "This distributor is suspended."
    ),
    "not_found": Problem(404, "not found", "No such resource", "There is nothing under this path."),
    "method_not_allowed": Problem(
        405, "method not allowed", "Method not allowed", "This path does not take this method."
    ),
    "request_timeout": Problem(
        408, "request timeout", "Request not received in time", f"The request was not whole in time. {_SAFE}",
        retryable=True,
    ),
    "no_campaign": Problem(
        409, "voucher unavailable", "No campaign for these products",
        "No campaign for these product_ids is assigned to this distributor.",
    ),
    "not_running": Problem(
        409, "voucher unavailable", "No campaign is running", "No campaign that is assigned is running now."
    ),
    "cap_reached": Problem(
        409, "voucher unavailable", "A cap is reached", "Every running campaign has reached one of its caps."
    ),
    "exhausted": Problem(409, "voucher unavailable", "No codes left", "No code is left for these product_ids."),
    "too_large": Problem(413, "payload too large", "The body is too large", "The body must not exceed 16 KiB."),
    "unsupported_media_type": Problem(
        415, "unsupported media type", "Not JSON", "The header `Content-Type: application/json` is required."
    ),
    "key_reused": Problem(
        422, "idempotency key reused", "The request_id was used for another request",
        "This request_id was used before, with another terminal_id or other product_ids. Nothing was issued.",
    ),
    "rate_limited": Problem(
        429, "rate limited", "Too many vouchers asked for",
        f"This distributor was issued as many vouchers as it may be at a time. {_SAFE}",
        retryable=True, retry_after_s=RETRY_AFTER_S,
    ),
    "headers_too_large": Problem(
        431, "invalid request", "The headers are too large", "The request line and headers are too large or too many."
    ),
    "internal": Problem(
        500, "internal server error", "Internal server error", f"An unexpected failure. {_SAFE}", retryable=True
    ),
    "overloaded": Problem(
        503, "service unavailable", "Overloaded", f"Too much to do at the moment. {_SAFE}",
        retryable=True, retry_after_s=RETRY_AFTER_S,
    ),
    "store_unreachable": Problem(
        503, "service unavailable", "Not available for a moment",
        f"It is not known whether a voucher was issued. {_SAFE}", retryable=True, retry_after_s=RETRY_AFTER_S,
    ),
    "refilling": Problem(
        503, "service unavailable", "Codes are being refilled", f"There are codes, but not at hand yet. {_SAFE}",
        retryable=True, retry_after_s=RETRY_AFTER_S,
    ),
    "draining": Problem(
        503, "service unavailable", "Shutting down", f"This process is shutting down. {_SAFE}",
        retryable=True, retry_after_s=RETRY_AFTER_S,
    ),
}  # fmt: skip


def problem(
    code: str,
    *,
    detail: str | None = None,
    request_id: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
    retry_after_s: int | None = None,
    distributor: str = "",
    campaign: str = "",
    **members: object,
) -> Answer:
    """The answer for ``code``, a key of PROBLEMS.  ``detail`` and ``retry_after_s`` replace the table's; ``members``
    are added as they are; ``distributor`` and ``campaign``: see ``Answer``.

    Neither may hold a token, a voucher code, or text of a client that was not validated.
    """
    row = PROBLEMS[code]
    content: dict[str, object] = {
        "type": f"urn:voucherd:problem:{code}",
        "title": row.title,
        "status": row.status,
        "detail": detail or row.detail,
        "error": row.error,
        "code": code,
    }
    if request_id is not None:
        content["request_id"] = request_id
    content["retryable"] = row.retryable
    content.update(members)
    body = orjson.dumps(content)
    seconds = row.retry_after_s if retry_after_s is None else retry_after_s
    retry_after = () if seconds is None else ((b"retry-after", b"%d" % seconds),)
    sent = (
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        *row.headers,
        *headers,
        *retry_after,
    )
    return Answer(row.status, sent, body, code, distributor, campaign, request_id or "")


def method_not_allowed(allow: str, request_id: str | None = None) -> Answer:
    """405, with the methods that the path does take."""
    return problem(
        "method_not_allowed",
        detail=f"This path takes only {allow}.",
        request_id=request_id,
        headers=[(b"allow", allow.encode("ascii"))],
    )


def rate_limited(limited: RateLimited, request_id: str, distributor: str) -> Answer:
    """429, with when the same request is within the limit."""
    return problem(
        "rate_limited", request_id=request_id, headers=limit_fields(limited), retry_after_s=limited.retry_after_s,
        distributor=distributor,
    )  # fmt: skip


def limit_fields(limited: RateLimited) -> Headers:
    """What the limit is, and what of it is left, in the fields of draft-ietf-httpapi-ratelimit-headers-10: a quota of
    ``q`` vouchers for a window of ``w`` seconds, ``r`` left now, and what was asked for in ``t`` seconds."""
    limit = limited.limit
    return (
        (b"ratelimit-policy", b'"vouchers";q=%d;w=%d' % (limit.burst, limit.rest_s)),
        (b"ratelimit", b'"vouchers";r=%d;t=%d' % (limited.left, limited.retry_after_s)),
    )


def unavailable(
    code: str, products: Iterable[str], considered: Sequence[Considered], request_id: str, distributor: str
) -> Answer:
    """409: each product that was tried, with the campaigns of this distributor and the rule that stopped each."""
    stops: dict[str, list[dict[str, str]]] = {product: [] for product in products}
    for stop in considered:
        campaign = {"campaign_id": stop.campaign_id, "stopped_by": stop.stopped_by}
        stops.setdefault(stop.product_id, []).append(campaign)
    tried = [{"product_id": product, "campaigns": campaigns} for product, campaigns in stops.items()]
    first = considered[0].campaign_id if considered else ""
    return problem(code, request_id=request_id, distributor=distributor, campaign=first, considered=tried)
