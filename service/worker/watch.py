"""Watch: whether Redis and the store are as the promises need them, looked at again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError, ResponseError

from service import keys, metrics
from service.errors import RedisUnreachable, StoreIsOlder
from service.scripts import Books, Scripts
from service.store import books, control, stock
from service.store.database import Database
from service.worker.currency import refuse_older

log = structlog.get_logger()

# Settings of Redis without which a promise does not hold, and what each must be (reliability.md 1-3, 12).
SETTINGS: Final = {
    "appendonly": ("yes", "acknowledged vouchers survive a restart only in the append-only file"),
    "appendfsync": ("always", "anything else loses acknowledged vouchers in a power cut"),
    "no-appendfsync-on-rewrite": ("no", "yes switches appendfsync off during rewrites"),
    "maxmemory-policy": ("noeviction", "an evicted key is a voucher issued twice"),
}

# Quarantine is counted code by code; it grows when a generation is left, and shrinks by late flushes only.
QUARANTINE_S: Final = 300

# One replay record in memory, key and overhead included (MEMORY USAGE of a v1 record with usual ids says 350 to 450).
RECORD_BYTES: Final = 512

# Versions below these have known ways out of the Lua sandbox (CVE-2025-49844); distributions patch older ones.
LEAST_VERSIONS: Final = {"redis": ((7, 2, 11), (8, 2, 2)), "valkey": ((8, 0, 6), (8, 1, 4))}

# Every command that a script uses: a right that is missing half-way through a script destroys a code.
COMMANDS: Final = (
    "exists", "expireat", "get", "hdel", "hget", "hincrby", "hmget", "hset", "info", "llen", "lpop", "lpos", "lrange",
    "lrem", "mget", "rpush", "set", "time", "unlink", "xack", "xadd", "xdel", "xlen", "zadd", "zcard",
)  # fmt: skip


class Seen(msgspec.Struct, frozen=True):
    """What one look found: why the store is older than Redis ('' if it is not), and what is wrong with Redis."""

    store_older: str
    wrong: tuple[str, ...]


class Watch:
    """Watches one partition and the store, and keeps their gauges."""

    def __init__(
        self, database: Database, scripts: Scripts, *, planned_rate: int, outbox_max: int, retention_s: int,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._database = database
        self._scripts = scripts
        self._planned_rate = planned_rate
        self._outbox_max = outbox_max
        self._records_max = planned_rate * retention_s
        self._now = now
        self._said: set[str] = set()
        self._quarantine_of = (0, 0.0)

    async def run_once(self) -> Seen:
        """One look.  Raises RedisUnreachable, StoreUnreachable."""
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
        wrong = tuple(await wrong_with_redis(self._scripts, records_max=self._records_max))
        for text in (*wrong, *((older,) if older else ())):
            if text not in self._said:
                log.critical("watch", wrong=text)
        self._said = {*wrong, older}
        return Seen(older, wrong)

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


async def wrong_with_redis(scripts: Scripts, *, records_max: int) -> list[str]:
    """What about the server's settings, version or rights breaks a promise, a line each; empty if all is well.

    ``records_max``: replay records that there will be at the planned rate over the whole retention.

    A setting that may not be read (a managed service) is left out.  Raises RedisUnreachable.
    """
    wrong: list[str] = []
    try:
        try:
            settings = await scripts.redis.config_get(*SETTINGS, "maxmemory")
        except ResponseError:
            settings = {}
        server = await scripts.redis.info("server")
    except RedisError as error:
        raise RedisUnreachable from error
    for name, (needed, why) in SETTINGS.items():
        if settings.get(name, needed) != needed:
            wrong.append(f"{name} is {settings[name]}, must be {needed}: {why}")
    memory = int(settings.get("maxmemory", 0))
    if 0 < memory < records_max * RECORD_BYTES:
        wrong.append(
            f"maxmemory is {memory:,} bytes, but replay records at the planned rate over the retention need some "
            f"{records_max * RECORD_BYTES:,}: raise it, or lower VOUCHERD_PLANNED_RATE or VOUCHERD_REPLAY_RETENTION_S"
        )
    kind = "valkey" if "valkey_version" in server else "redis"
    version = tuple(int(part) for part in str(server[f"{kind}_version"]).split(".")[:3])
    least = max((one for one in LEAST_VERSIONS[kind] if one[0] <= version[0]), default=LEAST_VERSIONS[kind][0])
    if version < least and version[:2] <= least[:2]:
        needed = ".".join(map(str, least))
        wrong.append(
            f"{kind} {'.'.join(map(str, version))} is below {needed}: make sure your distribution has patched it"
        )
    if refused := await scripts.rights(COMMANDS):
        wrong.append(f"this Redis user may not run {', '.join(refused)}: a script would stop half-way")
    return wrong
