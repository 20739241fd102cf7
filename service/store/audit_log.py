"""The audit log, read: who changed what.  Whoever changes something writes it, in the same transaction
(``control.log``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from sqlalchemy import Select, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.schema import audit_log

NOT_YET: Final = "not in force yet"
STORED: Final = "stored"


class Change(msgspec.Struct, frozen=True):
    """One change of the control plane or of stock: made at ``at`` (Unix seconds) as catalogue ``version``, None if it
    is none of the catalogue; or ``refused`` by a rule that ``detail`` names."""

    id: int
    at: int
    actor: str
    action: str
    subject: str
    detail: str
    version: int | None
    refused: bool

    def outcome(self, fence: int | None) -> str:
        """What came of it, by the version from which on scripts accept catalogues; None: nobody knows it now."""
        if self.refused:
            return "refused"
        if self.version is None or (fence is not None and self.version <= fence):
            return "done"
        return STORED if fence is None else NOT_YET


async def newest_first(
    conn: AsyncConnection,
    *,
    since: int = 0,
    actor: str | None = None,
    action: str | None = None,
    subject: str | None = None,
    limit: int,
) -> list[Change]:
    """At most ``limit`` changes at ``since`` (Unix seconds) or later that fit all that is given.  ``actor`` is a
    user of the system, whoever he said to be, or who somebody said to be: kept is ``<who> (<user>)``."""
    wanted = _changes().where(audit_log.c.at >= since).order_by(audit_log.c.id.desc()).limit(limit)
    for name, value in (("action", action), ("subject", subject)):
        if value is not None:
            wanted = wanted.where(audit_log.c[name] == value)
    if actor is not None:
        by = audit_log.c.actor
        said, was = by.startswith(f"{actor} (", autoescape=True), by.endswith(f" ({actor})", autoescape=True)
        wanted = wanted.where((by == actor) | said | was)
    return [Change(*row) for row in await conn.execute(wanted)]


async def unwritten(conn: AsyncConnection, limit: int, *, locked: bool = False) -> list[Change]:
    """The first ``limit`` changes that no worker has in its log.  ``locked``: they are the caller's until its
    transaction ends, and those of another are left out."""
    wanted = _changes().where(audit_log.c.written_at.is_(None)).order_by(audit_log.c.id).limit(limit)
    if locked:
        wanted = wanted.with_for_update(skip_locked=True)
    return [Change(*row) for row in await conn.execute(wanted)]


async def mark_written(conn: AsyncConnection, ids: Iterable[int], now: int) -> None:
    """These changes are in the log of a worker."""
    await conn.execute(update(audit_log).where(audit_log.c.id.in_(list(ids))).values(written_at=now))


def _changes() -> Select[Any]:
    return select(*(audit_log.c[name] for name in Change.__struct_fields__))
