"""What an application of Starlette's answers when none of its routes does, and what is noted of a defect.

The parent of the serving processes answers its ops port by this as well, and imports nothing of the APIs for it.
"""

from __future__ import annotations

import contextlib

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics, traceparent
from service.logs import where
from service.web.problems import Answer, method_not_allowed, problem


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


def note_defect(fault: Exception, path: str, *, request_id: str = "", trace: str = "") -> None:
    """The log says what and where it was, without the text of it, and of which request; a metric says that it was."""
    metrics.defects.inc()
    trace_id, parent_id = traceparent.ids(trace)
    structlog.get_logger(__name__).error(
        "defect", path=path, request_id=request_id, trace_id=trace_id, parent_id=parent_id, **where(fault)
    )


def response(answer: Answer) -> Response:
    """``answer`` as Starlette sends it."""
    sent = Response(answer.body, status_code=answer.status)
    sent.raw_headers = list(answer.headers)
    return sent


async def _failed(request: Request, fault: Exception) -> Response:
    note_defect(fault, request.url.path)
    return response(problem("internal"))


async def _refused(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)  # registered for nothing else
    if refusal.status_code == 405:
        return response(method_not_allowed((refusal.headers or {}).get("Allow", "")))
    return response(problem("not_found"))
