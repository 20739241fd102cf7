"""What stands between voucherd and Redis: passes bytes on, until it is told to hold them, to delay them, to lose
them or to cut.

Also the one address behind which servers change: connections made later go to ``upstream`` as it is then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final, cast

APART_S: Final = 1e-6  # between two pieces of one connection that are late: they keep their order


class Relay:
    """Between clients and a Redis on ``upstream``, a port of loopback."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.refusing = False  # connections are accepted and aborted at once
        self.deaf = False  # what Redis says is lost
        self.lost = 0  # bytes that were
        self.delay_s = 0.0  # what Redis says arrives so much later
        self._open = True
        self._ends: set[_End] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.get_running_loop().create_server(lambda: _Client(self), "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        try:
            yield
        finally:
            server.close()
            self.cut()
            await server.wait_closed()

    def hold(self) -> None:
        """What Redis says is held back, until ``release``."""
        self._open = False

    def release(self) -> None:
        self._open = True
        for end in tuple(self._ends):
            end.flush()

    def say(self, data: bytes) -> None:
        """To every client, as if Redis had said it."""
        for end in tuple(self._ends):
            if isinstance(end, _Client):
                end.say(data)

    def cut(self) -> None:
        """Every connection is reset."""
        for end in tuple(self._ends):
            end.abort()

    def join(self, end: _End) -> None:
        self._ends.add(end)

    def leave(self, end: _End) -> None:
        self._ends.discard(end)

    def passes(self) -> bool:
        return self._open


class _End(asyncio.Protocol):
    """One of the two connections that belong together."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.peer: _End | None = None
        self.transport: asyncio.Transport | None = None
        self.waiting: list[bytes] = []  # for this end to be connected, or to be let through

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.relay.join(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.relay.leave(self)
        if self.peer is not None:
            self.peer.close() if exc is None else self.peer.abort()

    def say(self, data: bytes) -> None:
        self.waiting.append(data)
        self.flush()

    def flush(self) -> None:
        if self.transport is not None and self.waiting and self.lets_through():
            self.transport.writelines(self.waiting)
            self.waiting.clear()

    def lets_through(self) -> bool:
        return True

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Client(_End):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.relay.refusing:
            self.abort()
            return
        self.peer = _Redis(self.relay, self)
        self._connecting = asyncio.ensure_future(self._connect(self.peer))

    async def _connect(self, peer: _End) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: peer, "127.0.0.1", self.relay.upstream)
        except OSError:
            self.abort()
            return
        if self.transport is None or self.transport.is_closing():
            peer.abort()
            return
        peer.flush()

    def data_received(self, data: bytes) -> None:
        assert self.peer is not None
        self.peer.say(data)

    def lets_through(self) -> bool:
        return self.relay.passes()


class _Redis(_End):
    def __init__(self, relay: Relay, client: _Client) -> None:
        super().__init__(relay)
        self.peer = client
        self._due = 0.0  # when what Redis said last arrives

    def data_received(self, data: bytes) -> None:
        assert self.peer is not None
        if self.relay.deaf:
            self.relay.lost += len(data)
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._due = max(now + self.relay.delay_s, self._due + APART_S)
        if self._due <= now:
            self.peer.say(data)
        else:
            loop.call_at(self._due, self.peer.say, data)
