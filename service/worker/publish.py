"""Publishing: a change of the control plane is in force on every process when its command returns (P6)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Generic, TypeVar

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.catalogue import encode
from service.errors import (
    Conflict,
    NotFound,
    RedisDiskFull,
    RedisFull,
    RedisUnreachable,
    ScriptFailed,
    StoreIsOlder,
    StoreUnreachable,
)
from service.scripts import Scripts
from service.store import control
from service.store.database import Database
from service.worker import patience
from service.worker.currency import catalogue_at, lacks_shown, older_catalogue, shown_catalogue

log = structlog.get_logger()

T = TypeVar("T")

# How long processes get to load a new catalogue before the fence makes them: those that are slower load it on
# their next request instead, which costs that request a few milliseconds and nothing else.
PRELOAD_S: Final = 1.0
PRELOAD_POLL_S: Final = 0.02

# A process that has not reported for this long is not waited for.
REPORT_AGE_MS: Final = 1_000

# Superseded snapshots stay this long for processes that are about to read them; the store has every version.
SUPERSEDED_S: Final = 300


class Published(msgspec.Struct, Generic[T], frozen=True):
    """``result`` of the change, the catalogue ``version`` it made, and the partitions where it is not in force yet
    (empty: it is in force everywhere).  ``work`` goes on trying those."""

    result: T
    version: int
    unreached: list[str]


async def change(
    database: Database,
    scripts: Scripts,
    edit: Callable[[AsyncConnection], Awaitable[T]],
    *,
    actor: str,
    action: str,
    subject: str,
    detail: str = "",
) -> Published[T]:
    """Makes ``edit`` in one transaction with the next catalogue version, and puts it in force.

    What ``edit`` raises leaves everything as it was, but for a line in the audit log if it is that a rule forbids the
    change.  Raises StoreIsOlder before anything is written.
    """
    deadline = time.monotonic() + patience.UNREACHED_S
    # What is written to the store before Redis was seen could go into one that came back older.
    while (in_force := await _in_force(scripts)) is None and time.monotonic() < deadline:
        await asyncio.sleep(patience.UNREACHED_POLL_S)
    now = int(time.time())
    note = partial(control.log, actor=actor, action=action, subject=subject, now=now)
    try:
        async with database.write() as conn:
            if in_force is not None:
                fence, catalogue, shown = in_force
                if older := await older_catalogue(conn, fence, catalogue) or await lacks_shown(conn, shown):
                    raise StoreIsOlder(older)
            result = await edit(conn)
            version = await control.raise_version(conn)
            blob = encode(await control.snapshot(conn, version))
            await control.save_snapshot(conn, version, blob, now)
            await note(conn, detail=detail, version=version)
    except (Conflict, NotFound) as refusal:
        with contextlib.suppress(StoreUnreachable):  # the refusal is what has to be told
            async with database.write() as conn:
                await note(conn, detail=f"{detail}{': ' if detail else ''}{refusal}", refused=True)
        raise
    unreached = await announce(database, scripts, version, blob)
    while unreached and time.monotonic() < deadline:
        await asyncio.sleep(patience.UNREACHED_POLL_S)
        unreached = await announce(database, scripts, version, blob)
    return Published(result, version, unreached)


async def announce(database: Database, scripts: Scripts, version: int, blob: bytes) -> list[str]:
    """Puts a stored version in force; returns the partitions where that failed.

    Nothing is put in force onto a catalogue that the store does not have: it came back older, and was edited while
    Redis was away.
    """
    try:
        fence = (await scripts.generation()).fence
        catalogue = await catalogue_at(scripts, fence)
        async with database.read() as conn:
            reason = await older_catalogue(conn, fence, catalogue)
        if not reason and await catalogue_at(scripts, version) not in (None, blob):
            reason = f"Redis has another catalogue {version}"  # processes that have that one would never load this one
        if not reason:
            await _preload(scripts, version, blob)
            if await scripts.publish(version) == "OK":
                return []
            reason = "it is being recovered"
    except (RedisError, RedisUnreachable, RedisFull, RedisDiskFull, StoreUnreachable, ScriptFailed, OSError) as error:
        reason = type(error).__name__
    log.warning("partition not reached", partition=scripts.partition, version=version, reason=reason)
    return [f"{keys.tag(scripts.partition)}: {reason}"]


async def deciding_second(scripts: Scripts) -> int:
    """The Unix second it is where times are compared for each request: Redis's, or this machine's while it is away.

    An end that lies at it is in force once it is published, however the two clocks differ.
    """
    try:
        return int((await scripts.redis.time())[0])
    except (RedisError, OSError):
        return int(time.time())


async def republish_once(database: Database, scripts: Scripts) -> int:
    """Raises a fence that is behind the store (a command died half-way, or Redis was away): 1 if it was, else 0."""
    fence = await _fence(scripts)
    async with database.read() as conn:
        if fence < 0 or await control.version(conn) <= fence:
            return 0
        version, blob = await control.load_snapshot(conn)
    await announce(database, scripts, version, blob)
    return 1


async def _in_force(scripts: Scripts) -> tuple[int, bytes | None, tuple[int, bytes | None]] | None:
    """The fence, what Redis has of that catalogue, and what processes were shown last; None while Redis is away."""
    try:
        fence = (await scripts.generation()).fence
        return fence, await catalogue_at(scripts, fence), await shown_catalogue(scripts, fence)
    except RedisUnreachable:
        return None


async def _fence(scripts: Scripts) -> int:
    """The fence, -1 if there is none or Redis is away."""
    try:
        return (await scripts.generation()).fence
    except RedisUnreachable:
        return -1


async def _preload(scripts: Scripts, version: int, blob: bytes) -> None:
    """Shows the snapshot to the processes and waits, bounded, until those that are alive have loaded it."""
    redis = scripts.redis
    async with redis.pipeline(transaction=False) as pipe:
        pipe.set(keys.catalogue(version), blob)
        pipe.expire(keys.catalogue(version - 1), SUPERSEDED_S)
        pipe.set(keys.catalogue_newest(), version)
        await pipe.execute()
    deadline = time.monotonic() + PRELOAD_S
    while time.monotonic() < deadline:
        reports = await redis.hgetall(keys.catalogue_processes())
        now_ms = time.time() * 1000
        loaded = [
            int(seen) >= version
            for seen, _, at_ms in (report.partition(":") for report in reports.values())
            if now_ms - float(at_ms) < REPORT_AGE_MS
        ]
        if all(loaded):
            return
        await asyncio.sleep(PRELOAD_POLL_S)
