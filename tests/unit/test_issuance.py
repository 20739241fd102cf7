"""The hot path against scripted replies: what it answers, what it never does, and that every wait has an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from service import issuance, metrics
from service.catalogue import Campaign, Catalogue, Pool, Snapshot, encode, load
from service.domain import (
    Authenticated,
    Busy,
    Code,
    Issued,
    KeyReused,
    Outcome,
    RateLimit,
    RateLimited,
    Record,
    Request,
    Rule,
    Suspended,
    Unauthorized,
    Unavailable,
    codes_in,
)
from service.errors import RedisDiskFull, RedisFull, RedisUnreachable, ReplyMismatch, StoreUnreachable
from service.issuance import BATCH_VOUCHERS_MAX, BREAKER_FAILURES, GATHER_FROM, LEDGER_WAITERS_MAX, Issuer
from service.scripts import Answer, Reply
from service.tokens import digest, new_token

TOKEN = new_token()
NOW = 1_800_000_000


def catalogue(
    version: int = 1, *, token: str | None = TOKEN, active: bool = True, assigned: bool = True,
    limit: RateLimit | None = None, others: Mapping[str, str] | None = None,
) -> Catalogue:  # fmt: skip
    campaign = Campaign(
        "C", "CAT", ("PAY",), "P", 1, 0, 0, False, "UTC", (), {"D": ()} if assigned else {},
    )  # fmt: skip
    tokens = {digest(token): "D"} if token else {}
    limits = {"D": limit} if limit else {}
    tokens |= {digest(other): owner for other, owner in (others or {}).items()}
    snapshot = Snapshot(version, tokens, {"D": active, "E": True}, (Pool("P", 0),), (campaign,), limits=limits)
    *_, loaded = load(encode(snapshot))
    assert loaded is not None
    return loaded


def request(key: str = "k", terminal: str = "T", distributor: str = "D") -> Request:
    return Request("v1", distributor, key, distributor, ("PAY",), f"{terminal}\tPAY")


def record(asked: Request) -> Record:
    rule = Rule("C", "P", "CAT", "PAY", 0)
    code = Code(NOW + 100, 1, 1, f"CODE-{asked.key}", "S-1")
    return Record(asked.payload, "v1", asked.distributor, asked.client, asked.key, NOW, rule, (code,))


class Script:
    """Stands in for the scripts: says what it is told to say, one entry a call, the last one for ever."""

    def __init__(self, *says: str | Exception) -> None:
        self.says = list(says)
        self.batches: list[list[Request]] = []
        self.versions: list[int] = []
        self.looked_up: list[bool] = []
        self.limits: list[RateLimit | None] = []
        self.hold: asyncio.Event | None = None

    async def issue(self, batch: Sequence[Any], *, generation: int, version: int, **_: object) -> Reply:
        self.batches.append([one.request for one in batch])
        self.looked_up += [one.looked_up for one in batch]
        self.limits += [one.limit for one in batch]
        return await self._say([one.request for one in batch], generation, version)

    async def replay(self, requests: Sequence[Request], *, generation: int, version: int) -> Reply:
        return await self._say(list(requests), generation, version, replay=True)

    async def _say(self, asked: list[Request], generation: int, version: int, replay: bool = False) -> Reply:
        if self.hold is not None:
            await self.hold.wait()
        self.versions.append(version)
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, Exception):
            raise said
        if said in ("STALE", "CLOCK"):
            return Reply(said, 1, NOW, version + 1, [])  # type: ignore[arg-type]
        if said.startswith("LOST"):
            return Reply("LOST", int(said.removeprefix("LOST") or 0), NOW, 0, [])
        details = {"ISSUED": None, "REPLAY": None, "REFILL": "1", "NONE": "exhausted", "LIMITED": "1000001,3"}
        answers = [
            Answer(said, details.get(said, "") or (record(one).pack() if said in ("ISSUED", "REPLAY") else ""))
            for one in asked
        ]
        return Reply("OK", generation, NOW, 0, answers, ("P",))


class Ledger:
    """Stands in for what the store knows: the records of some requests, or a fault."""

    def __init__(self, *known: Request, fault: Exception | None = None) -> None:
        self.known = known
        self.fault = fault
        self.asked: list[tuple[int, list[tuple[str, Request]]]] = []
        self.hold: asyncio.Event | None = None

    async def __call__(self, version: int, asked: Sequence[tuple[str, Request]]) -> dict[Request, Record]:
        self.asked.append((version, list(asked)))
        if self.hold is not None:
            await self.hold.wait()
        if self.fault is not None:
            raise self.fault
        keys = {one.key: one for one in self.known}
        return {one: record(keys[one.key]) for _, one in asked if one.key in keys}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def issuer(script: Script, *, load: Callable[[int], Catalogue] | None = None, known: Sequence[Request] | Exception = (),
           ledger: Ledger | None = None, **changes: Any) -> Issuer:  # fmt: skip
    async def load_catalogue(version: int) -> Catalogue:
        return load(version) if load else catalogue(max(1, version))

    async def lookup(asked: Sequence[Request]) -> dict[Request, Record]:
        if isinstance(known, Exception):
            raise known
        return {one: record(one) for one in asked if one in known}

    options: dict[str, Any] = {
        "outbox_max": 1_000, "outbox_bytes_max": 10**6, "retention_s": 60, "queue_max": 2_048, "deadline_s": 2.0,
    }  # fmt: skip
    replays = ledger or Ledger()
    made = Issuer(script, load_catalogue, lookup, replays, **{**options, **changes})  # type: ignore[arg-type]
    made.start()
    return made


async def test_a_request_is_answered_by_its_own_record_and_a_replay_says_so() -> None:
    service = issuer(Script("ISSUED", "REPLAY"))
    assert await service.issue(TOKEN, request()) == Issued(record(request()).pack(), replayed=False)
    assert await service.issue(TOKEN, request()) == Issued(record(request()).pack(), replayed=True)
    await service.drain()


async def more_than_two_batches(script: Script) -> tuple[Issuer, list[asyncio.Task[Outcome]]]:
    """An issuer with so many requests, whose script begins to answer in the next turn of the loop."""
    script.hold = asyncio.Event()
    count = 2 * BATCH_VOUCHERS_MAX + 100
    service = issuer(script, queue_max=3 * count)
    answers = [asyncio.create_task(service.issue(TOKEN, request(f"k{number}"))) for number in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    script.hold.set()
    return service, answers


async def test_while_a_call_is_on_the_wire_the_next_batch_gathers_and_none_passes_its_bound() -> None:
    script = Script("ISSUED")
    service, answers = await more_than_two_batches(script)
    assert {type(answer) for answer in await asyncio.gather(*answers)} == {Issued}
    assert sum(map(len, script.batches)) == len(answers)
    assert max(map(len, script.batches)) <= BATCH_VOUCHERS_MAX
    assert len(script.batches) <= 4
    await service.drain()


async def test_after_a_large_batch_those_who_come_back_at_once_share_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.issuance.GATHER_S", 0.2)  # in which a busy machine, too, comes to some turns
    script = Script("ISSUED")
    service = issuer(script)

    async def twice(number: int) -> None:
        await service.issue(TOKEN, request(f"k{number}"))
        for _ in range(number):  # turns of the loop: one comes after the other
            await asyncio.sleep(0)
        await service.issue(TOKEN, request(f"again-{number}"))

    await asyncio.gather(*map(twice, range(8)))
    assert [len(batch) for batch in script.batches] == [8, 8]
    await service.drain()


async def test_who_comes_after_a_small_batch_never_waits() -> None:
    script = Script("ISSUED")
    service = issuer(script)
    await asyncio.gather(*(service.issue(TOKEN, request(f"k{number}")) for number in range(GATHER_FROM - 1)))
    alone = asyncio.create_task(service.issue(TOKEN, request("alone")))
    for _ in range(3):  # turns of the loop, and no time
        await asyncio.sleep(0)
    assert [len(batch) for batch in script.batches] == [GATHER_FROM - 1, 1]
    await alone
    await service.drain()


async def test_a_full_batch_never_waits_for_more() -> None:
    script = Script("ISSUED")
    service, answers = await more_than_two_batches(script)
    await asyncio.sleep(0)  # one turn of the loop: both are called for in it
    assert [len(batch) for batch in script.batches] == 2 * [BATCH_VOUCHERS_MAX]
    assert {type(answer) for answer in await asyncio.gather(*answers)} == {Issued}
    await service.drain()


async def test_past_the_queue_bound_nothing_reaches_redis() -> None:
    script = Script("ISSUED")
    script.hold = asyncio.Event()
    service = issuer(script, queue_max=10)
    answers = [asyncio.create_task(service.issue(TOKEN, request(f"k{i}"))) for i in range(50)]
    await asyncio.sleep(0.01)
    script.hold.set()
    outcomes = await asyncio.gather(*answers)
    assert outcomes.count(Busy("overloaded")) >= 30
    assert sum(map(len, script.batches)) == sum(isinstance(one, Issued) for one in outcomes) <= 20
    await service.drain()


async def test_a_noisy_distributor_does_not_push_out_the_others() -> None:
    script = Script("ISSUED")
    script.hold = asyncio.Event()
    other = new_token()
    service = issuer(script, load=lambda version: catalogue(max(1, version), others={other: "E"}), queue_max=100)
    assert isinstance(await _released(script, service.issue(TOKEN, request())), Issued)  # now it has a catalogue
    before = _refused("share")
    noisy = [asyncio.create_task(service.issue(TOKEN, request(f"n{i}"))) for i in range(500)]
    unknown = [asyncio.create_task(service.issue(new_token(), request(f"u{i}"))) for i in range(500)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    quiet = [asyncio.create_task(service.issue(other, request(f"q{i}", distributor="E"))) for i in range(10)]
    await asyncio.sleep(0)
    script.hold.set()
    assert {type(outcome) for outcome in await asyncio.gather(*quiet)} == {Issued}
    outcomes = await asyncio.gather(*noisy, *unknown)
    assert outcomes.count(Busy("overloaded")) == _refused("share") - before > 800
    assert any(isinstance(outcome, Issued) for outcome in outcomes)
    await service.drain()


async def test_who_would_have_to_wait_for_too_long_is_told_at_once_and_before_redis_is_asked() -> None:
    clock, script = Clock(), Script("ISSUED")
    service = issuer(script, clock=clock)
    script.hold = asyncio.Event()
    first = asyncio.create_task(service.issue(TOKEN, request("first")))
    await asyncio.sleep(0.01)
    clock.now += 2.5  # it hangs for longer than the deadline
    before, batches = _refused("delay"), len(script.batches)
    assert await service.issue(TOKEN, request("late")) == Busy("overloaded")
    assert (_refused("delay") - before, len(script.batches)) == (1, batches)
    script.hold.set()
    await first
    assert isinstance(await service.issue(TOKEN, request("after")), Issued), "shut for good"
    await service.drain()


async def _released(script: Script, asked: Any) -> Any:
    """What comes of ``asked`` when the script answers at once, which it does not before nor afterwards."""
    hold, script.hold = script.hold, None
    try:
        return await asked
    finally:
        script.hold = hold


def _refused(guard: str) -> float:
    return metrics.guard_refusals.labels(guard)._value.get()


@pytest.mark.parametrize(
    ("now", "asked", "outcome"),
    [
        (catalogue(token=None), request(), Unauthorized("token_unknown")),
        (catalogue(), request(distributor="E"), Unauthorized("distributor_mismatch")),
        (catalogue(active=False), request(), Suspended()),
    ],
)
async def test_a_refusal_waits_for_the_fence(now: Catalogue, asked: Request, outcome: object) -> None:
    script = Script("OK")
    service = issuer(script, load=lambda _: now)
    assert await service.issue(TOKEN, asked) == outcome
    assert script.versions == [1], "refused from memory alone"
    await service.drain()


async def test_a_stale_refusal_becomes_a_voucher_by_the_newer_catalogue() -> None:
    script = Script("STALE", "ISSUED")
    service = issuer(script, load=lambda version: catalogue(max(1, version), token=TOKEN if version > 1 else None))
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    assert script.versions == [1, 2]
    await service.drain()


async def test_a_stale_success_is_never_given_to_a_revoked_token() -> None:
    script = Script("STALE", "OK")
    service = issuer(script, load=lambda version: catalogue(max(1, version), token=None if version > 1 else TOKEN))
    assert await service.issue(TOKEN, request()) == Unauthorized("token_unknown")
    await service.drain()


async def test_a_catalogue_that_stays_stale_ends_in_503() -> None:
    service = issuer(Script("STALE"))
    assert await service.issue(TOKEN, request()) == Busy("store_unreachable")
    await service.drain()


async def test_the_open_generation_is_adopted_and_a_lost_one_is_503() -> None:
    service = issuer(Script("LOST7", "ISSUED"))
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    await service.drain()
    service = issuer(Script("LOST7"))
    assert await service.issue(TOKEN, request()) == Busy("store_unreachable")
    await service.drain()


async def test_a_late_refill_is_waited_for_and_then_503_refilling_never_409() -> None:
    service = issuer(Script("REFILL", "REFILL", "ISSUED"))
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    await service.drain()
    service = issuer(Script("REFILL"), deadline_s=0.05)
    assert await service.issue(TOKEN, request()) == Busy("refilling")
    await service.drain()


async def test_nothing_left_is_409_with_the_rule_that_stopped_each_campaign() -> None:
    service = issuer(Script("NONE"))
    outcome = await service.issue(TOKEN, request())
    assert isinstance(outcome, Unavailable)
    assert (outcome.code, outcome.considered[0].stopped_by) == ("exhausted", "exhausted")
    await service.drain()


async def test_a_distributor_without_campaign_still_gets_its_replay() -> None:
    service = issuer(Script("REPLAY"), load=lambda _: catalogue(assigned=False))
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    await service.drain()


async def test_while_records_are_restored_the_ledger_is_asked_before_a_code_is_given() -> None:
    script = Script("LOOKUP")
    service = issuer(script, known=[request()])
    assert await service.issue(TOKEN, request()) == Issued(record(request()).pack(), replayed=True)
    await service.drain()
    script = Script("LOOKUP", "ISSUED")
    service = issuer(script)
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    assert script.looked_up == [False, True]
    await service.drain()
    script = Script("LOOKUP", "LOST7", "LOOKUP", "ISSUED")
    service = issuer(script)
    assert isinstance(await service.issue(TOKEN, request()), Issued)
    assert script.looked_up == [False, True, False, True], "what was looked up holds for one generation"
    await service.drain()
    for fault in (StoreUnreachable(), ZeroDivisionError()):
        service = issuer(Script("LOOKUP"), known=fault)
        assert await service.issue(TOKEN, request()) == Busy("store_unreachable")
        await service.drain()


async def test_answer_that_can_not_be_delivered_costs_nobody_else_theirs() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("the connection is gone")

    service = issuer(Script("ISSUED"))
    told: list[object] = []
    for number in range(6):
        service.submit(TOKEN, request(f"r{number}"), broken if number in (1, 3) else told.append)
    await asyncio.wait_for(service.issue(TOKEN, request("next")), 1)
    assert [type(outcome) for outcome in told] == [Issued] * 4
    await asyncio.wait_for(service.drain(), 1)


@pytest.mark.parametrize(("says", "outcome"), [("REPLAY", Issued), ("REUSED", KeyReused), ("MISS", Busy)])
async def test_a_full_redis_answers_replays_and_issues_nothing(says: str, outcome: type) -> None:
    service = issuer(Script(RedisFull(), says))
    assert isinstance(await service.issue(TOKEN, request()), outcome)
    await service.drain()


@pytest.mark.parametrize("fault", [RedisUnreachable(), ReplyMismatch()])
async def test_after_failures_in_a_row_nobody_waits_but_one_probe_at_a_time(fault: Exception) -> None:
    clock, script = Clock(), Script(fault)
    service = issuer(script, clock=clock)
    for number in range(BREAKER_FAILURES):
        assert await service.issue(TOKEN, request(f"k{number}")) == Busy("store_unreachable")
    assert await service.issue(TOKEN, request("k-open")) == Busy("store_unreachable")
    assert len(script.batches) == BREAKER_FAILURES, "the open breaker let a request through"
    script.says = ["ISSUED"]
    clock.now += 1
    assert isinstance(await service.issue(TOKEN, request("k-probe")), Issued)
    assert isinstance(await service.issue(TOKEN, request("k-after")), Issued)
    await service.drain()


async def test_a_limit_is_that_of_the_catalogue_in_force_and_its_refusal_says_when_to_come_back() -> None:
    script = Script("STALE", "LIMITED", "ISSUED")
    service = issuer(script, load=lambda version: catalogue(max(1, version), limit=RateLimit(max(1, version), 40)))
    outcome = await service.issue(TOKEN, request())
    assert outcome == RateLimited(RateLimit(2, 40), left=3, wait_us=1_000_001)
    assert isinstance(outcome, RateLimited)
    assert outcome.retry_after_s == 2
    assert script.limits == [RateLimit(1, 40), RateLimit(2, 40)]
    await service.drain()
    script = Script("ISSUED")
    service = issuer(script)
    await service.issue(TOKEN, request())
    assert script.limits == [None], "limited without a limit"
    await service.drain()


async def _opened(script: Script, service: Issuer) -> None:
    """Enough failed for the breaker to be open; ``script`` is told to fail."""
    for number in range(BREAKER_FAILURES):
        assert await service.issue(TOKEN, request(f"fails-{number}")) == Busy("store_unreachable")
    assert len(script.batches) >= BREAKER_FAILURES


async def test_with_redis_away_replays_come_from_the_ledger_and_nothing_new_does() -> None:
    script, ledger = Script(RedisUnreachable()), Ledger(request("old"))
    service = issuer(script, ledger=ledger, clock=Clock(), unix_clock=lambda: NOW)
    for opened in (False, True):
        if opened:
            await _opened(script, service)
        calls = len(script.batches)
        assert await service.issue(TOKEN, request("old")) == Issued(record(request("old")).pack(), replayed=True)
        assert await service.issue(TOKEN, request("old", terminal="T2")) == KeyReused()
        assert await service.issue(TOKEN, request("new")) == Busy("store_unreachable")
        assert (len(script.batches) == calls) == opened, "the open breaker let a request through"
    version, [(credential, asked)] = ledger.asked[-1]
    assert (version, credential, asked) == (1, TOKEN, request("new")), "the credential was not shown to the store"
    await service.drain()


async def test_what_is_past_its_retention_does_not_come_from_the_ledger() -> None:
    service = issuer(Script(RedisUnreachable()), ledger=Ledger(request("old")), unix_clock=lambda: NOW + 60)
    assert await service.issue(TOKEN, request("old")) == Busy("store_unreachable")
    await service.drain()


@pytest.mark.parametrize("fault", [StoreUnreachable(), ZeroDivisionError()])
async def test_with_redis_and_the_store_away_the_answer_takes_less_than_five_milliseconds(fault: Exception) -> None:
    script, ledger = Script(RedisUnreachable()), Ledger(fault=fault)
    service = issuer(script, ledger=ledger)
    await _opened(script, service)
    took = []
    for number in range(200):
        began = time.perf_counter()
        assert await service.issue(TOKEN, request(f"k{number}")) == Busy("store_unreachable")
        took.append(time.perf_counter() - began)
    assert sorted(took)[100] < 0.005, "the median: this machine may stand still for longer than that"
    assert len(ledger.asked) < BREAKER_FAILURES + 20, "a store that failed is asked again for every request"
    await service.drain()


async def test_a_ledger_that_hangs_keeps_few_waiting_and_none_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuance, "LEDGER_S", 2.0)  # longer than this machine may stand still below
    script, ledger = Script(RedisUnreachable()), Ledger()
    service = issuer(script, ledger=ledger)
    await _opened(script, service)
    ledger.hold = asyncio.Event()
    first = asyncio.create_task(service.issue(TOKEN, request("first")))
    await asyncio.sleep(0)
    others = [asyncio.create_task(service.issue(TOKEN, request(f"k{number}"))) for number in range(1_000)]
    await asyncio.sleep(0.01)
    assert sum(not one.done() for one in others) == LEDGER_WAITERS_MAX
    assert {*await asyncio.wait_for(asyncio.gather(first, *others), 10)} == {Busy("store_unreachable")}
    assert len(ledger.asked) == BREAKER_FAILURES + 1, "those who waited were kept waiting for another look-up"
    await service.drain()


async def test_one_probe_at_a_time_and_the_queue_is_told_when_the_breaker_opens() -> None:
    clock, script = Clock(), Script(RedisUnreachable())
    service = issuer(script, clock=clock)
    for _ in range(BREAKER_FAILURES - 1):
        await service.issue(TOKEN, request())
    script.hold = asyncio.Event()
    last = asyncio.create_task(service.issue(TOKEN, request("last")))
    await asyncio.sleep(0.01)
    queued = [asyncio.create_task(service.issue(TOKEN, request(f"q{number}"))) for number in range(5)]
    checking = asyncio.create_task(service.authenticate(TOKEN))
    await asyncio.sleep(0.01)
    calls = len(script.batches)
    script.hold.set()
    assert {*await asyncio.gather(last, checking, *queued)} == {Busy("store_unreachable")}
    assert len(script.batches) == calls, "those in the queue waited for a call of their own"

    clock.now += 1
    script.hold, script.says = asyncio.Event(), ["ISSUED"]
    probe = asyncio.create_task(service.issue(TOKEN, request("probe")))
    await asyncio.sleep(0.01)
    clock.now += 1
    assert await service.issue(TOKEN, request("second")) == Busy("store_unreachable")
    assert await service.authenticate(TOKEN) == Busy("store_unreachable")
    script.hold.set()
    assert isinstance(await probe, Issued)
    assert isinstance(await service.issue(TOKEN, request("after")), Issued)
    await service.drain()


@pytest.mark.parametrize(
    ("full", "missed"), [(RedisFull(), Busy("overloaded")), (RedisDiskFull(), Busy("store_unreachable"))]
)
async def test_a_redis_that_takes_no_writes_is_asked_for_replays_and_not_called_away(
    full: Exception, missed: Busy
) -> None:
    clock, ledger = Clock(), Ledger(request("old"))
    script = Script(*[RedisUnreachable()] * BREAKER_FAILURES, *[full, "MISS", full, "REPLAY"] * BREAKER_FAILURES)
    service = issuer(script, ledger=ledger, clock=clock)
    await _opened(script, service)
    clock.now += 1
    asked = len(ledger.asked)
    for number in range(BREAKER_FAILURES):
        assert await service.issue(TOKEN, request(f"new-{number}")) == missed
        assert isinstance(await service.issue(TOKEN, request("old")), Issued)
    assert len(ledger.asked) == asked, "the ledger was asked although Redis answers"
    await service.drain()


async def test_draining_answers_what_was_accepted_and_takes_nothing_new() -> None:
    script = Script("ISSUED")
    script.hold = asyncio.Event()
    service = issuer(script)
    accepted = asyncio.create_task(service.issue(TOKEN, request()))
    await asyncio.sleep(0)
    draining = asyncio.create_task(service.drain())
    await asyncio.sleep(0)
    assert not service.ready
    assert await service.issue(TOKEN, request("late")) == Busy("draining")
    script.hold.set()
    assert isinstance(await accepted, Issued)
    await asyncio.wait_for(draining, 1)


async def test_a_client_that_went_away_does_not_keep_the_drain_waiting() -> None:
    script = Script("ISSUED")
    script.hold = asyncio.Event()
    service = issuer(script)
    gone = asyncio.create_task(service.issue(TOKEN, request()))
    await asyncio.sleep(0)
    gone.cancel()
    script.hold.set()
    await asyncio.wait_for(service.drain(), 1)


async def test_authenticate_says_whose_a_token_is_only_after_the_fence() -> None:
    script = Script("OK")
    service = issuer(script)
    assert await service.authenticate(TOKEN) == Authenticated("D")
    assert await service.authenticate(new_token()) == Unauthorized("token_unknown")
    assert script.versions == [1, 1]
    await service.drain()


async def test_what_is_counted_as_issued_is_what_was_given_and_not_what_was_asked_for() -> None:
    """The record of the script holds one code, as if a cap had left no more."""
    service = issuer(Script("ISSUED"))
    service.start()
    before = metrics.vouchers_issued._value.get()
    many = msgspec.structs.replace(request("many"), quantity=20)
    await asyncio.gather(service.issue(TOKEN, request("one")), service.issue(TOKEN, many))
    assert metrics.vouchers_issued._value.get() - before == 2
    assert codes_in(record(many).pack()) == 1
    await service.drain()
