"""The ops port: metrics and health, answered by the parent of the serving processes, and by the worker.

/metrics   everything summed over the processes (the worker: its own), in Prometheus' text format
/healthz   200 while the parent (the worker) is alive
/readyz    200 while every serving process has loaded a catalogue once and none drains; else 503.  Redis or the
           store being away is a metric, and no reason to take every process out of rotation.  The worker has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.settings import Settings, refused
from service.web.defects import problems_only
from service.web.protocol import bounded
from service.web.serving import BACKLOG, Server

OPS_CONNECTIONS_MAX: Final = 64  # a scraper, a probe, an operator
OPS_SHUTDOWN_S: Final = 1  # seconds for a scrape under way
PRIVILEGED_PORTS: Final = 1_024  # those below it are root's


class Readiness(msgspec.Struct):
    """Body of /readyz.  ``missing`` says what it waits for, a line each; empty if ready."""

    ready: bool
    workers: int
    workers_ready: int
    missing: list[str]


def ops(exposition: Callable[[], bytes], readiness: Callable[[], Readiness] | None = None) -> ASGIApp:
    """The application of the ops port.  ``exposition`` gives the metrics; it is called in a thread."""

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(exposition)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def health(_: Request) -> Response:
        return _json(200, {"status": "alive"})

    routes = [Route("/metrics", metrics), Route("/healthz", health)]
    if readiness is not None:

        async def ready(_: Request) -> Response:
            now = readiness()
            return _json(200 if now.ready else 503, now)

        routes.append(Route("/readyz", ready))
    return problems_only(Starlette(routes=routes))


@contextlib.contextmanager
def listening(settings: Settings, host_setting: str, port_setting: str) -> Iterator[socket.socket]:
    """A socket that takes connections, where these two settings say.  Raises Misconfigured, naming the one that has to
    be another."""
    host, port = getattr(settings, host_setting), getattr(settings, port_setting)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            used = error.errno == errno.EADDRINUSE
            reason = "is in use: stop what uses it or choose another" if used else "may not be opened by this user"
            other = port - 1 if port > PRIVILEGED_PORTS else port + 8_000
            raise refused(port_setting, port, f"port {port} of {host} {reason}", other) from None
        why = str(error.strerror).partition(" (while ")[0]  # the rest tells the address again
        raise refused(host_setting, host, f"this machine can't listen there: {why}") from None
    except UnicodeError:
        raise refused(host_setting, host, "is no name of a machine") from None
    with listener:
        yield listener


@contextlib.asynccontextmanager
async def serving_ops(app: ASGIApp, listener: socket.socket, settings: Settings) -> AsyncIterator[None]:
    """The ops port answers."""
    server = Server(
        uvicorn.Config(
            app,
            interface="asgi3",
            http=bounded(receive_timeout_ms=settings.receive_timeout_ms, connections_max=OPS_CONNECTIONS_MAX),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=OPS_SHUTDOWN_S,
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await running


def _json(status: int, content: object) -> Response:
    return Response(msgspec.json.encode(content), status, headers={"content-type": "application/json"})
