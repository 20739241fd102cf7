"""What the store knows of codes that somebody names: to whom they were issued, or where they are instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import stock
from service.store.database import chunks
from service.store.flush import ADOPTED, is_request_of
from service.store.generations import CLOSED
from service.store.schema import codes, generations, incidents, issuances, leases, requests, set_asides

# ``adopted``: issued, by a partner's word (``adoption``).  ``out``: in a window, or issued and on its way to the
# ledger.  The reasons of ``set_asides`` are places too.
Place = Literal[
    "issued", "adopted", "stored", "out", "quarantined", "little_life", "withdrawn", "taken_back", "incident"
]


class Known(msgspec.Struct, frozen=True):
    """One code.  What follows ``seq`` is of its request, and empty unless it was issued."""

    place: Place
    pool: str
    lot: int
    seq: int
    distributor: str = ""
    key: str = ""
    answer_id: bytes | None = None  # the request_id of its answers, where the key is not that
    voucher_id: bytes | None = None
    issued_at: int = 0


async def known(conn: AsyncConnection, digests: Sequence[bytes]) -> dict[bytes, Known]:
    """Those of the codes with these ``digests`` that the store has ever had, each with what became of it."""
    found: dict[bytes, Known] = {}
    for some in chunks(list(dict.fromkeys(digests))):
        issued = await conn.execute(
            select(
                issuances.c.digest, requests.c.api, requests.c.pool, issuances.c.lot, issuances.c.seq,
                requests.c.distributor, requests.c.key, requests.c.answer_id, issuances.c.voucher_id,
                requests.c.issued_at,
            )
            .join(requests, is_request_of(issuances))
            .where(issuances.c.digest.in_(some))
        )  # fmt: skip
        found.update((mark, Known("adopted" if api == ADOPTED else "issued", *rest)) for mark, api, *rest in issued)
        left = [mark for mark in some if mark not in found]
        if not left:
            continue
        lease = and_(leases.c.lot == codes.c.lot, leases.c.seq_from <= codes.c.seq, leases.c.seq_to > codes.c.seq)
        of_lease = and_(generations.c.partition == leases.c.partition, generations.c.generation == leases.c.generation)
        aside = and_(set_asides.c.lot == codes.c.lot, set_asides.c.seq == codes.c.seq)
        rows = await conn.execute(
            select(
                codes.c.digest, codes.c.pool, codes.c.lot, codes.c.seq, generations.c.state, set_asides.c.why,
                (~stock.not_withdrawn(codes)).label("gone"), (~stock.not_in(incidents, codes)).label("named"),
            )
            .select_from(codes)
            .outerjoin(leases, lease)
            .outerjoin(generations, of_lease)
            .outerjoin(set_asides, aside)
            .where(codes.c.digest.in_(left))
        )  # fmt: skip
        for mark, pool, lot, seq, state, why, gone, named in rows:
            found[mark] = Known(_place(state, why, gone, named), pool, lot, seq)
    return found


def _place(state: str | None, why: Place | None, withdrawn: bool, named: bool) -> Place:
    """By the state of the generation that it was leased to, None if it was not."""
    if why is not None:
        return why
    if withdrawn:
        return "withdrawn"
    if named:
        return "incident"
    if state is None:
        return "stored"
    return "quarantined" if state == CLOSED else "out"
