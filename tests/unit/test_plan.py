"""From what there is to what a file wants: only what it names is changed, and faults are told with their paths."""

from __future__ import annotations

import pytest

from service.catalogue import Campaign, Cap
from service.domain import RateLimit
from service.worker.declaration import UnusableDeclaration, declaration
from service.worker.plan import Distributor, Existing, Plan, Pool, plan

NOW = 1_900_000_000
THERE = Existing(
    {"P": Pool("P", 2_000_000_000, 60), "Q": Pool("Q")},
    {"D": Distributor("D", "A partner", limit=RateLimit(5, 40)), "E": Distributor("E", "E", False)},
    {
        "C": Campaign(
            "C", "CAT", ("MOB", "PAY"), "P", 7, 1_800_000_000, 0, False, "Europe/Berlin",
            (Cap("campaign", "day", 10), Cap("terminal", "hour", 1)),
            {"D": (Cap("distributor", "total", 5),), "E": ()},
        ),
        "OTHER": Campaign("OTHER", "CAT", ("PAY",), "P", 100, 0, 0, False, "UTC", (), {}),
    },
)  # fmt: skip


def planned(text: str) -> Plan:
    return plan(declaration(text.encode(), "wanted.yaml"), THERE, NOW)


def changes(text: str) -> dict[str, tuple[object, object]]:
    """Of the one step that there is."""
    [step] = planned(text).to_do
    return {field: (was, to_be) for field, was, to_be in step.changes}


def refused(text: str) -> list[str]:
    with pytest.raises(UnusableDeclaration) as caught:
        planned(text)
    return str(caught.value).split("\n")


def test_what_is_there_already_is_kept() -> None:
    text = """
pools: [{id: P, expires: 2033-05-18T03:33:20Z, least_life: 1m}]
distributors: [{id: D, name: A partner, active: true}]
campaigns:
- {id: C, category: CAT, products: [PAY, MOB, PAY], pool: P, priority: 7, from: 2027-01-15T08:00:00Z, until: null,
   time_zone: Europe/Berlin, paused: false, caps: {day: 10, hour: null, terminal: {hour: 1}},
   assigned: [{distributor: E}, {distributor: D, caps: {total: 5}}]}
"""
    found = planned(text)
    assert [step.action for step in found.steps] == ["keep", "keep", "keep"]
    assert found.to_do == []
    assert [step.left for step in found.steps] == [(), (), ()]
    assert found.left == {"pools": ("Q",), "distributors": ("E",), "campaigns": ("OTHER",)}


def test_only_what_is_named_changes() -> None:
    assert changes("pools: [{id: P, expires: null}]") == {"expires": ("2033-05-18T03:33:20Z", None)}
    assert changes("pools: [{id: P, least_life: 120}]") == {"least_life": ("1m", "2m")}
    assert changes("distributors: [{id: E, active: true}]") == {"active": (False, True)}
    assert changes("distributors: [{id: D, rate: 9}]") == {"rate": (5, 9)}
    assert changes("distributors: [{id: D, burst: 99}]") == {"burst": (40, 99)}
    assert changes("distributors: [{id: D, rate: null}]") == {"rate": (5, None), "burst": (40, None)}
    assert changes("distributors: [{id: E, rate: 9}]") == {"rate": (None, 9), "burst": (None, 20)}
    assert changes("campaigns: [{id: C, priority: 1}]") == {"priority": (7, 1)}
    assert changes("campaigns: [{id: C, products: [NET, PAY]}]") == {"products": (["MOB", "PAY"], ["NET", "PAY"])}
    assert changes("campaigns: [{id: C, until: 2034-07-31}]") == {"until": (None, "2034-07-31T22:00:00Z")}
    assert changes("campaigns: [{id: C, caps: {day: null, terminal: {hour: 2, total: 9}}}]") == {
        "caps.day": (10, None), "caps.terminal.hour": (1, 2), "caps.terminal.total": (None, 9),
    }  # fmt: skip
    assert changes("campaigns: [{id: C, assigned: [{distributor: D, caps: {terminal: {day: 1}}}]}]") == {
        "assigned.D.caps.terminal.day": (None, 1),
    }  # fmt: skip


def test_caps_and_assignments_that_are_not_named_are_left_and_listed() -> None:
    [step] = planned("campaigns: [{id: C, caps: {total: 1}, assigned: [{distributor: D, caps: {day: 1}}]}]").to_do
    assert step.left == ("caps.day", "caps.terminal.hour", "assigned.D.caps.total", "assigned.E")
    assert isinstance(step.after, Campaign)
    assert step.after.caps == (Cap("campaign", "day", 10), Cap("campaign", "total", 1), Cap("terminal", "hour", 1))
    assert step.after.assigned == {"D": (Cap("distributor", "day", 1), Cap("distributor", "total", 5)), "E": ()}
    [step] = planned("campaigns: [{id: C, priority: 1}]").to_do
    assert step.left == ()


def test_what_a_new_campaign_does_not_say_is_as_campaign_create_has_it() -> None:
    [step] = planned("campaigns: [{id: NEW, category: CAT, products: [PAY], pool: P}]").to_do
    assert (step.action, step.kind) == ("create", "campaign")
    assert step.after == Campaign("NEW", "CAT", ("PAY",), "P", 100, NOW, 0, False, "UTC", (), {})


def test_all_faults_are_told_with_their_paths() -> None:
    text = """
pools: [{id: P, expires: soon}, {id: N, least_life: long}]
distributors: [{id: E, burst: 50}, {id: D, rate: null, burst: 50}]
campaigns:
- {id: NEW, pool: P}
- {id: C, pool: NONE, from: 2026-02-30, assigned: [{distributor: D}, {distributor: NOBODY}]}
- {id: OTHER, time_zone: Mars/Crater}
"""
    assert refused(text) == [
        "campaigns[1].pool: there is no pool NONE, neither in the file nor in the store",
        "campaigns[1].assigned[1].distributor: there is no distributor NOBODY, neither in the file nor in the store",
        "pools[0].expires: 'soon' is neither a day (2027-01-31) nor a time (2027-01-31T12:00:00Z)",
        "pools[1].least_life: 'long' is no duration: write 7d, 12h, 30m or 45 (seconds), say",
        "distributors[0].burst: goes with a rate",
        "distributors[1].burst: goes with a rate",
        "campaigns[0]: there is no campaign NEW, and to create it the file has to say its category, products",
        "campaigns[1].from: '2026-02-30' is neither a day (2027-01-31) nor a time (2027-01-31T12:00:00Z)",
        "campaigns[2].time_zone: 'Mars/Crater' is no time zone: take a name like Europe/Berlin",
    ]
