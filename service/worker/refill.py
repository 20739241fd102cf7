"""Refill: leases codes from the store to the windows, ahead of the burn rate.

A lease is durable before its codes are in Redis, and a chain per pool and generation says which comes after which;
so a crash between the two is finished by the next step, and nothing is ever leased twice.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import IntegrityError

from service import keys, metrics
from service.catalogue import Snapshot
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

# A window is filled to this many times its low water, so that refills are rarer than issues by that much.
FILL: Final = 2

# Weight of the newest rate in the running one: some five steps of memory, so that a peak is believed within seconds.
RATE_WEIGHT: Final = 0.3

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
        self._rates: dict[str, _Rate] = {}
        self._forked: set[tuple[int, str]] = set()
        self._snapshot: Snapshot | None = None

    async def demanded(self, *, wait_s: float) -> bool:
        """Waits, bounded, until some pool is below its low water, and takes note of all that are.

        What is noted here and then lost in a crash is asked for again by the next issue.
        """
        demand = keys.demand(self._scripts.partition)
        try:
            first = await self._scripts.redis.bzpopmin(demand, timeout=wait_s)
            if first is None:
                return False
            await self._scripts.redis.delete(demand)
        except RedisError as error:
            raise RedisUnreachable from error
        return True

    async def run_once(self) -> Refilled:
        """Brings every pool of the catalogue above its low water, as far as stock and LEASES_MAX allow.

        Raises RedisUnreachable or StoreUnreachable; what was leased by then is applied by the next step.  Raises
        StoreIsOlder if the store came back older; nothing is leased then.
        """
        seen = await self._scripts.generation()
        if not seen.agrees:
            return Refilled()
        async with self._database.read() as conn:
            version = await control.version(conn)
            if self._snapshot is None or self._snapshot.version != version:
                self._snapshot = await control.snapshot(conn, version)
            snapshot = self._snapshot
            versions = await stock.stock_versions(conn)
        if seen.fence > version:
            return Refilled()  # the store is older than Redis; the watch says so
        least_life = {pool.id: pool.least_life_s for pool in snapshot.pools}
        pools = sorted({campaign.pool for campaign in snapshot.campaigns})
        books = await self._scripts.books(pools, generation=seen.open)
        if books is None:
            return Refilled()
        async with self._database.read() as conn:
            last = {pool: window.lease for pool, window in books.windows.items()}
            unapplied = await stock.followers(conn, self._scripts.partition, seen.open, last)
        total, checked = Refilled(), False
        for pool, window in books.windows.items():
            if window.stock < versions[pool]:
                await self._scripts.stock(pool, versions[pool], generation=seen.open)
            low = self._low(pool, window)
            if (seen.open, pool) in self._forked or (
                pool not in unapplied and (window.length >= low or window.exhausted == versions[pool])
            ):
                continue
            if not checked:  # once a step: what is leased from an older store may have been leased before
                await refuse_older(self._database, self._scripts)
                checked = True
            done = await self._refill(seen.open, pool, window, low, least_life[pool])
            total = Refilled(total.codes + done.codes, total.exhausted + done.exhausted, total.forked + done.forked)
        return total

    def _low(self, pool: str, window: Window) -> int:
        """Low water by the burn rate: what the pool needs to get through a store outage, at least the planned."""
        rate = self._rates.setdefault(pool, _Rate(self._clock(), window.length))
        per_second = rate.note(self._clock(), window.length)
        metrics.window_codes.labels(pool).set(window.length)
        return max(self._low_water, math.ceil(per_second * self._store_outage_s))

    async def _refill(self, generation: int, pool: str, window: Window, low: int, least_life_s: int) -> Refilled:
        added, last, length = 0, window.lease, window.length
        for _ in range(LEASES_MAX):
            lease = await self._unapplied(generation, pool, last)
            if lease is None:
                return msgspec.structs.replace(await self._fork(generation, pool), codes=added)
            if not lease.codes:  # all that is leased is applied, maybe by another worker since: lease more
                last = lease.id
                wanted = min(FILL * low - length, LEASE_CODES_MAX)
                if wanted <= 0:
                    break
                now = self._now()
                try:
                    async with self._database.write() as conn:
                        version = (await stock.stock_versions(conn))[pool]
                        new = await stock.lease(
                            conn, pool=pool, partition=self._scripts.partition, generation=generation, predecessor=last,
                            lease_id=self._lease_id(), codes=wanted, now=now, earliest_expiry=now + least_life_s,
                        )  # fmt: skip
                except (Conflict, GenerationClosed, IntegrityError):
                    break  # another worker leased meanwhile, or the generation is being left: the next step sees
                if new is None:
                    if self._fill is not None and await self._fill.block(pool):
                        continue  # P4: a pool is not exhausted while codes can be made for it
                    if await self._scripts.exhausted(pool, version, last, generation=generation) == "OK":
                        metrics.window_codes.labels(pool).set(length)
                        return Refilled(added, exhausted=1)
                    break
                lease = new
            async with self._database.read() as conn:
                codes = await stock.lease_codes(conn, lease)
                version = (await stock.stock_versions(conn))[pool]
            if len(codes) != lease.codes:
                raise StoreIsOlder(f"the store lacks codes that it leased to {pool}: it came back older meanwhile")
            done = await self._scripts.restock(
                pool, lease.id, lease.predecessor, codes, generation=generation, stock_version=version, low_water=low
            )
            if done.status == "OK":
                added += len(codes)
                self._rates[pool].restocked(len(codes))
                metrics.leased.labels(pool).inc(len(codes))
            elif done.status != "DONE":
                break  # LOST, or another worker was faster: the next step sees
            last, length = lease.id, done.length
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
    """How fast a pool's window empties, codes per second, remembered over some seconds."""

    def __init__(self, at: float, length: int) -> None:
        self._at = at
        self._length = length
        self._rate = 0.0

    def note(self, at: float, length: int) -> float:
        seconds = at - self._at
        if seconds >= 0.5:  # shorter stretches say more about the scheduler than about the pool
            rate = max(0, self._length - length) / seconds
            self._rate += RATE_WEIGHT * (rate - self._rate)
            self._at, self._length = at, length
        return self._rate

    def restocked(self, codes: int) -> None:
        self._length += codes
