"""The header traceparent by the rules of W3C Trace Context: what breaks one is ignored, and never half believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import traceparent

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.mark.parametrize("flags", ["00", "01", "02", "ff"])
def test_a_good_one_is_kept_as_it_was_sent(flags: str) -> None:
    sent = GOOD[:-2] + flags
    assert traceparent.parsed(sent.encode()) == sent
    assert traceparent.ids(sent) == (TRACE_ID, PARENT_ID)
    assert traceparent.well_formed(sent)
    assert traceparent.parsed(f" {sent}\t".encode()) == sent
    assert not traceparent.well_formed(f" {sent}")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (f"cc-{TRACE_ID}-{PARENT_ID}-01", GOOD),
        (f"cc-{TRACE_ID}-{PARENT_ID}-01-what-the-future-will-be-like", GOOD),
        (f"01-{TRACE_ID}-{PARENT_ID}-fe", GOOD[:-1] + "0"),
        (f"fe-{TRACE_ID}-{PARENT_ID}-09-", GOOD),
    ],
)
def test_of_a_later_version_only_what_is_known_is_kept(sent: str, kept: str) -> None:
    assert traceparent.parsed(sent.encode()) == kept


@pytest.mark.parametrize(
    "bad",
    [
        "", "-", "00", GOOD[:-1], GOOD + "0", GOOD + "-", GOOD + "-later", GOOD + ".", GOOD.upper(),
        f"ff-{TRACE_ID}-{PARENT_ID}-01", f"0-{TRACE_ID}-{PARENT_ID}-01", f"000-{TRACE_ID}-{PARENT_ID}-01",
        f".0-{TRACE_ID}-{PARENT_ID}-01", f"0x-{TRACE_ID}-{PARENT_ID}-01",
        f"00-{'0' * 32}-{PARENT_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01", f"00-{TRACE_ID[:-1]}-{PARENT_ID}-01",
        f"00-{TRACE_ID}0-{PARENT_ID}-01", f"00-.{TRACE_ID[1:]}-{PARENT_ID}-01", f"00-{TRACE_ID}-.{PARENT_ID[1:]}-01",
        f"00-{TRACE_ID}-{PARENT_ID}-.0", f"00-{TRACE_ID}-{PARENT_ID}-1", f"00-{TRACE_ID}-{PARENT_ID}-001",
        f"00_{TRACE_ID}-{PARENT_ID}-01", f"{GOOD},{GOOD}", f"{GOOD}\n",
        f"cc-{TRACE_ID}-{PARENT_ID}-01.what-the-future-will-not-be-like", f"cc-{TRACE_ID}-{PARENT_ID}-01-\n",
    ],
)  # fmt: skip
def test_a_bad_one_is_ignored(bad: str) -> None:
    assert traceparent.parsed(bad.encode()) == ""
    assert not traceparent.well_formed(bad) or bad == ""


def test_no_trace_has_no_ids() -> None:
    assert traceparent.ids("") == ("", "")


@given(st.one_of(st.binary(max_size=80), st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.?")))
def test_whatever_is_kept_is_a_traceparent_of_version_00(value: bytes) -> None:
    kept = traceparent.parsed(value)
    if kept:
        assert (len(kept), kept[:3]) == (traceparent.LENGTH, "00-")
        assert traceparent.parsed(kept.encode()) == kept
        assert value.strip()[3:53].decode() == kept[3:53]
