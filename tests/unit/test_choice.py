"""The choice of the campaign, held against a plain reading of api-v1 ("Choice of the campaign", and 409 in "Errors").

``Catalogue.route`` and ``lua/issue.lua`` share the work: one decides the order, the other who is open, capped or
exhausted.  The model below knows nothing of either.  It keeps a list of the vouchers given and counts them again for
every cap of every campaign, by local dates and hours.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service import catalogue, zones
from service.catalogue import Campaign, Cap, Catalogue, Pool, Snapshot, encode
from service.domain import CapHolder, Considered, Record, Request, Stop, Unavailable
from service.scripts import Routed
from tests.scripting import YEAR_S, Bench, MemoryServer

# 40 minutes before midnight in Rome, 10 past the hour in Kolkata, 20 past it in UTC.
START = 1_750_109_000 - 1_750_109_000 % 3_600 + 1_200
POOLS, DISTRIBUTORS, TERMINALS = ("P", "Q"), ("D1", "D2"), ("T1", "T2")
ZONES = ("UTC", "Europe/Rome", "Asia/Kolkata")


class Given(msgspec.Struct, frozen=True):
    """A voucher that was given."""

    campaign: str
    distributor: str
    terminal: str
    at: int


class Wanted(msgspec.Struct, frozen=True):
    """A request, ``after`` this many seconds."""

    distributor: str
    terminal: str
    products: tuple[str, ...]
    after: int


# --- the contract, read plainly -------------------------------------------------------------------------------------


def expected(
    published: Snapshot, wanted: Wanted, now: int, given_so_far: list[Given], left: dict[str, int], exhausted: set[str]
) -> str | Unavailable:
    """``"CAMPAIGN PRODUCT"`` of the voucher to give, ``refilling``, or the 409."""
    considered: list[Considered] = []
    for i, product in enumerate(wanted.products):
        if product in wanted.products[:i]:
            continue
        for campaign in sorted(
            (c for c in published.campaigns if product in c.products and wanted.distributor in c.assigned),
            key=lambda c: (c.priority, c.until == 0, c.until, c.id),
        ):
            stop = _stopped_by(campaign, wanted, now, given_so_far)
            if stop is None and left[campaign.pool] == 0:
                if campaign.pool not in exhausted:
                    return "refilling"
                stop = "exhausted"
            if stop is None:
                return f"{campaign.id} {product}"
            considered.append(Considered(product, campaign.id, stop))
    stops = {one.stopped_by for one in considered}
    if "exhausted" in stops:
        return Unavailable("exhausted", tuple(considered))
    if "cap_reached" in stops:
        return Unavailable("cap_reached", tuple(considered))
    return Unavailable("not_running" if stops else "no_campaign", tuple(considered))


def _stopped_by(campaign: Campaign, wanted: Wanted, now: int, given_so_far: list[Given]) -> Stop | None:
    if campaign.paused:
        return "paused"
    if now < campaign.starts_at:
        return "before"
    if campaign.until and now >= campaign.until:
        return "after"
    zone = zones.zone(campaign.time_zone)
    for cap in campaign.caps + campaign.assigned[wanted.distributor]:
        used = 0
        for voucher in given_so_far:
            used += (
                voucher.campaign == campaign.id
                and (cap.holder == "campaign" or voucher.distributor == wanted.distributor)
                and (cap.holder != "terminal" or voucher.terminal == wanted.terminal)
                and _same_period(cap.period, *(datetime.fromtimestamp(at, zone) for at in (voucher.at, now)))
            )
        if used >= cap.limit:
            return "cap_reached"
    return None


def _same_period(period: str, one: datetime, other: datetime) -> bool:
    if period == "total":
        return True
    return one.date() == other.date() and (period == "day" or one.hour == other.hour)


# --- what may be asked ----------------------------------------------------------------------------------------------


def caps_per(*holders: CapHolder) -> st.SearchStrategy[tuple[Cap, ...]]:
    """Caps that ``store/control.py`` would let in: no holder and period twice."""
    one = st.builds(Cap, st.sampled_from(holders), st.sampled_from(["total", "day", "hour"]), st.integers(0, 3))
    return st.lists(one, max_size=2, unique_by=lambda cap: (cap.holder, cap.period)).map(tuple)


campaigns = st.builds(
    Campaign,
    id=st.just(""),
    category=st.just("CAT"),
    products=st.sampled_from([("A",), ("A",), ("A", "B"), ("B", "C"), ("C", "A")]),
    pool=st.sampled_from(POOLS),
    priority=st.integers(0, 1),
    starts_at=st.sampled_from([0, 0, 0, START - 100, START, START + 2_000]),
    until=st.sampled_from([0, 0, 0, START - 50, START + 1_000, START + 90_000]),
    paused=st.sampled_from([False, False, False, True]),
    time_zone=st.sampled_from(ZONES),
    caps=caps_per("campaign", "distributor", "terminal"),
    assigned=st.sampled_from([DISTRIBUTORS, DISTRIBUTORS, DISTRIBUTORS, ("D1",), ("D2",), ()]).flatmap(
        lambda assigned: st.fixed_dictionaries(dict.fromkeys(assigned, caps_per("distributor", "terminal")))
    ),
)

snapshots = st.lists(campaigns, min_size=1, max_size=6).flatmap(
    lambda made: st.permutations([f"C{i}" for i in range(len(made))]).map(
        lambda ids: Snapshot(
            1,
            {},
            dict.fromkeys(DISTRIBUTORS, True),
            tuple(Pool(pool, 0) for pool in POOLS),
            tuple(msgspec.structs.replace(one, id=id) for one, id in zip(made, ids, strict=True)),
        )
    )
)

requests = st.lists(
    st.builds(
        Wanted,
        distributor=st.sampled_from(DISTRIBUTORS),
        terminal=st.sampled_from(TERMINALS),
        products=st.sampled_from([("A",), ("A", "B"), ("B",), ("C", "A"), ("B", "B", "A", "C"), ("X", "A")]),
        after=st.sampled_from([0, 0, 0, 1, 600, 1_800, 3_600, 50_000]),
    ),
    min_size=3,
    max_size=10,
)

stocks = st.fixed_dictionaries({pool: st.tuples(st.integers(0, 4), st.booleans()) for pool in POOLS})


@settings(max_examples=100)
@given(published=snapshots, wanted=requests, stock=stocks)
def test_no_other_campaign_is_chosen_than_the_contract_says(
    published: Snapshot, wanted: list[Wanted], stock: dict[str, tuple[int, bool]]
) -> None:
    asyncio.run(_compare(published, wanted, stock))


async def _compare(published: Snapshot, wanted: list[Wanted], stock: dict[str, tuple[int, bool]]) -> None:
    *_, current = catalogue.load(encode(published))
    assert current is not None
    memory = MemoryServer(now=START)
    bench = Bench(memory.client(), memory=memory)
    await bench.open()
    left = {pool: count for pool, (count, _) in stock.items()}
    exhausted = {pool for pool, (_, over) in stock.items() if over}
    for pool, count in left.items():
        if count:
            await bench.restock(pool, count, expires_at=START + YEAR_S)
        if pool in exhausted:
            assert await bench.scripts.exhausted(pool, 1, bench.last_lease(pool), generation=1) == "OK"
    so_far: list[Given] = []
    for i, one in enumerate(wanted):
        memory.now = (memory.now or 0) + one.after
        says = expected(published, one, memory.now, so_far, left, exhausted)
        answer = await _ask(bench, current, one, f"r{i}")
        event(says.code if isinstance(says, Unavailable) else "refilling" if says == "refilling" else "issued")
        if isinstance(answer, Record):
            assert f"{answer.rule.campaign} {answer.rule.product}" == says
            so_far.append(Given(answer.rule.campaign, one.distributor, one.terminal, memory.now))
            left[answer.rule.pool] -= 1
        else:
            assert answer == says
    await bench.check()
    await bench.redis.aclose()


async def _ask(bench: Bench, current: Catalogue, wanted: Wanted, key: str) -> Record | Unavailable | str:
    route = current.route(wanted.distributor, wanted.products)
    request = Request(
        "v1", wanted.distributor, key, wanted.distributor, wanted.products,
        f"{wanted.terminal}\t{','.join(wanted.products)}",
    )  # fmt: skip
    [answer] = (await bench.issue(Routed(request, route.plan))).answers
    if answer.status == "ISSUED":
        return Record.unpack(answer.detail)
    return "refilling" if answer.status == "REFILL" else route.unavailable(answer.detail)
