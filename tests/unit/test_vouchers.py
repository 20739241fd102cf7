"""When a voucher expires, what it is called, and its ids."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import zones
from service.domain import Terms
from service.errors import UnknownIdKey
from service.identity import IdKeys
from service.vouchers import expires_at, local_time, voucher_name

TERMS = Terms("Gift", True, False, True, True, "SGD", 1000, "", "Asia/Singapore", "https://v/", "")
FAR = 1 << 40
ZONES = st.sampled_from(
    ["Asia/Singapore", "UTC", "America/New_York", "Europe/Berlin", "Asia/Kathmandu", "America/Havana"]
)
SECONDS = st.integers(1_600_000_000, 2_200_000_000)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def ruled(expiry: str, zone: str = "Asia/Singapore") -> Terms:
    return msgspec.structs.replace(TERMS, expiry=expiry, time_zone=zone)


@pytest.mark.parametrize(
    ("rule", "issued", "ends"),
    [
        ("days:1", "2026-03-31T23:59:59+08:00", "2026-04-01T23:59:59+08:00"),
        ("days:1", "2026-04-01T00:00:00+08:00", "2026-04-02T23:59:59+08:00"),
        ("days:1", "2026-03-31T20:00:00+00:00", "2026-04-02T23:59:59+08:00"),  # a day later in Singapore
        ("months:1", "2026-01-31T12:00:00+08:00", "2026-02-28T23:59:59+08:00"),
        ("months:1", "2028-01-31T12:00:00+08:00", "2028-02-29T23:59:59+08:00"),
        ("months:12", "2026-11-27T12:00:00+08:00", "2027-11-27T23:59:59+08:00"),
        ("months:14", "2026-12-31T12:00:00+08:00", "2028-02-29T23:59:59+08:00"),
        ("years:1", "2028-02-29T12:00:00+08:00", "2029-02-28T23:59:59+08:00"),
        ("years:4", "2028-02-29T12:00:00+08:00", "2032-02-29T23:59:59+08:00"),
    ],
)
def test_a_rule_counts_from_issuance_to_the_end_of_the_day_in_the_product_s_zone(
    rule: str, issued: str, ends: str
) -> None:
    assert expires_at(ruled(rule), at(issued), FAR) == at(ends)
    assert local_time(at(ends), "Asia/Singapore") == ends


@given(st.sampled_from(["days:3", "months:2", "years:1"]), ZONES, SECONDS)
def test_it_is_always_the_last_second_of_a_day(rule: str, zone: str, issued: int) -> None:
    ends = expires_at(ruled(rule, zone), issued, FAR)
    here = zones.zone(zone)
    assert datetime.fromtimestamp(ends + 1, here).date() > datetime.fromtimestamp(ends, here).date()
    assert ends > issued


@given(ZONES, SECONDS, st.integers(1, 400))
def test_days_are_counted_by_the_calendar_and_not_by_hours(zone: str, issued: int, days: int) -> None:
    here = zones.zone(zone)
    ends = datetime.fromtimestamp(expires_at(ruled(f"days:{days}", zone), issued, FAR), here).date()
    assert ends == datetime.fromtimestamp(issued, here).date() + timedelta(days=days)


def test_a_voucher_never_outlives_its_code() -> None:
    assert expires_at(ruled("years:1"), 1_800_000_000, 1_800_000_100) == 1_800_000_100
    assert expires_at(ruled("until:1900000000"), 1_800_000_000, 1_800_000_100) == 1_800_000_100
    assert expires_at(ruled("until:1900000000"), 1_800_000_000, FAR) == 1_900_000_000
    assert expires_at(TERMS, 1_800_000_000, 5) == 5


@pytest.mark.parametrize(
    ("cents", "shown"), [(1051, "$10.51"), (15000, "$150"), (100, "$1"), (105, "$1.05"), (150, "$1.50")]
)
def test_cents_are_named_only_when_there_are_some(cents: int, shown: str) -> None:
    terms = msgspec.structs.replace(TERMS, name="${FV} for you, ${FV}", is_open_value=True, amount=None)
    assert voucher_name(terms, cents) == f"{shown} for you, {shown}"
    assert voucher_name(msgspec.structs.replace(TERMS, name="a ${FV}"), None) == "a ${FV}"


def test_local_times_carry_the_offset_of_their_moment() -> None:
    assert local_time(at("2026-01-01T12:00:00+00:00"), "Europe/Berlin") == "2026-01-01T13:00:00+01:00"
    assert local_time(at("2026-07-01T12:00:00+00:00"), "Europe/Berlin") == "2026-07-01T14:00:00+02:00"


# --- ids

KEYS = IdKeys("k2", {"k1": b"1" * 32, "k2": b"2" * 32})


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_an_id_is_a_uuid_4_and_always_the_same(lot: int, seq: int) -> None:
    one = KEYS.identity("k1", lot, seq)
    assert one == IdKeys("k1", {"k1": b"1" * 32}).identity("k1", lot, seq)
    text = one.voucher_id
    assert text == str(UUID(text))
    assert (text[14], text[19] in "89ab", len(text)) == ("4", True, 36)
    assert len(one.short) == 11
    assert one.short.isalnum()
    assert 1_000 <= one.pin <= 9_999
    assert one != KEYS.identity("k2", lot, seq)


def test_ids_of_vouchers_that_were_issued_never_change() -> None:
    ids = IdKeys("k1", {"k1": b"k" * 32})
    assert ids.identity("k1", 3, 100) == ("3d746ad5-91f1-40b9-ab0d-5eccbc920cb4", "1SiOG0z7gwp", 1254)


def test_no_two_vouchers_share_an_id_or_a_link_and_pins_are_spread() -> None:
    some = [KEYS.identity("k1", lot, seq) for lot in range(3) for seq in range(20_000)]
    assert len({one.voucher_id for one in some}) == len({one.short for one in some}) == len(some)
    assert len({one.pin for one in some}) > 8_900


def test_a_request_id_is_that_of_its_issuance_alone() -> None:
    one = KEYS.request_id("k1", "C", "key", 5)
    assert one == KEYS.request_id("k1", "C", "key", 5)
    others = {KEYS.request_id("k1", *other) for other in (("D", "key", 5), ("C", "key2", 5), ("C", "key", 6))}
    assert one not in others
    assert len(others) == 3


def test_ids_of_a_key_that_is_gone_are_not_made_up() -> None:
    with pytest.raises(UnknownIdKey, match="k3"):
        KEYS.identity("k3", 1, 1)
    with pytest.raises(UnknownIdKey, match="k3"):
        KEYS.request_id("k3", "C", "key", 5)
