"""The hot path: gather requests, call ``issue`` once, answer.  Read it top to bottom.

One script call is on the wire at a time; while it is, the next batch gathers.  A call has a price of its own, so a busy
service waits for a moment before the next one, and those who were just answered come back into it: fewer calls.  An
idle one waits for nobody and sends batches of one.

Nothing that depends on the catalogue is decided from memory alone (P6).  Every request is authenticated and routed
by the catalogue that its batch is sent with, and the script's fence confirms that version or the batch is routed
again.  A refusal (an unknown token, say) waits for the same confirmation.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final, TypeVar

import msgspec
import structlog

from service import metrics, traceparent
from service.admission import Admission
from service.catalogue import Catalogue, Route, period_bounds
from service.domain import (
    Authenticated,
    Busy,
    Issued,
    KeyReused,
    Outcome,
    RateLimit,
    RateLimited,
    Record,
    Request,
    Suspended,
    Unauthorized,
    codes_in,
)
from service.errors import Fault, RedisDiskFull, RedisFull, RedisUnreachable
from service.scripts import Answer, Counter, PeriodBounds, Plan, Reply, Routed, Scripts

log = structlog.get_logger()

# Vouchers of one batch, at 6 to 12 us each.  Only a service that is asked for more than it can do comes near to this: a
# turn of its loop, and with it a batch, then takes tens of milliseconds.  Of 20,000 requests a second 4,195 vouchers
# were issued with batches of at most 256, 5,147 with 512, 7,414 with 1,024 (medians of six runs in turn, two cores).
BATCH_VOUCHERS_MAX: Final = 1_024

# After a batch of so many requests the next one gathers for so long, unless it is full (as PostgreSQL's commit_siblings
# and commit_delay).  A call takes some 0.3 ms of CPU whatever it carries, and clients that were answered together ask
# again within a millisecond, which is also the finest that the loop's timers tell (docs/performance.md).
GATHER_FROM: Final = 2
GATHER_S: Final = 0.001

# Refusals waiting for a fence check; they cost one script call for all, so this only bounds memory.
CHECKS_MAX: Final = 1_024

# A catalogue may be superseded while it loads, and a generation while it is adopted; a third time is someone else's
# trouble, and the client's retry is safe.
ATTEMPTS_MAX: Final = 4

# Requests of one pool that wait for its refill; past it 503 `refilling`.
REFILL_WAITERS_MAX: Final = 1_024

# A refill takes a store transaction and a script, some 5 ms; asking again starts there and backs off.
REFILL_RETRY_S_MIN: Final = 0.005
REFILL_RETRY_S_MAX: Final = 0.1

# After this many failures in a row nobody waits for Redis but one probe at a time, this often.
BREAKER_FAILURES: Final = 3
BREAKER_PROBE_S: Final = 0.2

# Requests that wait for what the ledger knows of them while Redis is away: one look-up of a few milliseconds takes all
# of them, and past it nobody waits.
LEDGER_WAITERS_MAX: Final = 256

# Longest wait for that look-up.  Whoever waits for two of them, after a time-out of Redis, still is in time.
LEDGER_S: Final = 0.4

T = TypeVar("T")

NO_PLAN: Final = Plan(())
NO_ROUTE: Final = Route(NO_PLAN, ())

LoadCatalogue = Callable[[int], Awaitable[Catalogue]]
Lookup = Callable[[Sequence[Request]], Awaitable[Mapping[Request, Record]]]
Replays = Callable[[int, Sequence[tuple[str, Request]]], Awaitable[Mapping[Request, Record]]]


class Issuer:
    """Issues vouchers for one process and one partition.

    ``load_catalogue(version)`` gives a catalogue of at least that version (0: the newest) and raises a Fault if it
    can't; ``lookup`` says which requests the ledger knows by key, for the time that records are being restored;
    ``replays(version, asked)`` the same for the time that Redis is away, of those whose credentials are in force in the
    store, which is at this version or above; ``id_key`` names what ids of new vouchers are to be derived with.
    """

    def __init__(
        self,
        scripts: Scripts,
        load_catalogue: LoadCatalogue,
        lookup: Lookup,
        replays: Replays,
        *,
        outbox_max: int,
        outbox_bytes_max: int,
        retention_s: int,
        queue_max: int,
        deadline_s: float,
        id_key: str = "",
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._scripts = scripts
        self._load_catalogue = load_catalogue
        self._lookup = lookup
        self._replays = replays
        self._outbox_max = outbox_max
        self._outbox_bytes_max = outbox_bytes_max
        self._retention_s = retention_s
        self._deadline_s = deadline_s
        self._id_key = id_key
        self._clock = clock
        self._unix_clock = unix_clock

        self.catalogue: Catalogue | None = None
        self._generation = 0
        self._server_ahead_s = 0.0  # Redis' clock less ours, as of its last reply

        self._queue: deque[_Waiting] = deque()
        self._admission = Admission(queue_max, BATCH_VOUCHERS_MAX, deadline_s)
        self._checks: list[_Check] = []
        self._refilling: dict[str, list[_Waiting]] = {}
        self._waiting = 0  # requests accepted and not yet answered
        self._work_to_do = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._calling = False  # a batch is under way
        self._failures = 0
        self._probe_at = 0.0
        self._gather_until = 0.0
        self._away: list[_Waiting] = []  # whom Redis can't answer, and the ledger is asked about
        self._asking_ledger = False
        self._ledger_at = 0.0  # from when on it is asked again after it failed
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what the web asks ---------------------------------------------------------------------------------------

    def submit(self, credential: str, request: Request, answered: Callable[[Outcome], None]) -> None:
        """Calls ``answered`` once, now or later, with the outcome.  Whatever it is, sending the request again is safe.

        ``credential``: what ``Catalogue.distributor`` takes.
        ``Issued`` is durable when it is told.  ``Busy`` may mean that the outcome is unknown: the same key gets the
        same voucher then.  Everything else: nothing was issued.
        """
        now = self._clock()
        busy = self._busy(now)
        # Whose it is, as far as is known now: it only decides whose share of the queue it is.
        holder = "" if self.catalogue is None else self.catalogue.distributor(credential) or ""
        if busy is None and (guard := self._admission.take(holder, request.quantity, now)):
            metrics.guard_refusals.labels(guard).inc()
            busy = OVERLOADED
        if busy is not None and busy is not UNREACHABLE:
            answered(busy)
            return
        waiting = _Waiting(
            request, NO_PLAN, credential=credential, holder=holder, answered=answered, deadline=now + self._deadline_s
        )
        self._expect_answer()
        if busy is None:
            self._queue.append(waiting)
            self._work_to_do.set()
        else:
            self._ask_ledger([waiting])

    async def issue(self, credential: str, request: Request) -> Outcome:
        """The outcome of one request, as ``submit`` tells it."""
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.submit(credential, request, partial(_resolve, outcome))
        return await outcome

    async def authenticate(self, credential: str) -> Authenticated | Unauthorized | Suspended | Busy:
        """Whose ``credential`` it is, by a catalogue that was in force after this call began."""
        return await self.confirm(partial(_authenticated, credential))

    async def confirm(self, judge: Callable[[Catalogue], T]) -> T | Busy:
        """What ``judge``, which must not raise, says of a catalogue that was in force after this call began."""
        now = self._clock()
        if (busy := self._busy(now)) is not None:
            return busy
        if len(self._checks) >= CHECKS_MAX:
            metrics.guard_refusals.labels("checks").inc()
            return OVERLOADED
        said: asyncio.Future[T | Busy] = asyncio.get_running_loop().create_future()
        self._checks.append(_Check(judge, partial(_resolve, said), now + self._deadline_s))
        self._expect_answer()
        self._work_to_do.set()
        return await said

    @property
    def ready(self) -> bool:
        """A catalogue was loaded once, and new requests are taken."""
        return self.catalogue is not None and not self._draining

    @property
    def queued(self) -> int:
        """Vouchers that wait for a batch."""
        return self._admission.queued

    def adopt(self, catalogue: Catalogue) -> None:
        """Decides by ``catalogue`` from the next batch on, unless a newer one is in use already."""
        if self.catalogue is None or catalogue.version > self.catalogue.version:
            self.catalogue = catalogue

    def start(self) -> None:
        """Begins to serve, in the running event loop."""
        self._spawn(self._gather())

    async def drain(self) -> None:
        """Takes no new requests and returns when every accepted one has its answer."""
        self._draining = True
        await self._idle.wait()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- gather --------------------------------------------------------------------------------------------------

    async def _gather(self) -> None:
        while True:
            await self._work_to_do.wait()
            if self._admission.queued < BATCH_VOUCHERS_MAX and (left_s := self._gather_until - self._clock()) > 0:
                await asyncio.sleep(left_s)
            checks, self._checks = self._checks, []
            batch: list[_Waiting] = []
            vouchers = 0
            while self._queue and vouchers + self._queue[0].request.quantity <= BATCH_VOUCHERS_MAX:
                waiting = self._queue.popleft()
                batch.append(waiting)
                vouchers += waiting.request.quantity
                self._admission.leave(waiting.holder, waiting.request.quantity)
            if not self._queue:
                self._work_to_do.clear()
            self._admission.began(self._clock())
            self._calling = True
            try:
                await self._serve(checks, batch)
            except Exception:  # the boundary of the loop: one defect must not end the service
                log.exception("batch failed")
                self._answer_all(checks, UNREACHABLE)
                self._answer_all(batch, UNREACHABLE)
            finally:
                self._calling = False
                now = self._clock()
                self._admission.ended(now)
                self._gather_until = now + GATHER_S if len(batch) >= GATHER_FROM else 0.0

    # --- call ----------------------------------------------------------------------------------------------------

    async def _serve(self, checks: list[_Check], batch: list[_Waiting]) -> None:
        self._answer_overdue(checks)
        self._answer_overdue(batch)
        for _ in range(ATTEMPTS_MAX):
            checks = [check for check in checks if not check.done]
            batch = [waiting for waiting in batch if not waiting.done]
            if not checks and not batch:
                return
            try:
                catalogue = self.catalogue or await self._load(0)
                routed, refused = self._route(catalogue, batch)
                refused += [(check, check.judge(catalogue)) for check in checks]
                try:
                    reply = await self._call(catalogue, routed)
                except (RedisFull, RedisDiskFull) as full:
                    await self._replay_only(catalogue, routed, refused, full)
                    return
                self._failures = 0
                metrics.batch_replies.labels(reply.status).inc()
                self._server_ahead_s = reply.now - self._unix_clock()
                if reply.status == "OK":
                    self._answer_refused(refused)
                    self._answer_routed(routed, reply)
                    return
                if reply.status == "STALE":
                    await self._load(reply.fence)
                elif reply.status == "LOST":
                    if reply.generation <= self._generation:
                        break  # not the data this process knows: a worker recovers it, here nothing is issued
                    self._generation = reply.generation
            except Fault as fault:
                self._failed(fault)
                break
        self._answer_all(checks, UNREACHABLE)
        if self._failures >= BREAKER_FAILURES:  # nor need those wait that are in the queue
            self._answer_all(self._checks, UNREACHABLE)
            self._checks.clear()
            while self._queue:
                batch.append(self._queue.popleft())
                self._admission.leave(batch[-1].holder, batch[-1].request.quantity)
        self._ask_ledger(batch)

    def _route(
        self, catalogue: Catalogue, batch: Iterable[_Waiting]
    ) -> tuple[list[_Waiting], list[tuple[_Asking, object]]]:
        """Who may ask, each with what is to be tried for it, and who is refused, with what each is to be told: by this
        catalogue, so by the fence that the script confirms."""
        routed: list[_Waiting] = []
        refused: list[tuple[_Asking, object]] = []
        for waiting in batch:
            request, distributor = waiting.request, catalogue.distributor(waiting.credential)
            if not distributor:
                refused.append((waiting, TOKEN_UNKNOWN if distributor is None else SUSPENDED))
            elif request.distributor != distributor:
                refused.append((waiting, DISTRIBUTOR_MISMATCH))
            elif not catalogue.active(distributor):
                refused.append((waiting, SUSPENDED))
            else:
                if request.api == "v1":
                    route = catalogue.route(distributor, request.products)
                else:
                    route = catalogue.product_route(distributor, request.products[0], request.face_value, self._id_key)
                waiting.route, waiting.plan, waiting.limit = route, route.plan, catalogue.limits.get(distributor)
                waiting.looked_up = waiting.looked_up_in == self._generation
                routed.append(waiting)
        return routed, refused

    async def _call(self, catalogue: Catalogue, routed: Sequence[_Waiting]) -> Reply:
        began, script = self._clock(), "issue" if routed else "replay"
        try:
            if not routed:
                metrics.fence_checks.inc()
                return await self._scripts.replay([], generation=self._generation, version=catalogue.version)
            reply = await self._scripts.issue(
                routed,
                generation=self._generation,
                version=catalogue.version,
                outbox_max=self._outbox_max,
                outbox_bytes_max=self._outbox_bytes_max,
                retention_s=self._retention_s,
                bounds=self._bounds({waiting.plan for waiting in routed}),
            )
        finally:  # also of one that was not answered in time
            metrics.script_seconds.labels(script).observe(self._clock() - began)
        metrics.batch_requests.observe(len(routed))
        return reply

    def _bounds(self, plans: Iterable[Plan]) -> dict[Counter, PeriodBounds]:
        now = int(self._unix_clock() + self._server_ahead_s)
        return {
            cap.counter: period_bounds(cap.counter.period, cap.counter.time_zone, now)
            for plan in plans
            for candidate in plan.candidates
            for cap in candidate.caps
        }

    async def _load(self, version: int) -> Catalogue:
        catalogue = await self._load_catalogue(version)
        self.adopt(catalogue)
        return self.catalogue or catalogue

    async def _replay_only(
        self,
        catalogue: Catalogue,
        routed: Sequence[_Waiting],
        refused: Sequence[tuple[_Asking, object]],
        full: RedisFull | RedisDiskFull,
    ) -> None:
        """Redis takes no writes, as it said before it began: what was issued is answered, nothing new is."""
        guard, missed = ("memory", OVERLOADED) if isinstance(full, RedisFull) else ("disk", UNREACHABLE)
        reply = await self._scripts.replay(
            [waiting.request for waiting in routed], generation=self._generation, version=catalogue.version
        )
        self._failures = 0
        if reply.status == "OK":
            self._answer_refused(refused)
            metrics.replays.inc(sum(answer.status == "REPLAY" for answer in reply.answers))
            metrics.guard_refusals.labels(guard).inc(sum(answer.status == "MISS" for answer in reply.answers))
            for waiting, answer in zip(routed, reply.answers, strict=True):
                self._answer(waiting, missed if answer.status == "MISS" else _settled(answer))
        else:
            self._answer_all(routed, UNREACHABLE)
            self._answer_all([asking for asking, _ in refused], UNREACHABLE)

    def _ask_ledger(self, batch: Iterable[_Waiting]) -> None:
        """Redis can't be asked: what the ledger knows is answered, and everybody else told that it is away."""
        closed = self._clock() < self._ledger_at
        for waiting in batch:
            if closed or len(self._away) >= LEDGER_WAITERS_MAX:
                self._answer(waiting, UNREACHABLE)
            elif not waiting.done:
                self._away.append(waiting)
        if self._away and not self._asking_ledger:
            self._asking_ledger = True
            self._spawn(self._answer_from_ledger())

    async def _answer_from_ledger(self) -> None:
        try:
            while self._away:
                asked, self._away = self._away, []
                try:
                    version = -1 if self.catalogue is None else self.catalogue.version
                    async with asyncio.timeout(LEDGER_S):
                        known = await self._replays(version, [(one.credential, one.request) for one in asked])
                except Exception as error:  # the boundary of a task: nobody else would answer these
                    if isinstance(error, (Fault, TimeoutError)):
                        log.warning("ledger look-up failed", fault=type(error).__name__)
                    else:
                        log.exception("ledger look-up failed")
                    self._ledger_at = self._clock() + BREAKER_PROBE_S
                    self._answer_all((*asked, *self._away), UNREACHABLE)
                    self._away.clear()
                else:
                    self._answer_known(asked, known)
        finally:
            self._asking_ledger = False

    def _answer_known(self, asked: Iterable[_Waiting], known: Mapping[Request, Record]) -> None:
        oldest = self._unix_clock() - self._retention_s  # what is older is forgotten, here as in Redis
        for waiting in asked:
            record = known.get(waiting.request)
            if record is None or record.issued_at <= oldest:
                self._answer(waiting, UNREACHABLE)
            else:
                self._answer_by(waiting, record)

    # --- answer --------------------------------------------------------------------------------------------------

    def _answer_refused(self, refused: Iterable[tuple[_Asking, object]]) -> None:
        for asking, outcome in refused:
            self._answer(asking, outcome)

    def _answer_routed(self, routed: Sequence[_Waiting], reply: Reply) -> None:
        unknown: list[_Waiting] = []
        issued = replayed = 0
        guards: dict[str, int] = {}
        for waiting, answer in zip(routed, reply.answers, strict=True):
            status, detail = answer.status, answer.detail
            if status == "ISSUED":  # a cap may have left fewer than were asked for
                issued += 1 if waiting.request.quantity == 1 else codes_in(detail)
                self._answer(waiting, Issued(detail, False))
            elif status == "NONE":
                self._answer(waiting, waiting.route.unavailable(detail))
            elif status == "REFILL":
                self._await_refill(waiting, reply.pools[int(detail) - 1])
            elif status == "LOOKUP":
                unknown.append(waiting)
            elif status == "BACKLOG":
                guards[f"outbox_{detail}"] = guards.get(f"outbox_{detail}", 0) + 1
                self._answer(waiting, OVERLOADED)
            elif status == "LIMITED":
                guards["rate_limit"] = guards.get("rate_limit", 0) + 1
                self._answer(waiting, _limited(waiting.limit, detail))
            else:
                replayed += status == "REPLAY"
                self._answer(waiting, _settled(answer))
        metrics.vouchers_issued.inc(issued)
        metrics.replays.inc(replayed)
        for guard, requests in guards.items():
            metrics.guard_refusals.labels(guard).inc(requests)
        if unknown:
            self._spawn(self._look_up(unknown, reply.generation))

    async def _look_up(self, unknown: list[_Waiting], generation: int) -> None:
        """Records of ``generation`` are being restored: what the ledger knows is a replay, the rest may be issued.

        That the ledger does not know a key holds for this generation alone: what is issued in it has its record in
        Redis, but one that ended in the meantime took such records along.
        """
        try:
            known = await self._lookup([waiting.request for waiting in unknown])
            for waiting in unknown:
                record = known.get(waiting.request)
                if record is None:
                    waiting.looked_up_in = generation
                    self._queue_again([waiting])
                else:
                    self._answer_by(waiting, record)
        except Fault as fault:
            log.warning("ledger look-up failed", fault=str(fault))
            self._answer_all(unknown, UNREACHABLE)
        except Exception:  # the boundary of a task: nobody else would answer these
            log.exception("ledger look-up failed")
            self._answer_all(unknown, UNREACHABLE)

    def _answer_by(self, waiting: _Waiting, record: Record) -> None:
        """The request is repeated: ``record`` is in the ledger under its key."""
        if record.payload == waiting.request.payload:
            metrics.replays.inc()
            self._answer(waiting, Issued(record.pack(), replayed=True))
        else:
            self._answer(waiting, KEY_REUSED)

    def _await_refill(self, waiting: _Waiting, pool: str) -> None:
        """The window is short: ask again when the worker had time to refill it (P4: this is no 409)."""
        waiters = self._refilling.setdefault(pool, [])
        if waiting.deadline <= self._clock() or len(waiters) >= REFILL_WAITERS_MAX:
            metrics.guard_refusals.labels("refill").inc()
            self._answer(waiting, REFILLING)
            return
        waiters.append(waiting)
        metrics.refill_waits.inc()
        if len(waiters) == 1:
            self._spawn(self._ask_again(pool))

    async def _ask_again(self, pool: str) -> None:
        await asyncio.sleep(self._refilling[pool][0].refill_pause_s)
        waiters = self._refilling.pop(pool)
        for waiting in waiters:
            waiting.refill_pause_s = min(2 * waiting.refill_pause_s, REFILL_RETRY_S_MAX)
        self._queue_again(waiters)

    def _queue_again(self, waiting: Sequence[_Waiting]) -> None:
        self._queue.extendleft(reversed(waiting))
        for one in waiting:
            self._admission.put_back(one.holder, one.request.quantity)
        self._work_to_do.set()

    def _answer(self, asking: _Asking, outcome: object) -> None:
        if asking.done:
            return
        asking.done = True
        self._waiting -= 1
        if not self._waiting:
            self._idle.set()
        try:
            asking.answered(outcome)
        except Exception:  # a defect at one end must not cost the others of the batch their answers
            log.exception("answer not delivered", **asking.named)

    def _answer_all(self, batch: Iterable[_Asking], outcome: Outcome) -> None:
        for asking in batch:
            self._answer(asking, outcome)

    def _answer_overdue(self, batch: Iterable[_Asking]) -> None:
        now = self._clock()
        for asking in batch:
            if asking.deadline < now:
                metrics.guard_refusals.labels("deadline").inc()
                self._answer(asking, asking.overdue)

    # --- bounds --------------------------------------------------------------------------------------------------

    def _expect_answer(self) -> None:
        self._waiting += 1
        self._idle.clear()

    def _busy(self, now: float) -> Busy | None:
        if self._draining:
            return DRAINING
        if self._failures >= BREAKER_FAILURES:
            if now < self._probe_at or self._calling or self._queue or self._checks:
                return UNREACHABLE
            self._probe_at = now + BREAKER_PROBE_S
        return None

    def _failed(self, fault: Fault) -> None:
        self._failures += 1
        self._probe_at = self._clock() + BREAKER_PROBE_S
        metrics.script_faults.labels("issue", type(fault).__name__).inc()
        log.warning("batch failed", fault=str(fault), unreachable=isinstance(fault, RedisUnreachable))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Check(msgspec.Struct, eq=False):
    """Someone who waits for what ``judge`` says of a catalogue that is in force."""

    judge: Callable[[Catalogue], object]
    answered: Callable[[Any], None]
    deadline: float
    done: bool = False
    named: ClassVar[dict[str, str]] = {}  # it is no request

    @property
    def overdue(self) -> Busy:
        """What it is told if it had to wait for too long."""
        return OVERLOADED


class _Waiting(Routed, eq=False, kw_only=True):
    """One request that waits for its answer."""

    credential: str
    holder: str  # whose share of the queue it takes
    answered: Callable[[Any], None]
    deadline: float
    route: Route = NO_ROUTE
    done: bool = False
    looked_up_in: int = -1  # the generation that was open when the ledger was found not to know the key
    refill_pause_s: float = REFILL_RETRY_S_MIN

    @property
    def named(self) -> dict[str, str]:
        """What a line of the log says it is."""
        trace_id, parent_id = traceparent.ids(self.request.trace)
        return {"request_id": self.request.key, "trace_id": trace_id, "parent_id": parent_id}

    @property
    def overdue(self) -> Busy:
        """What it is told if it had to wait for too long."""
        return REFILLING if self.refill_pause_s > REFILL_RETRY_S_MIN else OVERLOADED


_Asking = _Check | _Waiting


OVERLOADED: Final = Busy("overloaded")
UNREACHABLE: Final = Busy("store_unreachable")
REFILLING: Final = Busy("refilling")
DRAINING: Final = Busy("draining")
TOKEN_UNKNOWN: Final = Unauthorized("token_unknown")
DISTRIBUTOR_MISMATCH: Final = Unauthorized("distributor_mismatch")
SUSPENDED: Final = Suspended()
KEY_REUSED: Final = KeyReused()


def _resolve(future: asyncio.Future[Any], outcome: object) -> None:
    if not future.done():  # whoever waited may have gone
        future.set_result(outcome)


def _authenticated(credential: str, catalogue: Catalogue) -> Authenticated | Unauthorized | Suspended:
    """Whose ``credential`` it is at this version."""
    distributor = catalogue.distributor(credential)
    if distributor is None:
        return TOKEN_UNKNOWN
    return Authenticated(distributor) if catalogue.active(distributor) else SUSPENDED


def _limited(limit: RateLimit | None, detail: str) -> RateLimited:
    """What LIMITED means."""
    assert limit is not None, "the script limits only whom it was told to"
    wait_us, left = detail.split(",")
    return RateLimited(limit, int(left), int(wait_us))


def _settled(answer: Answer) -> Issued | KeyReused:
    """What ISSUED, REPLAY and REUSED mean."""
    if answer.status == "REUSED":
        return KEY_REUSED
    return Issued(answer.detail, replayed=answer.status == "REPLAY")
