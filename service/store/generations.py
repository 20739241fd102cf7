"""Generations: one life of a partition's data in Redis, numbered so that no number is ever used twice.

``building`` -> ``open`` -> ``closed``; a generation may also be closed without ever having been open.  A roll holds
the partition's row exclusively and a flush holds it shared, so neither ever sees the other half done.
"""

from __future__ import annotations

from typing import Final, Literal, cast

import msgspec
from sqlalchemy import func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import GenerationClosed, NotFound
from service.store.schema import generations, partitions

State = Literal["building", "open", "closed"]

BUILDING: Final = "building"
OPEN: Final = "open"
CLOSED: Final = "closed"


class Generation(msgspec.Struct, frozen=True):
    """One generation as the store has it.  ``reason``: why the one before was left.  Times are Unix seconds."""

    partition: int
    generation: int
    state: State
    reason: str
    made_at: int
    opened_at: int | None
    closed_at: int | None


async def lock(conn: AsyncConnection, partition: int, *, exclusive: bool) -> None:
    """Until the transaction ends, whoever rolls the partition (exclusive) and whoever flushes to it (shared) wait
    for each other; flushes don't wait for flushes.

    On SQLite a writing transaction excludes every other one already.
    """
    wanted = select(partitions.c.partition).where(partitions.c.partition == partition)
    if (await conn.execute(wanted.with_for_update(read=not exclusive))).first() is None:
        # A partition that no migration made: without its row there would be nothing to lock.
        dialect = sqlite if conn.dialect.name == "sqlite" else postgresql
        await conn.execute(
            dialect.insert(partitions).values(partition=partition).on_conflict_do_nothing(index_elements=["partition"])
        )
        await conn.execute(wanted.with_for_update(read=not exclusive))


async def current(conn: AsyncConnection, partition: int) -> Generation | None:
    """The highest generation that is open, None if none is."""
    row = (
        await conn.execute(
            select(generations)
            .where(generations.c.partition == partition, generations.c.state == OPEN)
            .order_by(generations.c.generation.desc())
            .limit(1)
        )
    ).first()
    return None if row is None else Generation(**row._mapping)


async def newest(conn: AsyncConnection, partition: int) -> int:
    """The highest number ever given, whatever became of it; 0 if none was."""
    found = await conn.scalar(select(func.max(generations.c.generation)).where(generations.c.partition == partition))
    return int(found or 0)


async def state(conn: AsyncConnection, partition: int, generation: int) -> State | None:
    """The state of one generation, None if it was never made."""
    return cast(
        State | None,
        await conn.scalar(
            select(generations.c.state).where(
                generations.c.partition == partition, generations.c.generation == generation
            )
        ),
    )


async def closed(conn: AsyncConnection, partition: int) -> list[int]:
    """The closed generations of a partition, oldest first."""
    found = await conn.scalars(
        select(generations.c.generation)
        .where(generations.c.partition == partition, generations.c.state == CLOSED)
        .order_by(generations.c.generation)
    )
    return [int(number) for number in found]


async def closed_lately(conn: AsyncConnection, partition: int, opened: int) -> list[int]:
    """The last ``opened`` closed generations that were known to be open, and those in between that were not (a roll
    that failed, or one whose worker died before it could say so), oldest first."""
    of_it = (generations.c.partition == partition) & (generations.c.state == CLOSED)
    known = select(generations.c.generation).where(of_it, generations.c.opened_at.is_not(None))
    oldest = await conn.scalar(known.order_by(generations.c.generation.desc()).offset(opened - 1).limit(1))
    return [number for number in await closed(conn, partition) if number >= (oldest or 0)]


async def unclosed(conn: AsyncConnection, partition: int) -> list[int]:
    """The generations of a partition that are open or being built, oldest first."""
    found = await conn.scalars(
        select(generations.c.generation)
        .where(generations.c.partition == partition, generations.c.state != CLOSED)
        .order_by(generations.c.generation)
    )
    return [int(number) for number in found]


async def make(conn: AsyncConnection, partition: int, reason: str, now: int) -> int:
    """A new generation is being built; its number is higher than every other.  The partition is locked exclusively."""
    await lock(conn, partition, exclusive=True)
    number = await newest(conn, partition) + 1
    await conn.execute(
        insert(generations).values(partition=partition, generation=number, state=BUILDING, reason=reason, made_at=now)
    )
    return number


async def put_closed(conn: AsyncConnection, partition: int, generation: int, reason: str, now: int) -> None:
    """There was this generation, which the store does not know: it is closed.  The partition is locked exclusively."""
    row = {"partition": partition, "generation": generation, "reason": reason, "made_at": now, "closed_at": now}
    await conn.execute(insert(generations), {**row, "state": CLOSED})


async def open_(conn: AsyncConnection, partition: int, generation: int, now: int) -> None:
    """``generation`` is open and every older one is closed, also those that were never finished, so that what was
    leased to them is in quarantine.  Opening it again changes nothing.  The partition is locked exclusively.

    Raises NotFound if it was never made, GenerationClosed if it is closed or a newer one is open.
    """
    await lock(conn, partition, exclusive=True)
    found = await state(conn, partition, generation)
    if found is None:
        raise NotFound(f"partition {partition} has no generation {generation}")
    present = await current(conn, partition)
    if found == CLOSED or (present is not None and present.generation > generation):
        raise GenerationClosed(f"generation {generation} of partition {partition} can't be opened any more")
    older = (
        generations.c.partition == partition,
        generations.c.generation < generation,
        generations.c.state != CLOSED,
    )
    await conn.execute(update(generations).where(*older).values(state=CLOSED, closed_at=now))
    if found == BUILDING:
        await conn.execute(
            update(generations)
            .where(generations.c.partition == partition, generations.c.generation == generation)
            .values(state=OPEN, opened_at=now)
        )


async def close(conn: AsyncConnection, partition: int, generation: int, now: int) -> None:
    """``generation`` is closed for good: nothing more may be leased to it, while what it issued may still be flushed.
    Closing it again changes nothing.  The partition is locked exclusively.

    Raises NotFound if it was never made.
    """
    await lock(conn, partition, exclusive=True)
    if await state(conn, partition, generation) is None:
        raise NotFound(f"partition {partition} has no generation {generation}")
    await conn.execute(
        update(generations)
        .where(
            generations.c.partition == partition,
            generations.c.generation == generation,
            generations.c.state != CLOSED,
        )
        .values(state=CLOSED, closed_at=now)
    )
