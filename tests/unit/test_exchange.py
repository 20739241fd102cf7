"""An exchange whose connection changed under it; over real sockets it is in tests/integration/test_protocol.py."""

from __future__ import annotations

import asyncio

from service.web.exchange import Exchange, Head
from service.web.problems import problem
from service.web.v1 import VoucherRequests
from tests.issuers import FakeIssuer

HEAD = Head(VoucherRequests(FakeIssuer()), 0, False)


class Transport(asyncio.Transport):
    """Remembers what was written; like uvloop's it raises when it is closed."""

    def __init__(self, *, closing: bool = False) -> None:
        super().__init__()
        self.closing = closing
        self.written = b""

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closing:
            raise RuntimeError("the handle is closed")
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True


def test_answer_is_written_once_and_the_exchange_ends_once() -> None:
    transport, ended = Transport(), list[Exchange]()
    exchange = Exchange(HEAD, b"", transport, [(b"date", b"now")], False, ended.append)
    exchange.answered(problem("overloaded"))
    exchange.answered(problem("internal"))
    assert transport.written.startswith(b"HTTP/1.1 503 Service Unavailable\r\ndate: now\r\n")
    assert transport.written.count(b"HTTP/1.1") == 1
    assert b"connection: close\r\n\r\n{" in transport.written
    assert transport.closing
    assert ended == [exchange]


def test_answer_to_a_connection_that_is_gone_is_dropped_and_still_ends_the_exchange() -> None:
    ended = list[Exchange]()
    exchange = Exchange(HEAD, b"", Transport(closing=True), [], True, ended.append)
    exchange.answered(problem("overloaded"))
    assert exchange.response_complete
    assert ended == [exchange]
