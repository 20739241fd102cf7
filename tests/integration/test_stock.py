"""Stock: what an import refuses, what a lease takes, and both at once, on both databases."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime

import pytest
from sqlalchemy import event, func, insert, select, update

from service.domain import Code
from service.errors import Conflict, Fault, GenerationClosed, NotFound
from service.store import control, intake, schema, stock
from service.store.database import Database
from service.store.stock import ImportedChunk, ImportState, Lease, Refused, Row

NOW = int(datetime(2027, 1, 15, tzinfo=UTC).timestamp())
SOON = NOW + 1_000
LATER = NOW + 2_000


def rows(codes: Iterable[str], first_line: int = 1, expires_at: int | None = None) -> list[Row]:
    return [Row(line, code, None, expires_at) for line, code in enumerate(codes, first_line)]


async def fill(database: Database, import_id: str, pool: str, lines: list[Row], now: int = NOW) -> ImportedChunk:
    async with database.write() as connection:
        await stock.begin_import(connection, import_id, pool, now)
        return await stock.import_rows(connection, import_id, pool, lines, now)


async def take(
    database: Database,
    lease_id: str,
    predecessor: str = "",
    *,
    pool: str = "P",
    generation: int = 1,
    codes: int = 10,
    now: int = NOW,
    earliest_expiry: int = 0,
) -> Lease | None:
    async with database.write() as connection:
        taken, _ = await stock.lease(
            connection, pool=pool, partition=0, generation=generation, predecessor=predecessor, lease_id=lease_id,
            codes=codes, now=now, earliest_expiry=earliest_expiry,
        )  # fmt: skip
        return taken


async def codes_of(database: Database, lease: Lease | None) -> list[Code]:
    assert lease is not None
    async with database.read() as connection:
        return await stock.lease_codes(connection, lease)


async def open_generation(database: Database, generation: int, state: str = "open") -> None:
    row = {"partition": 0, "generation": generation, "state": state, "reason": "a test", "made_at": NOW}
    async with database.write() as connection:
        await connection.execute(insert(schema.generations), row)


@pytest.fixture
async def furnished(database: Database) -> AsyncIterator[Database]:
    """Pools P (default expiry SOON), Q (none); generation 1 is open.  The books balance afterwards."""
    async with database.write() as connection:
        await control.create_pool(connection, "P", default_expires_at=SOON, least_life_s=0, now=NOW)
        await control.create_pool(connection, "Q", default_expires_at=None, least_life_s=0, now=NOW)
    await open_generation(database, 1)
    yield database
    await assert_balanced(database)


async def assert_balanced(database: Database) -> None:
    """P5: imported = stored + leased, per pool, counted from what is there and not from what was said."""
    async with database.read() as connection:
        claimed = Counter[str]()
        for row in await connection.execute(select(schema.imports.c.pool, schema.imports.c.inserted)):
            claimed[row.pool] += row.inserted
        there = Counter[str]((await connection.execute(select(schema.codes.c.pool))).scalars().all())
        taken = Counter[str]()
        ranges: dict[int, list[tuple[int, int]]] = {}
        for row in await connection.execute(select(schema.leases)):
            taken[row.pool] += row.codes
            ranges.setdefault(row.lot, []).append((row.seq_from, row.seq_to))
            assert len(await stock.lease_codes(connection, stock._lease(row))) == row.codes
        unleased = Counter[str]()
        for row in await connection.execute(select(schema.lots)):
            unleased[row.pool] += row.imported - row.leased_to
            position = 0  # leases follow each other without a gap and without sharing a position
            for seq_from, seq_to in sorted(ranges.get(row.id, [])):
                assert seq_from == position
                position = seq_to
            assert position == row.leased_to
    assert +claimed == +there == +(taken + unleased)


# --- imports -------------------------------------------------------------------------------------------------


async def test_each_bad_line_costs_that_line_and_no_other(furnished: Database) -> None:
    await fill(furnished, "before", "P", [Row(1, "IN-P", "SER-OLD", None)])
    await fill(furnished, "other", "Q", [Row(1, "IN-Q", "SER-Q", SOON)])
    lines = [
        Row(1, "GOOD-1", None, None),
        Row(2, "", None, None),
        Row(3, "X" * 129, None, None),
        Row(4, "WITH SPACE", None, None),
        Row(5, "TAB\tTAB", None, None),
        Row(6, "ÜMLAUT", None, None),
        Row(7, "NEWLINE\n", None, None),
        Row(8, "GOOD-1", None, None),
        Row(9, "IN-P", None, None),
        Row(10, "IN-Q", None, None),
        Row(11, "FRESH-1", "SER-OLD", None),
        Row(12, "FRESH-2", "S" * 65, None),
        Row(13, "FRESH-3", "", None),
        Row(14, "FRESH-4", None, NOW),
        Row(15, "FRESH-5", None, control.TIME_MAX + 1),
        Row(16, "GOOD-2", "SER-Q", LATER),  # another pool's serial is nobody's business
        Row(17, "FRESH-6", "SER-Q", None),
        Row(18, "X" * 128, "S" * 64, SOON),
    ]
    chunk = await fill(furnished, "mixed", "P", lines)
    assert chunk.inserted == 3
    assert [(each.line, each.reason) for each in chunk.refused] == [
        (2, "the code needs 1 to 128 printable ASCII characters without space"),
        (3, "the code needs 1 to 128 printable ASCII characters without space"),
        (4, "the code needs 1 to 128 printable ASCII characters without space"),
        (5, "the code needs 1 to 128 printable ASCII characters without space"),
        (6, "the code needs 1 to 128 printable ASCII characters without space"),
        (7, "the code needs 1 to 128 printable ASCII characters without space"),
        (8, "the code stands in line 1 already"),
        (9, "the code is in this pool already"),
        (10, "the code is in pool Q already"),
        (11, "the serial number is in this pool already"),
        (12, "the serial number needs 1 to 64 printable ASCII characters without space"),
        (13, "the serial number needs 1 to 64 printable ASCII characters without space"),
        (14, "expired already"),
        (15, "the expiry lies after the year 9999"),
        (17, "the serial number stands in line 16 already"),
    ]
    async with furnished.read() as connection:
        state = (await connection.execute(select(schema.imports).where(schema.imports.c.id == "mixed"))).one()
    assert (state.lines_done, state.inserted, state.refused) == (18, 3, 15)


async def test_code_without_any_expiry_is_refused(furnished: Database) -> None:
    chunk = await fill(furnished, "i", "Q", [Row(1, "A", None, None), Row(2, "B", None, SOON)])
    assert chunk.refused == [Refused(1, "invalid", "no expiry: neither the line nor the pool has one")]
    assert chunk.inserted == 1


async def test_lines_that_were_done_are_not_imported_again(furnished: Database) -> None:
    lines = rows(["A", "B", "C"])
    assert (await fill(furnished, "i", "P", lines)).inserted == 3
    again = await fill(furnished, "i", "P", [*lines, Row(4, "D", None, None)])  # the commit was in doubt
    assert (again.inserted, again.refused) == (1, [])
    async with furnished.write() as connection:
        assert await stock.begin_import(connection, "i", "P", NOW) == 4
        assert await stock.finish_import(connection, "i", NOW) == ImportState(4, 4, 0)
        assert await stock.finish_import(connection, "i", NOW + 1) == ImportState(4, 4, 0)
    with pytest.raises(Conflict, match="finished"):
        await fill(furnished, "i", "P", lines)


async def test_import_that_was_not_begun_or_is_another_pools_adds_nothing(furnished: Database) -> None:
    async def attempt(import_id: str, pool: str) -> None:
        async with furnished.write() as connection:
            await stock.import_rows(connection, import_id, pool, rows(["A"], expires_at=SOON), NOW)

    with pytest.raises(Conflict, match="begin"):
        await attempt("i", "P")
    with pytest.raises(NotFound):
        await attempt("i", "none")
    await fill(furnished, "i", "P", [])
    with pytest.raises(Conflict):
        await attempt("i", "Q")
    with pytest.raises(Conflict, match="pool P"):
        await fill(furnished, "i", "Q", [])
    with pytest.raises(Conflict):
        await fill(furnished, "bad id", "P", [])
    with pytest.raises(NotFound):
        await fill(furnished, "j", "none", [])
    async with furnished.write() as connection:
        with pytest.raises(NotFound):
            await stock.finish_import(connection, "none", NOW)
        with pytest.raises(ValueError, match="5000"):
            await stock.import_rows(connection, "i", "P", rows(map(str, range(5001))), NOW)


async def test_lots_of_thousands_of_expiries_are_made_and_grown_at_once(furnished: Database) -> None:
    """An expiry to the second in each line: statements for each of them would hold the pool's lock for seconds."""
    statements: list[str] = []
    event.listen(
        furnished._engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    lines = [Row(line, f"CODE-{line}", None, SOON + line % 4_000) for line in range(1, 5_001)]
    assert (await fill(furnished, "i", "P", lines)).inserted == 5_000
    more = [Row(line, f"MORE-{line}", None, SOON + line * 2) for line in range(1, 3_001)]
    assert (await fill(furnished, "j", "P", more)).inserted == 3_000
    assert len(statements) < 100
    async with furnished.read() as connection:
        found = await connection.execute(select(schema.lots.c.expires_at, schema.lots.c.imported))
    assert {row.expires_at: row.imported for row in found} == Counter(
        row.expires_at for row in [*lines, *more] if row.expires_at is not None
    )


async def test_stock_version_does_not_rise_without_new_stock(furnished: Database) -> None:
    assert (await fill(furnished, "i", "P", rows(["A"]))).stock_version == 1
    assert (await fill(furnished, "j", "P", rows(["A"]))).stock_version == 1
    assert (await fill(furnished, "k", "P", rows(["B"]))).stock_version == 2
    async with furnished.read() as connection:
        assert await stock.stock_versions(connection) == {"P": 2, "Q": 0}


async def test_no_two_codes_of_a_pool_share_a_serial(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(["A"]))
    lease = await take(furnished, "l1")
    lot = (await codes_of(furnished, lease))[0].lot
    # Serial numbers that look like those that the next codes would be given, in the stock and in the same rows.
    await fill(furnished, "b", "P", [Row(1, "B", intake._serial(lot, 2), None)])
    crafty = [intake._serial(lot, 4), None, f"{intake._serial(lot, 4)}-2"]
    lines = [
        Row(line, code, serial, None) for line, code, serial in zip((1, 2, 3, 4), "CDEF", [None, *crafty], strict=True)
    ]
    await fill(furnished, "c", "P", lines)
    await fill(furnished, "d", "P", [Row(1, "G", intake._serial(lot, 0), None)])
    async with furnished.read() as connection:
        found = (await connection.execute(select(schema.codes.c.code, schema.codes.c.serial))).all()
    serials = {row.code: row.serial for row in found}
    assert set(serials) == {"A", "B", "C", "D", "E", "F"}  # G's serial was A's
    assert len(set(serials.values())) == 6
    assert serials["B"] == intake._serial(lot, 2)
    assert all(len(serial) <= 64 for serial in serials.values())


async def test_two_imports_of_the_same_codes_into_two_pools_do_not_store_one_twice(furnished: Database) -> None:
    names = [f"CODE-{number:04}" for number in range(6000)]
    forward, backward = rows(names, expires_at=SOON), rows(reversed(names), expires_at=SOON)

    async def run(import_id: str, pool: str, lines: list[Row]) -> int:
        inserted = 0
        for start in range(0, len(lines), 3000):  # large chunks, so that each meets the other's in the middle
            inserted += (await fill(furnished, import_id, pool, lines[start : start + 3000])).inserted
        return inserted

    inserted = await asyncio.gather(run("a", "P", forward), run("b", "Q", backward))
    assert sum(inserted) == 6000


async def test_chunk_whose_codes_another_pool_has_not_committed_yet_waits_and_loses_only_those(
    postgres_url: str,
) -> None:
    database = Database.connect(postgres_url)
    async with database.write() as connection:
        for pool in ("P", "Q"):
            await control.create_pool(connection, pool, default_expires_at=SOON, least_life_s=0, now=NOW)
    async with database.write() as connection:
        await stock.begin_import(connection, "a", "P", NOW)
        await stock.import_rows(connection, "a", "P", rows(["A", "B"]), NOW)
        racing = asyncio.create_task(fill(database, "b", "Q", rows(["B", "C"])))
        await asyncio.wait([racing], timeout=0.3)
        assert not racing.done()
    chunk = await racing
    assert chunk.inserted == 1
    assert chunk.refused == [Refused(1, "duplicate_elsewhere", "the code is in pool P already")]
    await assert_balanced(database)
    await database.close()


async def test_two_imports_with_codes_in_common_do_not_wait_for_each_other_in_a_circle(postgres_url: str) -> None:
    database = Database.connect(postgres_url)
    async with database.write() as connection:
        for pool in ("P", "Q", "R"):
            await control.create_pool(connection, pool, default_expires_at=SOON, least_life_s=0, now=NOW)
    with pytest.raises(RuntimeError, match="half-way"):  # noqa: PT012 - a transaction is a block
        async with database.write() as connection:
            await stock.begin_import(connection, "r", "R", NOW)
            await stock.import_rows(connection, "r", "R", rows(["X"]), NOW)
            # In the order of their lines, one would hold A, the other B, and both wait for X, then for each other.
            racing = [
                asyncio.create_task(fill(database, "p", "P", rows(["A", "X", "B"]))),
                asyncio.create_task(fill(database, "q", "Q", rows(["B", "X", "A"]))),
            ]
            await asyncio.wait(racing, timeout=0.3)
            raise RuntimeError("half-way")
    assert sorted([(await task).inserted for task in racing]) == [0, 3]
    await assert_balanced(database)
    await database.close()


# --- leases --------------------------------------------------------------------------------------------------


async def test_codes_that_expire_first_are_not_left_behind(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(["L1", "L2"], expires_at=LATER))
    await fill(furnished, "b", "P", rows(["S1", "S2", "S3"], expires_at=SOON))
    first = await take(furnished, "l1", codes=2)
    second = await take(furnished, "l2", "l1", codes=2)  # one lot a lease: the rest of it
    third = await take(furnished, "l3", "l2", codes=2)
    assert [code.code for code in await codes_of(furnished, first)] == ["S1", "S2"]
    assert [code.code for code in await codes_of(furnished, second)] == ["S3"]
    assert [code.code for code in await codes_of(furnished, third)] == ["L1", "L2"]
    assert await take(furnished, "l4", "l3") is None
    assert first is not None
    assert first.codes == 2
    found = (await codes_of(furnished, first))[1]
    assert found == Code(SOON, first.lot, 1, "S2", intake._serial(first.lot, 1))
    async with furnished.read() as connection:
        assert await stock.left(connection, NOW) == {"P": 0, "Q": 0}


async def test_lots_that_are_over_are_not_leased_and_stay_stored(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(["S1"], expires_at=SOON))
    await fill(furnished, "b", "P", rows(["L1"], expires_at=LATER))
    async with furnished.read() as connection:
        assert await stock.left(connection, SOON - 1) == {"P": 2, "Q": 0}
        assert await stock.left(connection, SOON) == {"P": 1, "Q": 0}
    lease = await take(furnished, "l1", now=SOON)
    assert [code.code for code in await codes_of(furnished, lease)] == ["L1"]
    assert await take(furnished, "l2", "l1", now=SOON) is None


async def test_lots_with_too_little_life_left_are_not_leased(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(["S1"], expires_at=SOON))
    assert await take(furnished, "l1", earliest_expiry=SOON) is None
    assert await take(furnished, "l1", earliest_expiry=SOON - 1) is not None


async def test_nothing_is_leased_to_a_generation_that_is_closed_or_unknown(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(["A", "B", "C"]))
    await open_generation(furnished, 2, "building")
    await open_generation(furnished, 3, "closed")
    assert await take(furnished, "l2", generation=2, codes=1) is not None
    for generation in (3, 4):
        with pytest.raises(GenerationClosed):
            await take(furnished, "l3", generation=generation)
    async with furnished.write() as connection:
        await connection.execute(update(schema.generations).values(state="closed"))
    with pytest.raises(GenerationClosed):
        await take(furnished, "l4", generation=1)
    with pytest.raises(GenerationClosed):
        await take(furnished, "l2", generation=2, codes=1)  # not even again


async def test_chain_of_leases_does_not_fork(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(map(str, range(100))))
    await fill(furnished, "b", "Q", rows((f"Q{number}" for number in range(9)), expires_at=SOON))
    first = await take(furnished, "l1")
    second = await take(furnished, "l2", "l1")
    other = await take(furnished, "q1", pool="Q")
    for predecessor in ("", "l1", "none", "q1"):
        with pytest.raises(Conflict):
            await take(furnished, "l3", predecessor)
    assert await take(furnished, "l2", "l1") == second  # the commit was in doubt
    assert await take(furnished, "l1", codes=3) == first
    for predecessor, pool in (("l2", "P"), ("", "Q"), ("", "P")):
        with pytest.raises(Conflict):
            await take(furnished, "l2", predecessor, pool=pool)
    await open_generation(furnished, 2)
    newest = await take(furnished, "n1", generation=2)
    assert newest is not None
    async with furnished.read() as connection:
        assert await stock.chain_ends(connection, 0, 1) == {"P": second, "Q": other}
        assert await stock.chain_ends(connection, 0, 2) == {"P": newest}
        assert await stock.chain_ends(connection, 0, 3) == {}
    with pytest.raises(NotFound):
        await take(furnished, "x", pool="none")
    with pytest.raises(ValueError, match="at least one"):
        await take(furnished, "x", codes=0)


async def test_two_leases_at_once_do_not_take_the_same_position(furnished: Database) -> None:
    await fill(furnished, "a", "P", rows(map(str, range(100))))

    async def attempt(number: int) -> Lease | None:
        try:
            return await take(furnished, f"l{number}")
        except Conflict:
            return None

    taken = [lease for lease in await asyncio.gather(*(attempt(number) for number in range(8))) if lease]
    assert len(taken) == 1


async def test_lease_waits_for_an_import_that_has_not_committed_and_misses_none_of_it(postgres_url: str) -> None:
    database = Database.connect(postgres_url)
    async with database.write() as connection:
        await control.create_pool(connection, "P", default_expires_at=LATER, least_life_s=0, now=NOW)
    await open_generation(database, 1)
    await fill(database, "old", "P", rows(["L1"]))
    async with database.write() as connection:
        await stock.begin_import(connection, "new", "P", NOW)
        await stock.import_rows(connection, "new", "P", rows(["S1", "S2"], expires_at=SOON), NOW)
        racing = asyncio.create_task(take(database, "l1"))
        await asyncio.wait([racing], timeout=0.3)
        assert not racing.done()  # it would have taken L1, which expires later
    assert [code.code for code in await codes_of(database, await racing)] == ["S1", "S2"]
    await assert_balanced(database)
    await database.close()


async def test_closing_a_generation_waits_for_a_lease_under_way(postgres_url: str) -> None:
    database = Database.connect(postgres_url)
    async with database.write() as connection:
        await control.create_pool(connection, "P", default_expires_at=SOON, least_life_s=0, now=NOW)
    await open_generation(database, 1)
    await fill(database, "a", "P", rows(["A"]))

    async def close() -> None:
        async with database.write() as connection:
            await connection.execute(update(schema.generations).values(state="closed"))

    async with database.write() as connection:
        taken, _ = await stock.lease(
            connection, pool="P", partition=0, generation=1, predecessor="", lease_id="l1", codes=1, now=NOW,
            earliest_expiry=0,
        )  # fmt: skip
        closing = asyncio.create_task(close())
        await asyncio.wait([closing], timeout=0.3)
        assert not closing.done()
    await closing
    assert taken is not None
    with pytest.raises(GenerationClosed):
        await take(database, "l2", "l1")
    await database.close()


async def test_imports_and_leases_racing_lose_no_code_and_lease_none_twice(
    furnished: Database, store_url: str, rng: random.Random
) -> None:
    """Three imports and three that lease, each on a connection pool of its own, and one that checks the books."""
    others = [Database.connect(store_url) for _ in range(3)]
    names = [f"CODE-{number:05}" for number in range(1_500)]
    imports_left = 3
    grown = asyncio.Event()
    leased: list[Code] = []
    end = ""

    async def importing(database: Database, import_id: str, part: list[str]) -> None:
        nonlocal imports_left
        lines = [Row(line, code, None, rng.choice([SOON, LATER, LATER + 1])) for line, code in enumerate(part, 1)]
        start = 0
        while start < len(lines):
            size = rng.randrange(1, 200)
            chunk = await fill(database, import_id, "P", lines[start : start + size])
            assert chunk.refused == []
            grown.set()
            start += size
        imports_left -= 1
        grown.set()

    async def leasing(database: Database, name: str) -> None:
        nonlocal end
        number = 0
        while True:
            last_round = imports_left == 0
            grown.clear()
            number += 1
            predecessor = end
            try:
                taken = await take(database, f"{name}-{number}", predecessor, codes=rng.randrange(1, 150))
            except Conflict:
                continue  # another one was faster; `end` has moved or is about to
            if taken is not None:
                end = taken.id
                leased.extend(await codes_of(database, taken))
            elif last_round:
                grown.set()  # whoever else waits has a last round too
                return
            else:
                await grown.wait()

    async def watching(database: Database) -> None:
        while imports_left:
            await assert_balanced(database)

    async with asyncio.timeout(60):
        await asyncio.gather(
            *(importing(database, f"i{n}", names[n::3]) for n, database in enumerate(others)),
            *(leasing(database, f"l{n}") for n, database in enumerate(others)),
            watching(furnished),
        )
    for database in others:
        await database.close()
    assert sorted(code.code for code in leased) == names
    assert len({(code.lot, code.seq) for code in leased}) == len(names)
    async with furnished.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(schema.codes))).scalar_one() == len(names)
        assert await stock.left(connection, NOW) == {"P": 0, "Q": 0}


async def test_no_fault_shows_a_code(furnished: Database) -> None:
    secret = "SECRET-CODE"
    await fill(furnished, "a", "P", rows([secret]))
    chunk = await fill(furnished, "b", "P", rows([secret, secret, secret + " "]))
    assert len(chunk.refused) == 3
    assert secret not in repr(chunk)
    for attempt in (fill(furnished, secret + " ", "P", rows([secret])), take(furnished, "l1", "none")):
        with pytest.raises(Fault) as caught:
            await attempt
        assert secret not in str(caught.value)
