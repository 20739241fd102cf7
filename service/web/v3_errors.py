"""Every answer of Client API v3 that is not a success: one table, one form (api-v3 "Errors").

The codes of the published contract keep their meaning; those that it leaves open are chosen here and stay.
"""

from __future__ import annotations

import secrets
from typing import Final

import msgspec

from service.identity import random_uuid
from service.web.problems import RETRY_AFTER_S, Answer

JSON: Final = (b"content-type", b"application/json; charset=utf-8")


class Refusal(msgspec.Struct, frozen=True):
    """One row of the table.  ``documentation`` says what to do; ``retryable``: the same request, with the same key, may
    succeed in ``RETRY_AFTER_S`` seconds."""

    code: str
    message: str
    documentation: str
    retryable: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def status(self) -> int:
        """The HTTP status, which a code begins with."""
        return int(self.code[:3])


_BEARER: Final = ((b"www-authenticate", b'Bearer realm="voucherd"'),)
_INVALID: Final = ((b"www-authenticate", b'Bearer realm="voucherd", error="invalid_token"'),)
_SCOPE: Final = ((b"www-authenticate", b'Bearer realm="voucherd", error="insufficient_scope"'),)
_NEW_TOKEN: Final = "Ask /oauth2/token for a new access token and send the request again with the same Idempotency-Key."
_SAFE: Final = "Send the same request again, with the same Idempotency-Key, after Retry-After seconds."

REFUSALS: Final[dict[str, Refusal]] = {
    "partial": Refusal(
        "207-762", "Part of the quantity was issued",
        "A cap left room for fewer vouchers. Ask for the rest with a new Idempotency-Key.",
    ),
    "face_value": Refusal(
        "400-056", "Face value not acceptable",
        "An open-value product needs a face_value of 100 to 100000 cents; any other product takes none.",
    ),
    "exhausted": Refusal(
        "400-0C6", "Quantity over the stock",
        "The product has fewer vouchers left than were asked for, and none was issued. Ask for fewer.",
    ),
    "body": Refusal(
        "400-4C3", "Body not acceptable",
        "The body must be one JSON object with quantity, and face_value if the product needs it; client_reference is 1 "
        "to 50 letters, digits and _ / # : . -",
    ),
    "quantity": Refusal("400-5DC", "Quantity not acceptable", "quantity is required: an integer of 1 to 20."),
    "key_missing": Refusal(
        "400-9A0", "Idempotency-Key missing", "Send the header Idempotency-Key: a new UUID for each sale."
    ),
    "key_malformed": Refusal("400-BB4", "Idempotency-Key is no UUID", "Idempotency-Key must be one UUID."),
    "malformed_request": Refusal("400-A00", "Request malformed", "A header was sent more than once that must not be."),
    "ids_repeated": Refusal("400-215", "Voucher ids repeated", "Each voucher id may be asked for once in a request."),
    "ids_malformed": Refusal(
        "400-67B", "Voucher ids are no UUIDs", "Send id: 1 to 20 UUIDs with commas between them, in one parameter."
    ),
    "ids_too_many": Refusal("400-B32", "Too many voucher ids", "At most 20 vouchers can be asked for in a request."),
    "token_missing": Refusal(
        "401-A01", "Access token missing", "Send the header Authorization: Bearer <access token>.", headers=_BEARER
    ),
    "token_malformed": Refusal(
        "401-A02", "Access token malformed", "The access token is none of this service.", headers=_INVALID
    ),
    "token_expired": Refusal("401-A03", "Access token expired", _NEW_TOKEN, headers=_INVALID),
    "token_unknown": Refusal(
        "401-A04", "Access token not valid", f"Its signature, issuer or client is not in force. {_NEW_TOKEN}",
        headers=_INVALID,
    ),
    "scope_missing": Refusal(
        "403-F01", "Scope missing", "The access token does not grant this; ask for one with the scope.", headers=_SCOPE
    ),
    "suspended": Refusal("403-F02", "Client suspended", "This client or its distributor is suspended."),
    "not_assigned": Refusal("403-F03", "Product not assigned", "This product is not assigned to the client."),
    "no_product": Refusal("404-D01", "Product not found", "There is no product of this code."),
    "not_found": Refusal("404-D02", "No such resource", "There is nothing under this path."),
    "no_voucher": Refusal("404-D4E", "Voucher not found", "The client has no voucher of this id."),
    "method_not_allowed": Refusal("405-E01", "Method not allowed", "This path does not take this method."),
    "paused": Refusal("409-C01", "Product paused", "The product is not issued for the time being."),
    "not_valid": Refusal("409-C02", "Product not on sale now", "The product is issued from valid_from to valid_until."),
    "cap_reached": Refusal("409-C03", "Limit reached", "A limit on the product's vouchers is reached."),
    "too_large": Refusal("413-B01", "Body too large", "The body must not be larger than 16 KiB."),
    "unsupported_media_type": Refusal(
        "415-B02", "Media type not supported", "Content-Type must be application/json."
    ),
    "key_reused": Refusal(
        "422-B03", "Idempotency-Key used before",
        "This key was used for another request. Use one key for each sale, and a new one for the next.",
    ),
    "rate_limited": Refusal(
        "429-B04", "Too many vouchers asked for",
        f"As many were issued to you as may be at a time. Smaller quantities may go through earlier. {_SAFE}",
        retryable=True,
    ),
    "internal": Refusal("500-B05", "Internal error", "Sending the same request again is safe.", retryable=True),
    "overloaded": Refusal("503-B06", "Overloaded", _SAFE, retryable=True),
    "store_unreachable": Refusal(
        "503-B07", "Not available now", f"Whether something was issued is not known. {_SAFE}", retryable=True
    ),
    "refilling": Refusal("503-B08", "Stock is being brought up", _SAFE, retryable=True),
    "draining": Refusal("503-B09", "Shutting down", _SAFE, retryable=True),
    "not_yet": Refusal(
        "503-B0A", "Voucher not readable yet", "It may have been issued just now. Ask again in a moment.",
        retryable=True,
    ),
}  # fmt: skip


def error_body(name: str, details: str = "") -> dict[str, str]:
    """The member ``error`` of a body."""
    row = REFUSALS[name]
    error = {"code": row.code, "message": row.message, "documentation": row.documentation}
    return {**error, "details": details} if details else error


def new_request_id() -> str:
    """The id of a request that is not answered from a record."""
    return random_uuid(secrets.randbits(128))


def answered(body: msgspec.Struct) -> Answer:
    """200 with this body."""
    encoded = msgspec.json.encode(body)
    return Answer(200, (JSON, (b"content-length", b"%d" % len(encoded))), encoded, "read")


def refusal(
    name: str,
    details: str = "",
    *,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    request_id: str = "",
    retry_after_s: int = RETRY_AFTER_S,
    distributor: str = "",
    campaign: str = "",
) -> Answer:
    """The answer for one row of the table, with a request id of its own if none is given; ``distributor`` and
    ``campaign``: see ``Answer``."""
    row = REFUSALS[name]
    request_id = request_id or new_request_id()
    body = msgspec.json.encode({"request_id": request_id, "error": error_body(name, details)})
    retry_after = ((b"retry-after", b"%d" % retry_after_s),) if row.retryable else ()
    sent = (JSON, (b"content-length", b"%d" % len(body)), *row.headers, *headers, *retry_after)
    return Answer(row.status, sent, body, row.code, distributor, campaign, request_id)
