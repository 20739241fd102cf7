"""All scripts in any order against a plain model of a partition, on fakeredis (in virtual time) and on Valkey.

The model is lists and dictionaries.  After each step the windows are compared with it, the books of Redis balance
(P5), and no code was ever given to two requests (``Bench`` fails on that).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loadtest.servers import RedisServer
from service.catalogue import cap_field, period_start
from service.domain import Code, Record
from service.line import connect
from service.scripts import Answer, Count, CountedCap, Routed, counter_key, parse_separated
from tests.scripting import NOTHING, YEAR_S, Bench, MemoryServer, candidate, cap, own_server, plan, record_of, request

T = TypeVar("T")

START: Final = 1_750_000_000
RETENTION_S: Final = 86_399  # never a sum of the steps of time below, so that nothing expires on the second
PLENTY: Final = 10_000
POOLS: Final = ("P", "Q")

PLANS: Final = (
    plan(candidate(pool="P")),
    plan(
        candidate(cap(12), cap(3, holder="terminal", period="hour"), pool="P"),
        candidate(cap(20, campaign="CAMP-2"), pool="Q", campaign="CAMP-2", least_life_s=900),
    ),
    plan(
        candidate(
            cap(5, holder="distributor", period="day", campaign="CAMP-2"), pool="Q", campaign="CAMP-2", least_life_s=900
        )
    ),
    plan(
        candidate(pool="P", campaign="OVER", until=START - 10),
        candidate(cap(0, campaign="SHUT"), pool="P", campaign="SHUT"),
        candidate(pool="Q", campaign="LAST", least_life_s=900),
    ),
    NOTHING,
)


KEYS: Final = st.one_of(st.integers(0, 3), st.integers(4, 200))  # some often, most once


class Pool(msgspec.Struct):
    window: list[Code] = []
    stock: int = 0
    exhausted: int = -1
    lease: str = ""

    @property
    def is_exhausted(self) -> bool:
        return self.exhausted == self.stock


class Known(msgspec.Struct):
    """A record that is in Redis."""

    record: str
    payload: str
    until: int


class Machine(RuleBasedStateMachine):
    server: ClassVar[RedisServer | None] = None  # None: fakeredis

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.memory = MemoryServer(now=START) if self.server is None else None
        self.run(self._begin())
        self.pools = {pool: Pool() for pool in POOLS}
        self.known: dict[str, Known] = {}
        self.ledger: dict[str, Known] = {}  # every record there ever was
        self.used: dict[tuple[str, str], int] = {}  # (caps hash less generation, field) -> codes
        self.outbox: list[int] = []  # codes of each entry
        self.fence = 1
        self.restoring = False
        self._fill()

    async def _begin(self) -> None:
        if self.memory is not None:
            self.redis: Any = self.memory.client()
        else:
            assert self.server is not None
            self.redis = connect(self.server.url, timeout_ms=5_000)
            await self.redis.flushall()
        self.bench = Bench(self.redis, memory=self.memory)
        await self.bench.open()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def teardown(self) -> None:
        self.run(self.redis.aclose())
        self.loop.close()

    def _fill(self) -> None:
        for name in POOLS:
            self.restock(name, [YEAR_S, -1, YEAR_S, 800, YEAR_S, YEAR_S, YEAR_S, YEAR_S], 0, "")

    # --- stock ------------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(POOLS),
        lives=st.lists(st.sampled_from([YEAR_S, YEAR_S, YEAR_S, 800, 5_000, -1]), min_size=1, max_size=6),
        raises=st.integers(0, 1),
        fault=st.sampled_from(["", "", "", "", "twice", "forked"]),
    )
    def restock(self, name: str, lives: list[int], raises: int, fault: str) -> None:
        pool = self.pools[name]
        now = self.run(self.bench.now())
        if sum(code.expires_at < now + YEAR_S // 2 for code in pool.window) > 8:
            lives = [YEAR_S]  # no more than one call can set aside of both pools; that bound has a case of its own
        codes = [code for life in lives for code in self.bench.codes(1, expires_at=now + life)]
        version = max(pool.stock, 0) + raises
        if fault == "forked":
            answer = self.run(self.bench.lease(name, codes, predecessor="nobody's", stock_version=version))
            assert (answer.status, answer.last_lease) == ("FORKED", pool.lease)
            return
        answer = self.run(self.bench.lease(name, codes, stock_version=version, low_water=3))
        assert answer.status == "OK"
        predecessor, pool.lease = pool.lease, self.bench.last_lease(name)
        pool.window += codes
        pool.stock = max(pool.stock, version)
        assert answer.length == len(pool.window)
        if fault == "twice":
            again = self.run(self.bench.lease(name, codes, lease_id=pool.lease, predecessor=predecessor))
            assert (again.status, again.length) == ("DONE", len(pool.window))

    @rule(name=st.sampled_from(POOLS), by=st.integers(-1, 2))
    def stock(self, name: str, by: int) -> None:
        pool = self.pools[name]
        assert (
            self.run(self.bench.scripts.stock(name, max(pool.stock + by, 0), generation=self.bench.generation)) == "OK"
        )
        pool.stock = max(pool.stock, pool.stock + by)

    @rule(name=st.sampled_from(POOLS), by=st.integers(-1, 1), lease=st.sampled_from([True, True, False]))
    def exhausted(self, name: str, by: int, lease: bool) -> None:
        pool = self.pools[name]
        version = max(pool.stock + by, 0)
        last = pool.lease if lease else "another"
        status = self.run(self.bench.scripts.exhausted(name, version, last, generation=self.bench.generation))
        assert status == ("OK" if lease and version >= pool.stock else "CHANGED")
        if status == "OK":
            pool.stock = pool.exhausted = version

    # --- requests ---------------------------------------------------------------------------------------------------

    @rule(
        batch=st.lists(
            st.tuples(
                KEYS, st.integers(1, 4), st.sampled_from(["T1", "T2"]), st.integers(0, len(PLANS) - 1),
                st.booleans(), st.sampled_from(["", "", "", "", "", "another payload"]),
            ),
            min_size=1, max_size=6,
        ),
        spare=st.sampled_from([PLENTY, PLENTY, 0, 2, 6]),
    )  # fmt: skip
    def issue(self, batch: list[tuple[int, int, str, int, bool, str]], spare: int) -> None:
        routed = []
        for key, quantity, terminal, which, looked_up, payload in batch:
            asked = request(
                f"r{key}",
                quantity=quantity,
                terminal=terminal,
                distributor="D1",
                payload=f"{terminal}\t{payload or key}",
            )
            # The ledger is asked whether a key is really new; one that it knows is never said to be.
            routed.append(Routed(asked, PLANS[which], looked_up=looked_up and asked.key not in self.ledger))
        held = sum(self.outbox)
        before = {name: list(pool.window) for name, pool in self.pools.items()}
        reply = self.run(
            self.bench.issue(*routed, version=self.fence, outbox_max=held + spare, retention_s=RETENTION_S)
        )
        assert reply.status == "OK"
        asides = self._note_entry(before, reply.now, held + spare)
        for one, answer in zip(routed, reply.answers, strict=True):
            self._check_answer(one, answer, reply.now, spare, asides)
            if answer.status == "ISSUED":
                spare -= len(Record.unpack(answer.detail).codes)  # what this batch has issued is in the outbox too

    @rule(key=KEYS, which=st.integers(0, len(PLANS) - 1))
    def issue_one(self, key: int, which: int) -> None:
        self.issue([(key, 1, "T1", which, True, "")], PLENTY)

    @rule(pair=st.tuples(KEYS, KEYS), which=st.integers(0, len(PLANS) - 1))
    def issue_the_same_twice(self, pair: tuple[int, int], which: int) -> None:
        self.issue([(key, 2, "T2", which, True, "") for key in (*pair, *pair)], PLENTY)

    def _note_entry(self, before: dict[str, list[Code]], now: int, bound: int) -> int:
        """Takes what was set aside out of the windows, as far as it may have been: how many codes that is."""
        entries = self.run(self.bench.outbox())
        assert len(entries) - len(self.outbox) in (0, 1), "one entry a batch"
        if len(entries) == len(self.outbox):
            return 0
        fields = entries[-1][1]
        self.outbox.append(int(fields["codes"]))
        assert sum(self.outbox) <= bound
        asides = [Code.unpack(text) for text in parse_separated(fields["asides"])]
        for code in asides:
            [name] = [name for name, window in before.items() if code in window]
            assert code.expires_at <= now + (900 if name == "Q" else 0)
            self.pools[name].window.remove(code)
        return len(asides)

    def _check_answer(self, routed: Routed, answer: Answer, now: int, spare: int, asides: int) -> None:
        key, payload = routed.request.key, routed.request.payload
        known = self.known.get(key)
        if known is not None and known.until < now:
            del self.known[key]
            known = None
        if known is not None:
            expected = ("REPLAY", known.record) if known.payload == payload else ("REUSED", "")
            assert (answer.status, answer.detail) == expected
            return
        if self.restoring and not routed.looked_up:
            assert answer.status == "LOOKUP"
            return
        if answer.status == "BACKLOG":
            assert spare < PLENTY
            assert spare < asides + routed.request.quantity
            return
        stops = []
        for one in routed.plan.candidates:
            pool = self.pools[one.pool]
            alive = [code for code in pool.window if code.expires_at > now + one.least_life_s]
            take = min([routed.request.quantity, *(limit.limit - self._used(limit, routed, now) for limit in one.caps)])
            if one.until and now >= one.until:
                stops.append("after")
            elif take <= 0:
                stops.append("capped")
            elif pool.is_exhausted and len(alive) < routed.request.quantity:
                stops.append("exhausted")
            elif len(alive) < take:
                assert answer.status == "REFILL"
                return
            else:
                assert answer.status == "ISSUED", answer
                self._note_issued(routed, answer, alive[:take], one.pool, one.rule, now)
                for limit in one.caps:
                    self.used[self._counter(limit, routed, now)] = self._used(limit, routed, now) + take
                return
        assert (answer.status, answer.detail) == ("NONE", ",".join(stops))

    def _note_issued(
        self, routed: Routed, answer: Answer, codes: list[Code], pool: str, rule_text: str, now: int
    ) -> None:
        asked = routed.request
        record = record_of(asked, answer.detail)
        assert record.codes == tuple(codes), "the first that are alive, in their order"
        assert (record.payload, record.issued_at) == (asked.payload, now)
        assert record.rule.pack() == rule_text
        for code in codes:
            self.pools[pool].window.remove(code)
        self.known[asked.key] = self.ledger[asked.key] = Known(answer.detail, asked.payload, now + RETENTION_S)

    def _counter(self, limit: CountedCap, routed: Routed, now: int) -> tuple[str, str]:
        counter = limit.counter
        start = 0 if counter.period == "total" else period_start(counter.period, counter.time_zone, now)
        field = cap_field(limit.holder, routed.request.distributor, routed.request.terminal)
        return counter_key(0, 0, counter, start), field

    def _used(self, limit: CountedCap, routed: Routed, now: int) -> int:
        return self.used.get(self._counter(limit, routed, now), 0)

    @rule(key=KEYS)
    def replay(self, key: int) -> None:
        now = self.run(self.bench.now())
        asked = request(f"r{key}", terminal="T1", distributor="D1", payload=f"T1\t{key}")
        reply = self.run(self.bench.scripts.replay([asked], generation=self.bench.generation, version=self.fence))
        known = self.known.get(asked.key)
        if known is None or known.until < now:
            assert reply.answers == [Answer("MISS", "")]
        elif known.payload == asked.payload:
            assert reply.answers == [Answer("REPLAY", known.record)]
        else:
            assert reply.answers == [Answer("REUSED", "")]

    # --- the worker -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.outbox)
    @rule(count=st.integers(1, 4), twice=st.booleans())
    def flushed(self, count: int, twice: bool) -> None:
        entries, held = self.run(self.bench.outbox())[:count], self.run(self.bench.waiting())[:count]
        last = int(entries[-1][1]["seq"])
        for expected in (len(held), 0) if twice else (len(held),):
            done = self.run(self.bench.scripts.flushed("ledger", held, generation=self.bench.generation, seq=last))
            assert done == expected
        del self.outbox[:count]

    @rule(by=st.integers(-1, 2))
    def publish(self, by: int) -> None:
        version = max(self.fence + by, 0)
        assert self.run(self.bench.scripts.publish(version)) == "OK"
        if version > self.fence:
            reply = self.run(self.bench.issue(Routed(request("stale"), PLANS[0]), version=self.fence))
            assert (reply.status, reply.fence) == ("STALE", version)
            self.fence = version
        assert self.run(self.bench.scripts.generation()).fence == self.fence

    @rule(changed=st.booleans(), restored=st.integers(0, 10), seldom=st.integers(0, 3))
    def roll(self, changed: bool, restored: int, seldom: int) -> None:
        """The partition goes on beside its old data: caps come along, records one by one, windows and outbox do not."""
        if seldom:
            return
        if changed:
            self.run(self.bench.change_identity())
            reply = self.run(self.bench.issue(Routed(request("lost"), PLANS[0]), version=self.fence))
            assert reply.status == "LOST"
        old = self.bench.generation
        later = self.run(self.bench.now()) + 3 * 86_400
        counts = [
            Count(self._counter_of(old + 1, key), field, codes, 0 if key.endswith("total") else later)
            for (key, field), codes in self.used.items()
        ]
        self._restore(old + 1, [], counts)
        assert self.run(self.bench.open(old + 1, version=self.fence, restoring=True)) == "OK"
        reply = self.run(self.bench.issue(Routed(request("old"), PLANS[0]), generation=old, version=self.fence))
        assert (reply.status, reply.generation) == ("LOST", old + 1)
        self.pools = {pool: Pool() for pool in POOLS}
        self.outbox, self.known, self.restoring = [], {}, True
        self._restore(old + 1, list(self.ledger)[:restored], [])
        self._fill()

    @precondition(lambda self: self.restoring)
    @rule()
    def finish_restoring(self) -> None:
        self._restore(self.bench.generation, list(self.ledger), [])
        seen = self.run(self.bench.scripts.generation())
        status = self.run(self.bench.scripts.open(seen, seen.open, version=self.fence, restoring=False))
        assert status == "OK"
        self.restoring = False

    def _restore(self, generation: int, names: list[str], counts: list[Count]) -> None:
        now = self.run(self.bench.now())
        missing = [name for name in names if name not in self.known or self.known[name].until < now]
        restored = self.run(
            self.bench.scripts.restore(
                [("v1", "D1", name, self.ledger[name].record) for name in names], counts,
                open_generation=self.bench.generation, generation=generation, retention_s=RETENTION_S,
            )
        )  # fmt: skip
        assert restored == ("OK", len(missing))
        for name in missing:
            self.known[name] = msgspec.structs.replace(self.ledger[name], until=now + RETENTION_S)

    def _counter_of(self, generation: int, key: str) -> str:
        return key.replace("{0}:0:", f"{{0}}:{generation}:", 1)

    @precondition(lambda self: self.memory is not None)
    @rule(seconds=st.sampled_from([1, 60, 1_800, 3_600, 40_000]))
    def time_passes(self, seconds: int) -> None:
        assert self.memory is not None
        self.memory.now = (self.memory.now or 0) + seconds

    # --- after each step --------------------------------------------------------------------------------------------

    @invariant()
    def windows_are_those_of_the_model(self) -> None:
        for name, pool in self.pools.items():
            assert self.run(self.bench.window(name)) == pool.window

    @invariant()
    def the_books_balance(self) -> None:
        self.run(self.bench.check())

    @invariant()
    def caps_are_counted(self) -> None:
        for (key, field), codes in self.used.items():
            held = self.run(self.redis.hget(self._counter_of(self.bench.generation, key), field))
            assert held == str(codes) or (held is None and self.memory is not None), "a counter goes with its period"


def test_scripts_in_any_order_in_memory() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=8, stateful_step_count=40))


@pytest.mark.parametrize(("name", "examples"), [("valkey", 10), ("redis-server", 5)])
def test_scripts_in_any_order_on_a_real_server(name: str, examples: int, servers_dir: Path) -> None:
    server = own_server(name, servers_dir)
    try:
        real = type("RealMachine", (Machine,), {"server": server})
        run_state_machine_as_test(real, settings=settings(max_examples=examples, stateful_step_count=40))
    finally:
        server.stop()
