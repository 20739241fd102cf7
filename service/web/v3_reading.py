"""Vouchers of the ledger as a serving process reads them: looked up together, and waited for while on their way there.

Only what is not found costs more than its part of a statement.  Those that found nothing share one *barrier* after the
other: all that was in the outboxes when it began is in the ledger when it has passed.  So what unknown ids cost is
bounded by time and not by how many are asked for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Literal

import structlog
from redis.exceptions import RedisError

from service import keys
from service.errors import Fault, RedisUnreachable
from service.logs import where
from service.scripts import Scripts
from service.store import generations, vouchers
from service.store.database import IN_MAX, Database
from service.store.vouchers import Held

log = structlog.get_logger(__name__)

# Requests that are read for in one process.  They share statements and barriers, so this bounds memory alone, and the
# statements that one crowd of unknown ids costs: 1,024 of 20 ids are some 41, twice.
READERS_MAX: Final = 1_024

# Seconds between two looks at what is left of the outboxes.  A worker flushes five times a second, in some 10 ms: the
# first look is early for what was just under way, the later ones are a handful a second.
LOOK_S_MIN: Final = 0.005
LOOK_S_MAX: Final = 0.1

# Closed generations whose outboxes are looked at, some 10 us each.  Of all but the last few a worker has flushed the
# rest before these could be closed (worker/recover.py); rolls that failed have numbers too.
CLOSED_MAX: Final = 64

Refused = Literal["not_yet", "overloaded", "store_unreachable"]


class LedgerReading:
    """What clients may read.  ``deadline_s``: longest wait of one request, all in all."""

    def __init__(self, database: Database, scripts: Scripts, *, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._lookups = Lookups(database)
        self._barrier = Barrier(database, scripts, deadline_s=deadline_s)
        self._readers = 0

    async def read(self, client: str, ids: Sequence[bytes]) -> dict[bytes, Held] | Refused:
        """Those of the ids, at most IN_MAX, that were issued to ``client`` before this call.

        ``not_yet``: some of them may have been, and are not in the ledger yet.
        """
        if self._readers >= READERS_MAX:
            return "overloaded"
        self._readers += 1
        late: Refused = "store_unreachable"
        wanted = [(client, id) for id in ids]
        try:
            async with asyncio.timeout(self._deadline_s):
                found = await self._lookups.find(wanted)
                if len(found) < len(ids):
                    late = "not_yet"
                    if (refused := await self._barrier.passed()) is not None:
                        return refused
                    late = "store_unreachable"
                    found = await self._lookups.find(wanted)
        except TimeoutError:
            return late
        except Fault:
            return "store_unreachable"
        finally:
            self._readers -= 1
        return {id: held for (_, id), held in found.items()}


class Lookups:
    """One statement at a time; what is asked for meanwhile goes together into the next."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[_Wanted] = deque()
        self._task: asyncio.Task[None] | None = None

    async def find(self, wanted: Sequence[tuple[str, bytes]]) -> dict[tuple[str, bytes], Held]:
        """Those of the (client, voucher id) that the ledger had after this call began.  Raises StoreUnreachable."""
        mine = _Wanted(wanted)
        self._waiting.append(mine)
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._look_up())
        return await mine.found

    async def _look_up(self) -> None:
        while self._waiting:
            batch: list[_Wanted] = []
            ids = 0
            while self._waiting and (not batch or ids + len(self._waiting[0].pairs) <= IN_MAX):
                batch.append(self._waiting.popleft())
                ids += len(batch[-1].pairs)
            batch = [one for one in batch if not one.found.done()]  # whose request was given up
            try:
                await self._answer(batch)
            except Exception as fault:  # noqa: BLE001 - the boundary of the loop: nobody waits for ever
                for one in batch:
                    if not one.found.done():
                        one.found.set_exception(fault)

    async def _answer(self, batch: Sequence[_Wanted]) -> None:
        if not batch:
            return
        async with self._database.read() as conn:
            known = await vouchers.found(conn, {pair for one in batch for pair in one.pairs})
        for one in batch:
            if not one.found.done():
                one.found.set_result({pair: known[pair] for pair in one.pairs if pair in known})


class _Wanted:
    def __init__(self, pairs: Sequence[tuple[str, bytes]]) -> None:
        self.pairs = pairs
        self.found: asyncio.Future[dict[tuple[str, bytes], Held]] = asyncio.get_running_loop().create_future()


class Barrier:
    """Waits until what is in the outboxes is in the ledger: one wait at a time, shared by all who came before it began;
    those who come while it lasts share the next."""

    def __init__(self, database: Database, scripts: Scripts, *, deadline_s: float) -> None:
        self._database = database
        self._scripts = scripts
        self._deadline_s = deadline_s
        self._under_way: asyncio.Task[Refused | None] | None = None
        self._next: asyncio.Task[Refused | None] | None = None

    async def passed(self) -> Refused | None:
        """None if all that was issued before this call is in the ledger; else why nobody can say so now."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._under_way))
        return await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[Refused | None] | None) -> Refused | None:
        if before is not None:
            await asyncio.wait([before])
        self._under_way, self._next = self._next, None
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._wait()
        except TimeoutError:
            return "not_yet"
        except (RedisError, Fault, OSError) as fault:
            log.warning("outbox not readable", **where(fault))
            return "store_unreachable"
        return None

    async def _wait(self) -> None:
        seen = await self._scripts.generation()
        if not seen.agrees:
            raise RedisUnreachable("no generation is open, so nobody knows what is on its way")
        # After the look at Redis: whatever generation was left before that is closed in the store by now.
        async with self._database.read() as conn:
            closed = await generations.closed(conn, self._scripts.partition)
        outboxes = [
            keys.outbox(self._scripts.partition, number) for number in sorted({seen.open, *closed[-CLOSED_MAX:]})
        ]
        async with self._scripts.redis.pipeline(transaction=False) as pipe:
            for outbox in outboxes:
                pipe.xrevrange(outbox, count=1)
            newest = await pipe.execute()
        left = {outbox: entries[0][0] for outbox, entries in zip(outboxes, newest, strict=True) if entries}
        pause_s = LOOK_S_MIN
        while left := await self._unflushed(left):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S_MAX)

    async def _unflushed(self, last: dict[str, str]) -> dict[str, str]:
        """Those of the outboxes in which something is left up to the id ``last``: it goes only when it is flushed."""
        if not last:
            return {}
        async with self._scripts.redis.pipeline(transaction=False) as pipe:
            for outbox, id in last.items():
                pipe.xrange(outbox, max=id, count=1)
            oldest: list[Any] = await pipe.execute()
        return {outbox: id for (outbox, id), entries in zip(last.items(), oldest, strict=True) if entries}
