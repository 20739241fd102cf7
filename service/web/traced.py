"""The application and the issue script, each call of them a span (``service.tracing``).

A request's trace goes on from its span, so that the ledger names the span in which it was issued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

from opentelemetry.trace import Span, Status, StatusCode
from redis.asyncio import Redis
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope

from service import traceparent
from service.domain import Outcome, Request
from service.scripts import Reply, Routed, Scripts
from service.tracing import Attributes, Tracing, failed, trace_of
from service.web import incoming
from service.web.app import Api, App
from service.web.exchange import Head
from service.web.problems import Answer
from service.web.v1 import PATH, Issuing
from service.web.v3 import PREFIX, ClientApi

_PLAIN: Final = {"v1": PATH, "v3": f"{PREFIX}products/{{code}}"}  # routes of requests for vouchers


class TracedApp(App):
    """``App``, with a span for each request of both APIs."""

    def __init__(
        self, tracing: Tracing, issuer: Issuing, client_api: ClientApi | None = None, routes: Sequence[BaseRoute] = ()
    ) -> None:
        super().__init__(issuer, client_api, routes)
        self._tracing = tracing
        self._vouchers = _TracedApi(tracing, self._vouchers)
        if self._client_api is not None:
            self._client_api = _TracedApi(tracing, self._client_api)

    def begin(
        self, head: Head, key: bytes, body: bytes | bytearray, answered: Callable[[Answer], None], trace: str = ""
    ) -> bool:
        """As ``App.begin`` does.  The span of what is no plain request is never ended, and so never was: it gets
        another one on its other way."""
        route = _PLAIN[head.api.name]
        span = self._tracing.request(f"POST {route}", trace, {"http.request.method": "POST", "http.route": route})

        def told(answer: Answer) -> None:
            _end(span, answer)
            answered(answer)

        return super().begin(head, key, body, told, trace_of(span) or trace)


class _TracedApi:
    """One of the published contracts, with a span for each request."""

    def __init__(self, tracing: Tracing, api: Api) -> None:
        self._tracing = tracing
        self._api = api

    async def answer(self, scope: Scope, receive: Receive) -> Answer | None:
        pairs: list[tuple[bytes, bytes]] = scope["headers"]
        route = _route(scope["path"])
        said = {"http.request.method": scope["method"], "http.route": route}
        span = self._tracing.request(f"{scope['method']} {route}", incoming.trace_of(dict(pairs), pairs), said)
        if trace := trace_of(span):
            within = [pair for pair in pairs if pair[0] != traceparent.NAME]
            scope = {**scope, "headers": [*within, (traceparent.NAME, trace.encode())]}
        try:
            answer = await self._api.answer(scope, receive)
        except (Exception, asyncio.CancelledError) as fault:
            failed(span, fault)
            span.end()
            raise
        if answer is None:  # the client went away
            span.end()
        else:
            _end(span, answer)
        return answer

    @property
    def name(self) -> str:
        return self._api.name

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        return self._api.head(path, headers)  # it names the API itself: the application has the span of a plain request

    def plain(self, head: Head, key: bytes, body: bytes | bytearray, trace: str = "") -> tuple[str, Request] | None:
        return self._api.plain(head, key, body, trace)

    def told(self, outcome: Outcome, request: Request, key: bytes) -> Answer:
        return self._api.told(outcome, request, key)

    def refused(self, code: str) -> Answer:
        return self._api.refused(code)


class TracedScripts(Scripts):
    """``Scripts``, with a span for each batch, linked to the spans of its requests."""

    def __init__(self, tracing: Tracing, redis: Redis) -> None:
        super().__init__(redis)
        self._tracing = tracing

    async def issue(self, batch: Sequence[Routed], **given: Any) -> Reply:
        traces = [routed.request.trace for routed in batch]
        said: Attributes = {"db.system.name": "redis", "db.operation.name": "EVALSHA", "voucherd.requests": len(batch)}
        with self._tracing.step("issue", traces, said) as span:
            reply = await super().issue(batch, **given)
            span.set_attribute("voucherd.status", reply.status)
            return reply


def _end(span: Span, answer: Answer) -> None:
    span.set_attributes({"http.response.status_code": answer.status, "voucherd.code": answer.code})
    for name, value in (
        ("voucherd.distributor", answer.distributor),
        ("voucherd.campaign", answer.campaign),
        ("voucherd.request_id", answer.request_id),
    ):
        if value:
            span.set_attribute(name, value)
    if answer.status >= 500:
        span.set_status(Status(StatusCode.ERROR, answer.code))
    span.end()


def _route(path: str) -> str:
    """The path, without what names a single thing."""
    if not path.startswith(PREFIX):
        return PATH
    resource, slash, name = path.removeprefix(PREFIX).partition("/")
    if resource not in _NAMED:
        return f"{PREFIX}*"
    return f"{PREFIX}{resource}" + (_NAMED[resource] if slash and name else "")


_NAMED: Final = {"products": "/{code}", "vouchers": "/{id}"}
