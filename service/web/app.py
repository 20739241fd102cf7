"""The ASGI application of the public port: the one place where its parts are put together.

A plain voucher request gets here past ASGI (``begin``), any other one ahead of Starlette's router and middleware,
which cost 10 us a request; every other path goes through Starlette.  Whatever happens, the answer is in the
contract's form.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Protocol

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from service import metrics
from service.domain import Outcome
from service.domain import Request as Asked
from service.web.defects import note_defect, problems_only
from service.web.problems import Answer, problem
from service.web.v1 import PATH, Head, Issuing, VoucherRequests, plain, plain_head, told
from service.web.v3 import PREFIX, ClientApi


class Api(Protocol):
    """One of the published contracts."""

    async def answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer to one request; None if the client went away while it was sending."""

    def refused(self, code: str) -> Answer:
        """``draining`` or ``internal`` in the contract's form."""


class App:
    """The application over one issuer, which lives as long as the application's lifespan.

    ``client_api`` answers what is below /v3/, ``routes`` what else there is; without them there is neither.
    """

    def __init__(self, issuer: Issuing, client_api: ClientApi | None = None, routes: Sequence[BaseRoute] = ()) -> None:
        self._tallies = {"v1": metrics.Tally("v1"), "v3": metrics.Tally("v3")}
        self._tally = self._tallies["v1"]
        self._issuer = issuer
        self._vouchers = VoucherRequests(issuer)
        self._client_api = client_api
        self._others = problems_only(Starlette(routes=routes, lifespan=self._lifespan))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._answer(self._vouchers, self._tally, scope, receive, send)
        elif scope["type"] == "http" and self._client_api is not None and scope["path"].startswith(PREFIX):
            await self._answer(self._client_api, self._tallies["v3"], scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def _answer(self, api: Api, tally: metrics.Tally, scope: Scope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        answer: Answer | None
        try:
            answer = await api.answer(scope, receive)
        except asyncio.CancelledError:  # the drain took too long; whether a voucher was issued is not known
            answer = api.refused("draining")
        except Exception as fault:  # noqa: BLE001 - a defect, and the client has to be told in the contract's form
            note_defect(fault, scope["path"])
            answer = api.refused("internal")
        if answer is None:
            return
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})
        tally.count(answer.status, answer.code, perf_counter() - began, answer.distributor, answer.campaign)

    @property
    def ready(self) -> bool:
        """A catalogue was loaded once, and new requests are taken."""
        return self._issuer.ready

    def flush_tallies(self) -> None:
        """What was counted is in the metrics."""
        for tally in self._tallies.values():
            tally.flush()

    def flush_some_tallies(self) -> bool:
        """A bounded part of what was counted is in the metrics; whether there is more of it."""
        return any(tally.flush_some() for tally in self._tallies.values())

    def head(self, headers: dict[bytes, bytes]) -> Head | None:
        """What the headers of a voucher request say, if it may be a plain one."""
        return plain_head(headers)

    def begin(self, head: Head, body: bytes | bytearray, answered: Callable[[Answer], None]) -> bool:
        """Answers a voucher request that came whole, by calling ``answered`` once.  False: it is not a plain one (or
        not one at all), nothing was done, and ``__call__`` answers it."""
        began = perf_counter()
        try:
            if (request := plain(head, body)) is None:
                return False
            self._issuer.submit(head.token, request, partial(self._settle, answered, request, began))
        except Exception as fault:  # noqa: BLE001 - as above
            note_defect(fault, PATH)
            self._tell(answered, problem("internal"), began)
        return True

    def _settle(self, answered: Callable[[Answer], None], request: Asked, began: float, outcome: Outcome) -> None:
        try:
            answer = told(outcome, request)
        except Exception as fault:  # noqa: BLE001 - as above
            note_defect(fault, PATH)
            answer = problem("internal")
        self._tell(answered, answer, began)

    def _tell(self, answered: Callable[[Answer], None], answer: Answer, began: float) -> None:
        answered(answer)
        self._tally.count(answer.status, answer.code, perf_counter() - began, answer.distributor, answer.campaign)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Starts the issuer; at the end, no request is under way any more and the issuer drains what is left."""
        self._issuer.start()
        yield
        await self._issuer.drain()
        self.flush_tallies()
