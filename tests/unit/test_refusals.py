"""Refusals in the log: those of note, with the request and its trace, and never more than a disk can hold."""

from __future__ import annotations

import pytest
import structlog

from service.web.problems import problem
from service.web.refusals import LINES_A_SECOND, OF_NOTE, Refusals
from service.web.v3_errors import refusal
from tests.unit.test_traceparent import GOOD, PARENT_ID, TRACE_ID


def test_a_refusal_says_which_request_and_which_trace_it_was() -> None:
    with structlog.testing.capture_logs() as logged:
        Refusals().note("v1", problem("key_reused", request_id="req-1", distributor="D"), GOOD)
        Refusals().note("v3", refusal("suspended", request_id="1-2-3"), "")
    first, second = logged
    assert first == {
        "event": "refused", "log_level": "warning", "api": "v1", "status": 422, "code": "key_reused",
        "request_id": "req-1", "distributor": "D", "trace_id": TRACE_ID, "parent_id": PARENT_ID, "left_out": 0,
    }  # fmt: skip
    assert (second["request_id"], second["code"], second["trace_id"]) == ("1-2-3", "403-F02", "")


def test_a_flood_of_refusals_does_not_fill_a_disk() -> None:
    now = 0.0
    refusals = Refusals(clock=lambda: now)
    with structlog.testing.capture_logs() as logged:
        for number in range(1_000):
            refusals.note("v1", problem("token_unknown", request_id=f"req-{number}"), "")
        assert len(logged) == LINES_A_SECOND
        now = 1.0
        refusals.note("v1", problem("token_unknown"), "")
        refusals.note("v1", problem("token_unknown"), "")
    assert [one["left_out"] for one in logged[-2:]] == [1_000 - LINES_A_SECOND, 0]


@pytest.mark.parametrize("code", ["issued", "replayed", "exhausted", "cap_reached", "rate_limited", "overloaded"])
def test_what_happens_all_day_is_not_of_note(code: str) -> None:
    assert code not in OF_NOTE
