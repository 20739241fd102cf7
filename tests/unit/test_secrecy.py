"""The search for secrets in logs finds them; the acceptance suite runs it over all that its processes wrote."""

from __future__ import annotations

import pytest

from service.tokens import SECRET_PREFIX, new_token
from tests.secrecy import leaks

CODES = ["SPR-0001", "A CODE/OF 2 WORDS"]


@pytest.mark.parametrize(
    "held",
    [
        *CODES,
        pytest.param(new_token(), id="token"),  # two processes collect the tests, and both are to see the same names
        pytest.param(new_token(SECRET_PREFIX), id="secret"),
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJjbGllbnQifQ.c2ln",
        "-----BEGIN PRIVATE KEY-----",
        "redis://voucherd:hunter2@redis.internal:6379/0",
    ],
)
def test_no_secret_is_overlooked(held: str) -> None:
    assert leaks(f'{{"event":"defect","detail":"it said {held}"}}\n', CODES)


def test_an_innocent_line_is_no_leak() -> None:
    line = '{"event":"entry parked","url":"redis://127.0.0.1:6379/0","at":"SPR-00012 vch_ eyJ"}'
    assert leaks(line, CODES) == []
