"""Recover: decides whether what is in Redis may go on being issued from, and rolls the generation if not.

``serve`` stops by itself: scripts answer LOST as soon as generation or identity do not agree.  Here it is decided why.

*Same data* is accepted from a server that never stopped (its run_id is the accepted one, it is a master and has
never followed another): a first replica or a backup changes the replication id without any loss.  From one that was
restarted only if that is promised (``restart.py``).  Every other change rolls: a restored old copy whose missing part
had not been flushed can't be told from a restart, and guessing wrong would issue codes twice.  What a roll costs is the
codes in the old windows; they are in quarantine, counted and named.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys, metrics
from service.catalogue import Snapshot, cap_field, counted_by
from service.domain import Record
from service.errors import RedisUnreachable
from service.scripts import NO_SECOND_REPLID, Count, Generation, Scripts, counter_key
from service.store import books, control, generations, inspection, ledger, recreation
from service.store.books import Quarantined
from service.store.database import Database
from service.worker import restart
from service.worker.currency import refuse_older
from service.worker.flush import Flush
from service.worker.publish import announce

log = structlog.get_logger()

# Counts and records of one restoring script: some 1 ms, in which Redis does nothing else.
RESTORE_MAX: Final = 500

# Records read at once, and how often in one step: two or three seconds, then it is looked whether to roll again.
PAGE_MAX: Final = 5_000
PAGES_MAX: Final = 20

# Keys looked at in one SCAN, and unlinked at once.
UNLINK_MAX: Final = 500

# Closed generations whose keys are looked for: each look reads the names of all keys.  Older ones were cleaned while
# later ones were open.
CLEANED: Final = 8


class Recovered(msgspec.Struct, frozen=True):
    """What one step did.  ``opened`` is the generation that it opened or accepted, 0 if there was nothing to do."""

    opened: int = 0
    rolled: bool = False
    restored: int = 0


class Recover:
    """Keeps one partition open."""

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        flush: Flush,
        *,
        outbox_max: int,
        retention_s: int,
        restart_in_place: bool = False,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        """``restart_in_place``: Redis is never started on a copy of its data, and has no replicas."""
        self._database = database
        self._scripts = scripts
        self._flush = flush
        self._outbox_max = outbox_max
        self._retention_s = retention_s
        self._restart_in_place = restart_in_place
        self._now = now
        self._partition = scripts.partition
        self._restoring = 0  # generation whose records are being restored, and how far that has come
        self._restored_to: ledger.Cursor | None = None
        self._clean: set[int] = set()  # closed generations of which no key is left
        self._clean_on: tuple[int, str] = (0, "")  # as long as this generation is open on this server

    async def run_once(self) -> Recovered:
        """Afterwards the partition is open, unless another worker just changed it or StoreIsOlder is raised.

        Raises RedisUnreachable, StoreUnreachable: nothing was opened then that is not safe.
        """
        seen = await self._scripts.generation()
        if seen.agrees:
            if not await self._is_open(seen):
                return await self._roll(await self._disown())
            restored = await self._restore_records(seen) if seen.restoring else 0
            return Recovered(restored=restored)
        if seen.server_role != "master":
            return Recovered()  # wait until it is promoted or the URL points elsewhere
        if self._never_stopped(seen):
            async with self._database.read() as conn:
                version = await control.version(conn)
            status = await self._scripts.open(seen, seen.open, version=version, restoring=seen.restoring)
            log.warning("same server under a new replication id", partition=self._partition, status=status)
            return Recovered(opened=seen.open if status == "OK" else 0)
        if self._restart_in_place and await self._went_on(seen):
            return Recovered(opened=seen.open)
        return await self._roll(seen)

    async def clean_once(self) -> int:
        """Flushes what is left in outboxes of closed generations and unlinks the keys of those that are empty.

        Returns how many keys.  One that had nothing left is not looked at again while this generation is open on this
        server, which keeps no script from refusing to write there: a look reads every key's name.
        """
        seen = await self._scripts.generation()
        if not seen.agrees:
            return 0
        async with self._database.read() as conn:
            closed = await generations.closed_lately(conn, self._partition, CLEANED)
        if self._clean_on != (seen.open, seen.server_replid):
            self._clean_on, self._clean = (seen.open, seen.server_replid), set()
        unlinked = 0
        for generation in closed:
            if generation == seen.open or generation in self._clean:
                continue
            await self._flush.drain(generation)
            count, whole = await self._unlink(generation)
            unlinked += count
            if whole and not count:
                self._clean.add(generation)
        return unlinked

    def _never_stopped(self, seen: Generation) -> bool:
        return (
            seen.open > 0
            and seen.fence >= 0
            and seen.run_id == seen.server_run_id
            and seen.server_role == "master"
            and seen.server_replid2 == NO_SECOND_REPLID
        )

    async def _went_on(self, seen: Generation) -> bool:
        """Whether the server that was restarted has what it had, and issuing goes on from it."""
        _, books = await refuse_older(self._database, self._scripts)
        async with self._database.write() as conn:
            await generations.lock(conn, self._partition, exclusive=True)
            reason = await restart.why_not(conn, self._scripts, seen, books)
            if not reason:
                opened = await self._scripts.open(seen, seen.open, version=seen.fence, restoring=seen.restoring)
                reason = "" if opened == "OK" else "it has changed meanwhile"
        if reason:
            log.warning("not taken for a restart in place", partition=self._partition, reason=reason)
            return False
        log.warning("restarted in place", partition=self._partition, generation=seen.open)
        return True

    async def _is_open(self, seen: Generation) -> bool:
        """False if the store has closed what Redis has open: a server from before a failover is back.

        A roll that died between Redis and the store is finished here.
        """
        async with self._database.read() as conn:
            state = await generations.state(conn, self._partition, seen.open)
        if state == "building":
            async with self._database.write() as conn:
                await generations.open_(conn, self._partition, seen.open, self._now())
        return state != "closed"

    async def _disown(self) -> Generation:
        """Afterwards no script accepts what this server has open: nothing may be issued from it while it is left."""
        try:
            await self._scripts.redis.hdel(keys.generation(self._partition), "replid", "run_id")
        except RedisError as error:
            raise RedisUnreachable from error
        log.warning("a generation that was left is open again", partition=self._partition)
        return await self._scripts.generation()

    async def _roll(self, seen: Generation) -> Recovered:
        """Leaves the generation that was ``seen`` (if any) for a new one, beside it, and opens that."""
        await refuse_older(self._database, self._scripts)
        reason = "no data in Redis" if not seen.open else "another server, or the same one after a stop"
        now = self._now()
        async with self._database.write() as conn:
            await generations.lock(conn, self._partition, exclusive=True)
            # Another worker may have opened a generation since: closing that one would stop its refills for good.
            again = await self._scripts.generation()
            if (again.open, again.replid, again.server_replid) != (seen.open, seen.replid, seen.server_replid):
                return Recovered()
            # Also one that is being built: whoever built it may have died after it was open in Redis and before the
            # store knew, and what was issued from it since is counted under caps only if it is closed.
            for number in await generations.unclosed(conn, self._partition):
                await generations.close(conn, self._partition, number, now)
            generation = await generations.make(conn, self._partition, reason, now)
        log.warning("rolling", partition=self._partition, to=generation, reason=reason)
        metrics.rolls.labels(reason).inc()
        if seen.open:
            await self._flush.drain(seen.open)
        # From here until the new generation is open no late flush may commit: it is either counted below or adds
        # itself to the open generation (flush.py).
        async with self._database.write() as conn:
            await generations.lock(conn, self._partition, exclusive=True)
            if await generations.newest(conn, self._partition) != generation:
                return Recovered()  # another worker is rolling too, and began later
            version = await control.version(conn)
            snapshot = await control.snapshot(conn, version)
            lost = await books.quarantine(conn)
            counts = await self._counts(conn, generation, snapshot, lost)
            if await recreation.was_repaired(conn, self._partition, seen.open):
                counts = await self._at_least(counts, snapshot, seen.open, generation)
            for i in range(0, len(counts), RESTORE_MAX):
                status, _ = await self._scripts.restore(
                    [], counts[i : i + RESTORE_MAX],
                    open_generation=seen.open, generation=generation, retention_s=self._retention_s,
                )  # fmt: skip
                if status != "OK":
                    return Recovered()
            opened = await self._scripts.open(seen, generation, version=version, restoring=True)
            if opened != "OK":
                return Recovered()
            await generations.open_(conn, self._partition, generation, self._now())
            left = await self._put_on_record(conn, lost, reason)
        log.warning("rolled", partition=self._partition, to=generation)
        for pool, codes in left.items():
            metrics.incidents.labels(ledger.QUARANTINE).inc()
            log.error("codes of the generation that was left are in quarantine", pool=pool, codes=codes, why=reason)
        if version:
            async with self._database.read() as conn:
                newest = await control.load_snapshot(conn)
            await announce(self._database, self._scripts, *newest)
        return Recovered(opened=generation, rolled=True)

    async def _put_on_record(self, conn: AsyncConnection, lost: Sequence[Quarantined], reason: str) -> dict[str, int]:
        """What generations that were left since the last time have in quarantine, one incident a pool; how many codes.

        What is still in one of their outboxes comes out of it later.
        """
        left = Counter[str]()
        known = await inspection.on_record(conn, ledger.QUARANTINE, self._partition)
        for one in lost:
            if one.partition == self._partition and (one.generation, one.pool) not in known:
                left[one.pool] += one.codes
                await ledger.raise_incident(
                    conn, kind=ledger.QUARANTINE, partition=self._partition, generation=one.generation,
                    subject=one.pool, detail=f"{one.codes} codes are in quarantine: {reason}", now=self._now(),
                )  # fmt: skip
        return dict(left)

    async def _counts(
        self, conn: AsyncConnection, generation: int, snapshot: Snapshot, lost: Sequence[Quarantined]
    ) -> list[Count]:
        """What caps have used, by the ledger; a campaign's own caps also count what may have been issued and lost.

        What a generation lost is at most the outbox bound, and no more than what is in quarantine of it: with that, a
        campaign's cap is not exceeded even if all of it was issued (P8).
        """
        now = self._now()
        counted_from = await control.caps_counted_from(conn)
        counts: list[Count] = []
        for campaign in snapshot.campaigns:
            caps = {(cap.holder, cap.period) for some in (campaign.caps, *campaign.assigned.values()) for cap in some}
            for counter, start, expires_at in counted_by(campaign, now):
                period = counter.period
                own = {key: at for key, at in counted_from.items() if key[0] == campaign.id and key[3] == period}
                used: Counter[str] = Counter()
                for began in sorted(set(own.values())):
                    for count in await ledger.counts(conn, campaign.id, max(start, began)):
                        for holder in {holder for holder, of in caps if of == period}:
                            if began == _counted_from(own, count.distributor, holder):
                                used[cap_field(holder, count.distributor, count.terminal)] += count.codes
                if ("campaign", period) in caps:
                    since = max(start, own[campaign.id, "", "campaign", period])
                    left = [one for one in lost if one.pool == campaign.pool and one.left_at >= since]
                    used[cap_field("campaign", "")] += sum(min(one.codes, self._outbox_max) for one in left)
                key = counter_key(self._partition, generation, counter, start)
                counts += [Count(key, field, codes, expires_at) for field, codes in used.items() if codes]
        return counts

    async def _at_least(self, counts: Sequence[Count], snapshot: Snapshot, left: int, generation: int) -> list[Count]:
        """``counts``, and no cap has used less than it had in the generation that was ``left``: of what the store lost
        before it came back older, what is past the retention is in no replay record."""
        used = {(count.key, count.field): count for count in counts}
        now = self._now()
        for campaign in snapshot.campaigns:
            for counter, start, expires_at in counted_by(campaign, now):
                key = counter_key(self._partition, generation, counter, start)
                try:
                    had = await self._scripts.redis.hgetall(counter_key(self._partition, left, counter, start))
                except RedisError as error:
                    raise RedisUnreachable from error
                for field, text in had.items():
                    before = used.get((key, field))
                    if before is None or before.codes < int(text):
                        used[key, field] = Count(key, field, int(text), expires_at)
        return list(used.values())

    async def _restore_records(self, seen: Generation) -> int:
        """Sets the replay records that the ledger has and Redis lacks, newest first; while it lasts, a request whose
        record is missing is looked up in the ledger before it is issued.  Begins after the generation was opened,
        so a late flush is either found here or has restored its own (flush.py).

        While Redis' memory is at its limit none is set: first what was left has to be forgotten (``clean_once``).
        """
        if self._restoring != seen.open:
            self._restoring, self._restored_to = seen.open, None
        restored = 0
        page = await self._page()
        for _ in range(PAGES_MAX):
            if not page:
                async with self._database.read() as conn:
                    version = await control.version(conn)
                if await self._scripts.open(seen, seen.open, version=version, restoring=False) == "OK":
                    log.info("records restored", partition=self._partition, generation=seen.open)
                self._restoring = 0
                break
            if await self._scripts.is_full():
                break
            before, self._restored_to = self._restored_to, page[-1][0]
            # The store reads the next page while Redis takes this one.
            missing, following = await asyncio.gather(
                self._restore_page(page, seen.open), self._page(), return_exceptions=True
            )
            if isinstance(missing, BaseException) or missing is None:
                self._restored_to = before
                if isinstance(missing, BaseException):
                    raise missing
                break
            if isinstance(following, BaseException):
                raise following
            restored += missing
            page = following
        return restored

    async def _page(self) -> list[tuple[ledger.Cursor, Record]]:
        since = self._now() - self._retention_s
        async with self._database.read() as conn:
            return await ledger.newest_first(conn, self._partition, since, self._restored_to, PAGE_MAX)

    async def _restore_page(self, page: Sequence[tuple[ledger.Cursor, Record]], generation: int) -> int | None:
        """How many of these records were missing; None if another generation is open."""
        restored = 0
        for start in range(0, len(page), RESTORE_MAX):
            records = [(one.api, one.client, one.key, one.pack()) for _, one in page[start : start + RESTORE_MAX]]
            status, missing = await self._scripts.restore(
                records, [], open_generation=generation, generation=generation, retention_s=self._retention_s
            )
            if status != "OK":
                return None
            restored += missing
        return restored

    async def _unlink(self, generation: int) -> tuple[int, bool]:
        """Unlinks the keys of a closed generation, unless its outbox still holds something or it is open here: how
        many, and whether that was all of them."""
        unlinked, cursor = 0, 0
        while True:
            try:
                cursor, found = await self._scripts.redis.scan(
                    cursor, match=keys.of_generation(self._partition, generation), count=UNLINK_MAX
                )
            except RedisError as error:
                raise RedisUnreachable from error
            if found:
                status, count = await self._scripts.forget(found, generation=generation)
                if status != "OK":
                    return unlinked, False
                unlinked += count
            if cursor == 0:
                return unlinked, True


def _counted_from(own: dict[tuple[str, str, str, str], int], distributor: str, holder: str) -> int | None:
    """Since when what ``holder`` uses is counted: by the campaign's cap or the assignment's, whichever is older."""
    return min((at for key, at in own.items() if key[1] in ("", distributor) and key[2] == holder), default=None)
