"""Codes in quarantine that a partner has received: they are in the ledger, by its word.

What a window that was lost had given to somebody is known to nobody but who got it.  A row of the ledger that was
adopted says whose the code is and under which key, and no more (``flush.ADOPTED``).  If the outbox entry of that very
issuance turns up after all, it takes the place; one that gives the code to anybody else is a double issue
(``flush``).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import exists
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code, Record, Rule
from service.identity import NO_KEYS
from service.store import books, generations, ledger
from service.store.database import chunks
from service.store.entries import Entry, unfit
from service.store.flush import ADOPTED, RECREATED, write_unknown
from service.store.schema import codes, issuances, leases, lots
from service.store.schema import generations as generation_rows


class Received(msgspec.Struct, frozen=True):
    """What a distributor says of a code: under which key it asked for it, and when it got it (Unix seconds, None: it
    does not say)."""

    key: str
    at: int | None


async def find(
    conn: AsyncConnection, partition: int, rule: Rule, distributor: str, received: Mapping[bytes, Received]
) -> list[Record]:
    """What was ``received``, by digests of codes, as far as these codes are in quarantine and of the rule's pool: a
    record each.

    It was issued when the distributor says, but not before its code was leased nor after its generation was left.
    """
    found: list[Record] = []
    for some in chunks(sorted(received)):
        rows = await conn.execute(
            books.in_quarantine(
                codes.c.lot, codes.c.seq, codes.c.code, codes.c.serial, codes.c.digest, lots.c.expires_at,
                leases.c.leased_at, generation_rows.c.closed_at,
            )
            .join(lots, lots.c.id == codes.c.lot)
            .where(
                codes.c.digest.in_(some), leases.c.partition == partition, leases.c.pool == rule.pool,
                ~exists().where(issuances.c.digest == codes.c.digest),
            )
            .order_by(codes.c.lot, codes.c.seq)
        )  # fmt: skip
        for lot, seq, code, serial, mark, expires_at, leased_at, left_at in rows:
            said = received[mark]
            at = left_at if said.at is None else min(max(said.at, leased_at), left_at)
            one = Code(expires_at, lot, seq, code, serial)
            record = Record("", ADOPTED, distributor, distributor, said.key, at, rule, (one,))
            if unfit(_entry(partition, 1, record)) is None:
                found.append(record)
    return found


async def adopt(
    conn: AsyncConnection, partition: int, rule: Rule, distributor: str, received: Mapping[bytes, Received], now: int
) -> int:
    """What ``find`` finds is in the ledger; how many these are.  No flush of the partition commits meanwhile.

    Doing it again finds nothing more to do.
    """
    await generations.lock(conn, partition, exclusive=True)
    records = await find(conn, partition, rule, distributor, received)
    seq = await ledger.last_seq(conn, partition, RECREATED)
    entries = [_entry(partition, seq + n, record) for n, record in enumerate(records, 1)]
    await write_unknown(conn, entries, now, NO_KEYS)
    return len(records)


def _entry(partition: int, seq: int, record: Record) -> Entry:
    return Entry(partition, RECREATED, seq, f"adopted-{seq}", (record,), ())
