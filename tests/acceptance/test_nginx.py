"""What nginx says by itself, by the configuration that is shipped: in the form of the API that was asked (more of it:
``test_rolling.py``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.web.problems import PROBLEMS
from service.web.v3_errors import error_body
from tests.acceptance.front import Front
from tests.servers import free_port

TOO_LARGE = b"x" * (64 * 1_024 + 1)  # client_max_body_size
UUID_4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Nothing is behind it."""
    front = Front(tmp_path_factory.mktemp("nginx"), (free_port(), free_port()))
    with front.running():
        yield front


def _asked(front: Front, path: str, body: bytes) -> tuple[httpx.Response, dict[str, Any]]:
    answer = httpx.post(f"http://127.0.0.1:{front.port}{path}", content=body, trust_env=False)
    return answer, answer.json()


@pytest.mark.parametrize(("code", "body"), [("store_unreachable", b"{}"), ("too_large", TOO_LARGE)])
def test_the_voucher_request_api_is_answered_in_its_form(alone: Front, code: str, body: bytes) -> None:
    answer, said = _asked(alone, "/api/v1/voucher/request", body)
    row = PROBLEMS[code]
    assert (answer.status_code, answer.headers["content-type"]) == (row.status, "application/problem+json")
    assert answer.headers.get("retry-after") == (str(row.retry_after_s) if row.retry_after_s else None)
    assert (said["title"], said["detail"], said["error"]) == (row.title, row.detail, row.error)
    assert (said["code"], said["retryable"]) == (code, row.retryable)


@pytest.mark.parametrize(("name", "body"), [("store_unreachable", b"{}"), ("too_large", TOO_LARGE)])
def test_client_api_v3_is_answered_in_its_form(alone: Front, name: str, body: bytes) -> None:
    answer, said = _asked(alone, "/v3/products/GIFT", body)
    assert answer.status_code == int(error_body(name)["code"][:3])
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers.get("retry-after") == ("1" if answer.status_code == 503 else None)
    assert said["error"] == error_body(name)
    assert UUID_4.fullmatch(said["request_id"])
    assert _asked(alone, "/v3/products/GIFT", body)[1]["request_id"] != said["request_id"]


@pytest.mark.parametrize(
    ("status", "error", "body"), [(503, "temporarily_unavailable", b"a=b"), (413, "invalid_request", TOO_LARGE)]
)
def test_a_client_that_wants_an_access_token_is_answered_in_the_form_of_oauth(
    alone: Front, status: int, error: str, body: bytes
) -> None:
    answer, said = _asked(alone, "/oauth2/token", body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.headers["cache-control"] == "no-store"
    assert said["error"] == error
