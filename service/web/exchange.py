"""One request for vouchers and its answer without ASGI in between: what most requests of a peak are.

uvicorn makes a task, a scope, an event and two messages for each request, which together cost more than all that
voucherd does for it.  A plain request needs none of them: its body is here in one piece, and its answer comes by a
callback from the batch that it was in.  Nor are its headers read each time: a terminal sends the same ones all day.
An ``Exchange`` stands where uvicorn's protocol expects its own cycle, so every bound and time-out holds for it as for
any other request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.domain import Outcome, Request
from service.web.problems import Answer, Headers


class Head(msgspec.Struct, frozen=True, gc=False):
    """What the headers of a request say if nothing about them is wrong or unusual.

    ``length`` is that of the body in bytes; ``keyed``: there is one Idempotency-Key among them, whose value is looked
    at with the body, so that requests which differ in it alone have one head.
    """

    api: PlainApi
    length: int
    keyed: bool


class PlainApi(Protocol):
    """What each of the published contracts offers beside ASGI."""

    @property
    def name(self) -> str:
        """Which one: ``v1`` or ``v3``."""

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        """What a POST to ``path`` says that may be a plain request; None if it is none."""

    def plain(self, head: Head, key: bytes, body: bytes | bytearray, trace: str = "") -> tuple[str, Request] | None:
        """The credential and the request, if nothing about it is wrong or unusual; ``key``: its Idempotency-Key,
        ``trace``: its traceparent."""

    def told(self, outcome: Outcome, request: Request, key: bytes) -> Answer:
        """What the client is told."""

    def refused(self, code: str) -> Answer:
        """``draining`` or ``internal`` in the contract's form."""


class Lane(Protocol):
    """What ``service.web.app.App`` offers beside ASGI."""

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        """What a POST to ``path`` says that may be a plain request; None if it is none."""

    def begin(
        self, head: Head, key: bytes, body: bytes | bytearray, answered: Callable[[Answer], None], trace: str = ""
    ) -> bool:
        """Calls ``answered`` once, now or later, if the request is a plain one.  False: it is not, nothing was done."""


class Exchange:
    """From the end of a request's headers to its answer, with what uvicorn's protocol wants to know of a cycle."""

    __slots__ = (
        "_done", "_server_headers", "body", "disconnected", "head", "keep_alive", "key", "more_body",
        "response_complete", "trace", "transport",
    )  # fmt: skip

    response_started = False  # the answer is written at once, and then it is complete

    def __init__(
        self,
        head: Head,
        key: bytes,
        transport: asyncio.Transport,
        server_headers: list[tuple[bytes, bytes]],
        keep_alive: bool,
        done: Callable[[Exchange], None],
    ) -> None:
        self.head = head
        self.key = key  # its Idempotency-Key, if it is keyed
        self.trace = ""  # its traceparent, if it has one
        self.transport = transport
        self.keep_alive = keep_alive
        self.body: bytes | bytearray = b""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self._server_headers = server_headers  # uvicorn's own: the date
        self._done = done

    @property
    def message_event(self) -> Exchange:
        """uvicorn tells its application's event that something came; here nobody waits for it."""
        return self

    def set(self) -> None:
        """Nobody waits."""

    def answered(self, answer: Answer) -> None:
        """The answer is on its way to the client, unless that has gone or was answered before."""
        if self.response_complete:
            return
        self.response_complete = True
        # uvicorn tells only the newest of pipelined requests that its client is gone.
        if not (self.disconnected or self.transport.is_closing()):
            self._write(answer)
        self._done(self)

    def _write(self, answer: Answer) -> None:
        start = _start(answer.status, tuple(self._server_headers))
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self.transport.write(b"".join((start, _lines(answer.headers), end, answer.body)))
        if not self.keep_alive:
            self.transport.close()

    def cancel(self, msg: str | None = None) -> None:
        """uvicorn gives up waiting, as it cancels a task: whether a voucher was issued is not known."""
        draining = self.head.api.refused("draining")
        asyncio.get_running_loop().call_soon(self.answered, draining)  # not now: it is counting its tasks


@lru_cache(maxsize=64)  # each status of one second
def _start(status: int, server_headers: Headers) -> bytes:
    return STATUS_LINE[status] + _lines(server_headers)


@lru_cache(maxsize=4_096)  # they differ in the length of the body, and there are few lengths
def _lines(headers: Headers) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
