"""Catalogues for a serving process: the newest is loaded before it is needed, an older one never again."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError

from service import keys, metrics
from service.catalogue import Catalogue, load
from service.errors import Fault, NotFound, RedisUnreachable
from service.scripts import Scripts
from service.store import control
from service.store.database import Database

log = structlog.get_logger()

# How often a process looks for a newer catalogue and reports the one it uses: publishing waits for the reports, so
# this is most of the time a publishing command takes.
POLL_S: Final = 0.1


class Preload:
    """Loads catalogues from Redis, or from the store if Redis has none that this process can read.

    ``adopt`` is told of each newer one, ``in_use`` says the version that the process decides by now (-1: none).
    """

    def __init__(
        self, database: Database, scripts: Scripts, adopt: Callable[[Catalogue], None], in_use: Callable[[], int]
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._adopt = adopt
        self._in_use = in_use
        self._process = secrets.token_hex(8)
        self._closed = False

    async def load(self, version: int) -> Catalogue:
        """A catalogue of at least ``version`` (0: the newest there is); an empty one before the first publication.

        Raises StoreUnreachable or RedisUnreachable if neither has it now.
        """
        blob = None
        if version:
            try:
                text = await self._scripts.redis.get(keys.catalogue(version))
            except RedisError as error:
                raise RedisUnreachable from error
            blob = text.encode("utf-8", "surrogateescape") if text else None
        if blob is not None:
            try:
                return await self._assemble(blob)
            except msgspec.DecodeError:
                log.warning("catalogue not readable in Redis; reading the store", version=version)
        async with self._database.read() as conn:
            try:
                _, blob = await control.load_snapshot(conn)
            except NotFound:
                return Catalogue(0)
        catalogue = await self._assemble(blob)
        if catalogue.version < version:
            raise RedisUnreachable(f"catalogue {version} is in force, and neither Redis nor the store has it yet")
        return catalogue

    async def run(self) -> None:
        """Loads what is published, reports what is in use, until cancelled or closed."""
        # Cancelling is not enough: before Python 3.12 asyncio.wait_for, which redis-py waits with, may swallow it.
        while not self._closed:
            try:
                newest = int(await self._scripts.redis.get(keys.catalogue_newest()) or 0)
                if newest > self._in_use() or self._in_use() < 0:
                    self._adopt(await self.load(newest))
                report = f"{self._in_use()}:{int(time.time() * 1000)}"
                await self._scripts.redis.hset(keys.catalogue_processes(), self._process, report)
            except (RedisError, Fault, OSError) as fault:
                log.debug("preload", fault=type(fault).__name__)  # the next request says it louder, if there is one
                await self._from_store()
            metrics.catalogue_version.labels("serve").set(self._in_use())
            await asyncio.sleep(POLL_S)

    def stop(self) -> None:
        """``run`` ends with its present look at the latest."""
        self._closed = True

    async def close(self) -> None:
        """Nobody waits for this process any more."""
        with contextlib.suppress(RedisError, OSError):  # the report is too old in a second anyway
            await self._scripts.redis.hdel(keys.catalogue_processes(), self._process)

    async def _from_store(self) -> None:
        """With Redis away a process can still become ready: what it decides is confirmed by the fence later."""
        if self._in_use() >= 0:
            return
        try:
            self._adopt(await self.load(0))
        except Fault as fault:
            log.warning("no catalogue yet", fault=type(fault).__name__)

    async def _assemble(self, blob: bytes) -> Catalogue:
        metrics.catalogue_loads.inc()
        for catalogue in load(blob):
            if catalogue is not None:
                return catalogue
            await asyncio.sleep(0)
        raise msgspec.DecodeError("the snapshot ends before its catalogue")
