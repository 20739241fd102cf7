"""What operators type: a product's rule of expiry."""

from __future__ import annotations

import pytest

from service.worker.forms import product_expiry
from service.zones import zone

END_OF_OCTOBER = "until:1888156799"  # 2029-10-31T23:59:59+08:00


@pytest.mark.parametrize(
    ("typed", "stored", "words"),
    [
        ("90 days", "days:90", "90 days from issuance"),
        ("1 day", "days:1", "1 day from issuance"),
        ("12months", "months:12", "12 months from issuance"),
        ("1 year", "years:1", "1 year from issuance"),
        ("2029-10-31", END_OF_OCTOBER, "until 2029-10-31"),
        ("2029-10-31T16:00:00Z", END_OF_OCTOBER, "until 2029-10-31T16:00:00Z"),
        ("as the code", "", "as the code"),
    ],
)
def test_the_words_of_an_expiry_mean_what_was_typed(typed: str, stored: str, words: str) -> None:
    assert product_expiry(typed, zone("Asia/Singapore")) == (stored, words)
    assert product_expiry(words, zone("Asia/Singapore")) == (stored, words)


@pytest.mark.parametrize("typed", ["until", "until ", "until 90 days", "until until 2029-10-31", "until 2029-02-30",
                                   "2029-10-31 from issuance", "90 days from", "as the pool", ""])  # fmt: skip
def test_what_is_no_expiry_is_told_with_what_to_write(typed: str) -> None:
    with pytest.raises(ValueError, match="is no expiry: write `90 days`"):
        product_expiry(typed, zone("UTC"))
