"""Watch: how much is where, and whether the store is up to date, looked at again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from service import keys, metrics
from service.errors import RedisUnreachable, StoreIsOlder
from service.scripts import Books, Scripts
from service.store import books, control, stock
from service.store.database import Database
from service.worker.currency import refuse_older

log = structlog.get_logger()

# Quarantine is counted code by code; it grows when a generation is left, and shrinks by late flushes only.
QUARANTINE_S: Final = 300


class Watch:
    """Watches one partition and the store, and keeps their gauges."""

    def __init__(
        self, database: Database, scripts: Scripts, *, planned_rate: int, outbox_max: int,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._database = database
        self._scripts = scripts
        self._planned_rate = planned_rate
        self._outbox_max = outbox_max
        self._now = now
        self._said = ""
        self._quarantine_of = (0, 0.0)

    async def run_once(self) -> str:
        """One look.  Returns why the store is older than Redis, '' if it is not.  Raises RedisUnreachable,
        StoreUnreachable."""
        partition = str(self._scripts.partition)
        older = ""
        try:
            seen, held = await refuse_older(self._database, self._scripts)
        except StoreIsOlder as fault:
            older = str(fault)
        else:
            metrics.generation.labels(partition).set(seen.open)
            if held is not None:
                metrics.outbox_codes.labels(partition).set(held.codes)
                metrics.outbox_bytes.labels(partition).set(held.bytes)
                for pool, window in held.windows.items():
                    metrics.window_codes.labels(pool).set(window.length)
                age_s = await outbox_age_s(self._scripts, seen.open, self._now())
                metrics.outbox_age_seconds.labels(partition).set(age_s)
            async with self._database.read() as conn:
                left = await stock.left(conn, int(self._now()))
                used = await control.pools_in_use(conn, int(self._now()))
            for pool, codes in left.items():
                metrics.stock_codes.labels(pool).set(codes)
            if held is not None:
                left = {pool: codes for pool, codes in left.items() if pool in used}
                metrics.outage_lasts_seconds.labels(partition).set(
                    outage_lasts_s(held, left, outbox_max=self._outbox_max, planned_rate=self._planned_rate)
                )
            if (seen.open, self._now() // QUARANTINE_S) != self._quarantine_of:
                self._quarantine_of = (seen.open, self._now() // QUARANTINE_S)
                await self._quarantine()
        metrics.store_older.labels(partition).set(bool(older))
        if older and older != self._said:
            log.critical("watch", wrong=older)
        self._said = older
        return older

    async def _quarantine(self) -> None:
        async with self._database.read() as conn:
            lost = Counter[str]()
            for one in await books.quarantine(conn):
                lost[one.pool] += one.codes
        for pool, codes in lost.items():
            metrics.quarantined_codes.labels(pool).set(codes)


async def outbox_age_s(scripts: Scripts, generation: int, now: float) -> float:
    """How long the oldest entry has been in the outbox by Redis' clock and ``now``, 0.0 if it is empty.

    Raises RedisUnreachable.
    """
    try:
        oldest = await scripts.redis.xrange(keys.outbox(scripts.partition, generation), count=1)
    except RedisError as error:
        raise RedisUnreachable from error
    return max(0.0, now - int(oldest[0][0].split("-")[0]) / 1000) if oldest else 0.0


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
