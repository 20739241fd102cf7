"""A client of Client API v3: tokens, retries with the same key, typed results.

    with Client("https://vouchers.example", client_id, client_secret) as client:
        issued = client.issue("GIFT10", quantity=2, key=sale_id)
        for voucher in issued.vouchers:
            print(voucher.voucher_code, voucher.url)

``AsyncClient`` is the same with ``await``.  Both need httpx (``pip install voucherd[client]``) and nothing of the
service.  A call is tried until it is answered, its attempts are used up, or its time is: what was not answered, 429,
500 and 503 are tried again after Retry-After or a growing pause, spread by chance so that many clients don't come back
at once.  All attempts of one call carry one Idempotency-Key, so none of them issues twice.  An access token is asked
for when there is none, when it is about to expire, and once more when the service refuses it.
"""

from __future__ import annotations

import asyncio
import base64
import random
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Final, Self, TypeVar, cast

import httpx
import msgspec

from service.messages import Product, ProductAnswer, ProductsAnswer, TokenAnswer, Voucher, VoucherAnswer, VouchersAnswer

ATTEMPTS_MAX: Final = 6
PAUSE_S_MIN: Final = 0.2  # before the second attempt; doubled before each later one
PAUSE_S_MAX: Final = 5.0
CALL_S_MAX: Final = 30.0  # all attempts and pauses of one call
TIMEOUT_S: Final = 5.0  # one attempt: more than the service's own deadline
TOKEN_MARGIN_S: Final = 30.0  # a token with less left than this is not used any more

RETRIED: Final = frozenset({429, 500, 502, 503, 504})

T = TypeVar("T")


class Issued(msgspec.Struct, frozen=True):
    """What one key got.  ``partial``: fewer than were asked for (207); ``replayed``: issued by an earlier attempt."""

    request_id: str
    vouchers: tuple[Voucher, ...]
    partial: bool
    replayed: bool


class ApiError(Exception):
    """The service refused.  ``code`` is that of the contract's table, '' if the answer had none."""

    def __init__(self, status: int, code: str, message: str, request_id: str) -> None:
        super().__init__(f"{code or status}: {message}")
        self.status = status
        self.code = code
        self.request_id = request_id


class Unanswered(Exception):
    """No attempt was answered for good.  Whether vouchers were issued is not known: call again with the same key."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"no answer for key {key or '(none)'}: {cause}")
        self.key = key


# What a call does without doing it: it asks for a request to be sent, or for a pause of some seconds, and is told how
# that went.  So both clients have one way of calling.
_Steps = Generator["httpx.Request | float", "httpx.Response | httpx.TransportError | None", T]


class _Calls:
    """The calls of both clients: what they send, and what they make of the answers."""

    def __init__(
        self, base_url: str, client_id: str, client_secret: str, *, scope: str = "",
        chance: Callable[[], float] = random.random, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._base_url = base_url.rstrip("/")
        self._id, self._secret, self._scope = client_id, client_secret, scope
        self._chance, self._clock = chance, clock
        self._token, self._token_until = "", 0.0

    def products(self) -> _Steps[tuple[Product, ...]]:
        answer = yield from self._call("GET", "/v3/products")
        return msgspec.json.decode(answer.content, type=ProductsAnswer).products

    def product(self, code: str) -> _Steps[Product]:
        answer = yield from self._call("GET", f"/v3/products/{code}")
        return msgspec.json.decode(answer.content, type=ProductAnswer).product

    def voucher(self, voucher_id: str) -> _Steps[Voucher]:
        answer = yield from self._call("GET", f"/v3/vouchers/{voucher_id}")
        return msgspec.json.decode(answer.content, type=VoucherAnswer).voucher

    def vouchers(self, voucher_ids: Sequence[str]) -> _Steps[tuple[Voucher, ...]]:
        answer = yield from self._call("GET", f"/v3/vouchers?id={','.join(voucher_ids)}")
        return msgspec.json.decode(answer.content, type=VouchersAnswer).vouchers

    def issue(
        self, code: str, quantity: int, key: str, face_value: int | None, client_reference: str | None
    ) -> _Steps[Issued]:
        body: dict[str, object] = {"quantity": quantity}
        if face_value is not None:
            body["face_value"] = face_value
        if client_reference is not None:
            body["client_reference"] = client_reference
        answer = yield from self._call("POST", f"/v3/products/{code}", body, key)
        issued = msgspec.json.decode(answer.content, type=VouchersAnswer)
        replayed = answer.headers.get("idempotency-record") == "true"
        return Issued(issued.request_id, issued.vouchers, answer.status_code == 207, replayed)

    def _call(self, method: str, path: str, body: object = None, key: str = "") -> _Steps[httpx.Response]:
        """The successful answer, after as many attempts as it takes.  Raises ApiError and Unanswered."""
        end, failures, renewed = self._clock() + CALL_S_MAX, 0, False
        while True:
            admitted = self._clock() < self._token_until
            answer = yield from _answer(self._request(method, path, body, key) if admitted else self._token_request())
            if isinstance(answer, httpx.TransportError) or answer.status_code in RETRIED:
                failures += 1
                pause_s = self._pause_s(failures, answer)
                if failures == ATTEMPTS_MAX or self._clock() + pause_s > end:
                    raise Unanswered(key, _cause(answer))
                yield pause_s
            elif not admitted:
                self._admit(answer)
            elif answer.status_code == 401 and not renewed:  # a key that was revoked, say
                renewed, self._token_until = True, 0.0
            elif answer.is_success:
                return answer
            else:
                raise _refused(answer)

    def _request(self, method: str, path: str, body: object, key: str) -> httpx.Request:
        headers = {"authorization": f"Bearer {self._token}"}
        if key:
            headers["idempotency-key"] = key
        return httpx.Request(method, self._base_url + path, headers=headers, json=body)

    def _token_request(self) -> httpx.Request:
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        secret = base64.b64encode(f"{self._id}:{self._secret}".encode()).decode()
        headers = {"authorization": f"Basic {secret}"}
        return httpx.Request("POST", self._base_url + "/oauth2/token", headers=headers, data=form)

    def _admit(self, answer: httpx.Response) -> None:
        if not answer.is_success:
            raise _refused(answer)
        token = msgspec.json.decode(answer.content, type=TokenAnswer)
        left_s = max(token.expires_in - TOKEN_MARGIN_S, token.expires_in / 2)
        self._token, self._token_until = token.access_token, self._clock() + left_s

    def _pause_s(self, failures: int, answer: httpx.Response | httpx.TransportError) -> float:
        """Seconds before the next attempt: what the service asks for or more, and never the same for all clients."""
        pause_s = min(PAUSE_S_MAX, PAUSE_S_MIN * (1 << failures - 1))
        asked = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
        return float(asked if asked.isdigit() else 0) + pause_s * (0.5 + self._chance())


def _answer(request: httpx.Request) -> _Steps[httpx.Response | httpx.TransportError]:
    told = yield request
    assert told is not None
    return told


class Client:
    """A client for programs that wait.  Close it, or use it in a ``with``."""

    def __init__(self, base_url: str, client_id: str, client_secret: str, *, http: httpx.Client | None = None) -> None:
        self._calls = _Calls(base_url, client_id, client_secret)
        self._http = http or httpx.Client(timeout=TIMEOUT_S)

    def products(self) -> tuple[Product, ...]:
        """The products that are assigned to the client."""
        return self._run(self._calls.products())

    def product(self, code: str) -> Product:
        """One product."""
        return self._run(self._calls.product(code))

    def issue(
        self, code: str, quantity: int = 1, *, key: str | None = None,
        face_value: int | None = None, client_reference: str | None = None,
    ) -> Issued:  # fmt: skip
        """``quantity`` (1 to 20) vouchers of a product under ``key``, a UUID: one for each sale.

        Without a key one is made.  Keep it until the answer is here: after Unanswered the same call with the same key
        gets the same vouchers, a new key new ones.  Raises ApiError: nothing was issued.
        """
        return self._run(self._calls.issue(code, quantity, key or str(uuid.uuid4()), face_value, client_reference))

    def voucher(self, voucher_id: str) -> Voucher:
        """One voucher of the client, as it is now."""
        return self._run(self._calls.voucher(voucher_id))

    def vouchers(self, voucher_ids: Sequence[str]) -> tuple[Voucher, ...]:
        """1 to 20 vouchers in the order asked; ids that are not the client's are left out."""
        return self._run(self._calls.vouchers(voucher_ids))

    def close(self) -> None:
        """Connections are closed."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: _Steps[T]) -> T:
        told: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(told)
            except StopIteration as done:
                return cast(T, done.value)
            told = None
            if isinstance(step, httpx.Request):
                try:
                    told = self._http.send(step)
                except httpx.TransportError as error:
                    told = error
            else:
                time.sleep(step)


class AsyncClient:
    """``Client`` for asyncio: every call is awaited, and it is used in an ``async with``."""

    def __init__(
        self, base_url: str, client_id: str, client_secret: str, *, http: httpx.AsyncClient | None = None
    ) -> None:
        self._calls = _Calls(base_url, client_id, client_secret)
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT_S)

    async def products(self) -> tuple[Product, ...]:
        """As in Client."""
        return await self._run(self._calls.products())

    async def product(self, code: str) -> Product:
        """As in Client."""
        return await self._run(self._calls.product(code))

    async def issue(
        self, code: str, quantity: int = 1, *, key: str | None = None,
        face_value: int | None = None, client_reference: str | None = None,
    ) -> Issued:  # fmt: skip
        """As in Client."""
        steps = self._calls.issue(code, quantity, key or str(uuid.uuid4()), face_value, client_reference)
        return await self._run(steps)

    async def voucher(self, voucher_id: str) -> Voucher:
        """As in Client."""
        return await self._run(self._calls.voucher(voucher_id))

    async def vouchers(self, voucher_ids: Sequence[str]) -> tuple[Voucher, ...]:
        """As in Client."""
        return await self._run(self._calls.vouchers(voucher_ids))

    async def close(self) -> None:
        """Connections are closed."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: _Steps[T]) -> T:
        told: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(told)
            except StopIteration as done:
                return cast(T, done.value)
            told = None
            if isinstance(step, httpx.Request):
                try:
                    told = await self._http.send(step)
                except httpx.TransportError as error:
                    told = error
            else:
                await asyncio.sleep(step)


# --- bodies


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Refusal(msgspec.Struct):
    request_id: str = ""
    error: _Error | str = ""
    error_description: str = ""


def _refused(answer: httpx.Response) -> ApiError:
    try:
        body = msgspec.json.decode(answer.content, type=_Refusal)
    except msgspec.DecodeError:
        body = _Refusal()
    if isinstance(body.error, str):  # of the token endpoint
        return ApiError(answer.status_code, body.error, body.error_description, body.request_id)
    return ApiError(answer.status_code, body.error.code, body.error.message, body.request_id)


def _cause(answer: httpx.Response | httpx.TransportError) -> str:
    return f"HTTP {answer.status_code}" if isinstance(answer, httpx.Response) else type(answer).__name__
