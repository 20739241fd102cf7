"""The OpenAPI document of both APIs, made of the structs that validate and of the tables that refusals are told from,
so that it can't say anything else than the service does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from service import __version__, messages
from service.messages import QUANTITY_MAX
from service.web.problems import PROBLEMS
from service.web.v3_errors import REFUSALS, error_body

Node = dict[str, Any]

_SCHEMAS: Final = (
    messages.VoucherRequest, messages.VoucherIssued, messages.Problem, messages.IssueRequest, messages.VouchersAnswer,
    messages.PartAnswer, messages.VoucherAnswer, messages.ProductsAnswer, messages.ProductAnswer, messages.Refused,
    messages.TokenAnswer, messages.TokenRefused,
)  # fmt: skip

_SCOPES: Final = {
    "read_catalogue": "Look at products",
    "issue_vouchers": "Issue vouchers",
    "read_vouchers": "Look at the client's own vouchers",
}

# Told by the HTTP layer before it is known which API is meant.
_ANY: Final = ("malformed_request", "request_timeout", "headers_too_large", "overloaded")

_ADVICE: Final = (
    "After a 429, 500, 503, a time-out or a dropped connection send the same request again with the same key: it gets "
    "the same vouchers if any were issued. One key for each sale, never for each attempt."
)

_ISSUED_KEY: Final = {
    "Idempotency-Key": {"description": "as it was sent", "schema": {"type": "string"}},
    "Idempotency-Record": {
        "description": "`true` if the answer is that of an earlier request with this key",
        "schema": {"type": "string", "enum": ["true"]},
    },
}


def document(*, client_api: bool, scope_prefix: str) -> Node:
    """The document, an OpenAPI 3.1 object; without ``client_api`` that of the Voucher Request API alone."""
    _, schemas = msgspec.json.schema_components(_SCHEMAS, ref_template="#/components/schemas/{name}")
    paths: Node = {"/api/v1/voucher/request": {"post": _voucher_request()}}
    security: Node = {"token": {"type": "http", "scheme": "bearer", "description": "A distributor's token."}}
    tags = [{"name": "Voucher Request API", "description": "One voucher for one sale of a terminal."}]
    if client_api:
        paths |= _client_api(scope_prefix)
        flow = {"tokenUrl": "/oauth2/token", "scopes": {scope_prefix + name: what for name, what in _SCOPES.items()}}
        security["client"] = {"type": "oauth2", "flows": {"clientCredentials": flow}}
        security["secret"] = {"type": "http", "scheme": "basic", "description": "A client's id and secret."}
        tags.append({"name": "Client API v3", "description": "Catalogue, 1 to 20 vouchers a call, retrieval."})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "voucherd",
            "version": __version__,
            "description": _ADVICE,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": tags,
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
    }


def _voucher_request() -> Node:
    sent = "A value is the request's request_id; the header is not needed."
    return {
        "operationId": "requestVoucher",
        "tags": ["Voucher Request API"],
        "summary": "One voucher for one sale",
        "security": [{"token": []}],
        "parameters": [
            {"name": "Idempotency-Key", "in": "header", "required": False, "description": sent, "schema": _TEXT}
        ],
        "requestBody": _body(messages.VoucherRequest),
        "responses": {
            "200": _answer(
                messages.VoucherIssued, "The voucher",
                {"Idempotent-Replayed": {"description": "`true` if issued before", "schema": _TEXT}},
            ),
            **_problems(code for code in PROBLEMS if code not in ("not_found", "method_not_allowed")),
        },
    }  # fmt: skip


def _client_api(scope_prefix: str) -> Node:
    def operation(name: str, summary: str, scope: str, answers: Node, refusals: Sequence[str], **more: Any) -> Node:
        return {
            "operationId": name, "tags": ["Client API v3"], "summary": summary,
            "security": [{"client": [scope_prefix + scope]}], **more,
            "responses": answers | _refusals((*refusals, *_EVERYWHERE)) ,
        }  # fmt: skip

    key = {
        "name": "Idempotency-Key", "in": "header", "required": True, "schema": _UUID,
        "description": "A UUID: a new one for each sale, the same again for a retry.",
    }  # fmt: skip
    code = {"name": "code", "in": "path", "required": True, "description": "Product code", "schema": _NAME}
    one = {"name": "id", "in": "path", "required": True, "description": "Voucher id", "schema": _UUID}
    some = {
        "name": "id", "in": "query", "required": True, "style": "form", "explode": False,
        "description": "Voucher ids, with commas between them.",
        "schema": {
            "type": "array", "items": _UUID, "minItems": 1, "maxItems": QUANTITY_MAX, "uniqueItems": True,
        },
    }  # fmt: skip
    issued = {
        "200": _answer(messages.VouchersAnswer, "All vouchers that were asked for", _ISSUED_KEY),
        "207": _answer(messages.PartAnswer, "Fewer vouchers: a cap left no more", _ISSUED_KEY),
    }
    return {
        "/v3/products": {
            "get": operation(
                "listProducts", "The products that are assigned to the client", "read_catalogue",
                {"200": _answer(messages.ProductsAnswer, "The products")}, ("store_unreachable",),
            ),
        },
        "/v3/products/{code}": {
            "get": operation(
                "getProduct", "One product", "read_catalogue",
                {"200": _answer(messages.ProductAnswer, "The product")},
                ("no_product", "not_assigned", "store_unreachable"), parameters=[code],
            ),
            "post": operation(
                "issueVouchers", "Issue 1 to 20 vouchers of a product under one key", "issue_vouchers", issued,
                ("face_value", "exhausted", "body", "quantity", "key_missing", "key_malformed", "not_assigned",
                 "no_product", "paused", "not_valid", "cap_reached", "too_large", "unsupported_media_type",
                 "key_reused", "rate_limited", "store_unreachable", "refilling"),
                parameters=[code, key], requestBody=_body(messages.IssueRequest),
            ),
        },
        "/v3/vouchers": {
            "get": operation(
                "getVouchers", "Up to 20 vouchers of the client, in the order asked", "read_vouchers",
                {"200": _answer(messages.VouchersAnswer, "Those that there are")},
                ("ids_repeated", "ids_malformed", "ids_too_many", "no_voucher", "not_yet", "store_unreachable"),
                parameters=[some],
            ),
        },
        "/v3/vouchers/{id}": {
            "get": operation(
                "getVoucher", "One voucher of the client, as it is now", "read_vouchers",
                {"200": _answer(messages.VoucherAnswer, "The voucher")},
                ("no_voucher", "not_yet", "store_unreachable"), parameters=[one],
            ),
        },
        "/oauth2/token": {"post": _token(scope_prefix)},
        "/.well-known/jwks.json": {
            "get": {
                "operationId": "getKeys", "tags": ["Client API v3"], "summary": "The keys that access tokens verify by",
                "security": [],
                "responses": {"200": {"description": "A JWK set", "content": {"application/json": {"schema": _OBJECT}}}}
                | _problems(()),
            }
        },
    }  # fmt: skip


# --- parts

_TEXT: Final = {"type": "string"}
_OBJECT: Final = {"type": "object"}
_UUID: Final = {"type": "string", "format": "uuid"}
_NAME: Final = {"type": "string", "pattern": f"^{messages.NAME}$"}
_EVERYWHERE: Final = (
    "malformed_request", "token_missing", "token_malformed", "token_expired", "token_unknown", "scope_missing",
    "suspended", "internal", "overloaded", "draining",
)  # fmt: skip


def _token(scope_prefix: str) -> Node:
    form = {
        "type": "object",
        "properties": {
            "grant_type": {"type": "string", "enum": ["client_credentials"]},
            "scope": {"type": "string", "description": f"Several with a space between: {scope_prefix}issue_vouchers …"},
            "client_id": _TEXT,
            "client_secret": _TEXT,
        },
        "required": ["grant_type"],
    }
    refused = {
        status: _answer(messages.TokenRefused, text, media="application/json")
        for status, text in (
            ("400", "`invalid_request`, `unsupported_grant_type` or `invalid_scope`"),
            ("401", "`invalid_client`"),
            ("413", "The form is too large"),
            ("415", "Not a form"),
            ("429", "`slow_down`: too many wrong secrets"),
            ("503", "`temporarily_unavailable`"),
        )
    }
    return {
        "operationId": "getToken", "tags": ["Client API v3"], "summary": "An access token for an hour",
        "security": [{"secret": []}, {}],
        "requestBody": {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": form}}},
        "responses": {"200": _answer(messages.TokenAnswer, "The token")} | _both(refused, _problems(())),
    }  # fmt: skip


def _both(some: Node, others: Node) -> Node:
    """Answers of two kinds: where they share a status, it has two forms."""
    merged = dict(others)
    for status, answer in some.items():
        other = merged.get(status)
        merged[status] = answer if other is None else answer | {"content": answer["content"] | other["content"]}
    return merged


def _body(message: type) -> Node:
    return {"required": True, "content": {"application/json": {"schema": _ref(message)}}}


def _answer(message: type, description: str, headers: Node | None = None, media: str = "application/json") -> Node:
    answer: Node = {"description": description, "content": {media: {"schema": _ref(message)}}}
    return answer | ({"headers": headers} if headers else {})


def _ref(message: type) -> Node:
    return {"$ref": f"#/components/schemas/{message.__name__}"}


def _problems(codes: Iterable[str]) -> Node:
    """The refusals of the Voucher Request API, and those of HTTP itself."""
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    for code in dict.fromkeys((*codes, *_ANY)):
        by_status[PROBLEMS[code].status].append(code)
    return {
        str(status): _answer(
            messages.Problem, _list(f"`{code}`: {PROBLEMS[code].title}" for code in codes), None, _PROBLEM
        )
        for status, codes in sorted(by_status.items())
    }


_PROBLEM: Final = "application/problem+json"


def _refusals(names: Iterable[str]) -> Node:
    """The refusals of Client API v3, with those of HTTP itself in their own form."""
    answers = _problems(())
    by_status: defaultdict[int, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        by_status[REFUSALS[name].status].append(name)
    for status, some in sorted(by_status.items()):
        answer = answers.setdefault(str(status), {"content": {}})
        answer["description"] = _list(f"`{REFUSALS[name].code}`: {REFUSALS[name].message}" for name in some)
        answer["content"]["application/json"] = {
            "schema": _ref(messages.Refused),
            "examples": {
                REFUSALS[name].code: {"value": {"request_id": _EXAMPLE, "error": error_body(name)}} for name in some
            },
        }
    return answers


_EXAMPLE: Final = "bb1c73c1-da6a-4773-9a15-91de167fe263"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
