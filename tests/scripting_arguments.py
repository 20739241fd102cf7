"""Every argument of every script bad in turn: whatever a script says to it, it has changed nothing if it failed.

A failed command does not undo the writes before it, so a script that fails half-way has destroyed a code, or counted
one twice.  The calls that are spoilt here are those that the doors make, on a partition where each would write all
that its script can write.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from service import keys
from service.domain import Code, RateLimit, Record, Rule
from service.scripts import NAMES, Count, Counter, Routed, Scripts, load
from tests.scripting import DISTRIBUTOR, YEAR_S, Bench, candidate, cap, plan, request, statuses

# No number, no integer, an integer in a spelling that Lua reads and Redis does not, out of range, a valid other one.
BAD_VALUES: Final = (
    "", "abc", "-1", "1.5", "nan", "inf", "1e400", "1e300", "0x10", " 5", "5.0", "\x00",
    "0", "2", "9007199254740991", "9007199254740993", "9223372036854775808", "18446744073709551616-0",
)  # fmt: skip

TYPES: Final = ("string", "list", "hash", "zset", "stream")

# Numbers that scripts keep: whoever reads them next, Redis or Lua or Python, has to read the same.
PLAIN: Final = re.compile(r"0|-?[1-9]\d{0,15}")


class Call(msgspec.Struct, frozen=True):
    """One call of a script as its door makes it."""

    name: str
    keys: tuple[str, ...]
    argv: tuple[str, ...]

    def with_argument(self, at: int, value: str) -> Call:
        return Call(self.name, self.keys, (*self.argv[:at], value, *self.argv[at + 1 :]))

    def without_argument(self, at: int) -> Call:
        return Call(self.name, self.keys, self.argv[:at] + self.argv[at + 1 :])

    def without_key(self, at: int) -> Call:
        return Call(self.name, self.keys[:at] + self.keys[at + 1 :], self.argv)


class _Captured(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


class _CapturingScripts(Scripts):
    """Doors that lead nowhere: what would be sent is thrown instead."""

    async def _call(self, name: str, script_keys: Sequence[str], arguments: Sequence[str | int]) -> list[Any]:
        raise _Captured(Call(name, tuple(script_keys), tuple(str(one) for one in arguments)))


async def prepare(bench: Bench) -> dict[str, Call]:
    """Fills a partition and returns, for each script, a call that writes all that the script can write."""
    await bench.open()
    now = await bench.now()
    await bench.restock("P", 3, expires_at=now - 1)
    await bench.restock("P", 6, low_water=100)
    await bench.restock("Q", 4, low_water=100)
    bounds = {
        Counter("CAMP", "total", "UTC"): (0, 1 << 52, 1 << 52),
        Counter("CAMP", "hour", "UTC"): (now - 1_800, now + 1_800, now + 5_400),
        Counter("CAMP", "day", "UTC"): (now - 172_000, now - 43_200, now + 43_200),
    }
    first = candidate(cap(50), cap(40, holder="distributor", period="hour"), cap(30, holder="terminal", period="day"))
    both = plan(candidate(pool="Q", starts_at=now + 9_000), first)
    await bench.issue(Routed(request("old"), plan(candidate(pool="Q"))))
    await bench.issue(Routed(request("older"), plan(candidate(pool="Q"))))
    await bench.redis.rpush(keys.window(0, 3, "P"), "a code of a generation that was left")
    await bench.redis.hset(keys.totals(0, 3), "seq", 3)
    entries = await bench.waiting()
    code, *_ = codes = bench.codes(3, expires_at=now + YEAR_S)
    record = Record(
        "x", "v1", DISTRIBUTOR, DISTRIBUTOR, "gone", now, Rule("CAMP", "P", "CAT", "PAY", 0), (code,)
    ).pack()
    total, day = keys.caps(0, 1, "CAMP", "total"), keys.caps(0, 1, "CAMP", "day:0")
    in_window = await bench.redis.lindex(keys.window(0, 1, "P"), -1)
    doors = _CapturingScripts(bench.redis)
    seen = await bench.scripts.generation()
    calls: dict[str, Call] = {}
    for door in (
        doors.issue(
            [
                Routed(one, both, limit=RateLimit(7, 20))
                for one in (request("old"), request("a", quantity=2, trace="a trace"), request("b", terminal="T-2"))
            ],
            generation=1, version=1, outbox_max=1_000, outbox_bytes_max=100_000, retention_s=86_400,
            bounds=bounds,
        ),
        doors.replay([request("old"), request("new")], generation=1, version=1),
        doors.restock("P", "next", bench.last_lease("P"), codes, generation=1, stock_version=7, low_water=20),
        doors.stock("P", 7, generation=1),
        doors.exhausted("P", 7, bench.last_lease("P"), generation=1),
        doors.withdraw("P", [codes[0], Code.unpack(in_window), codes[1]], generation=1),
        doors.take_back("P", 2, generation=1, outbox_max=1_000),
        doors.publish(7),
        doors.open(seen, 2, version=7, restoring=True),
        doors.restore(
            [("v1", DISTRIBUTOR, "gone", record), ("v1", DISTRIBUTOR, "old", record)],
            [Count(total, "c", 3, 0), Count(day, "c", 3, now + 900)],
            open_generation=1, generation=1, retention_s=86_400,
        ),
        doors.flushed("ledger", entries, generation=1, seq=2),
        doors.distrust(1, 1),
        doors.forget([keys.window(0, 3, "P"), keys.totals(0, 3)], generation=3),
        doors.books(["P", "Q"], generation=1),
        doors.rights(["get", "set"]),
    ):  # fmt: skip
        with pytest.raises(_Captured) as thrown:
            await door
        calls[thrown.value.call.name] = thrown.value.call
    return calls


class BadArguments:
    """The cases; a tier gives them ``ground``."""

    @pytest.mark.parametrize("name", NAMES)
    async def test_a_bad_argument_that_fails_changes_nothing(self, ground: Ground, name: str) -> None:
        good = ground.calls[name]
        bad = [
            good.with_argument(at, value)
            for at, was in enumerate(good.argv)
            for i, value in enumerate(BAD_VALUES)
            if value != was and (at + i) % ground.share == 0
        ]
        await ground.try_all(bad)

    @pytest.mark.parametrize("name", NAMES)
    async def test_a_missing_argument_or_key_that_fails_changes_nothing(self, ground: Ground, name: str) -> None:
        good = ground.calls[name]
        bad = [good.without_argument(at) for at in range(len(good.argv))]
        bad += [good.without_key(at) for at in range(len(good.keys))]
        bad += [Call(name, good.keys, (*good.argv, "1")), Call(name, (*good.keys, "{0}:more"), good.argv)]
        bad += [Call(name, good.keys, ()), Call(name, (), good.argv), Call(name, (), ())]
        await ground.try_all(bad)

    @pytest.mark.parametrize("name", NAMES)
    async def test_a_key_of_a_wrong_type_that_fails_changes_nothing(self, ground: Ground, name: str) -> None:
        good = ground.calls[name]
        for key in dict.fromkeys(good.keys):
            for kind in TYPES:
                await ground.reset(key, kind)
                await ground.try_one(good)

    @pytest.mark.parametrize("name", NAMES)
    async def test_the_good_call_is_answered(self, ground: Ground, name: str) -> None:
        before = await ground.dump()
        raw = await ground.run(ground.calls[name])
        assert raw[0] == "OK"
        if name == "issue":
            assert raw[4::2] == ["REPLAY", "ISSUED", "ISSUED"]
        assert (await ground.dump() != before) == (name not in ("replay", "books", "rights"))


class Ground:
    """A prepared partition that is put back after each call that changed it.

    One in ``share`` of the bad values is tried: 1 but where another server has had all of them.
    """

    def __init__(self, bench: Bench, calls: dict[str, Call], *, url: str = "", share: int = 1) -> None:
        self.calls = calls
        self.share = share
        self._bench = bench
        self._redis: Any = bench.redis
        # What DUMP answers is no text.
        self._raw: Any = bench.redis if bench.memory is not None else Redis.from_url(url, protocol=2)
        self._prepared: list[tuple[Any, int, bytes]] = []

    async def begin(self) -> Ground:
        self._prepared = await self.dump()
        return self

    async def end(self) -> None:
        await self._raw.aclose()
        await self._redis.aclose()

    async def dump(self) -> list[tuple[Any, int, bytes]]:
        """Every key, its expiry, and all that it holds as opaque bytes."""
        if self._bench.memory is not None:
            held = self._bench.memory.dbs[0]._dict
            return [(name, 0, pickle.dumps(held[name])) for name in sorted(held)]
        # One round trip in nearly all cases: keys that are there are among those of the last look.
        names = [name for name, _, _ in self._prepared]
        while True:
            pipe = self._raw.pipeline(transaction=True).keys()
            for name in names:
                pipe.execute_command("EXPIRETIME", name)
                pipe.execute_command("DUMP", name)
            there, *answers = await pipe.execute()
            there = sorted(name.decode() for name in there)
            if there == names:
                return list(zip(names, answers[::2], answers[1::2], strict=True))
            names = there

    async def run(self, call: Call) -> list[Any]:
        """The raw reply; raises ResponseError."""
        raw: list[Any] = await self._redis.eval(load(call.name).text, len(call.keys), *call.keys, *call.argv)
        return raw

    async def reset(self, key: str = "", kind: str = "") -> None:
        """Puts back what was prepared; then ``key``, if one is named, holds a value of type ``kind``."""
        pipe = self._raw.pipeline(transaction=True)
        if self._bench.memory is not None:
            held = self._bench.memory.dbs[0]._dict
            held.clear()
            held.update({name: pickle.loads(dumped) for name, _, dumped in self._prepared})  # noqa: S301
        else:
            pipe.flushall()
            for name, expires_at, dumped in self._prepared:
                pipe.restore(name, max(expires_at, 0) * 1_000, dumped, absttl=True)
        if key:
            pipe.delete(key)
            match kind:
                case "string":
                    pipe.set(key, "some text")
                case "list":
                    pipe.rpush(key, "one", "two")
                case "hash":
                    pipe.hset(key, "some", "value")
                case "zset":
                    pipe.zadd(key, {"one": 1.0})
                case _:
                    pipe.xadd(key, {"some": "value"})
        await pipe.execute()

    async def try_one(self, call: Call) -> bool:
        """Whether the call was answered; if it failed, nothing may have changed."""
        before = await self.dump()
        try:
            raw = await self.run(call)
        except ResponseError:
            assert await self.dump() == before, f"failed and changed something: {call}"
            return False
        assert isinstance(raw, list), f"answered without a status: {call}"
        assert raw[0] in statuses(call.name), f"{raw[0]} is no status: {call}"
        if await self.dump() != before:
            await self._check_numbers(call)
        return True

    async def _check_numbers(self, call: Call) -> None:
        for key, (kind, _, content) in (await self._bench.contents()).items():
            numbers = []
            if kind == "hash":
                numbers = [value for field, value in content.items() if _is_number(key, field)]
            elif key in (keys.fence(0), keys.rate(0, 1, DISTRIBUTOR)) and kind == "string" and content != "some text":
                numbers = [content]
            for number in numbers:
                assert PLAIN.fullmatch(number), f"left {number!r} in {key}: {call}"

    async def try_all(self, calls: Sequence[Call]) -> None:
        """Each of ``calls`` on prepared ground."""
        for call in calls:
            if await self.try_one(call):
                await self.reset()


def _is_number(key: str, field: str) -> bool:
    if key.endswith(":totals") or ":caps:" in key:
        return field not in ("some", "flushed")
    return (":pool:" in key and field in ("stock", "exhausted", "low")) or field == "open"
