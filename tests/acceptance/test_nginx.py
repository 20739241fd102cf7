"""What nginx says when nothing is behind it, by the configuration that is shipped (more of it: ``test_rolling.py``)."""

from __future__ import annotations

from pathlib import Path

import httpx

from service.web.problems import PROBLEMS
from tests.acceptance.front import Front
from tests.servers import free_port


def test_a_service_that_is_gone_is_told_in_the_contracts_form(tmp_path: Path) -> None:
    with Front(tmp_path, (free_port(), free_port())).running() as front:
        answer = httpx.post(f"http://127.0.0.1:{front.port}/api/v1/voucher/request", json={}, trust_env=False)
    row = PROBLEMS["store_unreachable"]
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.headers["retry-after"] == str(row.retry_after_s)
    said = answer.json()
    assert (said["title"], said["detail"], said["error"]) == (row.title, row.detail, row.error)
    assert (said["code"], said["retryable"]) == ("store_unreachable", True)
