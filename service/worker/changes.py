"""Changes into the log: one line for each row of the audit log, whoever made it and wherever it was typed.

A command has no log of its own, and a change is made once it is committed: so the worker writes the line, from the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from service.domain import instant
from service.errors import RedisUnreachable
from service.scripts import Scripts
from service.store import audit_log
from service.store.audit_log import NOT_YET, STORED, Change
from service.store.database import STATEMENT_S, Database
from service.worker import patience
from service.worker.publish import PRELOAD_S

log = structlog.get_logger()

# Lines of one step; a change of many things is one change, so there are never many.
LINES_MAX: Final = 100

# A command notes the second at which it began: it may wait for the write lock, then for processes to load the
# catalogue, and tries for so long to put it in force.
HELD_S: Final = STATEMENT_S + PRELOAD_S + patience.UNREACHED_S


class Changes:
    """Writes the lines of one store."""

    def __init__(
        self, database: Database, scripts: Scripts, *, now: Callable[[], int] = lambda: int(time.time())
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._now = now

    async def run_once(self) -> bool:
        """Up to LINES_MAX changes that were in no log are in this one; whether there may be more.

        One that is stored and not in force yet waits until it is, but no longer than its command does.  Several workers
        share them.  A worker that dies in between has written lines that another writes again: none is lost.  Raises
        StoreUnreachable.
        """
        async with self._database.read() as conn:
            some = await audit_log.unwritten(conn, LINES_MAX)
        fence = await self._fence() if some else None
        if not any(self._is_due(one, fence) for one in some):
            return False  # so nobody takes the write lock of SQLite for nothing
        async with self._database.write() as conn:
            some = await audit_log.unwritten(conn, LINES_MAX, locked=True)
            due = [one for one in some if self._is_due(one, fence)]
            for one in due:
                log.info(
                    "change",
                    made_at=instant(one.at),
                    actor=one.actor,
                    action=one.action,
                    subject=one.subject,
                    detail=one.detail,
                    catalogue=one.version,
                    outcome=one.outcome(fence),
                    entry=one.id,
                )
            await audit_log.mark_written(conn, [one.id for one in due], self._now())
        return len(due) == LINES_MAX

    def _is_due(self, one: Change, fence: int | None) -> bool:
        """Whether its outcome is known for good, or its command no longer tries."""
        return one.outcome(fence) not in (NOT_YET, STORED) or abs(self._now() - one.at) > HELD_S

    async def _fence(self) -> int | None:
        try:
            return (await self._scripts.generation()).fence
        except RedisUnreachable:
            return None
