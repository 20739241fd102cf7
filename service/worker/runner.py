"""Runs the worker: every loop until told to stop, then the last flush."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import structlog

from service import keyring, metrics
from service.errors import Fault, Misconfigured, RedisUnreachable, StoreUnreachable
from service.identity import NO_KEYS
from service.line import connect
from service.scripts import Scripts
from service.settings import Settings
from service.store.database import Database, check_migrated
from service.vetting import Vetting
from service.worker.changes import Changes
from service.worker.flush import BLOCK_MS, Flush
from service.worker.generating import Fill
from service.worker.publish import republish_once
from service.worker.recover import Recover
from service.worker.refill import Refill
from service.worker.restart import note_synced
from service.worker.watch import Watch

log = structlog.get_logger()

# Seconds between two steps of a loop, unless the first said that there is more.  Refill waits inside its step (for
# demand) and pauses only so that demand that can't be met does not make it spin.  Flush waits inside its step for an
# entry and pauses so that one transaction holds many: a step costs some ten milliseconds whatever it flushes.
RECOVER_S: Final = 0.1
SYNCED_S: Final = 1.0
PUBLISH_S: Final = 1.0
CHANGES_S: Final = 1.0
FLUSH_S: Final = 0.2
REFILL_S: Final = 0.02
DEMAND_S: Final = 0.5
FILL_S: Final = 0.5
CLEAN_S: Final = 5.0
WATCH_S: Final = 10.0
VET_S: Final = 60.0  # settings of servers change by hand

# A roll counts the ledger under caps, which on a large one takes longer than any statement of every day may.
RECOVERY_STATEMENT_S: Final = 300.0

# After a fault a loop waits this long and then twice as long each time, up to the second.
FAULT_PAUSE_S_MIN: Final = 0.1
FAULT_PAUSE_S_MAX: Final = 2.0


async def work(settings: Settings, stop: asyncio.Event) -> None:
    """Works until ``stop`` is set; then what is in the outbox is flushed, as far as store and Redis answer.

    With the store or Redis away it keeps trying.  Raises Misconfigured if the schema is not this version's, if there is
    no usable secrets file where the settings name one, if they ask for OpenTelemetry and it is not installed, or in
    production mode if a server is not as it must be: at once, or when both servers have answered.
    """
    async with contextlib.AsyncExitStack() as closing:
        make_flush: Callable[..., Flush] = Flush
        if settings.otel:
            from service.tracing import Tracing  # an extra, which costs a second of imports besides
            from service.worker.traced import TracedFlush

            tracing = Tracing.configured("work")
            closing.push_async_callback(tracing.close)
            make_flush = partial(TracedFlush, tracing)
        await _work(settings, stop, make_flush)


async def _work(settings: Settings, stop: asyncio.Event, make_flush: Callable[..., Flush]) -> None:
    secrets = keyring.named(settings.secrets_file)
    database = Database.connect(settings.store_url)
    patient = Database.connect(settings.store_url, statement_s=RECOVERY_STATEMENT_S)
    redis = connect(settings.redis_url, timeout_ms=max(settings.redis_timeout_ms, 4 * BLOCK_MS))
    try:
        await check_migrated(database)
        scripts = Scripts(redis)
        flush = make_flush(
            database, scripts, consumer=f"{socket.gethostname()}-{os.getpid()}",
            retention_s=settings.replay_retention_s, ids=NO_KEYS if secrets is None else secrets.ids,
        )  # fmt: skip
        recover = Recover(
            patient, scripts, flush, outbox_max=settings.outbox_max, retention_s=settings.replay_retention_s,
            restart_in_place=settings.restart_in_place,
        )  # fmt: skip
        fill = Fill(database, scripts)
        refill = Refill(
            database, scripts, low_water=settings.low_water, store_outage_s=settings.store_outage_s, fill=fill
        )
        watch = Watch(
            database, scripts, planned_rate=settings.planned_rate, outbox_max=settings.outbox_max,
            outbox_bytes_max=settings.outbox_bytes_max, patient=patient,
        )  # fmt: skip
        changes = Changes(database, scripts)
        vetting = Vetting(database, scripts, settings)
        await vetting.run_once()
        refused: list[Misconfigured] = []

        async def flush_step() -> bool:
            await flush.run_once(block_ms=BLOCK_MS)
            return flush.behind

        async def refill_step() -> bool:
            return (await refill.step(wait_s=DEMAND_S)).codes > 0

        async def vet_step() -> None:
            try:
                await vetting.run_once()
            except Misconfigured as fault:  # a server that did not answer at the start does now
                refused.append(fault)
                stop.set()

        loops = {
            "recover": _loop("recover", recover.run_once, RECOVER_S, stop),
            "flush": _loop("flush", flush_step, FLUSH_S, stop),
            "refill": _loop("refill", refill_step, REFILL_S, stop),
            "fill": _loop("fill", fill.run_once, FILL_S, stop),
            "publish": _loop("publish", lambda: republish_once(database, scripts), PUBLISH_S, stop),
            "changes": _loop("changes", changes.run_once, CHANGES_S, stop),
            "clean": _loop("clean", recover.clean_once, CLEAN_S, stop),
            "watch": _loop("watch", watch.run_once, WATCH_S, stop),
            "count": _loop("count", watch.count_once, WATCH_S, stop),
            "vet": _loop("vet", vet_step, VET_S, stop, first=False),
        }
        if settings.restart_in_place:
            loops["synced"] = _loop("synced", lambda: note_synced(scripts), SYNCED_S, stop)
        tasks = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        log.info("working")
        await stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _last_flush(scripts, flush)
        log.info("stopped")
        for fault in refused:
            raise fault
    finally:
        await redis.aclose()
        await patient.close()
        await database.close()


async def _loop(
    name: str, step: Callable[[], Awaitable[object]], pause_s: float, stop: asyncio.Event, *, first: bool = True
) -> None:
    """``first``: the first step is made at once, and not after the first pause."""
    fault_pause_s = FAULT_PAUSE_S_MIN
    if not first:
        await asyncio.sleep(pause_s)
    # Cancelling is not enough: before Python 3.12 asyncio.wait_for, which redis-py waits with, may swallow it.
    while not stop.is_set():
        try:
            did_something = await step()
        except Exception as fault:  # the boundary of a loop: it tries again, whatever happened
            metrics.step_faults.labels(name, type(fault).__name__).inc()
            if isinstance(fault, Fault):
                log.warning("step failed", loop=name, fault=type(fault).__name__, detail=str(fault))
            else:
                log.exception("step failed", loop=name)
            if isinstance(fault, (RedisUnreachable, StoreUnreachable)):  # the loop is there, and says so
                metrics.loop_timestamp_seconds.labels(name).set(time.time())
            await asyncio.sleep(fault_pause_s)
            fault_pause_s = min(2 * fault_pause_s, FAULT_PAUSE_S_MAX)
        else:
            metrics.loop_timestamp_seconds.labels(name).set(time.time())
            fault_pause_s = FAULT_PAUSE_S_MIN
            await asyncio.sleep(0 if did_something is True else pause_s)


async def _last_flush(scripts: Scripts, flush: Flush) -> None:
    try:
        seen = await scripts.generation()
        if seen.open:
            await flush.drain(seen.open)
    except Fault as fault:
        log.warning("the last flush failed; the outbox keeps it", fault=type(fault).__name__)
