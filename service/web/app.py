"""The ASGI application of the public port: the one place where its parts are put together.

A plain voucher request gets here past ASGI (``begin``), any other one ahead of Starlette's router and middleware,
which cost 10 us a request; every other path goes through Starlette.  Whatever happens, the answer is in the
contract's form.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from time import perf_counter

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.domain import Outcome
from service.logs import where
from service.web.problems import Answer, method_not_allowed, problem
from service.web.v1 import PATH, Issuing, VoucherRequests, plain, told


class App:
    """The application over one issuer, which lives as long as the application's lifespan."""

    def __init__(self, issuer: Issuing) -> None:
        self.tally = metrics.Tally("v1")
        self._issuer = issuer
        self._vouchers = VoucherRequests(issuer)
        self._others = problems_only(Starlette(lifespan=self._lifespan))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._others(scope, receive, send)
            return
        began = perf_counter()
        answer: Answer | None
        try:
            answer = await self._vouchers.answer(scope, receive)
        except asyncio.CancelledError:  # the drain took too long; whether a voucher was issued is not known
            answer = problem("draining")
        except Exception as fault:  # noqa: BLE001 - a defect, and the client has to be told in the contract's form
            answer = defect(fault, PATH)
        if answer is None:
            return
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})
        self.tally.count(answer.status, answer.code, perf_counter() - began)

    def begin(self, headers: dict[bytes, bytes], body: bytes | bytearray, answered: Callable[[Answer], None]) -> bool:
        """Answers a voucher request that came whole, by calling ``answered`` once.  False: it is not a plain one (or
        not one at all), nothing was done, and ``__call__`` answers it."""
        began = perf_counter()

        def tell(answer: Answer) -> None:
            answered(answer)
            self.tally.count(answer.status, answer.code, perf_counter() - began)

        def settle(outcome: Outcome) -> None:
            try:
                answer = told(outcome, request)
            except Exception as fault:  # noqa: BLE001 - as above
                answer = defect(fault, PATH)
            tell(answer)

        try:
            if (asked := plain(headers, body)) is None:
                return False
            token, request = asked
            self._issuer.submit(token, request, settle)
        except Exception as fault:  # noqa: BLE001 - as above
            tell(defect(fault, PATH))
        return True

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Starts the issuer; at the end, no request is under way any more and the issuer drains what is left."""
        self._issuer.start()
        yield
        await self._issuer.drain()
        self.tally.flush()


def problems_only(starlette: Starlette) -> ASGIApp:
    """An application that answers as ``starlette`` does, except that every refusal and failure is problem+json."""
    starlette.router.redirect_slashes = False
    starlette.add_exception_handler(HTTPException, _refused)
    starlette.add_exception_handler(Exception, _failed)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette raises again what _failed has answered and logged, for servers that would log its text.
        with contextlib.suppress(*([Exception] if scope["type"] == "http" else [])):
            await starlette(scope, receive, send)

    return app


def defect(fault: Exception, path: str) -> Answer:
    """500, after the log says what and where it was, without the text of it."""
    metrics.defects.inc()
    structlog.get_logger(__name__).error("defect", path=path, **where(fault))
    return problem("internal")


def response(answer: Answer) -> Response:
    """``answer`` as Starlette sends it."""
    sent = Response(answer.body, status_code=answer.status)
    sent.raw_headers = list(answer.headers)
    return sent


async def _failed(request: Request, fault: Exception) -> Response:
    return response(defect(fault, request.url.path))


async def _refused(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)  # registered for nothing else
    if refusal.status_code == 405:
        return response(method_not_allowed((refusal.headers or {}).get("Allow", "")))
    return response(problem("not_found"))
