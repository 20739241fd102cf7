"""Where the lines of an import went, as far as it is remembered."""

from __future__ import annotations

import pytest

from service.store import intake
from service.store.intake import Earlier, Placed, Row, digest, sift


def test_ranges_that_follow_each_other_are_one_and_tell_the_line() -> None:
    earlier = Earlier(whole=True)
    for number in range(1_000):
        seq, line = number * 10, 2 + number * 10
        earlier.add([Placed(1, seq, seq + 10, line, line + 9)])
    assert earlier.where(1, 0) == "line 2"
    assert earlier.where(1, 9_999) == "line 10001"
    assert earlier.where(1, 10_000) == ""
    assert earlier.where(2, 0) == ""
    assert len(earlier._ranges[1]) == 1
    assert earlier.whole


def test_range_with_gaps_tells_between_which_lines() -> None:
    earlier = Earlier(whole=True)
    earlier.add([Placed(1, 5, 8, 10, 13), Placed(2, 0, 1, 12, 12)])
    earlier.add([Placed(1, 20, 22, 14, 15)])  # another import came in between
    assert earlier.where(1, 4) == ""
    assert earlier.where(1, 7) == "one of lines 10 to 13"
    assert earlier.where(1, 8) == ""
    assert earlier.where(1, 21) == "line 15"
    assert earlier.where(2, 0) == "line 12"


def test_ranges_are_bounded_and_what_is_not_known_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "RANGES_MAX", 10)
    earlier = Earlier(whole=True)
    for lot in range(10):
        earlier.add([Placed(lot, 0, 1, lot, lot)])
    assert earlier.whole
    earlier.add([Placed(10, 0, 1, 10, 10)])
    assert not earlier.whole
    assert earlier.where(10, 0) == ""
    assert earlier.where(9, 0) == "line 9"


def test_first_of_two_lines_with_one_code_is_the_good_one() -> None:
    good, refused = sift([Row(7, "A", None, 10), Row(8, "A", None, 20), Row(9, "B", None, None)], 10, 5)
    assert [(row.line, row.expires_at, row.digest) for row in good] == [(7, 10, digest("A")), (9, 10, digest("B"))]
    assert [(one.line, one.kind, one.reason) for one in refused] == [
        (8, "duplicate_in_file", "the code stands in line 7 already")
    ]
