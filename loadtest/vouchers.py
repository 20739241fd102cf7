"""The requests of the benchmarks.  Each is called for the next request as bytes, over all runs of one benchmark."""

from __future__ import annotations

import secrets
import uuid

TERMINALS = 1000


class VoucherRequests:
    """A voucher of ``product`` for one of TERMINALS terminals, under a request id (a UUID) that was never sent before.

    ``new_headers``: with one that is another each time and that the service does not know.
    """

    def __init__(self, token: str, distributor: str, product: str = "PAY", *, new_headers: bool = False) -> None:
        self._head = (
            "POST /api/v1/voucher/request HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\n"
        ).encode()
        self._tail = f'","distributor_id":"{distributor}","product_ids":["{product}"],"terminal_id":"AT-'.encode()
        self._new_headers = new_headers
        self._sent = 0

    def __call__(self, _: int) -> bytes:
        self._sent += 1
        return self.request(_new_id(), self._sent % TERMINALS)

    def request(self, id: bytes, terminal: int) -> bytes:
        """The request with this id."""
        body = b'{"request_id":"%b%b%d"}' % (id, self._tail, terminal)
        other = b"X-Correlation-Id: %b\r\n" % secrets.token_hex(16).encode() if self._new_headers else b""
        return b"%b%bContent-Length: %d\r\n\r\n%b" % (self._head, other, len(body), body)


class Repeated:
    """The same requests again and again: the first round issues, all others are replays."""

    def __init__(self, requests: VoucherRequests, count: int) -> None:
        self._requests = [requests(number) for number in range(count)]

    def __call__(self, number: int) -> bytes:
        return self._requests[number % len(self._requests)]


class IssueVouchers:
    """Client API v3: ``quantity`` vouchers of a product, under a key that was never sent before."""

    def __init__(self, access_token: str, product: str, quantity: int) -> None:
        body = f'{{"quantity":{quantity}}}'
        self._head = (
            f"POST /v3/products/{product} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {access_token}\r\nContent-Length: {len(body)}\r\nIdempotency-Key: "
        ).encode()
        self._tail = f"\r\n\r\n{body}".encode()

    def __call__(self, _: int) -> bytes:
        return b"%b%b%b" % (self._head, _new_id(), self._tail)


def _new_id() -> bytes:
    return str(uuid.UUID(bytes=secrets.token_bytes(16))).encode()
