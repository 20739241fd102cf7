"""The Python client over a service that answers as a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from service import client as module
from service.client import ATTEMPTS_MAX, ApiError, AsyncClient, Client, Unanswered

VOUCHER = {
    "voucher_code": "UG1", "voucher_id": "1b5a607b-e5eb-4b17-80b0-5739c041e81b", "name": "Gift", "status": "active",
    "expiration": "2029-10-31T23:59:59+08:00", "currency": "SGD", "remaining_amount": 1000, "product_code": "P",
    "product_name": "Gift", "is_value_based": True, "is_status_available": True, "is_multiple_use": True, "url": "u",
}  # fmt: skip
ISSUED = {"request_id": "r", "vouchers": [VOUCHER]}
Answering = Callable[[httpx.Request], httpx.Response]


class Service:
    """Hands out tokens ``t1``, ``t2`` and so on, and lets ``answers`` answer everything else, one after the other."""

    def __init__(self, *answers: httpx.Response | Exception | Answering, expires_in: int = 3600) -> None:
        self.sent: list[httpx.Request] = []
        self.tokens = 0
        self._answers = iter(answers)
        self._expires_in = expires_in

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/oauth2/token":
            self.tokens += 1
            assert request.headers["authorization"] == "Basic bWU6c2VjcmV0"
            assert parse_qs(request.content.decode()) == {"grant_type": ["client_credentials"]}
            content = {"access_token": f"t{self.tokens}", "expires_in": self._expires_in, "token_type": "Bearer"}
            return httpx.Response(200, json=content)
        self.sent.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(module.time, "sleep", made.append)
    return made


def client(service: Service) -> Client:
    return Client("http://service/", "me", "secret", http=httpx.Client(transport=httpx.MockTransport(service)))


def refused(status: int, code: str, **headers: str) -> httpx.Response:
    error = {"code": code, "message": "no", "documentation": "why"}
    return httpx.Response(status, json={"request_id": "r", "error": error}, headers=headers)


def test_every_attempt_of_a_call_carries_one_key(pauses: list[float]) -> None:
    service = Service(
        httpx.ConnectError("away"), httpx.ReadTimeout("late"), refused(503, "503-B06", **{"retry-after": "1"}),
        httpx.Response(200, json=ISSUED, headers={"idempotency-record": "true"}),
    )  # fmt: skip
    issued = client(service).issue("P", 1, key="30c40ad6-f135-4aad-97d5-79f195680458")
    assert (issued.replayed, issued.partial, issued.vouchers[0].voucher_code) == (True, False, "UG1")
    assert {one.headers["idempotency-key"] for one in service.sent} == {"30c40ad6-f135-4aad-97d5-79f195680458"}
    assert len(service.sent) == 4
    assert pauses[2] >= 1  # Retry-After


def test_pauses_grow_and_differ_between_clients(pauses: list[float]) -> None:
    for _ in range(2):
        with pytest.raises(Unanswered):
            client(Service(*itertools.repeat(httpx.ConnectError("away"), ATTEMPTS_MAX))).issue("P")
    first, second = pauses[: ATTEMPTS_MAX - 1], pauses[ATTEMPTS_MAX - 1 :]
    assert len(first) == len(second) == ATTEMPTS_MAX - 1
    assert first != second
    for number, pause in enumerate(first):
        expected = min(module.PAUSE_S_MAX, module.PAUSE_S_MIN * 2**number)
        assert 0.5 * expected <= pause <= 1.5 * expected


def test_a_call_that_is_never_answered_names_its_key(pauses: list[float]) -> None:
    service = Service(*itertools.repeat(refused(503, "503-B07"), ATTEMPTS_MAX))
    with pytest.raises(Unanswered) as unanswered:
        client(service).issue("P")
    assert unanswered.value.key == service.sent[0].headers["idempotency-key"]
    assert len(service.sent) == ATTEMPTS_MAX


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422])
def test_a_refusal_is_told_at_once_and_never_tried_again(status: int, pauses: list[float]) -> None:
    service = Service(refused(status, f"{status}-D4E"))
    with pytest.raises(ApiError) as refusal:
        client(service).voucher("x")
    assert (refusal.value.status, refusal.value.code, refusal.value.request_id) == (status, f"{status}-D4E", "r")
    assert len(service.sent) == 1
    assert pauses == []


def test_a_token_is_asked_for_once_and_again_when_it_is_refused() -> None:
    service = Service(
        httpx.Response(200, json=ISSUED), httpx.Response(200, json=ISSUED), refused(401, "401-A04"),
        httpx.Response(200, json=ISSUED),
    )  # fmt: skip
    calling = client(service)
    for _ in range(3):
        calling.issue("P")
    assert service.tokens == 2
    assert [one.headers["authorization"] for one in service.sent] == ["Bearer t1"] * 3 + ["Bearer t2"]
    assert service.sent[2].headers["idempotency-key"] == service.sent[3].headers["idempotency-key"]


def test_a_client_that_is_refused_for_good_does_not_ask_for_ever() -> None:
    service = Service(refused(401, "401-A04"), refused(401, "401-A04"))
    with pytest.raises(ApiError, match="401-A04"):
        client(service).products()
    assert service.tokens == 2


def test_a_wrong_secret_is_told_as_the_token_endpoint_says_it() -> None:
    answer = httpx.Response(401, json={"error": "invalid_client", "error_description": "no such client"})
    calling = Client("http://s", "me", "no", http=httpx.Client(transport=httpx.MockTransport(lambda _: answer)))
    with pytest.raises(ApiError, match="invalid_client"):
        calling.products()


def test_part_of_the_quantity_is_told_as_such() -> None:
    content: dict[str, Any] = {"request_id": "r", "error": {"code": "207-762"}, "vouchers": [VOUCHER]}
    issued = client(Service(httpx.Response(207, json=content))).issue("P", 3, face_value=1500, client_reference="a")
    assert (issued.partial, len(issued.vouchers)) == (True, 1)


async def test_the_client_for_asyncio_does_the_same() -> None:
    service = Service(httpx.ConnectError("away"), httpx.Response(200, json=ISSUED))
    http = httpx.AsyncClient(transport=httpx.MockTransport(service))
    async with AsyncClient("http://service", "me", "secret", http=http) as calling:
        issued = await calling.issue("P", client_reference="sale/1")
    assert issued.request_id == "r"
    assert len(service.sent) == 2
    assert b'"client_reference":"sale/1"' in service.sent[1].content
