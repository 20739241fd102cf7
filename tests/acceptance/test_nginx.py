"""What nginx says by itself, by the configuration that is shipped: in the form of the API that was asked (more of it:
``test_rolling.py``)."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from loadtest.servers import free_port
from service.web.problems import PROBLEMS
from service.web.v3_errors import error_body
from tests.acceptance.front import Front

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


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GARBAGE\r\n\r\n", "malformed_request"),
        (b"POST /api/v1/voucher/request HTTP/1.1\r\n\r\n", "malformed_request"),
        (b"POST /api/v1/voucher/request HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
         "malformed_request"),
        (b"POST /api/v1/voucher/request HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
         "malformed_request"),
        (b"POST /v3/products/G HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "malformed_request"),
        (b"POST /oauth2/token HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "malformed_request"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: odd\r\n\r\n", "malformed_request"),
        (b"POST / HTTP/9.9\r\nhost: x\r\n\r\n", "malformed_request"),
        (b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n", "method_not_allowed"),
        (b"POST /" + b"x" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", "headers_too_large"),
        (b"POST / HTTP/1.1\r\nhost: x\r\nx-long: " + b"x" * 40_000 + b"\r\n\r\n", "headers_too_large"),
    ],
    ids=[
        "garbage", "no host", "two lengths", "bad chunk", "bad chunk v3", "bad chunk oauth2", "unknown coding",
        "unknown version", "trace", "long target", "long header",
    ],
)  # fmt: skip
def test_what_nginx_can_not_read_is_refused_as_serve_would(alone: Front, sent: bytes, code: str) -> None:
    with socket.create_connection(("127.0.0.1", alone.port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # it answers before all is sent, and closes
            connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    row = PROBLEMS[code]
    said = json.loads(body)
    assert int(head.split(None, 2)[1]) == row.status
    assert b"content-type: application/problem+json" in head.lower()
    assert said == {
        "type": f"urn:voucherd:problem:{code}", "title": row.title, "status": row.status, "detail": row.detail,
        "error": row.error, "code": code, "retryable": row.retryable,
    }  # fmt: skip
