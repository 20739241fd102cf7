"""Vouchers that have an id, as their clients see them: what was issued, and what became of it since.

What was issued is in the ledger and never changes.  What became of a voucher is said by whoever redeems it, and lives
apart; one that nothing was said of is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import ColumnElement, Select, and_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Terms
from service.errors import Conflict, NotFound
from service.store.schema import WAY, issuances, requests, voucher_states
from service.store.stock import digest

State = Literal["active", "inactive", "used", "voided"]
STATES: Final[tuple[State, ...]] = ("active", "inactive", "used", "voided")


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


async def of_client(conn: AsyncConnection, client: str, ids: Sequence[bytes]) -> dict[bytes, Held]:
    """Those of the ids, at most some dozen, that are vouchers of this client."""
    wanted = _vouchers().where(issuances.c.voucher_id.in_(ids), requests.c.client == client, requests.c.api == "v3")
    return {held.voucher_id: held for held in map(_held, await conn.execute(wanted))}


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


async def set_state(
    conn: AsyncConnection, voucher_id: bytes, status: State, remaining: int | None, now: int
) -> tuple[Held, Held]:
    """The voucher is in this state, durably, and ``remaining`` is left of it (None: as it was); before and after.

    Setting the same again changes nothing.  Raises NotFound; Conflict if it was voided, which is final, or if more
    would be left than it was issued with.
    """
    held = await find(conn, voucher_id=voucher_id)
    state = voucher_states.c
    first = {"voucher_id": voucher_id, "status": "active", "changed_at": now}
    put = sqlite.insert if conn.dialect.name == "sqlite" else postgresql.insert
    await conn.execute(put(voucher_states).on_conflict_do_nothing(index_elements=["voucher_id"]), first)
    locked = select(state.status, state.remaining).where(state.voucher_id == voucher_id).with_for_update()
    before = (await conn.execute(locked)).one()  # two operators at once: the second sees what the first did
    held = msgspec.structs.replace(held, status=before.status, remaining=before.remaining)
    if held.status == "voided" and status != "voided":
        raise Conflict("this voucher is voided, and that is final")
    left = held.remaining if remaining is None else remaining
    if left is not None and not 0 <= left <= held.worth:
        raise Conflict(f"this voucher was issued with {held.worth}: 0 to that much can be left of it")
    after = msgspec.structs.replace(held, status=status, remaining=left, changed_at=now)
    if (held.status, held.remaining) != (after.status, after.remaining):
        await conn.execute(
            voucher_states.update()
            .where(state.voucher_id == voucher_id)
            .values(status=status, remaining=left, changed_at=now)
        )
    return held, after


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
