"""The snapshot, its slices, the order of routes, and the periods of caps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service import catalogue, zones
from service.catalogue import (
    SLICE,
    TOTAL_END,
    Campaign,
    Cap,
    Catalogue,
    Pool,
    Snapshot,
    encode,
    period_bounds,
    period_start,
)
from service.domain import Considered, RateLimit, Rule, Unavailable
from service.scripts import CountedCap, Counter
from service.tokens import digest


def campaign(
    id: str, *, products: Sequence[str] = ("PAY",), pool: str = "P", priority: int = 100, starts_at: int = 0,
    until: int = 0, paused: bool = False, time_zone: str = "UTC", caps: Sequence[Cap] = (),
    assigned: Sequence[str] = ("D",), own_caps: Sequence[Cap] = (),
) -> Campaign:  # fmt: skip
    return Campaign(
        id, "CAT", tuple(products), pool, priority, starts_at, until, paused, time_zone, tuple(caps),
        {distributor: tuple(own_caps) for distributor in assigned},
    )  # fmt: skip


def snapshot(*campaigns: Campaign, version: int = 1) -> Snapshot:
    pools = sorted({one.pool for one in campaigns})
    return Snapshot(
        version, {digest("token"): "D"}, {"D": True, "S": False}, tuple(Pool(pool, 60) for pool in pools), campaigns
    )


def loaded(published: Snapshot) -> Catalogue:
    *_, last = catalogue.load(encode(published))
    assert last is not None
    return last


def tried(of: Catalogue, *products: str, distributor: str = "D") -> list[str]:
    return [Rule.unpack(one.rule).campaign for one in of.route(distributor, products).plan.candidates]


# --- publishing and loading -----------------------------------------------------------------------------------------


def test_nothing_of_a_large_snapshot_is_lost_between_slices() -> None:
    count = 2 * SLICE + 1
    published = Snapshot(
        7,
        {digest(f"token-{i}"): f"D{i % 10}" for i in range(count)},
        {f"D{i}": i % 2 == 0 for i in range(10)},
        tuple(Pool(f"P{i}", i) for i in range(SLICE + 1)),
        tuple(
            campaign(f"C{i:05d}", pool=f"P{i % (SLICE + 1)}", products=(f"X{i}",), assigned=("D1",))
            for i in range(count)
        ),
        limits={f"D{i}": RateLimit(1 + i, 20) for i in range(count)},
    )
    assert catalogue.decode(encode(published)) == published
    *pauses, last = catalogue.load(encode(published))
    assert pauses == [None] * 3, "one pause a slice"
    assert last is not None
    assert last.version == 7
    for i in (0, SLICE - 1, SLICE, 2 * SLICE - 1, 2 * SLICE):
        assert last.distributor(f"token-{i}") == f"D{i % 10}"
        assert tried(last, f"X{i}", distributor="D1") == [f"C{i:05d}"]
        assert last.limits[f"D{i}"] == RateLimit(1 + i, 20)
    assert last.pools() == sorted(f"P{i}" for i in range(SLICE + 1))
    assert last.route("D1", (f"X{SLICE}",)).plan.candidates[0].least_life_s == SLICE


def test_a_slice_that_is_damaged_is_refused() -> None:
    version, slices = orjson.loads(encode(snapshot(campaign("c"))))
    with pytest.raises(msgspec.DecodeError):
        list(catalogue.load(orjson.dumps([version, [slices[0][:-8]]])))


def test_an_empty_snapshot_can_be_loaded() -> None:
    empty = loaded(Snapshot(1, {}, {}, (), ()))
    assert (empty.version, empty.pools(), tried(empty, "PAY")) == (1, [], [])


@pytest.mark.parametrize("blob", [b"", b"{}", b"[]", b"null", b'[1,[["x"]]]', b"[1,2,3]", b"\xff", b'["1",[]]'])
def test_what_is_no_snapshot_is_refused(blob: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        list(catalogue.load(blob))


def test_nobody_has_an_unknown_token_and_no_unknown_distributor_is_active() -> None:
    known = loaded(snapshot())
    for _ in range(2):  # also when it was asked before
        assert (known.distributor("token"), known.distributor("other")) == ("D", None)
    assert (known.active("D"), known.active("S"), known.active("X")) == (True, False, False)


# --- routing --------------------------------------------------------------------------------------------------------


def test_order_is_product_then_priority_then_earlier_end_then_id() -> None:
    known = loaded(
        snapshot(
            campaign("c-late", until=300, priority=5), campaign("a-open", priority=5),
            campaign("z-early", until=200, priority=5), campaign("b-early", until=200, priority=5),
            campaign("y-first", priority=1), campaign("m", products=("MOB",), priority=0),
        )
    )  # fmt: skip
    pay = ["y-first", "b-early", "z-early", "c-late", "a-open"]
    assert tried(known, "PAY") == pay
    assert tried(known, "PAY", "MOB") == [*pay, "m"]
    assert tried(known, "MOB", "PAY", "MOB") == ["m", *pay]


def test_a_campaign_that_serves_two_products_is_a_candidate_once() -> None:
    known = loaded(snapshot(campaign("both", products=("PAY", "MOB")), campaign("mob", products=("MOB",), priority=1)))
    route = known.route("D", ("PAY", "MOB"))
    assert tried(known, "PAY", "MOB") == ["both", "mob"]
    assert Rule.unpack(route.plan.candidates[0].rule).product == "PAY"
    assert route.unavailable("capped,exhausted") == Unavailable(
        "exhausted",
        (
            Considered("PAY", "both", "cap_reached"),
            Considered("MOB", "mob", "exhausted"),
            Considered("MOB", "both", "cap_reached"),
        ),
    )


def test_other_partners_campaigns_are_never_mentioned() -> None:
    known = loaded(
        snapshot(campaign("theirs", assigned=("E",)), campaign("paused-theirs", assigned=("E",), paused=True))
    )
    route = known.route("D", ("PAY", "MOB"))
    assert route.plan.candidates == ()
    assert route.unavailable("") == Unavailable("no_campaign", ())


def test_a_paused_campaign_is_no_candidate_and_is_named() -> None:
    known = loaded(snapshot(campaign("paused", paused=True, priority=1), campaign("running")))
    route = known.route("D", ("PAY",))
    assert tried(known, "PAY") == ["running"]
    assert route.unavailable("before") == Unavailable(
        "not_running", (Considered("PAY", "paused", "paused"), Considered("PAY", "running", "before"))
    )


@pytest.mark.parametrize(
    ("stops", "code"),
    [
        ("before,after,before", "not_running"),
        ("before,capped,after", "cap_reached"),
        ("capped,exhausted,before", "exhausted"),
        ("exhausted,capped,capped", "exhausted"),
    ],
)
def test_the_answer_is_how_far_the_furthest_got(stops: str, code: str) -> None:
    known = loaded(snapshot(campaign("a"), campaign("b"), campaign("c")))
    assert known.route("D", ("PAY",)).unavailable(stops).code == code


def test_the_least_of_two_caps_on_one_thing_holds() -> None:
    known = loaded(
        snapshot(
            campaign(
                "c", time_zone="Europe/Rome",
                caps=(Cap("distributor", "day", 9), Cap("campaign", "total", 50), Cap("terminal", "hour", 1)),
                own_caps=(Cap("distributor", "day", 5), Cap("terminal", "hour", 3), Cap("distributor", "hour", 4)),
            )
        )
    )  # fmt: skip
    [candidate] = known.route("D", ("PAY",)).plan.candidates
    assert set(candidate.caps) == {
        CountedCap(Counter("c", "day", "Europe/Rome"), "distributor", 5),
        CountedCap(Counter("c", "total", "Europe/Rome"), "campaign", 50),
        CountedCap(Counter("c", "hour", "Europe/Rome"), "terminal", 1),
        CountedCap(Counter("c", "hour", "Europe/Rome"), "distributor", 4),
    }


def test_a_question_asked_again_has_the_same_route_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = loaded(snapshot(campaign("c")))
    assert known.route("D", ("PAY",)) is known.route("D", ("PAY",))
    monkeypatch.setattr(catalogue, "ROUTES_MAX", 10)
    for i in range(100):
        known.route("D", (f"X{i}",))
    assert len(known._routes) <= 10


# --- periods --------------------------------------------------------------------------------------------------------

# Zones whose clocks do unusual things: half and quarter hours, midnight twice or never, summer time of half an hour.
ZONES = (
    "UTC", "Europe/Rome", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe",
    "Pacific/Chatham", "America/St_Johns", "America/Santiago", "America/Havana", "Africa/Cairo", "Asia/Beirut",
    "Atlantic/Azores",
    "America/Nuuk", "Asia/Gaza", "Africa/Casablanca", "Pacific/Apia", "Antarctica/Troll",
)  # fmt: skip
KINDS: tuple[Literal["day", "hour"], ...] = ("day", "hour")


def unix(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@given(
    kind=st.sampled_from(KINDS),
    zone=st.sampled_from(ZONES),
    at=st.integers(unix("2015-01-01"), unix("2037-12-31")),
)
@example(kind="hour", zone="Australia/Lord_Howe", at=unix("2025-04-05T15:00:00"))
@example(kind="hour", zone="Australia/Lord_Howe", at=unix("2025-10-04T15:45:00"))
@example(kind="day", zone="America/Santiago", at=unix("2025-09-07T04:00:00"))
@example(kind="day", zone="America/Havana", at=unix("2025-11-02T05:30:00"))
def test_periods_hold_now_and_neither_overlap_nor_leave_a_gap(kind: Literal["day", "hour"], zone: str, at: int) -> None:
    _check_tiling(kind, zone, at)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("kind", KINDS)
def test_periods_tile_around_every_change_of_the_clocks(kind: Literal["day", "hour"], zone: str) -> None:
    for change in _clock_changes(zone, unix("2024-01-01"), unix("2027-01-01")):
        for apart in (-3_601, -3_600, -1_800, -1, 0, 1, 1_799, 1_800, 3_599, 3_600, 43_200):
            _check_tiling(kind, zone, change + apart)


def _check_tiling(kind: Literal["day", "hour"], zone: str, at: int) -> None:
    start, middle, end = period_bounds(kind, zone, at)
    assert start <= at < middle < end
    assert period_bounds(kind, zone, start) == period_bounds(kind, zone, middle - 1) == (start, middle, end)
    assert period_bounds(kind, zone, middle)[:2] == (middle, end)
    assert period_start(kind, zone, start - 1) < start
    local = {datetime.fromtimestamp(second, zones.zone(zone)) for second in (start, at, middle - 1)}
    assert len({moment.date() for moment in local}) == 1
    if len({moment.utcoffset() for moment in local}) == 1:
        assert kind == "day" or len({moment.hour for moment in local}) == 1
    assert middle - start <= (3_600 if kind == "hour" else 26 * 3_600)


def _clock_changes(zone: str, first: int, last: int) -> list[int]:
    """The seconds at which the zone's offset changes, unless it changes back within a day."""

    def offset(at: int) -> object:
        return datetime.fromtimestamp(at, zones.zone(zone)).utcoffset()

    changes = []
    for day in range(first, last, 86_400):
        before, after = day, day + 86_400
        if offset(before) != offset(after):
            while after - before > 1:
                middle = (before + after) // 2
                before, after = (middle, after) if offset(middle) == offset(before) else (before, middle)
            changes.append(after)
    return changes


@pytest.mark.parametrize(
    ("day", "hours"), [("2025-03-29", 24), ("2025-03-30", 23), ("2025-10-26", 25), ("2025-10-27", 24)]
)
def test_a_day_has_the_hours_that_the_zone_gives_it(day: str, hours: int) -> None:
    start, middle, _ = period_bounds("day", "Europe/Rome", unix(f"{day}T12:00:00"))
    assert middle - start == hours * 3_600
    assert datetime.fromtimestamp(start, zones.zone("Europe/Rome")).isoformat()[:19] == f"{day}T00:00:00"


def test_hours_begin_where_the_zone_has_them() -> None:
    bounds = period_bounds("hour", "Asia/Kolkata", unix("2025-06-01T12:45:10"))
    assert bounds == tuple(unix(f"2025-06-01T{hour}:30:00") for hour in (12, 13, 14))


def test_an_hour_that_comes_twice_is_two_periods() -> None:
    once = period_start("hour", "Europe/Rome", unix("2025-10-26T00:10:00"))
    again = period_start("hour", "Europe/Rome", unix("2025-10-26T01:10:00"))
    assert again - once == 3_600


@given(at=st.integers(0, TOTAL_END - 1), zone=st.sampled_from(ZONES))
def test_a_total_never_ends(at: int, zone: str) -> None:
    assert period_bounds("total", zone, at) == (0, TOTAL_END, TOTAL_END)
