"""Returning to stock what was leased, lost with its window, and never received by anybody.

The proof is the operator's: a file of all that every distributor of the pool has received.  A code in quarantine that
it does not name was told to nobody who could use it.  The rest is made sure of here: only codes of generations that
were left before the file ends and whose outbox is empty come back, while no flush can commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import RedisError

from service import keys
from service.errors import Conflict, RedisUnreachable
from service.scripts import Scripts
from service.store import control, unseen
from service.store.database import Database
from service.worker.currency import refuse_older
from service.worker.stocking import tell_stock

# Codes of one transaction: it keeps flushes waiting, and on SQLite everybody.
CODES_MAX: Final = 1_000


class Back:
    """Returns codes of ``pool`` that a file of ``distributors`` does not name, received until ``until`` (Unix seconds).

    ``rehearse``: nothing is changed, and what would be returned is counted.
    """

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        pool: str,
        distributors: Sequence[str],
        until: int,
        *,
        reason: str,
        actor: str,
        rehearse: bool,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._pool = pool
        self._distributors = distributors
        self._until = until
        self._reason = reason
        self._actor = actor
        self._rehearse = rehearse
        self._now = now

    def refuse_incomplete(self, off: int) -> None:
        """Raises Conflict if the file is no proof: ``off`` lines can't be read, or vouchers are not in it."""
        if off:
            raise Conflict(
                f"the file is no proof that a code was not received: {off} lines are unreadable, or vouchers missing "
                "there; nothing was returned to stock"
            )

    async def run(self, named: Callable[[bytes], bool]) -> int:
        """How many codes came back; ``named``: whether the file names the code of this digest.

        Raises Conflict if a distributor that could have received codes of the pool is not among those of the file, or
        an outbox of a generation that was left is not empty; StoreIsOlder, RedisUnreachable and StoreUnreachable.  What
        came back by then is in stock.  Doing it again goes on.
        """
        await refuse_older(self._database, self._scripts)
        async with self._database.read() as conn:
            needed = await unseen.could_have_received(conn, self._pool)
        if missing := sorted(needed.difference(self._distributors)):
            raise Conflict(
                f"{', '.join(missing)} could have received codes of pool {self._pool} too: the file has to hold "
                "all that they received, and --distributor to name each of them; nothing was returned to stock"
            )
        partition, after, returned = self._scripts.partition, (0, -1), 0
        while True:
            async with self._database.read() as conn:
                page = await unseen.page(conn, partition, self._pool, self._until, after, CODES_MAX)
            if not page:
                break
            after = page[-1][0]
            positions = [position for position, mark in page if not named(mark)]
            if self._rehearse:
                returned += len(positions)
            elif positions:
                returned += await self._return(positions)
        return returned

    async def _return(self, positions: Sequence[tuple[int, int]]) -> int:
        """A line in the audit log says how many came back, whatever comes after."""
        async with self._database.write() as conn:
            await unseen.lock(conn, self._scripts.partition)
            for generation in sorted(await unseen.generations_of(conn, self._scripts.partition, positions)):
                await self._refuse_unsealed(generation)
            versions, count = await unseen.return_(conn, self._scripts.partition, positions, self._now())
            if count:
                of = ", ".join(self._distributors)
                detail = f"{count} codes from quarantine that {of} did not receive; {self._reason}"
                await control.log(
                    conn, actor=self._actor, action="return unseen", subject=self._pool, detail=detail, now=self._now()
                )
        for pool, version in versions.items():
            await tell_stock(self._scripts, pool, version)
        return count

    async def _refuse_unsealed(self, generation: int) -> None:
        seen = await self._scripts.generation()
        if not seen.agrees or seen.open == generation:
            raise Conflict("Redis is being recovered: nobody knows what is still on its way to the ledger; try again")
        try:
            held = await self._scripts.redis.xlen(keys.outbox(self._scripts.partition, generation))
        except RedisError as error:
            raise RedisUnreachable from error
        if held:
            raise Conflict(
                f"the outbox of generation {generation} still holds what is not in the ledger: see that `voucherd "
                "work` runs, then try again"
            )
