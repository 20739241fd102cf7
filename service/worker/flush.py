"""Outbox to ledger: what was issued becomes durable in the store, exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from typing import Any, Final, get_args

import msgspec
import structlog
from redis.exceptions import RedisError, ResponseError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys, metrics, traceparent
from service.catalogue import cap_field, counted_by
from service.domain import RECORD_SEPARATOR, CapHolder, Code, Record
from service.errors import LedgerLacks, RedisUnreachable
from service.identity import NO_KEYS, IdKeys
from service.scripts import Count, Scripts, counter_key, parse_separated, sequences
from service.store import campaigns, control, ledger, recreation, returning, unseen
from service.store.database import Database
from service.store.ledger import Entry
from service.store.schema import LITTLE_LIFE, TAKEN_BACK
from service.worker.publish import change

log = structlog.get_logger()

GROUP: Final = "ledger"

# Entries of one read: their texts are in memory together, up to a quarter of a megabyte each (BATCH_VOUCHERS_MAX).
ENTRIES_MAX: Final = 100

# Codes of one transaction, and about as many of one step: large enough to share one commit, small enough that on SQLite
# nobody waits for the write lock for long.
CODES_MAX: Final = 5_000

# An entry that its worker has not finished for this long is taken over.  A worker that wakes up later flushes it a
# second time, which changes nothing.
CLAIM_AFTER_MS: Final = 5_000

# One read waits this long for new entries; below the client's time-out.
BLOCK_MS: Final = 500


class Flushed(msgspec.Struct, frozen=True):
    """What one step did: entries taken out of the outbox; codes that are now in the ledger for the first time, that
    were parked with a malformed entry, and that met a wall (incidents; their campaigns are paused)."""

    entries: int = 0
    codes: int = 0
    parked: int = 0
    incidents: int = 0


class Flush:
    """Flushes one partition.  ``consumer`` names this worker; two with one name only do work twice.

    ``ids``: what the ids of vouchers are derived with.
    """

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        *,
        consumer: str,
        retention_s: int,
        ids: IdKeys = NO_KEYS,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._database = database
        self._ids = ids
        self._scripts = scripts
        self._consumer = consumer
        self._retention_s = retention_s
        self._now = now
        self._generation = 0
        self._own_pending = True  # entries read before a crash or an error come first
        self.behind = False  # the last step left something that it could have read

    async def run_once(self, *, block_ms: int = 0) -> Flushed:
        """Flushes what has come into the outbox of the open generation, up to about CODES_MAX codes, waiting
        ``block_ms`` for the first of them.

        Raises RedisUnreachable, StoreUnreachable or UnknownIdKey; entries stay in the outbox then, and the next step
        has them.
        """
        generation = (await self._scripts.generation()).open
        if not generation:
            return Flushed()
        if generation != self._generation:
            self._generation, self._own_pending = generation, True
        try:
            try:
                entries = await self._read(generation, block_ms)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                await self._make_group(generation)
                entries = await self._read(generation, block_ms)
        except RedisError as error:
            raise RedisUnreachable from error
        self._own_pending = bool(entries)  # until it is known that these went all the way
        return await self.settle(generation, entries)

    async def drain(self, generation: int) -> Flushed:
        """Flushes all that can be read of a generation, whoever read it before; for a roll, and for the last of it."""
        total = Flushed()
        outbox = keys.outbox(self._scripts.partition, generation)
        try:
            if not await self._scripts.redis.exists(outbox):
                return total
            after = "-"
            while entries := await self._scripts.redis.xrange(outbox, after, "+", count=ENTRIES_MAX):
                total = _sum(total, await self.settle(generation, entries))
                after = f"({entries[-1][0]}"
        except RedisError as error:
            raise RedisUnreachable from error
        return total

    async def settle(self, generation: int, entries: Sequence[tuple[str, dict[str, str] | None]]) -> Flushed:
        """Puts stream entries into the ledger and takes them out of the outbox, in this order."""
        total = Flushed()
        chunk: list[tuple[str, dict[str, str] | None]] = []
        codes = 0
        for entry in entries:
            held = _counted(entry[1] or {}, "codes")
            if chunk and codes + held > CODES_MAX:
                total = _sum(total, await self._settle(generation, chunk))
                chunk, codes = [], 0
            chunk.append(entry)
            codes += held
        return _sum(total, await self._settle(generation, chunk)) if chunk else total

    async def _settle(self, generation: int, entries: Sequence[tuple[str, dict[str, str] | None]]) -> Flushed:
        partition, now, began = self._scripts.partition, self._now(), time.monotonic()
        good: list[Entry] = []
        taken_out: list[tuple[str, int, int]] = []
        parked = 0
        for entry_id, fields in entries:
            if fields is None:  # another worker flushed and deleted it; only our pending mark is left
                taken_out.append((entry_id, 0, 0))
                continue
            held = _counted(fields, "codes")
            try:
                good.append(parse(partition, generation, entry_id, fields))
            except (ValueError, KeyError) as error:
                async with self._database.write() as conn:
                    await ledger.park(
                        conn,
                        partition,
                        generation,
                        entry_id,
                        held,
                        type(error).__name__,
                        msgspec.json.encode(_safe(fields)),
                        now,
                    )
                parked += held
                metrics.parked.inc()
                log.error("entry parked", partition=partition, generation=generation, entry=entry_id)
            taken_out.append((entry_id, held, _counted(fields, "bytes")))
        result = await self._to_ledger(generation, good, now)
        if result.paused:  # in force before the entries are gone, so that a crash here pauses it at the next step
            await change(
                self._database,
                self._scripts,
                partial(campaigns.mark_changed, ids=result.paused),  # the ledger has paused them in the store
                actor="worker",
                action="pause",
                subject=",".join(result.paused),
                detail="a code met a wall of the ledger",
            )
        if good:
            await self._restore_if_late(generation, good)
            await self._put_back(good, now)
        gone = 0
        if taken_out:
            seq = next((entry.outbox_seq for entry in good if ledger.unfit(entry) is None), 0)
            gone = await self._scripts.flushed(GROUP, taken_out, generation=generation, seq=seq)
        metrics.flush_seconds.observe(time.monotonic() - began)
        metrics.flush_lag_seconds.observe(max(0.0, time.time() - entered_at(entries[0][0])))
        metrics.flushed.inc(result.issued)
        metrics.set_aside.inc(result.set_aside)
        if result.incidents:
            metrics.incidents.labels("double_issue").inc(result.incidents)
            log.critical("codes met a wall of the ledger; their campaigns are paused", codes=result.incidents)
        return Flushed(gone, result.issued + result.set_aside, parked + result.parked, result.incidents)

    async def _put_back(self, entries: Sequence[Entry], now: int) -> None:
        """What was taken back is in stock, and Redis knows that stock was added, before the entries are gone.

        Not if the store was repaired in this generation: it may have put them back before, where they are issued from
        by now, and not know.  They stay as they are then, and nobody gets them.
        """
        positions = [(code.lot, code.seq) for entry in entries if entry.why == TAKEN_BACK for code in entry.asides]
        if not positions:
            return
        partition, generation, _ = entries[0].position
        async with self._database.write() as conn:
            if await recreation.was_repaired(conn, partition, generation):
                return
            versions = await returning.put_back(conn, positions, now)
        for pool, version in versions.items():
            seen = await self._scripts.generation()
            if seen.open:
                await self._scripts.stock(pool, version, generation=seen.open)

    async def _to_ledger(self, generation: int, entries: Sequence[Entry], now: int) -> ledger.Flushed:
        """A store that came back older still takes what is flushed now, but not before Redis has a note of the gap
        that these rows would hide (currency.py)."""
        totals = keys.totals(self._scripts.partition, generation)
        try:
            before = sequences(await self._scripts.redis.hget(totals, "flushed") or "")
        except RedisError as error:
            raise RedisUnreachable from error
        try:
            return await ledger.flush(self._database, entries, now, before=before, ids=self._ids)
        except LedgerLacks as fault:
            await self._scripts.distrust(generation, fault.seq)
            log.critical(
                "the store lost what was flushed",
                partition=self._scripts.partition,
                generation=generation,
                outbox_seq=fault.seq,
            )
            return await ledger.flush(self._database, entries, now, ids=self._ids)

    async def _read(self, generation: int, block_ms: int) -> list[tuple[str, dict[str, str] | None]]:
        redis, outbox = self._scripts.redis, keys.outbox(self._scripts.partition, generation)
        if self._own_pending:
            reply = await redis.xreadgroup(GROUP, self._consumer, {outbox: "0"}, count=ENTRIES_MAX)
            if entries := _entries(reply):
                self.behind = True
                return entries
            self._own_pending = False
        _, claimed, *_ = await redis.xautoclaim(outbox, GROUP, self._consumer, CLAIM_AFTER_MS, count=ENTRIES_MAX)
        if claimed:
            self.behind = True
            return list(claimed)
        self._own_pending = True  # what was read is ours, should the next read fail
        entries, codes, wait_ms = [], 0, block_ms or None
        while codes < CODES_MAX:  # many small entries share a transaction, too
            reply = await redis.xreadgroup(GROUP, self._consumer, {outbox: ">"}, count=ENTRIES_MAX, block=wait_ms)
            some = _entries(reply)
            entries += some
            codes += sum(_counted(fields or {}, "codes") for _, fields in some)
            self.behind = len(some) == ENTRIES_MAX
            if not self.behind:
                break
            wait_ms = None
        return entries

    async def _make_group(self, generation: int) -> None:
        outbox = keys.outbox(self._scripts.partition, generation)
        try:
            await self._scripts.redis.xgroup_create(outbox, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _restore_if_late(self, generation: int, entries: Sequence[Entry]) -> None:
        """A closed generation's entries also belong under the open one's keys: records, and counts under caps.

        A crash between the ledger and here counts them once too often, never too seldom: a cap is not exceeded.
        """
        seen = await self._scripts.generation()
        while seen.open not in (0, generation):
            records = [record for entry in entries for record in entry.records]
            async with self._database.read() as conn:
                given = [(code.lot, code.seq) for record in records for code in record.codes]
                # Somebody else may have one of these codes by now: the flush has raised an incident.
                back = await unseen.came_back(conn, given)
                told = [one for one in records if not any((code.lot, code.seq) in back for code in one.codes)]
                version_counts = await _counts(conn, self._scripts.partition, seen.open, records, self._now())
            status, _ = await self._scripts.restore(
                [(r.api, r.client, r.key, r.pack()) for r in told],
                version_counts,
                open_generation=seen.open,
                generation=seen.open,
                retention_s=self._retention_s,
            )
            if status == "OK":
                return
            seen = await self._scripts.generation()


async def _counts(
    conn: AsyncConnection, partition: int, generation: int, records: Sequence[Record], now: int
) -> list[Count]:
    snapshot = await control.snapshot(conn, await control.version(conn))
    campaigns = {campaign.id: campaign for campaign in snapshot.campaigns}
    counts: list[Count] = []
    for record in records:
        campaign = campaigns.get(record.rule.campaign)
        if campaign is None:
            continue
        for counter, start, expires_at in counted_by(campaign, record.issued_at):
            if expires_at and expires_at <= now:
                continue
            key = counter_key(partition, generation, counter, start)
            fields = [cap_field(holder, record.distributor, record.terminal) for holder in get_args(CapHolder)]
            counts += [Count(key, field, len(record.codes), expires_at) for field in fields]
    return counts


def parse(partition: int, generation: int, entry_id: str, fields: dict[str, str]) -> Entry:
    """An outbox entry as ``issue`` wrote it.  Raises ValueError or KeyError for anything else."""
    records = tuple(Record.unpack_entry(text) for text in parse_separated(fields["issued"]))
    asides = tuple(Code.unpack(text) for text in parse_separated(fields["asides"]))
    held = sum(len(record.codes) for record in records) + len(asides)
    if int(fields["codes"]) != held or int(fields["generation"]) != generation or int(fields["seq"]) < 1 or not held:
        raise ValueError("the entry does not hold what it says")
    traces = tuple(fields["traces"].split(RECORD_SEPARATOR)) if "traces" in fields else ()
    if traces and (len(traces) != len(records) or not all(not one or traceparent.well_formed(one) for one in traces)):
        raise ValueError("traces that are not those of its records")
    for text in (*fields.values(),):
        text.encode("ascii")  # UnicodeEncodeError is a ValueError: whatever this is, issue did not write it
    why = fields.get("why", LITTLE_LIFE)
    return Entry(partition, generation, int(fields["seq"]), entry_id, records, asides, why, traces)


def entered_at(entry_id: str) -> float:
    """Unix seconds, by Redis' clock, at which an entry came into its stream."""
    return int(entry_id.split("-")[0]) / 1000


def _sum(one: Flushed, other: Flushed) -> Flushed:
    return Flushed(*map(add, msgspec.structs.astuple(one), msgspec.structs.astuple(other)))


def _counted(fields: dict[str, str], name: str) -> int:
    """What the entry says that it added to this count; 0 if that is no count of ours."""
    text = fields.get(name, "0")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _safe(fields: dict[str, str]) -> dict[str, str]:
    return {
        key.encode("utf-8", "surrogateescape").decode("utf-8", "replace"): value.encode(
            "utf-8", "surrogateescape"
        ).decode("utf-8", "replace")
        for key, value in fields.items()
    }


def _entries(reply: Any) -> list[tuple[str, dict[str, str] | None]]:
    return list(reply[0][1]) if reply else []
