"""GET /v3/vouchers: a client's own vouchers, readable as soon as their issuance was answered.

The ledger has them a moment after they were issued.  Whoever asks for one that is not there waits until all that was in
the outbox when it asked is in the ledger, and only then is told that there is none.  Many wait together: however many
unknown ids are asked for, Redis and the store see one look after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import parse_qsl
from uuid import UUID

import structlog
from redis.exceptions import RedisError

from service import keys
from service.catalogue import Catalogue
from service.domain import Busy, Terms
from service.errors import RedisUnreachable, StoreUnreachable
from service.identity import Identity
from service.messages import QUANTITY_MAX
from service.scripts import Scripts
from service.store import generations, vouchers
from service.store.database import Database
from service.store.vouchers import Held
from service.web.access import Access
from service.web.problems import Answer
from service.web.v1 import Issuing
from service.web.v3_catalogue import out_of_force
from service.web.v3_errors import JSON, new_request_id, refusal
from service.web.v3_voucher import told_now

log = structlog.get_logger(__name__)

# Seconds between two looks at what is left in the outbox: a worker flushes five times a second.
POLL_S_MIN: Final = 0.01
POLL_S_MAX: Final = 0.1

# Requests that wait for the outbox in one process; they cost one look for all, so this only bounds memory.
WAITERS_MAX: Final = 1_024


class OwnVouchers:
    """The vouchers of clients in force, from the ledger; ``patience_s``: longest wait for one that is on its way."""

    def __init__(
        self,
        issuer: Issuing,
        database: Database,
        scripts: Scripts,
        *,
        patience_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._issuer = issuer
        self._database = database
        self._outbox = Outbox(database, scripts, patience_s)
        self._now = now

    async def voucher(self, access: Access, text: str) -> Answer:
        """One voucher; what is no UUID is nobody's."""
        if (wanted := _uuid(text)) is None:
            return refusal("no_voucher") if (refused := await self._refused(access)) is None else refused
        found = await self._found(access, [wanted])
        if isinstance(found, Answer):
            return found
        return _answered(f'"voucher":{found[0]}')

    async def vouchers(self, access: Access, query: bytes) -> Answer:
        """Those of the ids of a query string that are the client's, in their order."""
        wanted = parse_ids(query)
        if isinstance(wanted, str):
            return refusal(wanted) if (refused := await self._refused(access)) is None else refused
        found = await self._found(access, wanted)
        if isinstance(found, Answer):
            return found
        return _answered(f'"vouchers":[{",".join(found)}]')

    async def _found(self, access: Access, wanted: Sequence[UUID]) -> list[str] | Answer:
        if (refused := await self._refused(access)) is not None:
            return refused
        ids = [one.bytes for one in wanted]
        try:
            held = await self._held(access.client, ids)
            if len(held) < len(ids):
                if (why := await self._outbox.passed()) is not None:
                    return refusal(why)
                held |= await self._held(access.client, [one for one in ids if one not in held])
        except StoreUnreachable:
            return refusal("store_unreachable")
        now = int(self._now())
        return [_told(held[one], now) for one in ids if one in held] or refusal("no_voucher")

    async def _held(self, client: str, ids: Sequence[bytes]) -> dict[bytes, Held]:
        async with self._database.read() as conn:
            return await vouchers.of_client(conn, client, ids)

    async def _refused(self, access: Access) -> Answer | None:
        def judge(catalogue: Catalogue) -> str:
            return out_of_force(access, catalogue)

        said = await self._issuer.confirm(judge)
        if isinstance(said, Busy):
            return refusal(said.code)
        return refusal(said) if said else None


class Outbox:
    """Waits until what is in the outbox now is in the ledger."""

    def __init__(self, database: Database, scripts: Scripts, patience_s: float) -> None:
        self._database = database
        self._scripts = scripts
        self._patience_s = patience_s
        self._waiters = 0
        self._looking: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None

    async def passed(self) -> str | None:
        """None: all that was in the outbox when this was called is in the ledger.  Else the name of the refusal."""
        if self._waiters >= WAITERS_MAX:
            return "overloaded"
        self._waiters += 1
        try:
            # A look that has begun may have read the outbox before what is asked for got there.
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(self._look())
                return await asyncio.shield(self._looking)
            if self._next is None or self._next.done():
                self._next = asyncio.ensure_future(self._look_after(self._looking))
            return await asyncio.shield(self._next)
        finally:
            self._waiters -= 1

    async def _look_after(self, look: asyncio.Task[str | None]) -> str | None:
        await asyncio.wait([look])
        self._looking = asyncio.current_task()
        self._next = None
        return await self._look()

    async def _look(self) -> str | None:
        try:
            return await self._wait()
        except (RedisError, RedisUnreachable, StoreUnreachable, OSError) as fault:
            log.warning("outbox not readable", fault=type(fault).__name__)
            return "store_unreachable"

    async def _wait(self) -> str | None:
        redis, partition = self._scripts.redis, self._scripts.partition
        async with self._database.read() as conn:
            left = await generations.closed(conn, partition)
        seen = await self._scripts.generation()
        outboxes = [keys.outbox(partition, generation) for generation in sorted({seen.open, *left} - {0})]
        async with redis.pipeline(transaction=False) as pipe:
            for outbox in outboxes:
                pipe.xrevrange(outbox, count=1)
            newest = await pipe.execute()
        last = {outbox: _id(entries[0][0]) for outbox, entries in zip(outboxes, newest, strict=True) if entries}
        end, pause_s = time.monotonic() + self._patience_s, POLL_S_MIN
        while last:
            async with redis.pipeline(transaction=False) as pipe:
                for outbox in last:
                    pipe.xrange(outbox, count=1)
                oldest = await pipe.execute()
            last = {
                outbox: newest_id
                for (outbox, newest_id), entries in zip(last.items(), oldest, strict=True)
                if entries and _id(entries[0][0]) <= newest_id
            }
            if last:
                if time.monotonic() + pause_s > end:
                    return "not_yet"
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, POLL_S_MAX)
        return None


def parse_ids(query: bytes) -> list[UUID] | str:
    """The ids of the one parameter ``id``; if they are not as the contract has them, the name of the refusal."""
    try:
        given = [value for name, value in parse_qsl(query.decode("ascii"), keep_blank_values=True) if name == "id"]
    except (ValueError, UnicodeDecodeError):
        return "ids_malformed"
    if len(given) != 1:
        return "ids_malformed"
    texts = given[0].split(",")
    if len(texts) > QUANTITY_MAX:
        return "ids_too_many"
    ids = [one for text in texts if (one := _uuid(text)) is not None]
    if len(ids) < len(texts):
        return "ids_malformed"
    return ids if len(set(ids)) == len(ids) else "ids_repeated"


def _uuid(text: str) -> UUID | None:
    """The UUID, if it is written as UUIDs are: 36 characters, whatever their case."""
    try:
        return UUID(text) if len(text) == 36 and text[8::5][:4] == "----" else None
    except ValueError:
        return None


def _id(text: str) -> tuple[int, int]:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number)


def _told(held: Held, now: int) -> str:
    return told_now(
        Terms.unpack(held.terms), held.product, held.face_value, held.code,
        Identity(int.from_bytes(held.voucher_id, "big"), held.short, held.pin), held.issued_at, held.code_expires_at,
        status=held.status, remaining=held.remaining, now=now,
    )  # fmt: skip


def _answered(member: str) -> Answer:
    body = f'{{"request_id":"{new_request_id()}",{member}}}'.encode()
    return Answer(200, [JSON, (b"content-length", b"%d" % len(body))], body, "read")
