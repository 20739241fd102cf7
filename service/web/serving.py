"""One serving process over any issuer: the conversation with its parent, the server, the drain.

The control socket is a conversation of lines of JSON.  The parent's first line holds the settings (they may hold
passwords, so they are neither arguments nor environment), a later one tells the process to drain, and its end means
that the parent is dead, which is the same.  The process says when it becomes ready or stops being so, that it
drains, and, before it gives up, why it can't work with these settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import structlog
import uvicorn
import uvloop

from service import logs, metrics
from service.errors import Misconfigured
from service.garbage import collect_rarely
from service.settings import Settings
from service.web.protocol import PARTING_MAX, bounded

if TYPE_CHECKING:  # the parent imports this file, and neither an API nor what one works with
    from service.web.app import App

# Open connections of one process: each costs some 20 KB; terminals behind a proxy need far fewer.
CONNECTIONS_MAX: Final = 10_000
# File descriptors that are not client connections: Redis, the store, metrics, and some air.
OTHER_FILES: Final = 128 + PARTING_MAX
# Longer than the usual minute after which proxies drop an idle connection: the side that closes should be
# the one that sends the next request.
KEEP_ALIVE_S: Final = 75
BACKLOG: Final = 2_048  # connections waiting to be accepted: a burst of a tenth of a second
HANDSHAKE_S: Final = 5.0  # a TLS handshake is two round trips
GOODBYE_S: Final = 0.5  # for the other side's end of TLS, which an idle client does not send: a drain waits for it
WATCH_S: Final = 0.05  # between two looks at whether the issuer is ready
FLUSH_S: Final = 0.5  # between two additions of what was counted to the metrics
SETTINGS_LINE_MAX: Final = 65_536  # bytes

TEMPORARY_PREFIX: Final = "voucherd-metrics-"  # of a directory for metrics that goes with the parent

MISCONFIGURED: Final = 78  # exit status; EX_CONFIG of sysexits.h

Build = Callable[[Settings], contextlib.AbstractAsyncContextManager["App"]]


class Order(msgspec.Struct):
    """What the parent says."""

    drain: bool = False


class Word(msgspec.Struct, omit_defaults=True):
    """What the process says."""

    state: Literal["starting", "ready", "draining", "misconfigured"]
    reason: str = ""


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us.  ``handshake_s`` bounds a TLS handshake."""

    def __init__(self, config: uvicorn.Config, *, handshake_s: float = HANDSHAKE_S) -> None:
        super().__init__(config)
        self._handshake_s = handshake_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.is_ssl:
            # uvicorn leaves these at the loop's 60 s and 30 s: so long would a silent client cost a connection
            # that nobody counts, and an idle one hold up a drain.
            loop: Any = asyncio.get_running_loop()
            loop.create_server = partial(
                loop.create_server, ssl_handshake_timeout=self._handshake_s, ssl_shutdown_timeout=GOODBYE_S
            )
        await super().startup(sockets)


async def run(listener: socket.socket, control: socket.socket, settings: Settings, build: Build) -> int:
    """Serves on ``listener`` until told to drain by a line or the end of ``control``, or by SIGTERM.

    Returns the exit status.  By then every request that was under way is answered, unless it took longer than
    ``drain_s``.
    """
    reader, writer = await asyncio.open_unix_connection(sock=control)

    def say(word: Word) -> None:
        if not writer.is_closing():
            writer.write(msgspec.json.encode(word) + b"\n")

    try:
        async with build(settings) as app:
            server = Server(
                configured(app, settings, connections_max=_room_for_connections()),
                handshake_s=settings.receive_timeout_ms / 1000,
            )

            def drain() -> None:
                if not server.should_exit:
                    server.should_exit = True
                    say(Word("draining"))

            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)
            tasks = [
                asyncio.create_task(_obey(reader, drain)),
                asyncio.create_task(_watch(app, server, say)),
                asyncio.create_task(_flush(app)),
            ]
            try:
                await server.serve(sockets=[listener])
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                app.flush_tallies()
    except Misconfigured as fault:
        say(Word("misconfigured", str(fault)))
        return MISCONFIGURED
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return 0


def configured(app: App, settings: Settings, *, connections_max: int) -> uvicorn.Config:
    """uvicorn's configuration of the public port: httptools with our bounds, TLS if the settings name a certificate, no
    banner, no access log."""
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=bounded(app, receive_timeout_ms=settings.receive_timeout_ms, connections_max=connections_max),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
        ssl_certfile=settings.tls_cert_file or None,
        ssl_keyfile=settings.tls_key_file or None,
    )


async def _obey(reader: asyncio.StreamReader, drain: Callable[[], None]) -> None:
    """Drains at the parent's word, or when there is no parent any more."""
    told = False
    with contextlib.suppress(ConnectionError):
        while not told and (line := await reader.readline()):
            told = msgspec.json.decode(line, type=Order).drain
    drain()
    if not told and (directory := metrics.given_directory()) and directory.name.startswith(TEMPORARY_PREFIX):
        shutil.rmtree(directory, ignore_errors=True)  # the parent can't any more


async def _watch(app: App, server: Server, say: Callable[[Word], None]) -> None:
    """Tells the parent whenever the application becomes ready or stops being so."""
    said = False
    while not server.should_exit:
        if app.ready and server.started and not said:
            gc.collect()
            gc.freeze()  # the catalogue and the modules stay; no collection need look at them again
        if (app.ready and server.started) != said:
            said = not said
            say(Word("ready" if said else "starting"))
        await asyncio.sleep(WATCH_S)


async def _flush(app: App) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        app.note_queue()  # here and not with each batch: it grows while one is not answered
        while app.flush_some_tallies():
            await asyncio.sleep(0)  # requests are answered in between


def _room_for_connections() -> int:
    """Raises this process's limit of open files to what CONNECTIONS_MAX needs, as far as it may; returns what fits."""
    wanted = CONNECTIONS_MAX + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            structlog.get_logger(__name__).warning("few_open_files", limit=soft, connections_max=soft - OTHER_FILES)
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS_MAX, soft - OTHER_FILES))


def main(arguments: list[str], build: Build) -> int:
    """Runs the process on the two inherited descriptors; returns its exit status."""
    listening, controlling = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to drain
    collect_rarely()
    control = socket.socket(fileno=controlling)
    settings = msgspec.json.decode(_line(control), type=Settings)
    logs.configure("serving", style=settings.log_format, level=settings.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(socket.socket(fileno=listening), control, settings, build))


def _line(control: socket.socket) -> bytes:
    """The first line; what follows stays unread."""
    line = b""
    while not line.endswith(b"\n") and len(line) < SETTINGS_LINE_MAX:
        byte = control.recv(1)
        if not byte:
            raise SystemExit(0)  # the parent died before it said anything
        line += byte
    return line
