"""A closed-loop HTTP client: so many connections, each sends its next request when the last one is answered."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import cast

import msgspec
import uvloop

# Longest silence of a server before the run is given up.
SILENCE_S_MAX = 10.0


class Run(msgspec.Struct, frozen=True):
    """What a run saw: answers by status, seconds from the first request to the last answer, latencies in seconds."""

    statuses: dict[int, int]
    seconds: float
    latencies: list[float]

    def percentile(self, share: float) -> float:
        """The latency in seconds that ``share`` (0 to 1) of the answers did not pass."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def run(host: str, port: int, connections: int, requests: int, request: Callable[[int], bytes]) -> Run:
    """Sends ``requests`` requests, the i-th as ``request(i)`` gives it, over ``connections`` kept-alive connections.

    Raises ConnectionError if the server closes a connection, TimeoutError if it falls silent.
    """
    return uvloop.run(_run(host, port, connections, requests, request))


async def _run(host: str, port: int, connections: int, requests: int, request: Callable[[int], bytes]) -> Run:
    loop = asyncio.get_running_loop()
    state = _State(requests, request, loop.create_future())
    for _ in range(min(connections, requests)):
        await loop.create_connection(lambda: _Connection(state), host, port)
    began = time.perf_counter()
    for connection in list(state.connections):
        connection.send()
    answered = -1
    while not state.done.done():
        await asyncio.wait([state.done], timeout=SILENCE_S_MAX)
        if not state.done.done() and answered == len(state.latencies):
            raise TimeoutError(f"no answer for {SILENCE_S_MAX:.0f} s after {answered} answers")
        answered = len(state.latencies)
    state.done.result()
    seconds = time.perf_counter() - began
    for connection in state.connections:
        connection.close()
    return Run(dict(state.statuses), seconds, state.latencies)


class _State:
    def __init__(self, requests: int, request: Callable[[int], bytes], done: asyncio.Future[None]) -> None:
        self.requests = requests
        self.request = request
        self.done = done
        self.sent = 0
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.connections: list[_Connection] = []


class _Connection(asyncio.Protocol):
    def __init__(self, state: _State) -> None:
        self._state = state
        self._buffer = b""
        self._sent_at = 0.0
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has its own class
        self._state.connections.append(self)

    def send(self) -> None:
        state = self._state
        if state.sent < state.requests:
            data = state.request(state.sent)
            state.sent += 1
            self._sent_at = time.perf_counter()
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        head = buffer.find(b"\r\n\r\n")
        if head < 0:
            self._buffer = buffer
            return
        at = buffer.find(b"content-length: ")
        length = int(buffer[at + 16 : buffer.index(b"\r\n", at)])
        if len(buffer) < head + 4 + length:
            self._buffer = buffer
            return
        self._buffer = b""
        state = self._state
        state.latencies.append(time.perf_counter() - self._sent_at)
        state.statuses[int(buffer[9:12])] += 1
        if len(state.latencies) == state.requests:
            state.done.set_result(None)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing and not self._state.done.done():
            self._state.done.set_exception(ConnectionError("the server closed a connection"))

    def close(self) -> None:
        self._closing = True
        self._transport.close()
