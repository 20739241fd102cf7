"""Vouchers that have an id, as their clients see them: what was issued, and what became of it since.

What was issued is in the ledger and never changes.  What became of a voucher is said by whoever redeems it, and lives
apart; one that nothing was said of is active.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal
from uuid import UUID

import msgspec
from sqlalchemy import ColumnElement, Select, and_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Terms
from service.errors import Conflict, NotFound
from service.store import control
from service.store.schema import WAY, issuances, requests, voucher_states
from service.store.stock import digest

State = Literal["active", "inactive", "used", "voided"]
Change = Literal["void", "mark-used", "deactivate", "activate"]


class Held(msgspec.Struct, frozen=True):
    """One voucher.  ``remaining`` is cents or items as somebody said, None: what it was issued with; ``voucher_id`` is
    a UUID's 16 bytes; ``payload`` as in ``domain.Record``."""

    voucher_id: bytes
    short: str
    pin: int
    code: str
    code_expires_at: int
    client: str
    distributor: str
    product: str
    payload: str
    terms: str
    issued_at: int
    status: State
    remaining: int | None
    changed_at: int | None

    @property
    def face_value(self) -> int | None:
        """What the client asked it to be worth, in cents; None if it is worth what the product is."""
        value = self.payload.split("\t")[3]
        return int(value) if value else None

    @property
    def client_reference(self) -> str:
        """What the client calls its sale."""
        return self.payload.split("\t")[4]

    @property
    def worth(self) -> int:
        """Cents or items that it was issued with."""
        amount = Terms.unpack(self.terms).amount
        return amount if amount is not None else self.face_value or 0


async def found(conn: AsyncConnection, wanted: Collection[tuple[str, bytes]]) -> dict[tuple[str, bytes], Held]:
    """Those of the (client, voucher id) that are vouchers of this client, each under its own; by one statement.

    At most ``database.IN_MAX`` ids.
    """
    ids = sorted({id for _, id in wanted})
    rows = await conn.execute(_vouchers().where(issuances.c.voucher_id.in_(ids)))
    known = {(held.client, held.voucher_id): held for held in map(_held, rows)}
    return {one: known[one] for one in wanted if one in known}


async def find(conn: AsyncConnection, *, voucher_id: bytes | None = None, code: str | None = None) -> Held:
    """The voucher with this id, or this code, whosever it is.  Raises NotFound."""
    wanted = _vouchers().where(issuances.c.voucher_id.is_not(None))
    if voucher_id is not None:
        wanted = wanted.where(issuances.c.voucher_id == voucher_id)
    if code is not None:
        wanted = wanted.where(issuances.c.digest == digest(code))
    row = (await conn.execute(wanted)).first()
    if row is None:
        raise NotFound("there is no such voucher of Client API v3 in the ledger")
    return _held(row)


async def change(
    conn: AsyncConnection, voucher_id: bytes, what: Change, now: int, *, actor: str, remaining: int = 0
) -> Held:
    """The voucher after ``what`` was said of it, durably, with a line in the audit log; ``remaining``, in cents or
    items, goes with "mark-used".  Saying the same again changes nothing, and is not logged.

    Only a void is final: it leaves what remained, and gives back neither the code nor what it used of a cap.  A used
    voucher can be voided, and, if it is of multiple use, something can be left of it again; it is neither activated nor
    deactivated.  What is inactive stays so while something is left of it.  Time forbids nothing: reports come late.
    Raises NotFound, and Conflict if one of these rules or the worth of the voucher forbids it.
    """
    # Two operators at once: the second goes on, and reads, when the first has committed.
    await conn.execute(select(issuances.c.seq).where(issuances.c.voucher_id == voucher_id).with_for_update())
    before = await find(conn, voucher_id=voucher_id)
    status, left = _after(before, what, remaining)
    if (status, left) == (before.status, before.remaining):
        return before
    values = {"status": status, "remaining": left, "changed_at": now}
    if before.changed_at is None:
        await conn.execute(voucher_states.insert().values(voucher_id=voucher_id, **values))
    else:
        here = voucher_states.c.voucher_id == voucher_id
        await conn.execute(voucher_states.update().where(here).values(**values))
    await control.log(
        conn, actor=actor, action=f"voucher {what}", subject=str(UUID(bytes=voucher_id)), now=now,
        detail=f"{before.status} -> {status}{'' if left is None else f', {left} left'}",
    )  # fmt: skip
    return msgspec.structs.replace(before, **values)


def _after(held: Held, what: Change, remaining: int) -> tuple[State, int | None]:
    if what == "void":
        return "voided", held.remaining
    if held.status == "voided":
        raise Conflict("this voucher is voided, and that is final")
    if what == "mark-used":
        if not 0 <= remaining <= held.worth:
            raise Conflict(f"this voucher was issued with {held.worth}: 0 to that much can be left of it")
        if remaining and not Terms.unpack(held.terms).is_multiple_use:
            raise Conflict("this voucher is of single use: nothing is left of it once it was used")
        if not remaining:
            return "used", 0
        return "inactive" if held.status == "inactive" else "active", remaining
    if held.status == "used":
        raise Conflict("this voucher is used: say with `mark-used --remaining` if something is left of it")
    return "inactive" if what == "deactivate" else "active", held.remaining


def _vouchers() -> Select[Any]:
    return (
        select(
            issuances.c.voucher_id, issuances.c.short, issuances.c.pin, issuances.c.code, issuances.c.expires_at,
            requests.c.client, requests.c.distributor, requests.c.product, requests.c.payload, requests.c.terms,
            requests.c.issued_at, voucher_states.c.status, voucher_states.c.remaining, voucher_states.c.changed_at,
        )
        .join(requests, _request_of_it())
        .outerjoin(voucher_states, voucher_states.c.voucher_id == issuances.c.voucher_id)
    )  # fmt: skip


def _request_of_it() -> ColumnElement[bool]:
    return and_(
        *(requests.c[name] == issuances.c[name] for name in WAY[:3]), requests.c.ordinal == issuances.c.request_ordinal
    )


def _held(row: Any) -> Held:
    return Held(
        bytes(row.voucher_id), row.short, row.pin, row.code, row.expires_at, row.client, row.distributor, row.product,
        row.payload, row.terms, row.issued_at, row.status or "active", row.remaining, row.changed_at,
    )  # fmt: skip
