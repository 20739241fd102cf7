"""The requests of the benchmarks, each under an id that was never sent before."""

from __future__ import annotations

import secrets
import uuid

TERMINALS = 1000


class VoucherRequests:
    """Called for the next request as bytes, over all runs of one benchmark: a voucher of category PAY."""

    def __init__(self, token: str, distributor: str) -> None:
        self._run = secrets.token_hex(8)
        self._sent = 0
        self._head = (
            "POST /api/v1/voucher/request HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: "
        ).encode()
        self._distributor = distributor

    def __call__(self, _: int) -> bytes:
        self._sent += 1
        body = (
            f'{{"request_id":"bench-{self._run}-{self._sent}","distributor_id":"{self._distributor}",'
            f'"terminal_id":"AT-{self._sent % TERMINALS}","product_ids":["PAY"]}}'
        ).encode()
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)


class IssueVouchers:
    """The same of Client API v3: ``quantity`` vouchers of a product, under a key that was never sent before."""

    def __init__(self, access_token: str, product: str, quantity: int) -> None:
        body = f'{{"quantity":{quantity}}}'
        self._head = (
            f"POST /v3/products/{product} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {access_token}\r\nContent-Length: {len(body)}\r\nIdempotency-Key: "
        ).encode()
        self._tail = f"\r\n\r\n{body}".encode()

    def __call__(self, _: int) -> bytes:
        return b"%b%b%b" % (self._head, str(uuid.UUID(bytes=secrets.token_bytes(16))).encode(), self._tail)
