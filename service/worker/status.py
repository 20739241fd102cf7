"""The status: what an operator wants to know at a glance, of Redis and of the store, whichever of them answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from redis.exceptions import RedisError

from service import catalogue, keys
from service.checks import Finding
from service.errors import RedisUnreachable, StoreIsOlder, StoreUnreachable
from service.scripts import Books, Generation, Scripts
from service.settings import Settings
from service.store import books, control, inspection, ledger, stock
from service.store.database import Database
from service.store.inspection import Incident
from service.vetting import look
from service.worker.currency import refuse_older
from service.worker.watch import BURN_S, outage_lasts_s, outbox_age_s

# The newest incidents that are shown one by one.
INCIDENTS_SHOWN: Final = 10


class PoolStatus(msgspec.Struct, frozen=True):
    """One pool, in codes: ``left`` are in the store, not leased and not over (None: the store is away), ``window``
    are ready in Redis, and at ``low_water`` more are leased (both None: Redis is away or has nothing of the pool).
    ``last_minute``: codes issued in the last BURN_S (None: the store is away); ``empty_in_s``: seconds until stock and
    window are used up at that rate, 0 if they are and somebody may ask (None: it can't be told, or nothing was
    issued)."""

    pool: str
    left: int | None
    window: int | None
    low_water: int | None
    exhausted: bool
    quarantined: int
    last_minute: int | None
    empty_in_s: int | None


class PartitionStatus(msgspec.Struct, frozen=True):
    """The partition's Redis side.  ``issuing``: its scripts are accepted; ``restoring``: replay records are still being
    set, and what is not there is looked up in the ledger.  ``outage_s``: how long issuing would go on without the
    store at the planned rate, by what is in windows and what fits into the outbox."""

    generation: int
    issuing: bool
    restoring: bool
    fence: int
    outbox_codes: int
    outbox_entries: int
    outbox_max: int
    outbox_bytes: int
    outbox_bytes_max: int
    outbox_age_s: float
    outage_s: int


class Status(msgspec.Struct, frozen=True):
    """``partition`` is None while Redis is away, ``catalogue`` while the store is.  ``checks``: settings of the two
    that are not as they must be, or can't be read.  ``wrong``: one line each on what needs somebody's attention; those
    of ``checks`` that nobody has accepted are among them."""

    partition: PartitionStatus | None
    catalogue: int | None
    planned_rate: int
    store_outage_s: int
    pools: list[PoolStatus]
    incidents: int
    parked: int
    newest_incidents: list[Incident]
    quarantined: int
    checks: list[Finding]
    wrong: list[str]


async def status(
    database: Database, scripts: Scripts, settings: Settings, *, now: Callable[[], int] = lambda: int(time.time())
) -> Status:
    """What can be told now: a store or a Redis that is away is part of the answer, and not a fault."""
    wrong: list[str] = []
    kept = await _kept(database, now(), wrong)
    seen = await _seen(scripts, wrong)
    partition: PartitionStatus | None = None
    held: Books | None = None
    age_s = 0.0
    lows: dict[str, int] = {}
    if seen is not None:
        try:
            pools = sorted(kept.left) if kept is not None else await _published_pools(scripts)
            held = await scripts.books(pools, generation=seen.open) if seen.open else None
            lows = await _low_waters(scripts, seen.open, pools) if held is not None else {}
            age_s = await outbox_age_s(scripts, seen.open, now()) if held is not None else 0.0
        except (RedisError, RedisUnreachable):
            seen, held = None, None
            wrong.append("Redis did not answer: nothing can be issued")
    if seen is not None:
        partition = _partition(seen, held, age_s, kept, settings, wrong)
    if kept is not None and seen is not None:
        try:
            await refuse_older(database, scripts)
        except StoreIsOlder as fault:
            wrong.append(f"{fault}; leasing, importing and publishing have stopped")
        except (RedisUnreachable, StoreUnreachable):
            wrong.append("whether the store is up to date could not be told")
    checks = (await look(database, scripts, settings)).findings
    wrong += [f"{one.text} (check {one.check})" for one in checks if not one.accepted]
    return Status(
        partition=partition,
        catalogue=kept.version if kept is not None else None,
        planned_rate=settings.planned_rate,
        store_outage_s=settings.store_outage_s,
        pools=_pools(kept, held, lows),
        incidents=kept.incidents if kept is not None else 0,
        parked=kept.parked if kept is not None else 0,
        newest_incidents=kept.newest if kept is not None else [],
        quarantined=sum(kept.quarantined.values()) if kept is not None else 0,
        checks=list(checks),
        wrong=wrong,
    )


class _Kept(msgspec.Struct, frozen=True):
    """What the store says, in one snapshot."""

    version: int
    left: dict[str, int]
    used: set[str]
    asked: set[str]  # those that somebody may ask now, and that can be empty
    issued: dict[str, int]  # in the last BURN_S
    incidents: int
    parked: int
    newest: list[Incident]
    quarantined: dict[str, int]


async def _kept(database: Database, now: int, wrong: list[str]) -> _Kept | None:
    try:
        async with database.read() as conn:
            incidents, parked = await inspection.count_incidents(conn)
            quarantined: dict[str, int] = {}
            for one in await books.quarantine(conn):
                quarantined[one.pool] = quarantined.get(one.pool, 0) + one.codes
            kept = _Kept(
                await control.version(conn),
                await stock.left(conn, now),
                await control.pools_in_use(conn, now),
                await control.pools_asked(conn, now),
                await ledger.issued_by_pool(conn, now - BURN_S),
                incidents,
                parked,
                await inspection.newest_incidents(conn, INCIDENTS_SHOWN),
                quarantined,
            )
    except StoreUnreachable:
        wrong.append("the store did not answer: issuing goes on from the windows, nothing is flushed or refilled")
        return None
    if incidents:
        wrong.append(f"{incidents} incidents are on record: `voucherd audit` says what they mean")
    if parked:
        wrong.append(f"{parked} outbox entries are parked, because nobody could read them")
    return kept


async def _seen(scripts: Scripts, wrong: list[str]) -> Generation | None:
    try:
        seen = await scripts.generation()
    except RedisUnreachable:
        wrong.append("Redis did not answer: nothing can be issued")
        return None
    if not seen.agrees:
        wrong.append("no generation is open in Redis, nothing can be issued: see that `voucherd work` runs")
    return seen


def _partition(
    seen: Generation, held: Books | None, age_s: float, kept: _Kept | None, settings: Settings, wrong: list[str]
) -> PartitionStatus:
    codes, entries = (held.codes, held.entries) if held is not None else (0, 0)
    if kept is not None and seen.agrees and seen.fence < kept.version:
        wrong.append(f"catalogue {kept.version} is not in force yet: see that `voucherd work` runs")
    full = held is not None and (held.codes >= settings.outbox_max or held.bytes >= settings.outbox_bytes_max)
    if full:
        wrong.append("the outbox is full, new requests are refused: see that `voucherd work` and the store run")
    return PartitionStatus(
        generation=seen.open,
        issuing=seen.agrees,
        restoring=seen.restoring,
        fence=seen.fence,
        outbox_codes=codes,
        outbox_entries=entries,
        outbox_max=settings.outbox_max,
        outbox_bytes=0 if held is None else held.bytes,
        outbox_bytes_max=settings.outbox_bytes_max,
        outbox_age_s=age_s,
        outage_s=_outage_s(held, kept, settings) if held is not None else 0,
    )


def _outage_s(held: Books, kept: _Kept | None, settings: Settings) -> int:
    left = {pool: codes for pool, codes in kept.left.items() if pool in kept.used} if kept is not None else {}
    return int(outage_lasts_s(held, left, outbox_max=settings.outbox_max, planned_rate=settings.planned_rate))


def _pools(kept: _Kept | None, held: Books | None, lows: dict[str, int]) -> list[PoolStatus]:
    windows = held.windows if held is not None else {}
    known = sorted({*(kept.left if kept is not None else ()), *windows})
    found = []
    for pool in known:
        left = kept.left.get(pool, 0) if kept is not None else None
        window = windows[pool].length if pool in windows else None
        issued = kept.issued.get(pool, 0) if kept is not None else None
        empty_in_s = None
        if kept is not None and not left and window == 0 and pool in kept.asked:
            empty_in_s = 0
        elif issued and left is not None:
            empty_in_s = BURN_S * (left + (window or 0)) // issued
        found.append(
            PoolStatus(
                pool=pool,
                left=left,
                window=window,
                low_water=lows.get(pool),
                exhausted=pool in windows and windows[pool].exhausted == windows[pool].stock,
                quarantined=kept.quarantined.get(pool, 0) if kept is not None else 0,
                last_minute=issued,
                empty_in_s=empty_in_s,
            )
        )
    return found


async def _low_waters(scripts: Scripts, generation: int, pools: list[str]) -> dict[str, int]:
    async with scripts.redis.pipeline(transaction=False) as pipe:
        for pool in pools:
            pipe.hget(keys.pool(scripts.partition, generation, pool), "low")
        found: list[Any] = await pipe.execute()
    return {pool: int(low) for pool, low in zip(pools, found, strict=True) if low is not None}


async def _published_pools(scripts: Scripts) -> list[str]:
    """The pools of the published catalogue, for when the store can't be asked."""
    version = await scripts.redis.get(keys.catalogue_newest())
    blob = await scripts.redis.get(keys.catalogue(int(version))) if version else None
    if not blob:
        return []
    try:
        loaded = [part for part in catalogue.load(blob.encode("utf-8", "surrogateescape")) if part is not None]
    except msgspec.DecodeError:
        return []  # published by a later version
    return loaded[-1].pools() if loaded else []
