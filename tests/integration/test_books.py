"""The books: nothing that left stock is missing from them, and what must never be is shown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from sqlalchemy import insert, update

from service import zones
from service.catalogue import Cap, Period
from service.domain import CapHolder, Code, Record, Rule
from service.store import books, campaigns, control, generations, ledger, stock
from service.store.books import Accounted, OverCap, Quarantined, StockBalance
from service.store.database import Database
from service.store.ledger import Entry
from service.store.schema import imports, lots, set_asides

NOW = 1_760_000_000
EXPIRY = 1_790_000_000
RETENTION_S = 86_400


@pytest.fixture
async def shop(database: Database) -> Database:
    """Two distributors and a pool of 100 codes."""
    async with database.write() as conn:
        await control.create_distributor(conn, "DIST-001", "First", NOW)
        await control.create_distributor(conn, "DIST-002", "Second", NOW)
        await control.create_pool(conn, "POOL-1", default_expires_at=EXPIRY, least_life_s=0, now=NOW)
        await control.create_pool(conn, "POOL-2", default_expires_at=EXPIRY, least_life_s=0, now=NOW)
        await stock.begin_import(conn, "import-1", "POOL-1", NOW)
        lines = [stock.Row(n, f"CODE-{n:03d}", None, None) for n in range(1, 101)]
        await stock.import_rows(conn, "import-1", "POOL-1", lines, NOW)
    return database


async def make_generation(database: Database) -> int:
    async with database.write() as conn:
        number = await generations.make(conn, 0, "test", NOW)
        await generations.open_(conn, 0, number, NOW)
    return number


async def lease(database: Database, generation: int, codes: int, lease_id: str, predecessor: str = "") -> list[Code]:
    async with database.write() as conn:
        made, _ = await stock.lease(
            conn, pool="POOL-1", partition=0, generation=generation, predecessor=predecessor, lease_id=lease_id,
            codes=codes, now=NOW, earliest_expiry=NOW,
        )  # fmt: skip
        assert made is not None
        return await stock.lease_codes(conn, made)


def record(
    key: str,
    *codes: Code,
    campaign: str = "CAMP-001",
    distributor: str = "DIST-001",
    terminal: str = "T-1",
    at: int = NOW,
) -> Record:
    rule = Rule(campaign, "POOL-1", "PAY", "PAY", 0)
    return Record(f"{terminal}\tPAY", "v1", distributor, distributor, key, at, rule, codes)


def entry(outbox_seq: int, *records: Record, asides: Sequence[Code] = (), generation: int = 1) -> Entry:
    return Entry(0, generation, outbox_seq, f"{outbox_seq}-0", records, tuple(asides))


# --- stock and quarantine --------------------------------------------------------------------------------------------


async def test_stock_balances_while_nothing_is_lost(shop: Database) -> None:
    generation = await make_generation(shop)
    async with shop.read() as conn:
        assert await books.stock_balance(conn) == [
            StockBalance("POOL-1", 100, 100, 0, 0), StockBalance("POOL-2", 0, 0, 0, 0),
        ]  # fmt: skip
    await lease(shop, generation, 30, "a")
    await lease(shop, generation, 20, "b", "a")
    async with shop.read() as conn:
        balances = await books.stock_balance(conn)
    assert balances[0] == StockBalance("POOL-1", 100, 50, 50, 0)
    assert all(balance.balanced for balance in balances)


@pytest.mark.parametrize("lost", ["a lease was forgotten", "an import counts too much"])
async def test_stock_that_went_missing_is_not_hidden(shop: Database, lost: str) -> None:
    async with shop.write() as conn:
        if lost == "a lease was forgotten":
            await conn.execute(update(lots).values(leased_to=10))
        else:
            await conn.execute(update(imports).values(inserted=101))
    async with shop.read() as conn:
        assert [balance.balanced for balance in await books.stock_balance(conn)] == [False, True]


async def test_no_code_of_a_closed_generation_is_out_of_sight(shop: Database) -> None:
    first = await make_generation(shop)
    codes = await lease(shop, first, 10, "a")
    more = await lease(shop, first, 5, "b", "a")
    await ledger.flush(
        shop,
        [
            entry(1, record("req-1", codes[0], codes[1]), asides=[codes[2]], generation=first),
            entry(2, record("req-2", codes[0]), record("req-3", more[4]), generation=first),
        ],
        NOW,
    )
    async with shop.read() as conn:
        assert await books.quarantine(conn) == []
        assert await books.accounted(conn, 0, first) == Accounted(issued=3, set_aside=1, parked=0, incidents=1)

    second = await make_generation(shop)
    await lease(shop, second, 7, "c")
    missing = [*codes[3:], *more[:4]]
    async with shop.read() as conn:
        assert await books.quarantine(conn) == [Quarantined("POOL-1", 0, first, len(missing), NOW)]
        named = await books.quarantined_codes(conn, 100)
        assert [(one.lot, one.seq, one.serial_number) for one in named] == [(c.lot, c.seq, c.serial) for c in missing]
        assert await books.quarantined_codes(conn, 3) == named[:3]

    # What was still on its way arrives late and leaves quarantine; an incident's code was never to be found there.
    await ledger.flush(shop, [entry(3, record("req-4", codes[3]), asides=[codes[4]], generation=first)], NOW)
    async with shop.write() as conn:
        await ledger.raise_incident(
            conn, kind="conflicting_entry", partition=0, generation=first, subject="POOL-1", detail="by hand", now=NOW,
            outbox_seq=9, ordinal=0, codes=1, lot=codes[5].lot, seq=codes[5].seq,
        )  # fmt: skip
        await ledger.raise_incident(
            conn, kind="forked_lease", partition=0, generation=first, subject="POOL-1", detail="no position", now=NOW
        )
        await ledger.park(conn, 0, first, "7-0", 2, "unreadable", b"?", NOW)
    async with shop.read() as conn:
        assert await books.quarantine(conn) == [Quarantined("POOL-1", 0, first, len(missing) - 3, NOW)]
        assert await books.accounted(conn, 0, first) == Accounted(issued=4, set_aside=2, parked=2, incidents=2)
        assert (await books.accounted(conn, 0, first)).codes == 10
        assert (await books.accounted(conn, 0, second)).codes == 0
        assert [balance.balanced for balance in await books.stock_balance(conn)] == [True, True]

    await make_generation(shop)
    async with shop.read() as conn:
        assert [(one.generation, one.codes) for one in await books.quarantine(conn)] == [(1, 8), (2, 7)]


async def test_a_generation_that_was_never_opened_keeps_no_code(shop: Database) -> None:
    async with shop.write() as conn:
        abandoned = await generations.make(conn, 0, "died", NOW)
    await lease(shop, abandoned, 4, "a")
    await make_generation(shop)
    async with shop.read() as conn:
        assert await books.quarantine(conn) == [Quarantined("POOL-1", 0, abandoned, 4, NOW)]


# --- what must never be ----------------------------------------------------------------------------------------------


async def test_a_code_issued_and_set_aside_behind_the_walls_is_shown(shop: Database) -> None:
    codes = await lease(shop, await make_generation(shop), 3, "a")
    await ledger.flush(shop, [entry(1, record("req-1", codes[0]), asides=[codes[1]])], NOW)
    async with shop.read() as conn:
        assert await books.double_codes(conn) == []
    way = {"partition": 0, "generation": 1, "outbox_seq": 9, "ordinal": 0}
    async with shop.write() as conn:
        await conn.execute(insert(set_asides), {**way, "lot": codes[0].lot, "seq": codes[0].seq, "flushed_at": NOW})
    await ledger.flush(shop, [entry(2, record("req-2", codes[0]))], NOW)
    async with shop.read() as conn:
        found = await books.double_codes(conn)
    assert [(one.found, one.lot, one.seq) for one in found] == [
        ("incident", codes[0].lot, codes[0].seq),
        ("issued and set aside", codes[0].lot, codes[0].seq),
    ]
    assert not any("CODE-" in one.detail for one in found)

    await make_generation(shop)  # one of the three leased is nowhere, however often the others are somewhere
    async with shop.read() as conn:
        assert await books.quarantine(conn) == [Quarantined("POOL-1", 0, 1, 1, NOW)]
        assert [one.seq for one in await books.quarantined_codes(conn, 9)] == [codes[2].seq]


async def test_a_key_used_twice_within_its_retention_is_shown_and_no_other(database: Database) -> None:
    seq = iter(range(100))

    def issued(key: str, at: int, distributor: str = "DIST-001") -> Record:
        n = next(seq)
        return record(key, Code(EXPIRY, 1, n, f"C-{n}", f"S-{n}"), at=at, distributor=distributor)

    records = [
        issued("once", NOW),
        issued("other client", NOW), issued("other client", NOW, "DIST-002"),
        issued("much later", NOW), issued("much later", NOW + RETENTION_S),
        issued("twice", NOW), issued("twice", NOW + RETENTION_S - 1),
        issued("thrice", NOW), issued("thrice", NOW), issued("thrice", NOW + 5),
        issued("thrice", NOW + 5 * RETENTION_S),
    ]  # fmt: skip
    await ledger.flush(database, [entry(1, *records)], NOW)
    async with database.read() as conn:
        found = {one.key: one.requests for one in await books.double_keys(conn, RETENTION_S)}
    assert found == {"twice": 2, "thrice": 3}


# --- caps ------------------------------------------------------------------------------------------------------------


async def campaign(database: Database, caps: Sequence[Cap], *, zone: str = "UTC", id: str = "CAMP-001") -> None:
    async with database.write() as conn:
        await campaigns.create(
            conn, id, category="PAY", products=["PAY"], pool="POOL-1", priority=1, starts_at=0, until=0,
            time_zone=zone, caps=caps, now=NOW,
        )  # fmt: skip


async def assign(database: Database, distributor: str, *caps: Cap, at: int = NOW) -> None:
    async with database.write() as conn:
        await campaigns.assign(conn, "CAMP-001", distributor, caps, at)


class Till:
    """Issues by hand, past every cap."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.seq = 0

    async def issue(
        self, times: Sequence[int], *, distributor: str = "DIST-001", terminal: str = "T-1", campaign: str = "CAMP-001"
    ) -> None:
        records = []
        for at in times:
            self.seq += 1
            code = Code(EXPIRY, 1, self.seq, f"CODE-{self.seq}", f"S-{self.seq}")
            records.append(
                record(f"r-{self.seq}", code, campaign=campaign, distributor=distributor, terminal=terminal, at=at)
            )
        await ledger.flush(self.database, [entry(self.seq, *records)], NOW)


@pytest.fixture
def till(shop: Database) -> Till:
    return Till(shop)


async def over(database: Database) -> list[OverCap]:
    async with database.read() as conn:
        return await books.over_caps(conn)


@pytest.mark.parametrize("period", ["total", "day", "hour"])
@pytest.mark.parametrize("holder", ["campaign", "distributor", "terminal"])
async def test_a_cap_that_was_passed_by_one_is_shown_and_one_just_reached_is_not(
    shop: Database, till: Till, holder: CapHolder, period: Period
) -> None:
    start = int(datetime(2025, 10, 9, 9, tzinfo=UTC).timestamp())
    day = int(datetime(2025, 10, 9, tzinfo=UTC).timestamp())
    await campaign(shop, [Cap(holder, period, 6)])
    await campaign(shop, [Cap(holder, period, 5)], id="CAMP-OTHER")
    others = 0 if holder == "campaign" else 1
    for distributor, terminal in (("DIST-001", "T-1"), ("DIST-001", "T-2"), ("DIST-002", "T-1")):
        share = {"campaign": 2, "distributor": 3, "terminal": 6}[holder]
        await till.issue([start, start + 1, start + 2, start + 3, start + 4, start + 3599][:share],
                         distributor=distributor, terminal=terminal)  # fmt: skip
    # Another day and hour, and another campaign: not counted here, unless the cap is a total.
    if period != "total":
        await till.issue([start + 86_400] * 6)
    await till.issue([start] * 5, campaign="CAMP-OTHER")
    assert await over(shop) == []

    await till.issue([start + 60])
    assert await over(shop) == [
        OverCap(
            campaign="CAMP-001",
            holder=holder,
            period=period,
            distributor="DIST-001" if others else "",
            terminal="T-1" if holder == "terminal" else "",
            starts_at={"total": 0, "day": day, "hour": start}[period],
            limit=6,
            codes=7,
        )
    ]


async def test_the_cap_of_one_assignment_is_not_held_against_another(shop: Database, till: Till) -> None:
    await campaign(shop, [])
    await assign(shop, "DIST-001", Cap("distributor", "total", 3), Cap("terminal", "total", 2))
    await assign(shop, "DIST-002")
    await till.issue([NOW] * 9, distributor="DIST-002")
    await till.issue([NOW] * 2)
    await till.issue([NOW], terminal="T-2")
    assert await over(shop) == []
    await till.issue([NOW], terminal="T-2")
    assert [(one.holder, one.codes) for one in await over(shop)] == [("distributor", 4)]
    await till.issue([NOW])
    assert [(one.holder, one.terminal, one.codes) for one in await over(shop)] == [
        ("distributor", "", 5), ("terminal", "T-1", 3),
    ]  # fmt: skip


async def test_days_are_those_of_the_campaigns_zone(shop: Database, till: Till) -> None:
    """Kathmandu is 5:45 ahead of UTC, Berlin has a day of 25 hours, and its clock shows one hour twice."""
    await campaign(shop, [Cap("campaign", "day", 2)], zone="Asia/Kathmandu")
    midnight = int(datetime(2025, 10, 9, tzinfo=zones.zone("Asia/Kathmandu")).timestamp())
    await till.issue([midnight - 1, midnight - 1, midnight, midnight + 86_399])
    assert await over(shop) == []
    await till.issue([midnight + 1])
    assert [(one.starts_at, one.codes) for one in await over(shop)] == [(midnight, 3)]


async def test_neither_a_long_day_nor_a_repeated_hour_is_cut_or_joined(shop: Database, till: Till) -> None:
    await campaign(shop, [Cap("campaign", "day", 3), Cap("campaign", "hour", 1)], zone="Europe/Berlin")
    midnight = int(datetime(2025, 10, 26, tzinfo=zones.zone("Europe/Berlin")).timestamp())
    twice = [midnight + 2 * 3600, midnight + 3 * 3600]  # both are two o'clock
    await till.issue([*twice, midnight + 25 * 3600 - 1])
    assert await over(shop) == []
    await till.issue([midnight])
    assert [(one.period, one.starts_at, one.codes) for one in await over(shop)] == [("day", midnight, 4)]


async def test_a_cap_does_not_count_what_was_issued_before_it_was_published(shop: Database, till: Till) -> None:
    await campaign(shop, [])
    await assign(shop, "DIST-001")
    await till.issue([NOW + 10] * 5)
    await assign(shop, "DIST-001", Cap("distributor", "total", 4), Cap("distributor", "day", 3), at=NOW + 100)
    await till.issue([NOW + 100 + books.SETTLING_S - 1])  # perhaps by a process that did not know yet
    await till.issue([NOW + 300] * 3)
    assert await over(shop) == []
    await till.issue([NOW + 300])
    assert [(one.period, one.codes) for one in await over(shop)] == [("day", 4)]
    await till.issue([NOW + 300])
    assert [(one.period, one.codes) for one in await over(shop)] == [("day", 5), ("total", 5)]


async def test_a_lowered_cap_is_not_held_against_what_was_allowed_but_lets_nothing_through(
    shop: Database, till: Till
) -> None:
    await campaign(shop, [])
    await assign(shop, "DIST-001", Cap("distributor", "total", 9), Cap("distributor", "hour", 8))
    await till.issue([NOW + 10] * 8)
    await assign(shop, "DIST-001", Cap("distributor", "total", 4), Cap("distributor", "hour", 3), at=NOW + 100)
    await till.issue([NOW + 101])  # perhaps by a process that did not know yet
    assert await over(shop) == []
    await till.issue([NOW + 300])
    assert [(one.period, one.codes) for one in await over(shop)] == [("hour", 10), ("total", 10)]


async def test_a_raised_cap_counts_from_its_first_publication(shop: Database, till: Till) -> None:
    await campaign(shop, [])
    await assign(shop, "DIST-001", Cap("distributor", "total", 3))
    await till.issue([NOW + 10] * 3)
    await assign(shop, "DIST-001", Cap("distributor", "total", 5), at=NOW + 100)
    await till.issue([NOW + 300] * 2)
    assert await over(shop) == []
    await till.issue([NOW + 300])
    assert [one.codes for one in await over(shop)] == [6]


async def test_a_cap_of_nothing_lets_nothing_through(shop: Database, till: Till) -> None:
    await campaign(shop, [Cap("campaign", "total", 0)])
    assert await over(shop) == []
    await till.issue([NOW])
    assert [one.codes for one in await over(shop)] == [1]
