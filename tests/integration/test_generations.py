"""Generations: numbers are never used twice, and a roll and a flush never see each other half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.errors import GenerationClosed, NotFound
from service.store import generations
from service.store.database import Database

NOW = 1_760_000_000


async def test_numbers_are_never_used_twice(database: Database) -> None:
    made = []
    for _ in range(3):
        async with database.write() as conn:
            made.append(await generations.make(conn, 0, "empty", NOW))
        async with database.write() as conn:
            await generations.close(conn, 0, made[-1], NOW)
    assert made == [1, 2, 3]
    async with database.read() as conn:
        assert await generations.newest(conn, 0) == 3
        assert await generations.closed(conn, 0) == [1, 2, 3]
        assert await generations.newest(conn, 1) == 0


async def test_an_abandoned_attempt_is_not_numbered_again(database: Database) -> None:
    async with database.write() as conn:
        assert await generations.make(conn, 0, "first start", NOW) == 1
    async with database.write() as conn:
        assert await generations.make(conn, 0, "the one before died", NOW) == 2
    async with database.read() as conn:
        assert await generations.current(conn, 0) is None
        assert await generations.state(conn, 0, 1) == "building"
        assert await generations.state(conn, 0, 3) is None


async def test_no_older_generation_stays_open_or_unfinished(database: Database) -> None:
    async with database.write() as conn:
        for _ in range(3):
            await generations.make(conn, 0, "roll", NOW)
        await generations.open_(conn, 0, 1, NOW)
        await generations.open_(conn, 0, 3, NOW + 5)
    async with database.read() as conn:
        assert await generations.closed(conn, 0) == [1, 2]
        assert await generations.current(conn, 0) == generations.Generation(
            partition=0, generation=3, state="open", reason="roll", made_at=NOW, opened_at=NOW + 5, closed_at=None
        )


async def test_opening_again_changes_nothing(database: Database) -> None:
    async with database.write() as conn:
        await generations.make(conn, 0, "first start", NOW)
        await generations.open_(conn, 0, 1, NOW)
        before = await generations.current(conn, 0)
        await generations.open_(conn, 0, 1, NOW + 9)
        assert await generations.current(conn, 0) == before


async def test_a_closed_or_overtaken_generation_is_not_opened(database: Database) -> None:
    async with database.write() as conn:
        for _ in range(3):
            await generations.make(conn, 0, "roll", NOW)
        await generations.close(conn, 0, 1, NOW)
        await generations.open_(conn, 0, 3, NOW)
        for number in (1, 2):
            with pytest.raises(GenerationClosed):
                await generations.open_(conn, 0, number, NOW)
        with pytest.raises(NotFound):
            await generations.open_(conn, 0, 4, NOW)
        with pytest.raises(NotFound):
            await generations.close(conn, 0, 4, NOW)


async def test_partitions_do_not_share_generations(database: Database) -> None:
    async with database.write() as conn:
        assert await generations.make(conn, 0, "first start", NOW) == 1
        assert await generations.make(conn, 1, "first start", NOW) == 1
        await generations.open_(conn, 1, 1, NOW)
    async with database.read() as conn:
        assert await generations.current(conn, 0) is None


@pytest.fixture
async def two(postgres_url: str) -> AsyncIterator[tuple[Database, Database]]:
    """Two processes' doors to one PostgreSQL database."""
    pair = Database.connect(postgres_url), Database.connect(postgres_url)
    yield pair
    for each in pair:
        await each.close()


async def is_waited_for(database: Database) -> None:
    """Returns once some session waits for a lock."""
    async with asyncio.timeout(5):
        while True:
            async with database.read() as conn:
                waiting = await conn.exec_driver_sql(
                    "select count(*) from pg_stat_activity "
                    "where wait_event_type = 'Lock' and datname = current_database()"
                )
                if waiting.scalar_one():
                    return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("partition", [0, 7], ids=["made by a migration", "never seen"])
async def test_shared_and_exclusive_locks_are_never_held_together(
    two: tuple[Database, Database], partition: int
) -> None:
    here, there = two
    ended: list[str] = []

    async def take(exclusive: bool) -> None:
        async with there.write() as conn:
            await generations.lock(conn, partition, exclusive=exclusive)
            ended.append("second")

    for first, second in ((True, False), (False, True), (True, True)):
        ended.clear()
        async with here.write() as conn:
            await generations.lock(conn, partition, exclusive=first)
            waiting = asyncio.create_task(take(second))
            await is_waited_for(here)
            ended.append("first")
        await waiting
        assert ended == ["first", "second"]


async def test_shared_locks_do_not_wait_for_each_other(two: tuple[Database, Database]) -> None:
    async with two[0].write() as conn, two[1].write() as other, asyncio.timeout(2):
        await generations.lock(conn, 0, exclusive=False)
        await generations.lock(other, 0, exclusive=False)


async def test_generations_that_nobody_knew_to_be_open_hide_none_that_was(database: Database) -> None:
    """Rolls that fail one after the other are closed as well, and what they left has to be cleaned up."""
    async with database.write() as conn:
        for number in range(1, 15):
            assert await generations.make(conn, 0, "test", 0) == number
            if number in (1, 3, 4, 14):
                await generations.open_(conn, 0, number, 0)
    async with database.read() as conn:
        assert await generations.closed_lately(conn, 0, 2) == [*range(3, 14)]
        assert await generations.closed_lately(conn, 0, 3) == [*range(1, 14)]
        assert await generations.closed_lately(conn, 0, 8) == [*range(1, 14)]
        assert await generations.closed_lately(conn, 1, 8) == []
