"""Where the codes of each lot are now: every imported code is in exactly one of these places."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import books, register
from service.store.schema import LITTLE_LIFE, TAKEN_BACK, WITHDRAWN, incidents, issuances, set_asides
from service.store.stock import not_in


class Whereabouts(msgspec.Struct, frozen=True):
    """Codes of one lot: ``imported`` is the sum of all others.

    ``stored`` can still be leased; ``out`` are in a window, or issued and on their way to the ledger; ``set_aside`` had
    too little life left; ``withdrawn`` from stock or a window; ``taken_back`` from a window, and in stock again at
    another position, which counts as imported once more; ``incidents`` are named by one and are nowhere else.
    """

    pool: str
    lot: int
    expires_at: int
    imported: int
    stored: int
    out: int
    issued: int
    set_aside: int
    withdrawn: int
    taken_back: int
    quarantined: int
    incidents: int


async def by_lot(conn: AsyncConnection, pool: str | None = None) -> list[Whereabouts]:
    """The lots of one pool or of all, pools by their names and lots by their expiry.  Raises NotFound."""
    pools = await register.all_pools(conn) if pool is None else [await register.pool(conn, pool)]
    issued = await _by_lot(conn, select(issuances.c.lot, func.count()))
    left = {
        why: await _by_lot(conn, select(set_asides.c.lot, func.count()).where(set_asides.c.why == why))
        for why in (LITTLE_LIFE, WITHDRAWN, TAKEN_BACK)
    }
    named = select(incidents.c.lot, func.count(incidents.c.seq.distinct())).where(
        incidents.c.lot.is_not(None), not_in(issuances, incidents), not_in(set_asides, incidents)
    )
    raised = await _by_lot(conn, named)
    quarantined = await books.quarantined_by_lot(conn)
    found = []
    for one in pools:
        for lot in one.lots:
            parts = [counts.get(lot.lot, 0) for counts in (issued, *left.values(), quarantined, raised)]
            given, put_aside, taken, back, lost, incident = parts
            out = lot.leased - sum(parts)
            found.append(
                Whereabouts(
                    one.id, lot.lot, lot.expires_at, lot.imported, lot.stored, out, given, put_aside,
                    lot.withdrawn + taken, back, lost, incident,
                )
            )  # fmt: skip
    return found


async def _by_lot(conn: AsyncConnection, query: Select[Any]) -> dict[int, int]:
    lot = query.selected_columns[0]
    return {lot: int(count) for lot, count in await conn.execute(query.group_by(lot))}
