"""Watch: how much is where, and whether the store is up to date, looked at again and again."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from redis.exceptions import RedisError, ResponseError

from service import keys, metrics
from service.errors import RedisUnreachable, StoreIsOlder, StoreUnreachable
from service.scripts import Books, Scripts
from service.store import books, control, stock
from service.store.database import Database
from service.worker.balance import in_between, in_redis
from service.worker.currency import refuse_older
from service.worker.flush import entered_at

log = structlog.get_logger()

# Quarantine, stock and ledger are counted code by code.  Quarantine grows when a generation is left, and shrinks by
# late flushes only; books that are off stay off.
COUNT_S: Final = 300

# Seconds over which the burn rate is taken: a peak is seen within the minute, and one large request is no peak.
BURN_S: Final = 60


class Watch:
    """Watches one partition and the store, and keeps their gauges."""

    def __init__(
        self, database: Database, scripts: Scripts, *, planned_rate: int, outbox_max: int,
        outbox_bytes_max: int, patient: Database | None = None, now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """``patient``: the same store, whose statements may take as long as it takes to count every row."""
        self._database = database
        self._patient = patient or database
        self._scripts = scripts
        self._planned_rate = planned_rate
        self._outbox_max = outbox_max
        self._outbox_bytes_max = outbox_bytes_max
        self._now = now
        self._said = ""
        self._quarantined = set[str]()  # pools whose gauge says what is in quarantine
        self._counted_in = (0, 0.0)
        # As the store said last, by pool.
        self._left: dict[str, int] = {}  # codes
        self._leased: dict[str, int] = {}  # codes, ever
        self._used = set[str]()
        self._asked = set[str]()  # those that somebody may ask now, and that can be empty
        self._gone: deque[tuple[float, int, dict[str, int]]] = deque()  # when, in which generation, codes by pool

    async def run_once(self) -> str:
        """One look.  Returns why the store is older than Redis, '' if it is not.

        What the one server says is told also while the other is away.  Raises RedisUnreachable, StoreUnreachable.
        """
        faults = [
            fault
            for server, look in (("store", self._look_at_store), ("redis", self._look_at_redis))
            if (fault := await _told(server, look)) is not None
        ]
        if faults:
            raise faults[0]
        return await self._look_at_both()

    async def _look_at_redis(self) -> None:
        partition = str(self._scripts.partition)
        seen = await self._scripts.generation()
        held = await self._scripts.books(sorted(self._left), generation=seen.open) if seen.open else None
        metrics.generation.labels(partition).set(seen.open)
        metrics.fence_version.labels(partition).set(seen.fence)
        if held is not None:
            metrics.outbox_codes.labels(partition).set(held.codes)
            metrics.outbox_bytes.labels(partition).set(held.bytes)
            metrics.outbox_limit_codes.labels(partition).set(self._outbox_max)
            metrics.outbox_limit_bytes.labels(partition).set(self._outbox_bytes_max)
            windows = {pool: window.length for pool, window in held.windows.items()}
            metrics.set_by_pool(metrics.window_codes, windows)
            age_s = await outbox_age_s(self._scripts, seen.open, self._now())
            metrics.outbox_age_seconds.labels(partition).set(age_s)
            metrics.outage_lasts_seconds.labels(partition).set(
                outage_lasts_s(
                    held, {pool: codes for pool, codes in self._left.items() if pool in self._used},
                    outbox_max=self._outbox_max, planned_rate=self._planned_rate,
                )
            )  # fmt: skip
        await self._redis_itself(partition)

    async def _look_at_store(self) -> None:
        now = int(self._now())
        async with self._database.read() as conn:
            self._left = await stock.left(conn, now)
            self._used = await control.pools_in_use(conn, now)
            self._asked = await control.pools_asked(conn, now)
            self._leased = await stock.leased_ever(conn)
            metrics.catalogue_stored.labels(str(self._scripts.partition)).set(await control.version(conn))
        metrics.name_pools(sorted(self._asked))
        metrics.set_by_pool(metrics.stock_codes, self._left)

    async def _look_at_both(self) -> str:
        partition, older = str(self._scripts.partition), ""
        try:
            seen, held = await refuse_older(self._database, self._scripts)
        except StoreIsOlder as fault:
            older = str(fault)
        else:
            if held is not None:
                metrics.conservation_difference.labels(partition, "windows").set(abs(in_redis(held)))
                self._burn(seen.open, held)
        metrics.store_older.labels(partition).set(bool(older))
        if older and older != self._said:
            log.critical("watch", wrong=older)
        self._said = older
        return older

    async def count_once(self) -> bool:
        """What is counted code by code, if that is due: quarantine, and whether ledger and stock are what they must be.
        Whether it was; nothing is counted in a store that is older.  Raises RedisUnreachable, StoreUnreachable."""
        due = ((await self._scripts.generation()).open, self._now() // COUNT_S)
        if due == self._counted_in:
            return False
        try:
            seen, held = await refuse_older(self._database, self._scripts)
        except StoreIsOlder:
            return False  # `run_once` says so
        self._counted_in = due  # now: a count that takes too long is not made again at once
        await self._count(seen.open, held)
        metrics.books_checked.labels(str(self._scripts.partition)).set(self._now())
        return True

    def _burn(self, generation: int, held: Books) -> None:
        """When each pool will be empty, by how fast codes left it: leased by the store and no longer in its window.
        One that nobody may ask now never is, nor one that makes its own codes."""
        now = self._now()
        gone = {pool: self._leased.get(pool, 0) - window.length for pool, window in held.windows.items()}
        if self._gone and self._gone[-1][1] != generation:
            self._gone.clear()  # windows that were left with their generation were not burnt
        self._gone.append((now, generation, gone))
        while len(self._gone) > 1 and now - self._gone[1][0] >= BURN_S:
            self._gone.popleft()
        then, _, before = self._gone[0]
        empty_in: dict[str, float] = {}
        for pool, codes in gone.items():
            burnt = codes - before.get(pool, codes)
            burns = burnt > 0 and now > then and pool in self._asked
            codes_left = self._left.get(pool, 0) + held.windows[pool].length
            seconds = codes_left * (now - then) / burnt if burns else math.inf
            empty_in[pool] = seconds if codes_left or pool not in self._asked else 0.0
        metrics.set_by_pool(metrics.pool_empty_in_seconds, empty_in, min)

    async def _count(self, generation: int, held: Books | None) -> None:
        partition = self._scripts.partition
        async with self._patient.read() as conn:
            lost = Counter[str]()
            for one in await books.quarantine(conn):
                lost[one.pool] += one.codes
            in_ledger = (await books.accounted(conn, partition, generation)).codes
            in_stock = sum(abs(one.difference) for one in await books.stock_balance(conn))
        self._quarantined |= lost.keys()  # of those that it lacks all were withdrawn, returned or adopted since
        metrics.set_by_pool(metrics.quarantined_codes, {pool: lost[pool] for pool in sorted(self._quarantined)})
        difference = metrics.conservation_difference
        difference.labels(str(partition), "stock").set(in_stock)
        again = await self._scripts.books([], generation=generation)
        if held is not None and again is not None:
            difference.labels(str(partition), "ledger").set(in_between(held, in_ledger, again))

    async def _redis_itself(self, partition: str) -> None:
        """Raises RedisUnreachable.  What a managed service does not tell is left out."""
        try:
            memory = await self._scripts.redis.info("memory")
            persistence = await self._scripts.redis.info("persistence")
        except ResponseError:
            return
        except RedisError as error:
            raise RedisUnreachable from error
        if "used_memory" in memory:
            metrics.redis_memory_bytes.labels(partition).set(memory["used_memory"])
        if "maxmemory" in memory:
            metrics.redis_memory_limit_bytes.labels(partition).set(memory["maxmemory"] or math.inf)
        if "aof_last_write_status" in persistence:
            metrics.redis_append_failing.labels(partition).set(persistence["aof_last_write_status"] != "ok")


async def _told(server: str, look: Callable[[], Awaitable[None]]) -> RedisUnreachable | StoreUnreachable | None:
    """The fault of a look at a server that did not answer; the gauge says whether it did."""
    fault = None
    try:
        await look()
    except (RedisUnreachable, StoreUnreachable) as unreachable:
        fault = unreachable
    metrics.server_reachable.labels(server).set(fault is None)
    return fault


async def outbox_age_s(scripts: Scripts, generation: int, now: float) -> float:
    """How long the oldest entry has been in the outbox by Redis' clock and ``now``, 0.0 if it is empty.

    Raises RedisUnreachable.
    """
    try:
        oldest = await scripts.redis.xrange(keys.outbox(scripts.partition, generation), count=1)
    except RedisError as error:
        raise RedisUnreachable from error
    return max(0.0, now - entered_at(oldest[0][0])) if oldest else 0.0


def outage_lasts_s(held: Books, left: dict[str, int], *, outbox_max: int, planned_rate: int) -> float:
    """Seconds that issuing goes on from now without the store, if one pool has to bear all of the planned rate.

    The smallest window counts of those that the store could still refill, by the codes ``left`` there (if nothing is
    known of it, of all that hold something): one whose stock is all in Redis loses nothing by an outage.
    """
    windows = [
        window.length for pool, window in held.windows.items() if left.get(pool, 0) > 0 or (not left and window.length)
    ]
    codes: int = min([max(0, outbox_max - held.codes), *windows])
    return codes / planned_rate
