"""GET /v3/vouchers: a client's own vouchers, readable as soon as their issuance was answered.

The ledger has them a moment after they were issued.  Whoever asks for one that is not there waits until all that was in
an outbox when it asked is in the ledger, and is told only then that there is none.  Nothing of it is on the way of an
issue request, and many wait together: however many unknown ids are asked for, the store and Redis see one look after
the other (v3_reading.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import parse_qsl

from service.domain import Terms
from service.identity import Identity, is_uuid, uuid_told
from service.store.vouchers import Held
from service.web.problems import Answer
from service.web.v3_errors import JSON, refusal
from service.web.v3_reading import LedgerReading
from service.web.v3_voucher import told_now

# Ids in one request (api-v3 "Endpoints").
IDS_MAX: Final = 20


class OwnVouchers:
    """The answers to a client that a catalogue in force admitted; ``request_id`` is that of its request."""

    def __init__(self, reading: LedgerReading, unix_clock: Callable[[], float] = time.time) -> None:
        self._reading = reading
        self._unix_clock = unix_clock

    async def voucher(self, client: str, text: str, request_id: str) -> Answer:
        """One voucher.  What is no UUID names none: 404 like any other that there is not."""
        if (wanted := uuid_of(text)) is None:
            return refusal("no_voucher", request_id=request_id)
        told = await self._told(client, [wanted])
        if isinstance(told, str):
            return refusal(told, request_id=request_id)
        return _answered(f'"voucher":{told[0]}', request_id)

    async def vouchers(self, client: str, query: bytes, request_id: str) -> Answer:
        """Those of the ids in a query string that are the client's, in the order asked."""
        wanted = ids_of(query)
        if isinstance(wanted, str):
            return refusal(wanted, request_id=request_id)
        told = await self._told(client, wanted)
        if isinstance(told, str):
            return refusal(told, request_id=request_id)
        return _answered(f'"vouchers":[{",".join(told)}]', request_id)

    async def _told(self, client: str, ids: Sequence[bytes]) -> list[str] | str:
        """The vouchers as JSON objects; the name of the refusal if there is none, or nobody knows yet."""
        held = await self._reading.read(client, ids)
        if isinstance(held, str):
            return held
        now = int(self._unix_clock())
        return [_told(held[id], now) for id in ids if id in held] or "no_voucher"


def ids_of(query: bytes) -> list[bytes] | str:
    """The ids of the one parameter ``id``; if they are not as the contract has them, the name of the refusal.

    Looked at in this order: one parameter that is not empty, not too many, each a UUID, none twice.
    """
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in pairs if name == "id"]
    if len(given) != 1:
        return "ids_malformed"
    texts = given[0].split(",")
    if len(texts) > IDS_MAX:
        return "ids_too_many"
    ids = [id for text in texts if (id := uuid_of(text)) is not None]
    if len(ids) < len(texts):
        return "ids_malformed"
    return ids if len(set(ids)) == len(ids) else "ids_repeated"


def uuid_of(text: str) -> bytes | None:
    """The 16 bytes of a UUID as UUIDs are written, in any case; None if it is none."""
    return bytes.fromhex(text.replace("-", "")) if is_uuid(text) else None


def _told(held: Held, now: int) -> str:
    return told_now(
        Terms.unpack(held.terms), held.product, held.face_value, held.code,
        Identity(uuid_told(held.voucher_id), held.short, held.pin), held.issued_at, held.code_expires_at,
        status=held.status, remaining=held.remaining, now=now,
    )  # fmt: skip


def _answered(member: str, request_id: str) -> Answer:
    body = f'{{"request_id":"{request_id}",{member}}}'.encode()
    return Answer(200, (JSON, (b"content-length", b"%d" % len(body))), body, "read")
