"""An ASGI application called without a server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Scope


class Seen(msgspec.Struct):
    """One answer as the client sees it; ``received``: messages of the body that the application asked for."""

    status: int
    headers: dict[str, str]
    body: bytes
    received: int

    @property
    def problem(self) -> dict[str, Any]:
        """The body, which is a JSON object."""
        content: dict[str, Any] = json.loads(self.body)
        return content


async def answer(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    headers: Iterable[tuple[bytes, bytes]] = (),
    body: bytes | Iterable[bytes] = b"",
    query: bytes = b"",
    disconnects: bool = False,
) -> Seen:
    """What ``app`` answers; status 0 if nothing.  ``body`` comes whole or in pieces; ``disconnects``: then the client
    goes away."""
    pieces = [body] if isinstance(body, bytes) else list(body)
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) or disconnects}
        for number, piece in enumerate(pieces, 1)
    ]
    sent: list[Message] = []
    received = 0

    async def receive() -> Message:
        nonlocal received
        received += 1
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query, "root_path": "", "scheme": "http",
        "headers": list(headers), "server": ("127.0.0.1", 8080), "client": ("127.0.0.1", 50_000), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    if not sent:
        return Seen(0, {}, b"", received)
    start, *rest = sent
    named = {name.decode(): value.decode() for name, value in start["headers"]}
    assert len(named) == len(start["headers"]), "a header was answered twice"
    return Seen(start["status"], named, b"".join(message.get("body", b"") for message in rest), received)
