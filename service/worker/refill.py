"""Refill: leases codes from the store to the windows, ahead of the burn rate.

A lease is durable before its codes are in Redis, and a chain per pool and generation says which comes after which;
so a crash between the two is finished by the next step, and nothing is ever leased twice.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final, NamedTuple

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import IntegrityError

from service import keys, metrics
from service.catalogue import Campaign, Snapshot, can_issue
from service.errors import Conflict, GenerationClosed, RedisUnreachable, StoreIsOlder
from service.scripts import Scripts, Window
from service.store import control, generations, ledger, stock
from service.store.database import Database
from service.worker.currency import refuse_older
from service.worker.generating import Fill

log = structlog.get_logger()

# Codes of one lease.  Everybody who asks for a voucher meanwhile waits for the script that applies it, 2 us a code on a
# slow machine; fewer a lease cost the worker more CPU a code, which it takes from who serves (docs/performance.md).
LEASE_CODES_MAX: Final = 2_500

# Leases of one pool in one step: enough for a window over many small lots, and other pools get their turn.
LEASES_MAX: Final = 16

# A window that is short is filled to this many times what it is short of, so that refills are rarer than issues.
FILL: Final = 2

# A window is short below its planned low water, and below what it gives in so many seconds: it is filled at once then.
# From there to its low water by the burn rate it grows this many times as fast as it empties: to fill it for an outage
# of a minute as fast as can be takes most of a core from who serves, at the peak (docs/performance.md).
SHORT_S: Final = 2
GROWTH: Final = 1.5

# Seconds over which a burn rate is remembered: a peak is believed within a few.
RATE_MEMORY_S: Final = 3.0

# How often all pools are looked at, and not those alone that ask for codes or grow; and how many in one script call,
# 1 ms on a slow machine.
SWEEP_S: Final = 2.0
POOLS_MAX: Final = 500

# A shorter wait is none: as milliseconds it might be 0, which is for ever.
WAIT_S_MIN: Final = 0.01

# How often a chain that does not fit, and that nobody moves, is looked at before it is called forked; and how often at
# one that others move, before it is left to them.
FORK_LOOKS: Final = 3
LOOKS_MAX: Final = 20


class Refilled(msgspec.Struct, frozen=True):
    """What one step did: codes put into windows, pools found exhausted, and pools whose lease chain is forked
    (leasing to those has stopped; an incident says so)."""

    codes: int = 0
    exhausted: int = 0
    forked: int = 0

    def __add__(self, other: Refilled) -> Refilled:
        return Refilled(self.codes + other.codes, self.exhausted + other.exhausted, self.forked + other.forked)


class _Wanted(NamedTuple):
    """A window is to hold ``length`` codes (0: as many as it holds), and asks for more below ``low_water``."""

    length: int
    low_water: int


class _Served(NamedTuple):
    """A pool that the ``campaigns`` of a catalogue issue from."""

    least_life_s: int
    campaigns: list[Campaign]


def _served(snapshot: Snapshot) -> dict[str, _Served]:
    least_life_s = {pool.id: pool.least_life_s for pool in snapshot.pools}
    found: dict[str, _Served] = {}
    for campaign in snapshot.campaigns:
        found.setdefault(campaign.pool, _Served(least_life_s[campaign.pool], [])).campaigns.append(campaign)
    return found


class Refill:
    """Refills the windows of one partition.  ``low_water`` and ``store_outage_s``: see ``settings``; ``fill`` makes
    codes for pools that are generated, without it none are."""

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        *,
        low_water: int,
        store_outage_s: int,
        now: Callable[[], int] = lambda: int(time.time()),
        clock: Callable[[], float] = time.monotonic,
        lease_id: Callable[[], str] = lambda: secrets.token_hex(16),
        fill: Fill | None = None,
    ) -> None:
        self._fill = fill
        self._database = database
        self._scripts = scripts
        self._low_water = low_water
        self._store_outage_s = store_outage_s
        self._now = now
        self._clock = clock
        self._lease_id = lease_id
        self._generation = 0
        self._rates: dict[str, _Rate] = {}
        self._due: dict[str, float] = {}  # when a window that grows gets its next lease, by the clock
        self._sweep_at = -math.inf
        self._forked: set[tuple[int, str]] = set()
        self._version = -1  # of the catalogue that ``_served`` is of
        self._served: dict[str, _Served] = {}

    async def step(self, *, wait_s: float) -> Refilled:
        """Waits, at most ``wait_s``, until a pool asks for codes or is due; then refills these, and every SWEEP_S all.

        Raises as ``run_once`` does.
        """
        wait_s = min(wait_s, min(self._sweep_at, *self._due.values(), math.inf) - self._clock())
        pools = await self._demanded(wait_s)
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            return await self.run_once()
        for pool in [pool for pool, at in self._due.items() if at <= now]:
            del self._due[pool]
            pools.add(pool)
        return await self.run_once(pools) if pools else Refilled()

    async def _demanded(self, wait_s: float) -> set[str]:
        """The pools that ask for codes; the POOLS_MAX with the fewest, if there are more.

        What is noted here and then lost in a crash is asked for again by the next issue.
        """
        redis, demand = self._scripts.redis, keys.demand(self._scripts.partition)
        try:
            if wait_s < WAIT_S_MIN:
                return {pool for pool, _ in await redis.zpopmin(demand, POOLS_MAX)}
            if (first := await redis.bzpopmin(demand, timeout=wait_s)) is None:
                return set()
            return {first[1], *(pool for pool, _ in await redis.zpopmin(demand, POOLS_MAX))}
        except RedisError as error:
            raise RedisUnreachable from error

    async def run_once(self, pools: Collection[str] | None = None) -> Refilled:
        """Brings these ``pools`` (None: all) of the catalogue above what is short, as far as stock and LEASES_MAX
        allow; a window that is to grow gets its lease if that is due.  Nothing is leased to a pool that no campaign can
        issue from.

        Raises RedisUnreachable or StoreUnreachable; what was leased by then is applied by the next step.  Raises
        StoreIsOlder if the store came back older; nothing is leased then.
        """
        seen = await self._scripts.generation()
        if not seen.agrees:
            return Refilled()
        if seen.open != self._generation:  # its windows begin empty, and nobody has issued what the old ones held
            self._generation = seen.open
            self._rates.clear()
            self._due.clear()
        async with self._database.read() as conn:
            version = await control.version(conn)
            if self._version != version:
                self._served, self._version = _served(await control.snapshot(conn, version)), version
        if seen.fence > version:
            return Refilled()  # the store is older than Redis; the watch says so
        asked = sorted(self._served if pools is None else self._served.keys() & pools)
        total = Refilled()
        for start in range(0, len(asked), POOLS_MAX):
            books = await self._scripts.books(asked[start : start + POOLS_MAX], generation=seen.open)
            if books is None:
                break
            total += await self._below(seen.open, books.windows)
        return total

    async def _below(self, generation: int, windows: Mapping[str, Window]) -> Refilled:
        """``run_once`` for these ``windows``."""
        async with self._database.read() as conn:
            versions = await stock.stock_versions(conn, list(windows))
            last = {pool: window.lease for pool, window in windows.items()}
            unapplied = await stock.followers(conn, self._scripts.partition, generation, last)
        now, todo = self._now(), dict[str, _Wanted]()
        for pool, window in windows.items():
            if window.stock < versions[pool]:
                await self._scripts.stock(pool, versions[pool], generation=generation)
            wanted = self._wanted(pool, window)
            if not any(can_issue(campaign, now) for campaign in self._served[pool].campaigns):
                self._due.pop(pool, None)
                wanted = _Wanted(0, wanted.low_water)  # a lease that was made is applied all the same
            if (generation, pool) in self._forked or (pool not in unapplied and window.exhausted == versions[pool]):
                self._due.pop(pool, None)
            elif pool in unapplied or window.length < wanted.length:
                todo[pool] = wanted
        total = Refilled()
        if todo:  # what is leased from an older store may have been leased before
            await refuse_older(self._database, self._scripts, list(todo))
        for pool, wanted in todo.items():
            total += await self._refill(generation, pool, windows[pool], wanted, self._served[pool].least_life_s)
        return total

    def _wanted(self, pool: str, window: Window) -> _Wanted:
        now = self._clock()
        rate = self._rates.setdefault(pool, _Rate(now, window.length))
        per_second = rate.note(now, window.length)
        metrics.set_of_pool(metrics.window_codes, pool, window.length)
        low = max(self._low_water, math.ceil(per_second * self._store_outage_s))
        short = max(self._low_water, math.ceil(per_second * min(SHORT_S, self._store_outage_s)))
        if window.length < short:
            length = FILL * short
        elif window.length < low and self._due.get(pool, now) <= now:
            length = min(window.length + LEASE_CODES_MAX, FILL * low)
        else:
            if window.length >= low:
                self._due.pop(pool, None)
            return _Wanted(0, short)
        if short < low:
            self._due[pool] = now + (length - window.length) / (GROWTH * per_second)
        return _Wanted(length, short)

    async def _refill(self, generation: int, pool: str, window: Window, wanted: _Wanted, least_life_s: int) -> Refilled:
        lease = await self._unapplied(generation, pool, window.lease)
        if lease is None:
            return await self._fork(generation, pool)
        added, length, version = 0, window.length, 0
        for _ in range(LEASES_MAX):
            began = self._clock()
            if not lease.codes:  # all that is leased is applied, maybe by another worker since: lease more
                if length >= wanted.length:
                    break
                codes, now = min(wanted.length - length, LEASE_CODES_MAX), self._now()
                try:
                    async with self._database.write() as conn:
                        new, version = await stock.lease(
                            conn, pool=pool, partition=self._scripts.partition, generation=generation,
                            predecessor=lease.id, lease_id=self._lease_id(), codes=codes, now=now,
                            earliest_expiry=now + least_life_s,
                        )  # fmt: skip
                except (Conflict, GenerationClosed, IntegrityError):
                    break  # another worker leased meanwhile, or the generation is being left: the next step sees
                if new is None:
                    if self._fill is not None and await self._fill.block(pool):
                        continue  # P4: a pool is not exhausted while codes can be made for it
                    if await self._scripts.exhausted(pool, version, lease.id, generation=generation) == "OK":
                        metrics.set_of_pool(metrics.window_codes, pool, length)
                        return Refilled(added, exhausted=1)
                    break
                lease = new
                metrics.lease_seconds.observe(self._clock() - began)
            async with self._database.read() as conn:
                given = await stock.lease_codes(conn, lease)
                version = version or (await stock.stock_versions(conn, [pool]))[pool]
            if len(given) != lease.codes:
                raise StoreIsOlder(f"the store lacks codes that it leased to {pool}: it came back older meanwhile")
            done = await self._scripts.restock(
                pool, lease.id, lease.predecessor, given, generation=generation, stock_version=version,
                low_water=wanted.low_water,
            )  # fmt: skip
            if done.status == "OK":
                added += len(given)
                self._rates[pool].restocked(len(given))
                metrics.leased_by_pool(pool, len(given))
                metrics.refill_seconds.observe(self._clock() - began)
            elif done.status != "DONE":
                break  # LOST, or another worker was faster: the next step sees
            lease, length = msgspec.structs.replace(lease, codes=0), done.length
        return Refilled(added)

    async def _unapplied(self, generation: int, pool: str, last: str) -> stock.Lease | None:
        """The lease that comes after ``last``, one without codes if there is none (its id is that of the last one that
        is applied), or None if the chain does not go on from ``last``.

        Store and Redis are looked at one after the other, so another worker may be ahead each time: it is no fork as
        long as anything moves.
        """
        chain = (self._scripts.partition, generation, pool)

        def nothing_after(last: str) -> stock.Lease:
            return stock.Lease(last, "", *chain, 0, 0, 0, 0)

        seen, still = ("", ""), 0
        for _ in range(LOOKS_MAX):
            async with self._database.read() as conn:
                if await stock.ends_with(conn, *chain, last):
                    return nothing_after(last)
                after = (await stock.followers(conn, *chain[:2], {pool: last})).get(pool)
                if after is not None and await stock.ends_with(conn, *chain, after.id):
                    return after
            books = await self._scripts.books([pool], generation=generation)
            # An older copy of the data ends its chain earlier; nothing is issued from it, and it is no fork.
            if books is None or not (await self._scripts.generation()).agrees:
                return nothing_after(last)
            last = books.windows[pool].lease
            here = ("" if after is None else after.id, last)
            still = still + 1 if here == seen else 1
            if still == FORK_LOOKS:
                return None
            seen = here
        return nothing_after(last)

    async def _fork(self, generation: int, pool: str) -> Refilled:
        """Leasing to this pool stops: what is in its window and what the store thinks of it do not fit."""
        await refuse_older(self._database, self._scripts)  # then that is why
        async with self._database.write() as conn:
            if await generations.state(conn, self._scripts.partition, generation) == generations.CLOSED:
                return Refilled()  # it was left meanwhile, and what it has fits nothing any more
            await ledger.raise_incident(
                conn,
                kind="forked_lease",
                partition=self._scripts.partition,
                generation=generation,
                subject=pool,
                detail="the last lease that Redis applied is neither the chain's end nor the one before it",
                now=self._now(),
            )
        self._forked.add((generation, pool))
        log.critical("lease chain forked: leasing to this pool has stopped", pool=pool, generation=generation)
        metrics.incidents.labels("forked_lease").inc()
        return Refilled(forked=1)


class _Rate:
    """How fast a pool's window empties, codes per second, remembered over RATE_MEMORY_S."""

    def __init__(self, at: float, length: int) -> None:
        self._at = at
        self._length = length
        self._rate = 0.0

    def note(self, at: float, length: int) -> float:
        seconds = at - self._at
        if seconds >= 0.5:  # shorter stretches say more about the scheduler than about the pool
            rate = max(0, self._length - length) / seconds
            self._rate += (1 - math.exp(-seconds / RATE_MEMORY_S)) * (rate - self._rate)
            self._at, self._length = at, length
        return self._rate

    def restocked(self, codes: int) -> None:
        self._length += codes
