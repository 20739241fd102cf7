"""HTTP on one connection: uvicorn's httptools protocol, with the bounds that it does not have.

Without them a client may take for ever to send half a request, send a megabyte of headers or two that contradict
each other, and is answered in plain text.  Here:

* a request must be whole within a time limit, and a connection that says nothing is closed after it;
* headers are bounded in number and bytes, and those that say where a request ends or whose it is come once;
* what is no HTTP is answered with problem+json;
* an answer that is given before a large body was read reaches the client: the connection is half closed, and a
  little more of the body is read and thrown away before it is closed (closing at once would reset it);
* on shutdown, an idle connection is kept for a moment, so that a request that is just on its way is answered;
* a plain request for vouchers goes past ASGI (``exchange.py``); whatever is unusual about one takes the usual way.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import termios
from array import array
from typing import Any, ClassVar, Final

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service import metrics, traceparent
from service.web.exchange import Exchange, Head, Lane
from service.web.incoming import BODY_MAX
from service.web.problems import problem

HEADERS_MAX: Final = 64  # a partner's client sends about ten, proxies add a few each
HEADER_BYTES_MAX: Final = 16_384  # request line and headers; what most proxies in front allow
PIPELINE_MAX: Final = 64  # requests of one connection that wait for the answer of an earlier one
LINGER_S: Final = 1.0  # for the client to notice an early answer and stop sending
LINGER_BYTES: Final = 1_048_576  # read and thrown away meanwhile: most of what is already on its way
PARTING_MAX: Final = 128  # connections over the limit that are told so; past it they are cut
IDLE_GRACE_S: Final = 0.25  # on shutdown: many times what a request needs to get here

# Plain requests' headers that are known by their bytes, so that they are not read again: reading them costs more than
# deciding the request.  A partner sends a few (its token, some lengths of the body), and there may be 10,000 partners;
# past the bound all are forgotten.  An Idempotency-Key, another one each time, is no part of what is remembered.
HEADS_MAX: Final = 16_384
HEAD_BYTES_MAX: Final = 1_536  # of one that is remembered, an access token takes half of it: 25 MB at most

_SINGLE: Final = (b"host", b"authorization", b"content-length")
_VERSIONS: Final = ("1.1", "1.0")  # the parser also takes 2.0 and 0.9: a request line without any version
_TRACEPARENT: Final = b"\r\n" + traceparent.NAME + b": "


class _RefusalError(Exception):
    """Raised in a callback of the parser, which then stops."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection.  Made with its bounds by ``bounded``."""

    receive_timeout_s: ClassVar[float]
    connections_max: ClassVar[int]
    lane: ClassVar[Lane | None]
    heads: ClassVar[dict[bytes | tuple[int, bytes], Head]]  # keyed ones without their key, with where it began

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.whole = True  # nothing of an unfinished request has been received
        self.new: Exchange | None = None  # the plain request that was read last
        self.key_at = 0  # where the Idempotency-Key began in the plain request that was read last; 0: it had none
        self.headed = False  # its headers have, and self.cycle is its cycle
        self.received = 0  # bytes of it, give or take one read
        self.refusal = ""  # why the parser was stopped
        self.deaf = False  # what comes is thrown away
        self.parting: bytes | None = None  # a refusal that waits until earlier requests are answered
        self.lingering = False  # half closed
        self.draining = False
        self.timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0  # by the loop's clock; when the last answer was given
        self.idle_timer: asyncio.TimerHandle | None = None

    # --- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        metrics.connections.inc()
        if len(self.connections) <= self.connections_max:
            self._arm()
            return
        metrics.connections_refused.inc()
        if len(self.connections) <= self.connections_max + PARTING_MAX:
            self._part(self._wire("overloaded"))
        else:
            transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that only stopped sending still gets the answers to what it has asked.  False: close now, which is
        all that there is under TLS."""
        unfinished = self.headed and not self.whole  # then self.cycle is of the request that will never be whole
        if self.lingering or unfinished or self.cycle is None or self.cycle.response_complete:
            return False
        if self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        metrics.connections.dec()
        self._disarm()
        if self.idle_timer is not None:
            self.idle_timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """No request after the one under way; without one, none after a moment."""
        self.draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self.whole and not self.lingering:
            self.loop.call_later(IDLE_GRACE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.transport.is_closing() or not self.whole or not (self.cycle is None or self.cycle.response_complete):
            return
        if _is_unread(self.transport):  # the next request has come in this very moment: it is answered yet
            self.loop.call_later(IDLE_GRACE_S, self._close_if_idle)
        else:
            self.transport.close()

    # --- what arrives

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            self._throw_away(len(data))
            return
        if self.whole and self._take_known(data):
            return
        alone = self._comes_alone()
        self.received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(self.refusal or "malformed_request")
            return
        if not self.whole:
            self._bound_the_rest()
        elif alone and self.new is not None:
            self._remember(data, self.new)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads the request again as one that offers no other protocol; ``rest`` is what came after its headers.

        The parser takes what follows such headers for the other protocol, so the body would be lost.  Java's client
        offers HTTP/2 in this way unless it is told not to.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse("malformed_request")
            return
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(option for option in value.split(b",") if option.strip().lower() != b"upgrade")
            if name != b"upgrade":
                head.append(b"%b: %b\r\n" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
        self.received = 0
        self.data_received(b"".join(head) + b"\r\n" + rest)

    def _bound_the_rest(self) -> None:
        """The request is not whole yet: it has some time, and so many bytes."""
        if self.timer is None:
            self._arm()
        if not self.headed:
            if self.received > HEADER_BYTES_MAX:
                self._refuse("headers_too_large")
        elif self.received > HEADER_BYTES_MAX + BODY_MAX:
            if self.cycle.response_complete:
                self._linger()
            else:
                self._close_after_answer()

    def on_message_begin(self) -> None:
        self.whole = self.headed = self.expect_100_continue = False
        self.new = None
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.headed:  # a trailer; merged into the headers it would overrule what a proxy has checked
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value.rstrip(b" \t")))  # space behind a value is none of it (RFC 9110, 5.5)

    def on_headers_complete(self) -> None:
        headers = self.headers
        named = dict(headers)
        if len(headers) > HEADERS_MAX or (self.received > HEADER_BYTES_MAX and self._header_bytes() > HEADER_BYTES_MAX):
            raise self._refused("headers_too_large")
        if len(named) != len(headers):
            names = [name for name, _ in headers]
            if any(names.count(name) > 1 for name in _SINGLE):
                raise self._refused("malformed_request")
        if self.parser.get_http_version() not in _VERSIONS:
            raise self._refused(
                "malformed_request"
            )  # the parser also takes 0.9, whose requests have no headers, and 2.0
        if len(self.pipeline) >= PIPELINE_MAX:
            raise self._refused("overloaded")
        if self.parser.should_upgrade():
            return  # it will be read again
        head = self._plain_head(named)
        if head is not None:
            key = named[b"idempotency-key"] if head.keyed else b""
            self.cycle = exchange = self._exchange(head, key, self.parser.should_keep_alive())  # type: ignore[assignment]  # see there
            if traceparent.NAME in named:
                exchange.trace = traceparent.parsed(named[traceparent.NAME])
        else:
            self._begin_cycle()
        self.headed = True
        if self.draining:
            self.cycle.keep_alive = False
        length = named.get(b"content-length")
        if length is not None and len(length) > 4 and int(length) > BODY_MAX:
            self._close_after_answer()

    def on_message_complete(self) -> None:
        if not self.headed:
            return  # it offers another protocol, and will be read again
        self.whole = True
        self.received = 0
        if self.timer is not None:
            self._disarm()
        exchange: Any = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
        elif self._begin(exchange, exchange.body):
            self.new = exchange if exchange.keep_alive else None
        else:
            self._leave_to_asgi(exchange)
        if self.draining:
            self.loop.call_later(IDLE_GRACE_S, self._close_if_idle)  # if its answer came before it was whole

    def on_response_complete(self) -> None:
        if self.lingering:
            self.server_state.total_requests += 1
            self.pipeline.clear()
        elif self.parting is not None and not self.pipeline:
            self.server_state.total_requests += 1
            self._part(self.parting)
        else:
            self.server_state.total_requests += 1
            if not self.transport.is_closing():
                self.flow.resume_reading()
                self._go_on()

    def _go_on(self) -> None:
        """Begins the next request, or waits for one."""
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self.idle_since = self.loop.time()
        if self.idle_timer is None:
            self.idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_if_idle)

    def _begin_cycle(self) -> None:
        """What uvicorn does with a request, from the beginning: here it is only begun when its headers are complete."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers
        super().on_headers_complete()

    # --- past ASGI

    def _take_known(self, data: bytes, trace: str = "") -> bool:
        """Begins the request if ``data`` is a whole plain one whose headers are known, byte for byte.

        The same bytes mean the same: the parser, which is between two requests, need not see them.  A traceparent is
        another one with each request, so headers are known without it; ``trace``: it was taken out of ``data``.
        """
        end, at = _end_of_head(data), self.key_at
        if at:
            stop = data.find(b"\r\n", at)
            key, head = data[at:stop], self.heads.get((at, data[:at] + data[stop:end]))
        else:
            key, head = b"", self.heads.get(data[:end])
        if head is None and not trace:
            rest, trace = _without_trace(data, end)
            if trace:
                return self._take_known(rest + data[end:], trace)
        if head is None or len(data) - end != head.length or self.draining or not self._is_free():
            return False
        self.cycle = exchange = self._exchange(head, key, True)  # type: ignore[assignment]
        exchange.trace = trace
        if not self._begin(exchange, data[end:]):
            self.cycle = None  # type: ignore[assignment]
            return False
        if self.timer is not None:
            self._disarm()
        return True

    def _comes_alone(self) -> bool:
        """Whether what comes now begins between two requests; the one that was read before it is forgotten."""
        self.new = None
        return self.whole

    def _remember(self, data: bytes, exchange: Exchange) -> None:
        """``data`` was given to the parser between two requests; the last one in it was plain."""
        end, head = _end_of_head(data), exchange.head
        if len(data) - end != head.length or end > HEAD_BYTES_MAX:
            return  # more than this one request, or headers that nobody sends again and again
        if traceparent.NAME in data[:end].lower():
            rest, trace = _without_trace(data, end)
            if not trace or traceparent.NAME in rest.lower():
                return  # an unusual one
            data, end = rest + data[end:], len(rest)
        if len(self.heads) >= HEADS_MAX:
            self.heads.clear()
        if head.keyed:
            if (line := _KEY_LINE(data, 0, end)) is None:
                return
            self.key_at = line.end()
            self.heads[self.key_at, data[: self.key_at] + data[self.key_at + len(exchange.key) : end]] = head
        else:
            self.key_at = 0
            self.heads[data[:end]] = head

    def _plain_head(self, headers: dict[bytes, bytes]) -> Head | None:
        """What the headers say if it is likely that ``lane`` takes the request, whose body is yet to come."""
        if (
            self.lane is not None
            and len(headers) == len(self.headers)
            and b"expect" not in headers
            and self._is_free()
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
        ):
            return self.lane.head(self.url, headers)
        return None

    def _is_free(self) -> bool:
        """No earlier request waits for its answer, and the client takes answers."""
        return (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused

    def _exchange(self, head: Head, key: bytes, keep_alive: bool) -> Exchange:
        """What stands for uvicorn's cycle: nothing says that it is one, but it is all that uvicorn asks of it."""
        return Exchange(head, key, self.transport, self.server_state.default_headers, keep_alive, self._exchange_done)

    def _begin(self, exchange: Exchange, body: bytes | bytearray) -> bool:
        if self.lane is None or not self.lane.begin(
            exchange.head, exchange.key, body, exchange.answered, exchange.trace
        ):
            return False
        if not exchange.response_complete:
            self.tasks.add(exchange)  # type: ignore[arg-type]  # what uvicorn waits for before it stops, and cancels
        return True

    def _exchange_done(self, exchange: Any) -> None:
        self.tasks.discard(exchange)
        self.on_response_complete()

    def _leave_to_asgi(self, exchange: Exchange) -> None:
        """It was not a plain one: what is said of it is said by the application, as if it had come there first."""
        self.cycle = None  # type: ignore[assignment]
        self._begin_cycle()
        self.cycle.keep_alive = self.cycle.keep_alive and exchange.keep_alive
        self.cycle.body += exchange.body
        super().on_message_complete()

    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    # --- time

    def _arm(self) -> None:
        self.timer = self.loop.call_later(self.receive_timeout_s, self._too_slow)

    def _disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _look_if_idle(self) -> None:
        """Closes a connection that was idle for too long.  One timer a connection, not one a request as in uvicorn."""
        self.idle_timer = None
        if not (self.cycle is None or self.cycle.response_complete):
            return  # the end of this request sets it again
        left = self.idle_since + self.timeout_keep_alive - self.loop.time()
        if not self.whole:  # it was answered before it was whole, and what is left of it has its own time limit
            left = self.timeout_keep_alive
        if left > 0:
            self.idle_timer = self.loop.call_later(left, self._look_if_idle)
        else:
            self.transport.close()

    def _too_slow(self) -> None:
        self.timer = None
        if self.transport.is_closing():
            return
        ours = self.headed and not self.whole  # self.cycle is of the request that is late
        if self.flow.read_paused or (not ours and self.cycle is not None and not self.cycle.response_complete):
            self._arm()  # we are the slow ones: the rest may have been here for long, unread
        elif self.whole:
            self.transport.close()
        else:
            self._refuse("request_timeout")

    # --- refusing

    def _refused(self, code: str) -> _RefusalError:
        self.refusal = code
        return _RefusalError(code)

    def _refuse(self, code: str) -> None:
        """Answers the request that is being received with ``code``, after those before it; then parts."""
        metrics.requests_malformed.labels(code).inc()
        self._disarm()
        wire = self._wire(code)
        if self.headed and not self.whole:
            late = self.cycle
            if self.pipeline and self.pipeline[0][0] is late:
                self.pipeline.popleft()
                self._part_after_answers(wire)
            elif late.response_started:  # it had its answer before it was whole
                self._linger()
            else:
                late.disconnected = True
                late.message_event.set()
                self._part(wire)
        elif self.cycle is None or self.cycle.response_complete:
            self._part(wire)
        else:
            self._part_after_answers(wire)

    def _part_after_answers(self, wire: bytes) -> None:
        self.parting = wire
        self.deaf = True
        self.flow.pause_reading()

    def _part(self, wire: bytes) -> None:
        """Sends the last answer of this connection."""
        self.parting = None
        if not self.transport.is_closing():
            self.transport.write(wire)
            self._linger()

    def _wire(self, code: str) -> bytes:
        answer = problem(code)
        headers = [*self.server_state.default_headers, *answer.headers, (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        return STATUS_LINE[answer.status] + lines + b"\r\n" + answer.body

    # --- closing without losing the answer

    def _close_after_answer(self) -> None:
        """The answer to the request being received says `Connection: close`, and is not lost by it."""
        self.cycle.keep_alive = False
        self.cycle.transport = _Lingering(self)

    def _linger(self) -> None:
        self.lingering = self.deaf = True
        self.received = 0
        self._disarm()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _throw_away(self, count: int) -> None:
        self.received += count
        if self.received > LINGER_BYTES:
            self.flow.pause_reading()


class _Lingering(asyncio.Transport):
    """The transport of a request whose answer may come before its body is read."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__()
        self._protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.lingering or self._protocol.transport.is_closing()

    def close(self) -> None:
        if self._protocol.whole:
            self._protocol.transport.close()
        else:
            self._protocol._linger()


_KEY_LINE: Final = re.compile(rb"\r\nidempotency-key:[ \t]*", re.IGNORECASE).search


def _is_unread(transport: asyncio.Transport) -> bool:
    """Whether bytes have arrived that nobody has read yet.  Closing would reset the connection, and lose them."""
    count = array("i", [0])
    fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
    return count[0] > 0


def _end_of_head(data: bytes) -> int:
    """Where the body begins; short of any request line if it is not in ``data``."""
    return data.find(b"\r\n\r\n") + 4


def _without_trace(data: bytes, end: int) -> tuple[bytes, str]:
    """The headers without their first traceparent, and what it says; '' if there is none, or it is bad or unusual."""
    at = data.find(_TRACEPARENT, 0, end)
    value = at + len(_TRACEPARENT)
    after = value + traceparent.LENGTH
    if at < 0 or data[after : after + 2] != b"\r\n":
        return b"", ""
    return data[:at] + data[after:end], traceparent.parsed(data[value:after])


def bounded(lane: Lane | None = None, *, receive_timeout_ms: int, connections_max: int) -> type[BoundedProtocol]:
    """The protocol class for uvicorn's ``http`` setting.

    A request must be whole ``receive_timeout_ms`` after its first byte; past ``connections_max`` open connections
    of this process, a new one is answered 503 `overloaded` at once.  ``lane`` answers plain voucher requests,
    the application all others.
    """

    class Protocol(BoundedProtocol):
        pass

    Protocol.receive_timeout_s = receive_timeout_ms / 1000
    Protocol.connections_max = connections_max
    Protocol.lane = lane
    Protocol.heads = {}
    return Protocol
