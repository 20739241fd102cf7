"""Whether Redis and the store pass the checks of ``service.checks``: what is read of them, and who is told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import text

from service import metrics
from service.checks import CHECKS, Facts, Finding, judged
from service.errors import Misconfigured, RedisUnreachable, ReplyMismatch, ScriptFailed, StoreUnreachable
from service.line import connect
from service.scripts import Scripts
from service.settings import PREFIX, Settings
from service.store.database import Database, connections_most

log = structlog.get_logger()

# Every command that a script uses: a right that is missing half-way through a script destroys a code.
COMMANDS: Final = (
    "exists", "expireat", "get", "hdel", "hget", "hincrby", "hmget", "hset", "info", "llen", "lpop", "lpos", "lrange",
    "lrem", "mget", "rpush", "set", "time", "unlink", "xack", "xadd", "xdel", "xlen", "xrange", "zadd",
    "zcard",
)  # fmt: skip

# Seconds between two tries to look at a server that did not answer at the start of a process in production mode.
RETRY_S: Final = 5.0


class Look(msgspec.Struct, frozen=True):
    """What one look found; ``unreached``: the servers that did not answer, about which nothing is said."""

    findings: tuple[Finding, ...]
    unreached: tuple[str, ...]

    @property
    def refused(self) -> list[Finding]:
        """What production mode does not start with."""
        return [one for one in self.findings if not one.accepted]


async def look(database: Database, scripts: Scripts, settings: Settings) -> Look:
    """Both servers are asked; one that does not answer is part of the result."""
    findings: list[Finding] = []
    unreached: list[str] = []
    try:
        findings += judged("redis", await _of_redis(scripts, settings), settings.accepted)
    except (RedisUnreachable, ReplyMismatch):
        unreached.append("Redis")
    try:
        facts = await _of_store(database, settings)
        findings += judged("sqlite" if database.is_sqlite else "postgresql", facts, settings.accepted)
    except StoreUnreachable:
        unreached.append("the store")
    return Look(tuple(findings), tuple(unreached))


def refuse_unsafe(found: Look, settings: Settings) -> None:
    """Raises Misconfigured in production mode if a check is not passed and not accepted."""
    if settings.production and found.refused:
        names = ",".join(sorted({one.check for one in found.refused} | settings.accepted))
        raise Misconfigured(
            f"{PREFIX}PRODUCTION: not started, for " + "; and ".join(one.text for one in found.refused)
            + f". To start nevertheless: {PREFIX}ACCEPT={names}"
        )  # fmt: skip


class Vetting:
    """Looks again and again, and says in the log and in the metric what has changed."""

    def __init__(self, database: Database, scripts: Scripts, settings: Settings) -> None:
        self._database = database
        self._scripts = scripts
        self._settings = settings
        self._said: dict[str, Finding] = {}
        self._vetted = False  # both servers answered once, and were accepted

    async def run_once(self) -> Look:
        """One look.  Raises Misconfigured in production mode, if the first look that both servers answered finds
        what is not accepted: what becomes unsafe later is told, and stops nobody."""
        found = await look(self._database, self._scripts, self._settings)
        self._say(found)
        if not self._vetted:
            refuse_unsafe(found, self._settings)
            self._vetted = not found.unreached
        return found

    def _say(self, found: Look) -> None:
        unsafe = {one.check: one for one in found.findings}
        for name, one in unsafe.items():
            if self._said.get(name) != one:
                (log.warning if one.accepted else log.critical)(
                    "unsafe", check=name, state=one.state, accepted=one.accepted, what=one.text
                )
        looked = {name for name, check in CHECKS.items() if self._was_looked_at(check.server, found)}
        for name in (self._said.keys() & looked) - unsafe.keys():
            log.info("safe again", check=name)
        for server in found.unreached:
            log.warning("unchecked", server=server)
        for name in looked:
            metrics.unsafe_settings.labels(name).set(name in unsafe and not unsafe[name].accepted)
        self._said = {name: one for name, one in self._said.items() if name not in looked} | unsafe

    def _was_looked_at(self, server: str, found: Look) -> bool:
        if server == "redis":
            return "Redis" not in found.unreached
        return "the store" not in found.unreached and (server == "sqlite") == self._database.is_sqlite


async def until_vetted(settings: Settings) -> None:
    """Returns once both servers have passed the checks, or are accepted as they are; outside of production mode after
    one look.  Raises Misconfigured."""
    while True:
        database = Database.connect(settings.store_url)
        redis = connect(settings.redis_url, timeout_ms=settings.redis_timeout_ms)
        try:
            found = await Vetting(database, Scripts(redis), settings).run_once()
        finally:
            await redis.aclose()
            await database.close()
        if not found.unreached or not settings.production:
            return
        await asyncio.sleep(RETRY_S)


async def _of_redis(scripts: Scripts, settings: Settings) -> Facts:
    """Raises RedisUnreachable, ReplyMismatch."""
    facts = {"memory_needed": str(settings.records_bytes)}
    wanted = [name for name, check in CHECKS.items() if check.server == "redis" and "CONFIG" in check.reads]
    try:
        for section in ("server", "replication", "persistence", "memory", "cluster"):
            with contextlib.suppress(ResponseError):
                facts |= {name: str(value) for name, value in (await scripts.redis.info(section)).items()}
        if "aof_enabled" in facts:
            facts["appendonly"] = "yes" if facts["aof_enabled"] == "1" else "no"
        if "maxmemory_policy" in facts:
            facts["maxmemory-policy"] = facts["maxmemory_policy"]
        with contextlib.suppress(ResponseError):
            facts |= await scripts.redis.config_get(*wanted)
    except RedisError as error:
        raise RedisUnreachable from error
    with contextlib.suppress(ScriptFailed):
        facts["refused"] = ", ".join(await scripts.rights(COMMANDS))
    return facts


async def _of_store(database: Database, settings: Settings) -> Facts:
    """Raises StoreUnreachable."""
    async with database.read() as conn:
        if database.is_sqlite:
            return {
                name: str((await conn.execute(text(f"PRAGMA {name}"))).scalar_one())
                for name, check in CHECKS.items()
                if check.server == "sqlite"
            }
        names = ("synchronous_commit", "fsync", "full_page_writes", "server_version_num", "server_encoding",
                 "max_connections", "superuser_reserved_connections", "reserved_connections")  # fmt: skip
        rows = await conn.execute(
            text("select name, setting from pg_settings where name = any(:names)"), {"names": list(names)}
        )
        facts = {str(row[0]): str(row[1]) for row in rows}
    reserved = sum(int(facts.pop(name, "0")) for name in ("superuser_reserved_connections", "reserved_connections"))
    if "max_connections" in facts:
        facts["max_connections"] = str(int(facts["max_connections"]) - reserved)
    facts["connections_needed"] = str(connections_most(settings.workers, works=1))
    return facts
