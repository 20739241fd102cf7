"""The ops port: metrics and health, answered by the parent of the serving processes.

/metrics   everything summed over the processes, in Prometheus' text format
/healthz   200 while the parent is alive
/readyz    200 while every serving process has loaded a catalogue once and none drains; else 503.  Redis or the
           store being away is a metric, and no reason to take every process out of rotation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.metrics import Supervision, exposition
from service.web.defects import problems_only


class Readiness(msgspec.Struct):
    """Body of /readyz.  ``missing`` says what it waits for, a line each; empty if ready."""

    ready: bool
    workers: int
    workers_ready: int
    missing: list[str]


def ops(directory: Path, supervision: Supervision, readiness: Callable[[], Readiness]) -> ASGIApp:
    """The application of the ops port.  ``directory`` is where the processes keep their metrics."""

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(exposition, directory, supervision)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def health(_: Request) -> Response:
        return _json(200, {"status": "alive"})

    async def ready(_: Request) -> Response:
        now = readiness()
        return _json(200 if now.ready else 503, now)

    routes = [Route("/metrics", metrics), Route("/healthz", health), Route("/readyz", ready)]
    return problems_only(Starlette(routes=routes))


def _json(status: int, content: object) -> Response:
    return Response(msgspec.json.encode(content), status, headers={"content-type": "application/json"})
