"""What both APIs look at in a request before they know what it asks for: its headers, and its body up to a bound."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from starlette.types import Receive

from service import traceparent

BODY_MAX: Final = 16_384  # bytes; the longest valid body is below 2 KiB

# Twice the same thing said is a mistake; twice something different is how requests are smuggled past a proxy.
_SINGLE: Final = {
    b"authorization": "Authorization",
    b"content-type": "Content-Type",
    b"content-length": "Content-Length",
}


def repeated(pairs: list[tuple[bytes, bytes]]) -> str | None:
    """The first header that was sent more than once and must not be."""
    seen: set[bytes] = set()
    for name, _ in pairs:
        if name in seen and name in _SINGLE:
            return _SINGLE[name]
        seen.add(name)
    return None


def exceeds(length: bytes) -> bool:
    """Whether a body of this Content-Length is too large; one that is no number of a sane length counts as such."""
    return len(length) > 18 or not length.isdigit() or int(length) > BODY_MAX


def trace_of(headers: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]]) -> str:
    """The traceparent of a request, '' if it sent none, a bad one, or several."""
    value = headers.get(traceparent.NAME)
    if value is None or sum(name == traceparent.NAME for name, _ in pairs) > 1:
        return ""
    return traceparent.parsed(value)


async def body_of(receive: Receive) -> bytes | None:
    """The body, or what came of it when it grew above BODY_MAX; None if the client went away while it was sending."""
    body = b""
    while len(body) <= BODY_MAX:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body


_PARAMETER: Final = re.compile(rb"""\s*(?:[\w!#$%&'*+.^`|~-]+=(?:[\w!#$%&'*+.^`|~-]+|"[^"\\]*")\s*)?""")


@lru_cache(maxsize=64)
def is_json(content_type: bytes) -> bool:
    """Whether it is application/json, with any parameters: a body that is not UTF-8 is refused as such."""
    media_type, *parameters = content_type.split(b";")
    return media_type.strip().lower() == b"application/json" and all(map(_PARAMETER.fullmatch, parameters))
