"""The ASGI application of the public port: the one place where its parts are put together.

A plain request for vouchers gets here past ASGI (``begin``), any other one ahead of Starlette's router and middleware,
which cost 10 us a request; every other path goes through Starlette.  Whatever happens, the answer is in the
contract's form.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Final, Protocol

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from service import metrics
from service.domain import Outcome
from service.domain import Request as Asked
from service.web.defects import note_defect, problems_only
from service.web.exchange import Head, PlainApi
from service.web.incoming import trace_of
from service.web.problems import Answer
from service.web.refusals import OF_NOTE, Refusals
from service.web.v1 import PATH, Issuing, VoucherRequests
from service.web.v3 import PREFIX, ClientApi


class Api(PlainApi, Protocol):
    """One of the published contracts."""

    async def answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer to one request; None if the client went away while it was sending."""


class App:
    """The application over one issuer, which lives as long as the application's lifespan.

    ``client_api`` answers what is below /v3/, ``routes`` what else there is; without them there is neither.
    """

    def __init__(self, issuer: Issuing, client_api: ClientApi | None = None, routes: Sequence[BaseRoute] = ()) -> None:
        self._tallies = {"v1": metrics.Tally("v1"), "v3": metrics.Tally("v3")}
        self._refusals = Refusals()
        self._issuer = issuer
        self._vouchers: Api = VoucherRequests(issuer)
        self._client_api: Api | None = client_api
        self._others = problems_only(Starlette(routes=routes, lifespan=self._lifespan))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._answer(self._vouchers, scope, receive, send)
        elif scope["type"] == "http" and self._client_api is not None and scope["path"].startswith(PREFIX):
            await self._answer(self._client_api, scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def _answer(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        answer: Answer | None
        try:
            answer = await api.answer(scope, receive)
        except asyncio.CancelledError:  # the drain took too long; whether a voucher was issued is not known
            answer = api.refused("draining")
        except Exception as fault:  # noqa: BLE001 - a defect, and the client has to be told in the contract's form
            answer = api.refused("internal")
            note_defect(fault, scope["path"], request_id=answer.request_id, trace=_trace_of(scope))
        if answer is None:
            return
        if answer.code in OF_NOTE:
            self._refusals.note(api.name, answer, _trace_of(scope))
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})
        self._count(api, answer, began)

    @property
    def ready(self) -> bool:
        """A catalogue was loaded once, and new requests are taken."""
        return self._issuer.ready

    def flush_tallies(self) -> None:
        """What was counted is in the metrics."""
        for tally in self._tallies.values():
            tally.flush()

    def note_queue(self) -> None:
        """The metric says how many vouchers wait for a batch now."""
        metrics.queue.set(self._issuer.queued)

    def flush_some_tallies(self) -> bool:
        """A bounded part of what was counted is in the metrics; whether there is more of it."""
        return any(tally.flush_some() for tally in self._tallies.values())

    def head(self, path: bytes, headers: dict[bytes, bytes]) -> Head | None:
        """What a POST to ``path`` says, if it may be a plain request for vouchers."""
        if path == _VOUCHER_PATH:
            return self._vouchers.head(path, headers)
        return None if self._client_api is None else self._client_api.head(path, headers)

    def begin(
        self, head: Head, key: bytes, body: bytes | bytearray, answered: Callable[[Answer], None], trace: str = ""
    ) -> bool:
        """Answers a request for vouchers that came whole, by calling ``answered`` once.  False: it is not a plain one
        (or not one at all), nothing was done, and ``__call__`` answers it."""
        began = perf_counter()
        request_id = ""
        try:
            if (asked := head.api.plain(head, key, body, trace)) is None:
                return False
            credential, request = asked
            request_id = request.key
            self._issuer.submit(credential, request, partial(self._settle, answered, head.api, request, key, began))
        except Exception as fault:  # noqa: BLE001 - as above
            note_defect(fault, head.api.name, request_id=request_id, trace=trace)
            self._tell(answered, head.api, head.api.refused("internal"), began)
        return True

    def _settle(
        self, answered: Callable[[Answer], None], api: PlainApi, request: Asked, key: bytes, began: float,
        outcome: Outcome,
    ) -> None:  # fmt: skip
        try:
            answer = api.told(outcome, request, key)
        except Exception as fault:  # noqa: BLE001 - as above
            note_defect(fault, api.name, request_id=request.key, trace=request.trace)
            answer = api.refused("internal")
        if answer.code in OF_NOTE:
            self._refusals.note(api.name, answer, request.trace)
        self._tell(answered, api, answer, began)

    def _tell(self, answered: Callable[[Answer], None], api: PlainApi, answer: Answer, began: float) -> None:
        answered(answer)
        self._count(api, answer, began)

    def _count(self, api: PlainApi, answer: Answer, began: float) -> None:
        seconds = perf_counter() - began
        self._tallies[api.name].count(
            answer.status, answer.code, seconds, answer.distributor, answer.campaign, answer.issued
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Starts the issuer; at the end, no request is under way any more and the issuer drains what is left."""
        self._issuer.start()
        yield
        await self._issuer.drain()
        self.flush_tallies()


def _trace_of(scope: Scope) -> str:
    return trace_of(dict(scope["headers"]), scope["headers"])


_VOUCHER_PATH: Final = PATH.encode()
