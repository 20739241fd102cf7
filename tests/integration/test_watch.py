"""What the watch tells: how long a pool lasts, whether the books are off, how Redis itself is."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import delete, update

from service import keys
from service.errors import RedisUnreachable, StoreUnreachable
from service.store import control, schema
from service.store.database import Database
from service.store.stock import Row
from service.worker.stocking import import_codes
from service.worker.watch import BURN_S, COUNT_S, Watch
from tests.integration.stage import OUTBOX_BYTES_MAX, OUTBOX_MAX, Stage, staged

POOL = "CAMP-001"
CODES = 300


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign(POOL)
        rows = [Row(line, f"CODE-{line:05}", None, None) for line in range(1, CODES + 1)]
        await import_codes(stage.database, stage.scripts, POOL, rows, import_id="first")
        await stage.refill.run_once()
        yield stage


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(stage: Stage, clock: Clock) -> Watch:
    return Watch(
        stage.database,
        stage.scripts,
        planned_rate=1,
        outbox_max=OUTBOX_MAX,
        outbox_bytes_max=OUTBOX_BYTES_MAX,
        now=clock,
    )


def empty_in_s() -> float | None:
    return REGISTRY.get_sample_value("voucherd_pool_empty_in_seconds", {"pool": POOL})


def off(books: str) -> float | None:
    return REGISTRY.get_sample_value("voucherd_conservation_difference_codes", {"partition": "0", "books": books})


async def test_a_pool_lasts_as_long_as_its_burn_rate_says_whatever_is_leased_meanwhile(
    stage: Stage, watch: Watch, clock: Clock
) -> None:
    await watch.run_once()
    assert empty_in_s() == math.inf
    for second in range(3):
        await stage.issue(*(f"first-{second}-{number}" for number in range(10)))
        await stage.refill.run_once()
        clock.now += 10
        await watch.run_once()
        assert empty_in_s() == pytest.approx(CODES - 10 * (second + 1))  # at one code a second
    clock.now += BURN_S
    await watch.run_once()
    clock.now += 10
    await watch.run_once()
    assert empty_in_s() == math.inf  # nothing was issued for a minute


async def test_an_import_is_no_negative_burn(stage: Stage, watch: Watch, clock: Clock) -> None:
    await watch.run_once()
    await stage.issue(*(f"first-{number}" for number in range(10)))
    rows = [Row(line, f"MORE-{line:05}", None, None) for line in range(1, 101)]
    await import_codes(stage.database, stage.scripts, POOL, rows, import_id="second")
    clock.now += 10
    await watch.run_once()
    assert empty_in_s() == pytest.approx(CODES - 10 + 100)


async def test_a_pool_without_a_code_is_empty_now(stage: Stage, watch: Watch, clock: Clock) -> None:
    for batch in range(CODES // 10 + 1):
        await stage.issue(*(f"{batch}-{number}" for number in range(10)))
        await stage.refill.run_once()
    await watch.run_once()
    assert empty_in_s() == 0.0


async def test_what_waits_in_the_outbox_is_not_told_without_how_much_may(stage: Stage, watch: Watch) -> None:
    await stage.issue("one", "two", "three")
    await watch.run_once()
    told = {
        name: REGISTRY.get_sample_value(f"voucherd_outbox_{name}", {"partition": "0"})
        for name in ("bytes", "limit_bytes")
    }
    assert told["limit_bytes"] == OUTBOX_BYTES_MAX
    assert 3 * 50 < told["bytes"] < told["limit_bytes"]


async def test_books_that_balance_differ_by_nothing_wherever_the_codes_are(
    stage: Stage, watch: Watch, clock: Clock
) -> None:
    for moment in ("in windows", "in the outbox", "in the ledger"):
        if moment == "in the outbox":
            await stage.issue("one", "two", "three")
        if moment == "in the ledger":
            await stage.flush.run_once()
        clock.now += COUNT_S
        await watch.run_once()
        assert await watch.count_once()
        assert (off("windows"), off("ledger"), off("stock")) == (0.0, 0.0, 0.0), moment
        assert not await watch.count_once(), "every row is read, so not again at once"
    assert value("voucherd_books_checked_timestamp_seconds") == clock.now


async def test_a_code_that_is_lost_anywhere_is_seen(stage: Stage, watch: Watch, clock: Clock) -> None:
    generation = (await stage.scripts.generation()).open
    await stage.issue("one", "two", "three")
    await stage.flush.run_once()
    await watch.run_once()
    await stage.scripts.redis.rpop(keys.window(0, generation, POOL))
    await watch.run_once()
    assert off("windows") == 1.0
    async with stage.database.write() as conn:
        await conn.execute(delete(schema.issuances).where(schema.issuances.c.ordinal == 1))
        await conn.execute(delete(schema.codes).where(schema.codes.c.code == f"CODE-{CODES:05}"))
    clock.now += COUNT_S
    await watch.count_once()
    assert off("ledger") == 1.0
    assert off("stock") == 1.0


def value(name: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"partition": "0"})


def reachable(server: str) -> float | None:
    return REGISTRY.get_sample_value("voucherd_server_reachable", {"server": server})


async def test_what_waits_for_the_ledger_is_told_while_the_store_is_away(
    stage: Stage, watch: Watch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is then that somebody has to be woken before the outbox is full."""
    await watch.run_once()
    assert (reachable("redis"), reachable("store")) == (1, 1)
    lasts_s, held = value("voucherd_outage_lasts_seconds"), value("voucherd_outbox_codes")
    assert held == 0
    await stage.issue("one", "two", "three")
    monkeypatch.setattr(stage.database, "read", _away)
    clock.now += 40
    with pytest.raises(StoreUnreachable):
        await watch.run_once()
    assert (reachable("redis"), reachable("store")) == (1, 0)
    assert value("voucherd_outbox_codes") == 3
    assert value("voucherd_outbox_age_seconds") == pytest.approx(40, abs=5)
    assert value("voucherd_outage_lasts_seconds") == lasts_s - 3  # of a window, at one a second


async def test_what_is_published_is_told_while_redis_is_away(
    stage: Stage, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence is behind then, and a token that was revoked may still work when Redis is back."""
    await watch.run_once()
    stored = value("voucherd_catalogue_stored_version")

    async def away(*_: object, **__: object) -> None:
        raise RedisUnreachable

    monkeypatch.setattr(stage.scripts, "generation", away)
    async with stage.database.write() as conn:
        await control.raise_version(conn)
    with pytest.raises(RedisUnreachable):
        await watch.run_once()
    assert (reachable("redis"), reachable("store")) == (0, 1)
    assert value("voucherd_catalogue_stored_version") == stored + 1
    assert value("voucherd_fence_version") == stored


@pytest.mark.parametrize("so", ["paused", "not begun", "nobody's", "over"])
async def test_a_pool_that_nobody_may_ask_now_is_never_called_empty(
    stage: Stage, watch: Watch, clock: Clock, so: str
) -> None:
    campaigns, table = schema.campaigns, schema.assignments
    change = {
        "paused": update(campaigns).values(paused=True),
        "not begun": update(campaigns).values(starts_at=int(clock.now) + 60),
        "nobody's": delete(table),
        "over": update(campaigns).values(until=int(clock.now) - 1),
    }[so]
    async with stage.database.write() as conn:
        await conn.execute(change)
        await conn.execute(delete(schema.codes))
        await conn.execute(update(schema.lots).values(leased_to=schema.lots.c.imported))
    await stage.scripts.redis.delete(keys.window(0, (await stage.scripts.generation()).open, POOL))
    await watch.run_once()
    assert empty_in_s() == math.inf


@asynccontextmanager
async def _away() -> AsyncIterator[None]:
    raise StoreUnreachable
    yield


async def test_redis_itself_is_watched(stage: Stage, watch: Watch) -> None:
    await watch.run_once()
    assert value("voucherd_redis_memory_limit_bytes") == math.inf
    assert value("voucherd_redis_memory_bytes") > 0
    assert value("voucherd_redis_append_failing") == 0
    assert value("voucherd_fence_version") == value("voucherd_catalogue_stored_version") > 0
    await stage.scripts.redis.config_set("maxmemory", "1gb")
    await watch.run_once()
    assert value("voucherd_redis_memory_limit_bytes") == 2**30
