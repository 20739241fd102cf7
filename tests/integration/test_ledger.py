"""The ledger: every code that left a window is accounted for once, whatever is flushed, how often and by whom."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, func, insert, select, update

from service.catalogue import Cap
from service.domain import Code, Record, Rule
from service.errors import LedgerLacks, StoreUnreachable
from service.store import books, campaigns, control, generations, ledger, schema, stock
from service.store.database import Database
from service.store.ledger import Count, Entry, Flushed
from service.store.schema import incidents, issuances, parked, requests, set_asides
from tests.integration.test_generations import is_waited_for

NOW = 1_760_000_000
EXPIRY = 1_790_000_000
CODES = 40


def code(seq: int, lot: int = 1) -> Code:
    return Code(EXPIRY, lot, seq, f"PSCF-{lot}-{seq:04d}", f"SER-{lot}-{seq:06d}")


def record(
    key: str,
    *codes: Code,
    terminal: str = "T-1",
    campaign: str = "CAMP-001",
    distributor: str = "DIST-001",
    issued_at: int = NOW,
) -> Record:
    return Record(
        payload=f"{terminal}\tPAY,MOB",
        api="v1",
        distributor=distributor,
        client=distributor,
        key=key,
        issued_at=issued_at,
        rule=Rule(campaign, "POOL-1", "PAY", "PAY", 0),
        codes=codes,
    )


def entry(
    outbox_seq: int, *records: Record, asides: Sequence[Code] = (), generation: int = 1, traces: Sequence[str] = ()
) -> Entry:
    return Entry(0, generation, outbox_seq, f"{outbox_seq}-0", records, tuple(asides), traces=tuple(traces))


async def rows(database: Database, table: Table) -> list[Any]:
    async with database.read() as conn:
        return list(await conn.execute(select(table).order_by(*table.primary_key.columns)))


async def count(database: Database, table: Table) -> int:
    async with database.read() as conn:
        return int((await conn.execute(select(func.count()).select_from(table))).scalar_one())


async def accounted(database: Database, generation: int = 1) -> books.Accounted:
    async with database.read() as conn:
        return await books.accounted(conn, 0, generation)


async def looked_up(database: Database, *keys: str) -> dict[str, Record]:
    async with database.read() as conn:
        return await ledger.lookup(conn, "v1", "DIST-001", keys)


@pytest.fixture
async def shop(database: Database) -> Database:
    """A store with two campaigns on one pool of CODES codes: lot 1, seq 0 and on, as ``code`` makes them."""
    async with database.write() as conn:
        await control.create_distributor(conn, "DIST-001", "First", NOW)
        await control.create_pool(conn, "POOL-1", default_expires_at=EXPIRY, least_life_s=0, now=NOW)
        for campaign in ("CAMP-001", "CAMP-002"):
            await campaigns.create(
                conn, campaign, category="PAY", products=["PAY"], pool="POOL-1", priority=1, starts_at=0, until=0,
                time_zone="Europe/Berlin", caps=[Cap("campaign", "total", 1_000)], now=NOW,
            )  # fmt: skip
        await stock.begin_import(conn, "import-1", "POOL-1", NOW)
        lines = [stock.Row(seq + 1, code(seq).code, code(seq).serial, None) for seq in range(CODES)]
        done = await stock.import_rows(conn, "import-1", "POOL-1", lines, NOW)
        assert done.inserted == CODES
    return database


async def paused(database: Database) -> list[str]:
    async with database.read() as conn:
        return list(
            await conn.scalars(
                select(schema.campaigns.c.id).where(schema.campaigns.c.paused.is_(True)).order_by(schema.campaigns.c.id)
            )
        )


# --- once --------------------------------------------------------------------------------------------------------


async def test_entries_flushed_twice_leave_one_row_each(database: Database) -> None:
    entries = [
        entry(1, record("req-1", code(0)), record("req-2", code(1), code(2)), asides=[code(3)]),
        entry(2, record("req-3", code(4))),
        entry(3, asides=[code(5), code(6)]),
    ]
    assert await ledger.flush(database, entries, NOW) == Flushed(issued=4, set_aside=3)
    before = [await rows(database, table) for table in (requests, issuances, set_asides, incidents)]
    assert [len(some) for some in before] == [3, 4, 3, 0]
    assert await ledger.flush(database, entries, NOW + 9) == Flushed(already=7)
    assert [await rows(database, table) for table in (requests, issuances, set_asides, incidents)] == before
    async with database.read() as conn:
        assert await ledger.lacking(conn, 0, 1, (3, 4, 1, 2)) == [4]
        assert await ledger.lacking(conn, 0, 2, (1,)) == [1]
        assert await ledger.lacking(conn, 0, 1, ()) == []


TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACE = f"00-{TRACE_ID}-{PARENT_ID}-01"


async def test_a_trace_is_found_with_what_it_was_given_and_with_nothing_else(database: Database) -> None:
    plain = entry(1, record("req-1", code(0)))
    traced = entry(2, record("req-2", code(1), code(2)), record("req-3", code(3)), traces=(TRACE, ""))
    assert (await ledger.flush(database, [plain, traced], NOW)).issued == 4
    async with database.read() as conn:
        found = await ledger.find(conn, trace_id=TRACE_ID)
        assert await ledger.find(conn, trace_id="0" * 31 + "1") == []
        everything = await ledger.find(conn)
    assert {(one.request_id, one.trace_id, one.parent_id) for one in found} == {("req-2", TRACE_ID, PARENT_ID)}
    assert len(found) == 2
    assert [one.trace_id for one in everything if one.request_id != "req-2"] == ["", ""]


@pytest.mark.parametrize("first", ["traced", "untraced"])
async def test_a_worker_that_knows_no_traces_and_one_that_does_may_flush_the_same_entry(
    database: Database, first: str
) -> None:
    untraced = entry(1, record("req-1", code(0)))
    traced = msgspec.structs.replace(untraced, traces=(TRACE,))
    before, after = (traced, untraced) if first == "traced" else (untraced, traced)
    assert await ledger.flush(database, [before], NOW) == Flushed(issued=1)
    assert await ledger.flush(database, [after], NOW) == Flushed(already=1)
    assert await count(database, incidents) == 0


async def test_a_ledger_that_lacks_what_was_committed_before_takes_nothing(database: Database) -> None:
    await ledger.flush(database, [entry(1, record("req-1", code(0)))], NOW)
    with pytest.raises(LedgerLacks) as lacks:
        await ledger.flush(database, [entry(4, record("req-4", code(4)))], NOW, before=(1, 2, 3))
    assert lacks.value.seq == 2
    assert await count(database, issuances) == 1
    assert await ledger.flush(database, [entry(4, record("req-4", code(4)))], NOW, before=(1,)) == Flushed(issued=1)


async def test_an_entry_that_came_twice_in_one_flush_is_written_once(database: Database) -> None:
    twice = entry(1, record("req-1", code(0)))
    assert await ledger.flush(database, [twice, twice], NOW) == Flushed(issued=1, already=1)
    assert await count(database, issuances) == 1


async def test_known_and_new_entries_in_any_order_do_not_disturb_each_other(
    database: Database, rng: random.Random
) -> None:
    entries = [entry(seq, record(f"req-{seq}", code(seq))) for seq in [*range(1, 30), 5_000, 5_001]]
    flushed = rng.sample(entries, 11)
    await ledger.flush(database, flushed, NOW)
    rng.shuffle(entries)
    assert await ledger.flush(database, entries, NOW) == Flushed(issued=20, already=11)
    assert await count(database, issuances) == 31


async def test_nothing_to_flush_needs_no_store() -> None:
    away = Database.connect("postgresql+asyncpg://postgres@127.0.0.1:1/none")
    assert await ledger.flush(away, [], NOW) == Flushed()
    with pytest.raises(StoreUnreachable):
        await ledger.flush(away, [entry(1, record("req-1", code(0)))], NOW)
    await away.close()


async def test_a_flush_that_was_cut_off_leaves_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    class CutError(Exception):
        pass

    async def cut(*_: object) -> None:
        raise CutError

    first = entry(1, record("req-1", code(0)), asides=[code(1)])
    monkeypatch.setattr("service.store.flush._compare", cut)  # everything is written, nothing committed
    with pytest.raises(CutError):
        await ledger.flush(database, [first], NOW)
    assert [await count(database, table) for table in (requests, issuances, set_asides)] == [0, 0, 0]
    monkeypatch.undo()
    assert await ledger.flush(database, [first], NOW) == Flushed(issued=1, set_aside=1)


async def test_a_closed_generation_may_still_be_flushed(database: Database) -> None:
    async with database.write() as conn:
        await generations.make(conn, 0, "first start", NOW)
        await generations.close(conn, 0, 1, NOW)
    assert await ledger.flush(database, [entry(1, record("req-1", code(0)))], NOW) == Flushed(issued=1)


# --- known positions with other content ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "codes"),
    [
        (entry(1, record("req-1", code(7)), record("req-2", code(1)), asides=[code(2)]), 1),
        (entry(1, record("req-1", code(0)), record("req-9", code(1)), asides=[code(2)]), 0),
        (entry(1, record("req-1", code(0)), record("req-2", code(1), terminal="T-2"), asides=[code(2)]), 0),
        (entry(1, record("req-1", code(0)), record("req-2", code(1)), asides=[code(8)]), 1),
        (entry(1, record("req-1", code(0)), asides=[code(1), code(2)]), 1),
        (entry(1, record("req-1", code(0)), record("req-2", code(1)), asides=[code(2), code(3)]), 1),
        (entry(1, record("req-1", code(0)), record("req-2", code(1))), 0),
    ],
    ids=["code", "key", "terminal", "set aside", "issued or set aside", "longer", "shorter"],
)
async def test_other_content_at_a_known_position_does_not_change_the_ledger(
    shop: Database, other: Entry, codes: int
) -> None:
    first = entry(1, record("req-1", code(0)), record("req-2", code(1)), asides=[code(2)])
    await ledger.flush(shop, [first], NOW)
    tables = (requests, issuances, set_asides)
    before = [await rows(shop, table) for table in tables]

    flushed = await ledger.flush(shop, [other], NOW)
    assert flushed.incidents == 1
    assert flushed.already == other.codes - (1 if other.codes >= first.codes else 0)
    assert flushed.issued == flushed.set_aside == 0
    assert [await rows(shop, table) for table in tables] == before
    (raised,) = await rows(shop, incidents)
    assert (raised.kind, raised.codes) == ("conflicting_entry", codes)
    assert "PSCF" not in raised.detail
    assert (await accounted(shop)).codes == 3 + codes

    for again in (other, first):
        assert (await ledger.flush(shop, [again], NOW)).incidents == 0
    assert await paused(shop) == []


async def test_a_conflict_does_not_hold_up_the_rest(database: Database) -> None:
    await ledger.flush(database, [entry(1, record("req-1", code(0)))], NOW)
    entries = [entry(1, record("req-1", code(5))), entry(2, record("req-2", code(1)))]
    assert await ledger.flush(database, entries, NOW) == Flushed(issued=1, incidents=1)


# --- one code, twice -----------------------------------------------------------------------------------------------


async def test_one_code_in_two_entries_is_an_incident_and_the_rest_is_in_the_ledger(shop: Database) -> None:
    entries = [
        entry(1, record("req-1", code(0))),
        entry(2, record("req-2", code(1)), record("req-3", code(0)), record("req-4", code(2))),
    ]
    flushed = await ledger.flush(shop, entries, NOW)
    assert flushed == Flushed(issued=3, incidents=1, paused=("CAMP-001",))
    assert [row.seq for row in await rows(shop, issuances)] == [0, 1, 2]
    (raised,) = await rows(shop, incidents)
    assert (raised.kind, raised.outbox_seq, raised.ordinal, raised.lot, raised.seq, raised.codes, raised.subject) == (
        "double_issue", 2, 1, 1, 0, 1, "CAMP-001",
    )  # fmt: skip
    assert "PSCF" not in raised.detail
    assert (await accounted(shop)).codes == 4
    assert await paused(shop) == ["CAMP-001"]
    # Both clients were told the same code, and a replay tells both what they were told.
    told = await looked_up(shop, "req-1", "req-3")
    assert told["req-3"] == record("req-3", code(0))
    assert told["req-1"] == record("req-1", code(0))


async def test_a_code_of_an_earlier_flush_is_not_issued_again_and_a_repeat_raises_no_second_incident(
    shop: Database,
) -> None:
    await ledger.flush(shop, [entry(1, record("req-1", code(0)))], NOW)
    again = [entry(1, record("req-2", code(0), campaign="CAMP-002"), generation=2)]
    assert await ledger.flush(shop, again, NOW) == Flushed(incidents=1, paused=("CAMP-001", "CAMP-002"))
    # Not acknowledged, flushed again: no second incident, and the pause is told again until it is lifted.
    assert await ledger.flush(shop, again, NOW) == Flushed(already=1, paused=("CAMP-002",))
    async with shop.write() as conn:
        await conn.execute(update(schema.campaigns).values(paused=False))
    assert await ledger.flush(shop, again, NOW) == Flushed(already=1)
    assert await paused(shop) == []
    assert await count(shop, incidents) == 1


async def test_one_request_with_a_good_and_a_double_code_is_told_both_again(shop: Database) -> None:
    await ledger.flush(shop, [entry(1, record("req-1", code(1)))], NOW)
    three = record("req-2", code(0), code(1), code(2))
    assert (await ledger.flush(shop, [entry(2, three)], NOW)).issued == 2
    assert (await looked_up(shop, "req-2"))["req-2"].pack() == three.pack()
    async with shop.read() as conn:
        found = await ledger.find(conn, request_id="req-2")
        assert [(one.code, one.double) for one in found] == [
            (code(0).code, False), (code(1).code, True), (code(2).code, False),
        ]  # fmt: skip
        assert {(one.request_id, one.double) for one in await ledger.find(conn, code=code(1).code)} == {
            ("req-1", False), ("req-2", True),
        }  # fmt: skip


async def test_one_code_at_two_positions_of_stock_is_issued_once(shop: Database) -> None:
    elsewhere = Code(EXPIRY, 2, 77, code(0).code, "SER-X")
    entries = [entry(1, record("req-1", code(0))), entry(2, record("req-2", elsewhere))]
    assert await ledger.flush(shop, entries, NOW) == Flushed(issued=1, incidents=1, paused=("CAMP-001",))
    # Stock has another code there, or none: what this client was told can't be rebuilt from it.
    assert await looked_up(shop, "req-2") == {}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("issued_first", [True, False])
async def test_a_code_set_aside_is_not_issued_nor_the_other_way_round(
    shop: Database, issued_first: bool, at_once: bool
) -> None:
    given = record("req-1", code(0))
    entries = [entry(1, given), entry(2, asides=[code(0), code(1)])]
    if not issued_first:
        entries = [entry(1, asides=[code(0), code(1)]), entry(2, given)]
    flushed = [await ledger.flush(shop, [one], NOW) for one in entries] if not at_once else [
        await ledger.flush(shop, entries, NOW)
    ]  # fmt: skip
    assert sum(one.incidents for one in flushed) == 1
    assert flushed[-1].paused == ("CAMP-001",)
    assert [row.kind for row in await rows(shop, incidents)] == ["double_issue"]
    assert await count(shop, issuances) + await count(shop, set_asides) == 2
    assert (await accounted(shop)).codes == 3
    assert await looked_up(shop, "req-1") == {"req-1": given}
    async with shop.read() as conn:
        assert len(await books.double_codes(conn)) == 1
    for one in entries:
        assert (await ledger.flush(shop, [one], NOW)).incidents == 0


async def test_a_code_set_aside_twice_is_an_incident(shop: Database) -> None:
    entries = [entry(1, asides=[code(0)]), entry(2, asides=[code(0), code(1)])]
    assert await ledger.flush(shop, entries, NOW) == Flushed(set_aside=2, incidents=1)
    assert await ledger.flush(shop, entries, NOW) == Flushed(already=3)


async def test_a_batch_full_of_double_codes_loses_none(shop: Database) -> None:
    first = [entry(1, *(record(f"a-{seq}", code(seq)) for seq in range(CODES)))]
    second = [entry(1, *(record(f"b-{seq}", code(seq)) for seq in range(CODES)), generation=2)]
    await ledger.flush(shop, first, NOW)
    flushed = await ledger.flush(shop, second, NOW)
    assert (flushed.issued, flushed.incidents) == (0, CODES)
    assert (await accounted(shop, 2)).codes == CODES
    assert len(await looked_up(shop, *(f"b-{seq}" for seq in range(CODES)))) == CODES


# --- what no row can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        entry(1, record("k" * 129, code(0))),
        entry(1, record("req-1", Code(EXPIRY, 1, 0, "x" * 129, "S"))),
        entry(1, record("req-1", Code(EXPIRY, 2**63, 0, "x", "S"))),
        entry(1, record("req-1", code(0), terminal="t" * 65)),
        entry(1, record("nul\0", code(0))),
        entry(1, record("half \udcff", code(0))),
        entry(1, record("req-1", code(0), issued_at=-1)),
        entry(1, asides=[Code(EXPIRY, -1, 0, "x", "S")]),
        entry(2**63, record("req-1", code(0))),
    ],
    ids=["key", "code", "lot", "terminal", "NUL", "surrogate", "time", "set aside", "sequence"],
)
async def test_an_entry_that_no_row_can_hold_is_parked_and_holds_nobody_up(database: Database, bad: Entry) -> None:
    good = entry(2, record("req-2", code(1)))
    assert await ledger.flush(database, [bad, good], NOW) == Flushed(issued=1, parked=1)
    assert await ledger.flush(database, [bad, good], NOW) == Flushed(already=1, parked=1)
    (kept,) = await rows(database, parked)
    assert (kept.codes, kept.entry_id) == (1, bad.entry_id)
    assert kept.content == bad.content()
    assert (await accounted(database)).codes == 2


async def test_a_record_without_a_code_is_parked(database: Database) -> None:
    assert await ledger.flush(database, [entry(1, record("req-1"))], NOW) == Flushed(parked=0)
    assert await count(database, parked) == 1
    assert await count(database, requests) == 0


async def test_parking_again_keeps_what_was_parked_first(database: Database) -> None:
    async with database.write() as conn:
        await ledger.park(conn, 0, 1, "7-0", 3, "no such field", b"\xff\x00", NOW)
        await ledger.park(conn, 0, 1, "7-0", 9, "other", b"", NOW + 1)
    (kept,) = await rows(database, parked)
    assert (kept.codes, kept.reason, kept.content) == (3, "no such field", b"\xff\x00")


async def test_incidents_without_a_position_are_never_taken_for_the_same(database: Database) -> None:
    async with database.write() as conn:
        for _ in range(2):
            assert await ledger.raise_incident(
                conn, kind="forked_lease", partition=0, generation=1, subject="POOL-1", detail="a fork", now=NOW
            )
        one = {"kind": "conflicting_entry", "partition": 0, "generation": 1, "subject": "x", "detail": "y", "now": NOW}
        assert await ledger.raise_incident(conn, **one, outbox_seq=4, ordinal=0)  # type: ignore[arg-type]
        assert not await ledger.raise_incident(conn, **one, outbox_seq=4, ordinal=0)  # type: ignore[arg-type]
        assert await ledger.lacking(conn, 0, 1, (4,)) == []


# --- reading -------------------------------------------------------------------------------------------------------

# What a record's fields may hold: anything but control characters, which its lines and columns are made of.
_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=64)
_NUMBER = st.integers(0, 2**63 - 1)
_unique = itertools.count(1)


def _record_of(
    terminal: str, products: str, fields: list[str], issued_at: int, until: int, n: int, times: list[int]
) -> Record:
    number = next(_unique)
    distributor, client, key, campaign, pool, category, product, text, serial = fields
    return Record(
        payload=f"{terminal}\t{products}",
        api="v1",
        distributor=distributor,
        client=client,
        key=f"{key}{number}",
        issued_at=issued_at,
        rule=Rule(campaign, pool, category, product, until),
        codes=tuple(Code(times[i], number, i, f"{number}.{i}.{text}", serial) for i in range(n)),
    )


_RECORDS = st.lists(
    st.builds(
        _record_of, _TEXT, _TEXT, st.lists(_TEXT, min_size=9, max_size=9), _NUMBER, _NUMBER, st.integers(1, 3),
        st.lists(_NUMBER, min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(records=_RECORDS)
async def test_records_are_not_changed_by_a_byte_on_their_way_through_the_ledger(
    database: Database, records: list[Record]
) -> None:
    outbox_seq = next(_unique)
    assert (await ledger.flush(database, [entry(outbox_seq, *records)], NOW)).issued > 0
    async with database.read() as conn:
        for one in records:
            found = await ledger.lookup(conn, one.api, one.client, [one.key, "none"])
            assert {key: told.pack() for key, told in found.items()} == {one.key: one.pack()}
        told = await ledger.newest_first(conn, 0, 0, None, 1_000)
        packed = {r.pack() for cursor, r in told if cursor[2] == outbox_seq}
        assert packed == {one.pack() for one in records}


async def test_the_earliest_of_several_records_of_a_key_is_the_one(database: Database) -> None:
    entries = [entry(seq, record("req-1", code(seq), issued_at=NOW + seq)) for seq in (2, 1, 3)]
    await ledger.flush(database, entries, NOW)
    assert await looked_up(database, "req-1") == {"req-1": record("req-1", code(1), issued_at=NOW + 1)}
    async with database.read() as conn:
        assert await ledger.lookup(conn, "v3", "DIST-001", ["req-1"]) == {}
        assert await ledger.lookup(conn, "v1", "DIST-002", ["req-1"]) == {}
        assert await ledger.lookup(conn, "v1", "DIST-001", []) == {}


async def test_pages_of_records_leave_none_out_and_repeat_none(database: Database, rng: random.Random) -> None:
    entries = []
    for generation, outbox_seq in itertools.product((1, 2), range(1, 8)):
        first = 100 * generation + 10 * outbox_seq
        at = NOW + rng.randrange(4)  # clocks step back, and many are issued in one second
        entries.append(
            entry(
                outbox_seq,
                *(record(f"req-{first + i}", code(first + i), code(first + i, 2), issued_at=at) for i in range(3)),
                generation=generation,
            )
        )
    await ledger.flush(database, entries, NOW)
    everything = {one.key: one for each in entries for one in each.records}
    for since, limit in itertools.product((0, NOW + 2, NOW + 9), (1, 4, 42, 100)):
        before: ledger.Cursor | None = None
        told: list[Record] = []
        async with database.read() as conn:
            while page := await ledger.newest_first(conn, 0, since, before, limit):
                assert len(page) <= limit
                told += [one for _, one in page]
                before = page[-1][0]
            assert await ledger.newest_first(conn, 1, since, None, limit) == []
        assert {one.key: one for one in told} == {k: r for k, r in everything.items() if r.issued_at >= since}
        assert len({one.key for one in told}) == len(told)
        assert [one.issued_at for one in told] == sorted((one.issued_at for one in told), reverse=True)


async def test_a_record_that_can_not_be_told_does_not_end_the_pages(shop: Database) -> None:
    elsewhere = [Code(EXPIRY, 2, seq, code(seq).code, "SER-X") for seq in range(4)]
    await ledger.flush(shop, [entry(seq + 1, record(f"good-{seq}", code(seq))) for seq in range(4)], NOW)
    await ledger.flush(shop, [entry(seq + 5, record(f"bad-{seq}", elsewhere[seq])) for seq in range(4)], NOW)
    async with shop.read() as conn:
        page = await ledger.newest_first(conn, 0, 0, None, 2)
        assert [one.key for _, one in page] == ["good-3", "good-2"]


async def test_no_code_is_missing_from_the_counts(database: Database) -> None:
    await ledger.flush(
        database,
        [
            entry(1, record("a", code(0), code(1)), record("b", code(2), terminal="T-2", issued_at=NOW + 10)),
            entry(2, record("c", code(3), issued_at=NOW + 10), record("d", code(4), distributor="DIST-002")),
            entry(3, record("e", code(5), campaign="CAMP-002")),
        ],
        NOW,
    )
    async with database.read() as conn:
        assert await ledger.counts(conn, "CAMP-001", 0) == [
            Count("DIST-001", "T-1", 3), Count("DIST-001", "T-2", 1), Count("DIST-002", "T-1", 1),
        ]  # fmt: skip
        assert await ledger.counts(conn, "CAMP-001", NOW + 1) == [
            Count("DIST-001", "T-1", 1), Count("DIST-001", "T-2", 1),
        ]  # fmt: skip
        assert await ledger.counts(conn, "none", 0) == []


async def test_find_shows_nothing_that_was_not_asked_for(database: Database) -> None:
    await ledger.flush(
        database,
        [
            entry(1, record("a", code(0), code(1)), record("b", code(2), issued_at=NOW + 5)),
            entry(2, record("a", code(3), distributor="DIST-002", issued_at=NOW + 3)),
        ],
        NOW + 7,
    )
    async with database.read() as conn:
        assert [one.code for one in await ledger.find(conn)] == [code(n).code for n in (2, 3, 0, 1)]
        assert [one.code for one in await ledger.find(conn, limit=3)] == [code(n).code for n in (2, 3, 0)]
        assert [one.seq for one in await ledger.find(conn, request_id="a")] == [3, 0, 1]
        assert [one.seq for one in await ledger.find(conn, request_id="a", distributor="DIST-001")] == [0, 1]
        assert await ledger.find(conn, code="PSCF-none") == []
        (found,) = await ledger.find(conn, code=code(1).code)
    assert found == ledger.Found(
        partition=0, generation=1, outbox_seq=1, ordinal=1, api="v1", distributor="DIST-001", client="DIST-001",
        request_id="a", terminal="T-1", payload="T-1\tPAY,MOB", campaign="CAMP-001", pool="POOL-1", category="PAY",
        product="PAY", until=0, issued_at=NOW, flushed_at=NOW + 7, quantity=2, lot=1, seq=1, code=code(1).code,
        serial=code(1).serial, expires_at=EXPIRY, double=False,
    )  # fmt: skip


# --- several at once (PostgreSQL; SQLite lets one write at a time) ---------------------------------------------------


@pytest.fixture
async def three(postgres_url: str) -> AsyncIterator[list[Database]]:
    """Three processes' doors to one PostgreSQL database."""
    opened = [Database.connect(postgres_url) for _ in range(3)]
    yield opened
    for each in opened:
        await each.close()


async def test_concurrent_flushes_of_the_same_entries_write_each_once(
    three: list[Database], rng: random.Random
) -> None:
    for generation in range(1, 9):
        entries = [
            entry(
                seq,
                *(record(f"{generation}-{seq}-{i}", code(10 * seq + i, generation)) for i in range(5)),
                asides=[code(10 * seq + 5, generation)],
                generation=generation,
            )
            for seq in range(1, 21)
        ]
        some = [entries, rng.sample(entries, 15), rng.sample(entries, 15)]
        done = await asyncio.gather(*(ledger.flush(db, part, NOW) for db, part in zip(three, some, strict=True)))
        assert sum(one.issued for one in done) == 100
        assert sum(one.set_aside for one in done) == 20
        assert sum(one.already for one in done) == 6 * (15 + 15)
        assert sum(one.incidents for one in done) == 0
        assert (await accounted(three[0], generation)).codes == 120
    assert await count(three[0], incidents) == 0


async def test_concurrent_flushes_of_one_code_leave_one_issuance_and_one_incident(three: list[Database]) -> None:
    async with three[0].write() as conn:
        await control.create_pool(conn, "POOL-1", default_expires_at=EXPIRY, least_life_s=0, now=NOW)
        await campaigns.create(
            conn, "CAMP-001", category="PAY", products=["PAY"], pool="POOL-1", priority=1, starts_at=0, until=0,
            time_zone="UTC", caps=[], now=NOW,
        )  # fmt: skip
    for lot in range(1, 9):
        parts = [
            [entry(10 * lot + n, record(f"{lot}-{n}", code(0, lot)), record(f"{lot}-{n}-good", code(n, lot)))]
            for n in (1, 2, 3)
        ]
        done = await asyncio.gather(*(ledger.flush(db, part, NOW) for db, part in zip(three, parts, strict=True)))
        assert sum(one.issued for one in done) == 4
        assert sum(one.incidents for one in done) == 2
    assert await paused(three[0]) == ["CAMP-001"]
    assert await count(three[0], incidents) == 16


async def test_a_flush_does_not_go_on_while_the_partition_is_locked_exclusively(three: list[Database]) -> None:
    async with three[0].write() as conn:
        await generations.lock(conn, 0, exclusive=True)
        flush = asyncio.create_task(ledger.flush(three[1], [entry(1, record("req-1", code(0)))], NOW))
        await is_waited_for(three[2])
        assert await count(three[2], issuances) == 0
    assert await flush == Flushed(issued=1)


async def test_an_exclusive_lock_is_not_had_while_a_flush_goes_on(
    three: list[Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    compare = ledger.flush.__globals__["_compare"]

    async def stopped(*arguments: object) -> object:
        reached.set()
        await go_on.wait()
        return await compare(*arguments)

    monkeypatch.setattr("service.store.flush._compare", stopped)
    flush = asyncio.create_task(ledger.flush(three[0], [entry(1, record("req-1", code(0)))], NOW))
    await reached.wait()

    async def roll() -> int:
        async with three[1].write() as conn:
            await generations.lock(conn, 0, exclusive=True)
            found = await conn.execute(select(func.count()).select_from(issuances))
            return int(found.scalar_one())

    rolling = asyncio.create_task(roll())
    await is_waited_for(three[2])
    go_on.set()
    assert await rolling == 1
    assert await flush == Flushed(issued=1)


async def test_a_row_committed_since_the_look_is_not_taken_for_a_double(
    three: list[Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker wins between looking which entries are known and writing them, in each round once."""
    entries = [entry(1, asides=[code(0)]), entry(2, record("req-2", code(1)))]
    module = ledger.flush.__globals__
    known = module["_known"]
    rounds: list[int] = []

    async def overtaken(*arguments: Any) -> Any:
        found = await known(*arguments)
        if len(rounds) < 2:
            rounds.append(len(rounds))
            monkeypatch.setattr("service.store.flush._known", known)
            await ledger.flush(three[1], [entries[len(rounds) - 1]], NOW)
            monkeypatch.setattr("service.store.flush._known", overtaken)
        return found

    monkeypatch.setattr("service.store.flush._known", overtaken)
    assert await ledger.flush(three[0], entries, NOW) == Flushed(already=2)
    assert rounds == [0, 1]
    assert await count(three[0], incidents) == 0


async def test_an_entry_committed_during_the_search_for_culprits_is_not_one(
    three: list[Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other worker writes the first entry while this one, met by a wall, looks who has its second entry's code."""
    entries = [entry(2, asides=[code(0)]), entry(3, record("req-2", code(1)))]
    await ledger.flush(three[1], [entry(1, record("req-1", code(1)))], NOW)
    doubles = ledger.flush.__globals__["_doubles"]

    async def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr("service.store.flush._doubles", doubles)
        await ledger.flush(three[1], entries[:1], NOW)
        return await doubles(*arguments)

    monkeypatch.setattr("service.store.flush._doubles", overtaken)
    assert await ledger.flush(three[0], entries, NOW) == Flushed(already=1, incidents=1)
    assert [(row.outbox_seq, row.lot, row.seq) for row in await rows(three[0], incidents)] == [(3, 1, 1)]


@pytest.mark.parametrize("table", [issuances, set_asides], ids=["issuances", "set-asides"])
async def test_a_violation_that_is_not_a_race_is_never_swallowed(
    shop: Database, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the look for culprits ever wrong, the flush fails loudly and nothing is written."""

    async def nobody(*_: object) -> dict[object, object]:
        return {}

    monkeypatch.setattr("service.store.flush._doubles", nobody)
    way = {"partition": 0, "generation": 9, "outbox_seq": 1, "ordinal": 0, "lot": 1, "seq": 0}
    rest: dict[str, object] = {"flushed_at": NOW}
    if table is issuances:
        rest = {"request_ordinal": 0, "code": "x", "serial": "x", "expires_at": 1, "digest": b"x" * 16}
    async with shop.write() as conn:
        await conn.execute(insert(table), {**way, **rest})
    bad = entry(1, record("req-1", code(0))) if table is issuances else entry(1, asides=[code(0)])
    with pytest.raises(StoreUnreachable):
        await ledger.flush(shop, [bad, entry(2, record("req-2", code(1)))], NOW)
    assert await count(shop, table) == 1
    assert await count(shop, requests) == 0
