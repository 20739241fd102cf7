"""An HTTP client on so many connections.  Closed loop: each sends its next request when the last one is answered.  With
a rate: requests are due at a steady pace, whatever the answers do, and a latency counts from when its request was due.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import cast

import msgspec
import uvloop

# Longest silence of a server before the run is given up.
SILENCE_S_MAX = 10.0

# With a rate, requests that are due are sent together this often: a timer for each would keep the generator busy.
PACE_S = 0.001

# After connecting: what a server does for new connections is not what is measured.
SETTLE_S = 0.5


class Run(msgspec.Struct, frozen=True):
    """What a run saw: latencies in seconds by status, and seconds from the first request to the last answer."""

    latencies: dict[int, list[float]]
    seconds: float

    @property
    def statuses(self) -> dict[int, int]:
        """How many answers had which status."""
        return {status: len(seen) for status, seen in self.latencies.items()}

    def percentile(self, share: float, status: int = 200) -> float:
        """The latency in seconds that ``share`` (0 to 1) of the answers of this status did not pass; 0 without any."""
        seen = sorted(self.latencies.get(status, ()))
        return seen[min(len(seen) - 1, int(share * len(seen)))] if seen else 0.0


def run(
    host: str, port: int, connections: int, requests: int, request: Callable[[int], bytes], rate: float | None = None
) -> Run:
    """Sends ``requests`` requests, the i-th as ``request(i)`` gives it, over ``connections`` kept-alive connections;
    ``rate`` a second if one is given, otherwise as fast as they are answered.

    Raises ConnectionError if the server closes a connection, TimeoutError if it falls silent.
    """
    return uvloop.run(_run(host, port, connections, requests, request, rate))


async def _run(
    host: str, port: int, connections: int, requests: int, request: Callable[[int], bytes], rate: float | None
) -> Run:
    loop = asyncio.get_running_loop()
    state = _State(requests, request, loop.create_future())
    for _ in range(min(connections, requests)):
        await loop.create_connection(lambda: _Connection(state), host, port)
    await asyncio.sleep(SETTLE_S)
    began = time.perf_counter()
    pace = None
    if rate is None:
        state.due.extend([0.0] * requests)
        for connection in list(state.connections):
            connection.send()
    else:
        state.idle.extend(state.connections)
        pace = asyncio.ensure_future(_pace(state, began, requests, rate))
    answered = -1
    while not state.done.done():
        await asyncio.wait([state.done], timeout=SILENCE_S_MAX)
        if not state.done.done() and answered == state.answered:
            raise TimeoutError(f"no answer for {SILENCE_S_MAX:.0f} s after {answered} answers")
        answered = state.answered
    state.done.result()
    if pace is not None:
        await pace
    seconds = time.perf_counter() - began
    for connection in state.connections:
        connection.close()
    return Run(dict(state.latencies), seconds)


async def _pace(state: _State, began: float, requests: int, rate: float) -> None:
    number = 0
    while number < requests:
        now = time.perf_counter()
        while number < requests and (due := began + number / rate) <= now:
            number += 1
            state.due.append(due)
            if state.idle:
                state.idle.popleft().send()
        await asyncio.sleep(PACE_S)


class _State:
    def __init__(self, requests: int, request: Callable[[int], bytes], done: asyncio.Future[None]) -> None:
        self.requests = requests
        self.request = request
        self.done = done
        self.sent = 0
        self.answered = 0
        self.latencies: defaultdict[int, list[float]] = defaultdict(list)
        self.connections: list[_Connection] = []
        self.due = deque[float]()  # when the requests that wait should have been sent; 0: at once, counted from then
        self.idle = deque[_Connection]()


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
        """The next request that is due, or none: then it waits for one."""
        state = self._state
        if state.due:
            data = state.request(state.sent)
            state.sent += 1
            self._sent_at = state.due.popleft() or time.perf_counter()
            self._transport.write(data)
        else:
            state.idle.append(self)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        head = buffer.find(b"\r\n\r\n")
        if head < 0:
            self._buffer = buffer
            return
        at = buffer[:head].lower().find(b"content-length: ")
        length = int(buffer[at + 16 : buffer.index(b"\r\n", at)])
        if len(buffer) < head + 4 + length:
            self._buffer = buffer
            return
        self._buffer = b""
        state = self._state
        state.answered += 1
        state.latencies[int(buffer[9:12])].append(time.perf_counter() - self._sent_at)
        if state.answered == state.requests:
            state.done.set_result(None)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing and not self._state.done.done():
            self._state.done.set_exception(ConnectionError("the server closed a connection"))

    def close(self) -> None:
        self._closing = True
        self._transport.close()
