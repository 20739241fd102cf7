"""A store and a Redis with the worker's steps at hand, each taken when a test says so."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.catalogue import Cap, Catalogue, encode, load, period_bounds
from service.domain import Record, Request, Rule, Terms
from service.identity import IdKeys
from service.line import connect
from service.scripts import Answer, Plan, Routed, Scripts
from service.store import campaigns, control
from service.store.database import Database
from service.worker.audit import Report, audit
from service.worker.flush import Flush
from service.worker.publish import change
from service.worker.recover import Recover
from service.worker.refill import Refill
from tests.scripting import record_of

DISTRIBUTOR = "DIST-001"
OUTBOX_MAX = 10_000
OUTBOX_BYTES_MAX = 10_000_000
RETENTION_S = 86_400
IDS = IdKeys("k1", {"k1": bytes(range(32))})
CLIENT = "CLIENT-001"
TERMS = Terms(
    name="Card of ${FV}", is_value_based=True, is_open_value=True, is_status_available=True, is_multiple_use=True,
    currency="PHP", amount=None, expiry="days:30", time_zone="Asia/Manila", url="https://v.example/", short_url="",
)  # fmt: skip


class Stage:
    """One partition, open, whose windows, outbox and ledger only move when told to."""

    def __init__(self, database: Database, scripts: Scripts) -> None:
        self.database = database
        self.scripts = scripts
        self.flush = Flush(database, scripts, consumer="test", retention_s=RETENTION_S, ids=IDS)
        self.recover = Recover(database, scripts, self.flush, outbox_max=OUTBOX_MAX, retention_s=RETENTION_S)
        # Its clock stands still: how fast the machine issues decides how long no window is.
        self.refill = Refill(database, scripts, low_water=20, store_outage_s=1, clock=lambda: 0.0)

    async def open(self) -> int:
        """The generation that is open now, with all its records restored."""
        for _ in range(20):
            await self.recover.run_once()
            seen = await self.scripts.generation()
            if seen.agrees and not seen.restoring:
                return seen.open
        raise AssertionError("the partition does not open")

    async def campaign(self, id: str = "CAMP-001", product: str = "PAY", caps: tuple[Cap, ...] = ()) -> None:
        """A campaign with a pool of its own, assigned to DISTRIBUTOR, which is made if it is not there."""
        now = int(time.time())

        async def edit(conn: AsyncConnection) -> None:
            snapshot = await control.snapshot(conn, 0)
            if DISTRIBUTOR not in snapshot.distributors:
                await control.create_distributor(conn, DISTRIBUTOR, "A partner", now)
            await control.create_pool(conn, id, default_expires_at=now + 10**7, least_life_s=0, now=now)
            await campaigns.create(
                conn, id, category=product, products=[product], pool=id, priority=100, starts_at=now - 60, until=0,
                time_zone="UTC", caps=caps, now=now,
            )  # fmt: skip
            await campaigns.assign(conn, id, DISTRIBUTOR, (), now)

        published = await change(self.database, self.scripts, edit, actor="test", action="test", subject=id)
        assert not published.unreached

    async def issue(self, *keys: str, product: str = "PAY") -> list[Answer]:
        """What the script says to one request per key, as one batch."""
        plan, version = await self._plan(product)
        requests = [Request("v1", DISTRIBUTOR, key, DISTRIBUTOR, (product,), f"T1\t{product}") for key in keys]
        return await self._issue(requests, plan, version)

    async def issue_v3(
        self, key: str, quantity: int = 1, *, client: str = CLIENT, terms: Terms = TERMS, face_value: int | None = 1_051
    ) -> Record:
        """The record of one request of Client API v3, which the campaign CAMP-001 issued under these terms."""
        plan, version = await self._plan("PAY")
        rule = Rule("CAMP-001", "CAMP-001", "", "CAMP-001", 0, IDS.current, terms.pack()).pack()
        plan = Plan(tuple(msgspec.structs.replace(candidate, rule=rule) for candidate in plan.candidates))
        payload = f"\tCAMP-001\t{quantity}\t{'' if face_value is None else face_value}\tsale-{key}"
        request = Request("v3", client, key, DISTRIBUTOR, ("CAMP-001",), payload, quantity, face_value)
        (answer,) = await self._issue([request], plan, version)
        assert answer.status == "ISSUED"
        return record_of(request, answer.detail)

    async def _plan(self, product: str) -> tuple[Plan, int]:
        async with self.database.read() as conn:
            version = await control.version(conn)
            snapshot = await control.snapshot(conn, version)
        catalogue = [part for part in load(encode(snapshot)) if part is not None][-1]
        assert isinstance(catalogue, Catalogue)
        return catalogue.route(DISTRIBUTOR, (product,)).plan, version

    async def _issue(self, requests: Sequence[Request], plan: Plan, version: int) -> list[Answer]:
        now = int(time.time())
        reply = await self.scripts.issue(
            [Routed(request, plan) for request in requests],
            generation=(await self.scripts.generation()).open,
            version=version,
            outbox_max=OUTBOX_MAX,
            outbox_bytes_max=OUTBOX_BYTES_MAX,
            retention_s=RETENTION_S,
            bounds={
                cap.counter: period_bounds(cap.counter.period, cap.counter.time_zone, now)
                for candidate in plan.candidates
                for cap in candidate.caps
            },
        )
        assert reply.status == "OK"
        return reply.answers

    async def lose_redis(self) -> list[tuple[str, dict[str, str]]]:
        """Redis is emptied, and the second generation is open.  What was in the first one's outbox, for a copy of it
        that turns up late."""
        entries = list(await self.scripts.redis.xrange(keys.outbox(0, 1)))
        await self.scripts.redis.flushall()
        assert await self.open() == 2
        return entries

    async def issue_everything(self) -> list[str]:
        """All codes that could still be issued, and all of them are in the ledger."""
        given: list[str] = []
        for round_number in range(40):
            await self.refill.run_once()
            answers = await self.issue(*(f"all-{round_number}-{number}" for number in range(20)))
            given += [Record.unpack(one.detail).codes[0].code for one in answers if one.status == "ISSUED"]
            await self.flush.run_once()
            if {one.status for one in answers} == {"NONE"}:
                return given
        raise AssertionError("the pool is never exhausted")

    async def audit(self) -> Report:
        return await audit(self.database, self.scripts)

    async def balanced(self) -> None:
        """The audit finds nothing."""
        assert (await self.audit()).findings == []


@asynccontextmanager
async def staged(database: Database, redis_url: str) -> AsyncIterator[Stage]:
    """A stage whose partition is open."""
    redis = connect(redis_url, timeout_ms=2_000)
    try:
        stage = Stage(database, Scripts(redis))
        await stage.open()
        yield stage
    finally:
        await redis.aclose()
