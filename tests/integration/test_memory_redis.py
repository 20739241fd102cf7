"""The simulation's Redis against a real one: the same commands, chosen at random, get the same answers.

What each has for itself (ids of stream entries, identity, the words of an error) is compared by what it stands for.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.exceptions import NoScriptError, ResponseError

from service.domain import Code, Record, Request, Rule
from service.line import connect
from service.scripts import Candidate, CountedCap, Counter, Plan, Routed, Scripts
from tests.simulation.memory import Client, Command, Server, direct

STEPS = 400
KEYS = ("a", "b", "c", "d")
FIELDS = ("x", "y", "z")
NUMBERS = ("0", "1", "2", "-1", "7", "-3", "1.5", "x", "")
GROUPS = ("g", "h")
CONSUMERS = ("one", "two")

Both = tuple[Any, Any]


class Pair:
    """Two servers that are asked the same; ids of stream entries are named by the order in which they were made."""

    def __init__(self, url: str) -> None:
        counter = itertools.count()
        self.memory = Server(time.time, lambda: f"{next(counter):040d}")
        self._real = redis.Redis.from_url(url, decode_responses=True, protocol=2)
        self._connection = self._real.connection_pool.get_connection()
        self.ids: list[tuple[str, str, str]] = []  # here, there, and in which stream

    def close(self) -> None:
        self._real.connection_pool.release(self._connection)
        self._real.close()

    def ask(self, *command: str) -> Both:
        """The two answers, made comparable.  ``#3`` in a command is the third id that was made."""
        here, there = self._ask_memory(self._with_ids(command, 0)), self._ask_real(self._with_ids(command, 1))
        return self._normal(here, 0, command), self._normal(there, 1, command)

    def add(self, key: str, *pairs: str) -> Both:
        """An entry of a stream, on both."""
        time.sleep(0.001)  # so that no two entries get one id
        made = self._ask_memory(("xadd", key, "*", *pairs)), self._ask_real(("xadd", key, "*", *pairs))
        if isinstance(made[0], str) and isinstance(made[1], str) and "-" in made[0] and "-" in made[1]:
            self.ids.append((made[0], made[1], key))
            return "added", "added"
        return made

    def _ask_memory(self, command: Command) -> Any:
        try:
            return self.memory.call(command)
        except ResponseError as error:
            return _word(error)

    def _ask_real(self, command: Command) -> Any:
        try:
            self._connection.send_command(*command)  # type: ignore[no-untyped-call]
            return self._connection.read_response()
        except ResponseError as error:
            return _word(error)

    def _with_ids(self, command: Command, side: int) -> Command:
        return tuple(self.ids[int(word[1:])][side] if word.startswith("#") else word for word in command)

    def _normal(self, reply: Any, side: int, command: Command) -> Any:
        if isinstance(reply, list):
            return [self._normal(one, side, command) for one in reply]
        # The last one of this name: a stream that is deleted and made again may use one twice.
        named = (i for i in reversed(range(len(self.ids))) if self.ids[i][side] == reply and self.ids[i][2] in command)
        return f"#{found}" if (found := next(named, None)) is not None else reply


def _word(error: ResponseError) -> str:
    """What kind of error it is: the servers' own words differ from version to version."""
    if isinstance(error, NoScriptError):
        return "error NOSCRIPT"
    word = str(error).split(" ", 1)[0]
    return f"error {word}" if word in ("WRONGTYPE", "NOGROUP", "BUSYGROUP") else "error"


@pytest.fixture
def pair(valkey_url: str) -> Iterator[Pair]:
    made = Pair(valkey_url)
    yield made
    made.close()


def some_command(rng: random.Random, pair: Pair) -> Command:
    """A command as the service might send it, mostly with arguments that make sense."""
    key, field, number = rng.choice(KEYS), rng.choice(FIELDS), rng.choice(NUMBERS)
    good = rng.choice(("0", "1", "2", "3", "-1"))
    at = rng.randrange(len(pair.ids)) if pair.ids else -1
    id, stream = (f"#{at}", pair.ids[at][2]) if pair.ids else ("0-0", key)
    group, consumer = rng.choice(GROUPS), rng.choice(CONSUMERS)
    return rng.choice([
        ("exists", *rng.sample(KEYS, 2)), ("del", key), ("unlink", *rng.sample(KEYS, 2)), ("expire", key, good),
        ("expire", key, "100"), ("expireat", key, str(int(time.time()) + 100)), ("expireat", key, number),
        ("get", key), ("mget", *KEYS), ("set", key, number), ("set", key, "v", "nx"), ("set", key, "v", "ex", number),
        ("set", key, "v", "ex", "100", "nx"), ("hget", key, field), ("hmget", key, *FIELDS), ("hgetall", key),
        ("hset", key, field, number), ("hset", key, "x", "1", "y", "2"), ("hset", key, "x", "1", "y"),
        ("hdel", key, field), ("hdel", key, *FIELDS), ("hincrby", key, field, number), ("hincrby", key, field, good),
        ("llen", key), ("lrange", key, number, good), ("lrange", key, good, good), ("rpush", key, field, number),
        ("rpush", key, field), ("lpop", key), ("lpop", key, good), ("lpop", key, number), ("lrem", key, "1", field),
        ("zadd", key, number, field), ("zadd", key, good, field), ("zcard", key), ("zpopmin", key),
        ("xlen", key), ("xdel", stream, id), ("xack", stream, group, id), ("xrange", key, "-", "+"),
        ("xrange", stream, id, "+"), ("xrange", stream, id, id), ("xrange", key, "-", "+", "count", "2"),
        ("xgroup", "create", key, group, "0", "mkstream"), ("xgroup", "create", key, group, "0"),
        ("xreadgroup", "group", group, consumer, "count", "2", "streams", key, ">"),
        ("xreadgroup", "group", group, consumer, "count", "2", "streams", key, "0"), ("config", "get", "appendfsync"),
        ("evalsha", "0" * 40, "0"), ("nonsense", key),
    ])  # fmt: skip


@pytest.mark.leaves_keys
def test_no_command_is_answered_otherwise_than_by_a_real_server(pair: Pair, rng: random.Random) -> None:
    for step in range(STEPS):
        if rng.random() < 0.15:
            here, there = pair.add(rng.choice(KEYS), "f", str(step))
            command: Command = ("xadd",)
        elif rng.random() < 0.05:
            command = (
                "xautoclaim",
                rng.choice(KEYS),
                rng.choice(GROUPS),
                rng.choice(CONSUMERS),
                "0",
                "0-0",
                "count",
                "50",
            )
            here, there = pair.ask(*command)
        elif rng.random() < 0.02:
            command = ("scan",)
            here, there = (sorted(reply[1]) for reply in pair.ask("scan", "0", "match", "[a-c]", "count", "500"))
        else:
            command = some_command(rng, pair)
            here, there = pair.ask(*command)
        assert here == there, f"step {step}: {command}"


def _code(lot: int, seq: int, expires_at: int) -> Code:
    return Code(expires_at, lot, seq, f"CODE-{lot}-{seq}", f"SER-{lot}-{seq}")


def _told(reply: Any) -> list[Any]:
    """What an issue answered, without the moment."""
    return [
        reply.status, reply.generation, reply.fence,
        [
            (a.status, Record.unpack(a.detail).codes if a.status in ("ISSUED", "REPLAY") else a.detail)
            for a in reply.answers
        ],
    ]  # fmt: skip


async def test_no_script_answers_otherwise_than_on_a_real_server(valkey_url: str, rng: random.Random) -> None:
    counter = itertools.count()
    real = connect(valkey_url, timeout_ms=2_000)
    memory: Any = Client(direct(Server(time.time, lambda: f"{next(counter):040d}")))
    both = (Scripts(memory), Scripts(real))
    now = int(time.time())
    total = Counter("CAMP", "total", "UTC")
    plans = [
        Plan(tuple(
            Candidate(pool, 10, 0, 0, Rule("CAMP", pool, "CAT", "PAY", 0).pack(), (CountedCap(total, "campaign", 40),))
            for pool in pools
        ))
        for pools in (("P",), ("P", "Q"), ())
    ]  # fmt: skip
    version, generation, leases, numbers = 1, 1, {"P": "", "Q": ""}, itertools.count()
    for scripts in both:
        assert await scripts.open(await scripts.generation(), 1, version=1, restoring=False) == "OK"
    for step in range(120):
        what = rng.choice(
            ("issue", "issue", "issue", "restock", "stock", "exhausted", "publish", "open", "flush", "books", "replay")
        )
        requests = [
            Request(
                "v1",
                "D",
                f"k{rng.randrange(30)}",
                "D",
                ("PAY",),
                f"T\tPAY{rng.randrange(6) // 5}",
                rng.choice((1, 1, 3)),
            )
            for _ in range(rng.randrange(1, 5))
        ]
        routed = [Routed(request, rng.choice(plans), rng.random() < 0.5) for request in requests]
        pool, lease, late = rng.choice(("P", "Q")), f"lease-{next(numbers)}", rng.random() < 0.2
        codes = [_code(step, seq, now + (5 if late else 5_000)) for seq in range(rng.randrange(1, 9))]
        sent, behind = generation - (rng.random() < 0.05), version - (rng.random() < 0.1)
        bounds = {total: (0, 1 << 52, 1 << 52)}
        if what == "publish":
            version += rng.choice((0, 1))
        if what == "open" and rng.random() < 0.5:
            generation, leases = generation + 1, {"P": "", "Q": ""}
        answers = []
        for scripts in both:
            answer: Any
            if what == "issue":
                answer = _told(await scripts.issue(
                    routed, generation=sent, version=behind, outbox_max=30, outbox_bytes_max=2_000, retention_s=100,
                    bounds=bounds,
                ))  # fmt: skip
            elif what == "replay":
                answer = _told(await scripts.replay(requests, generation=sent, version=behind))
            elif what == "restock":
                answer = await scripts.restock(
                    pool, lease, leases[pool], codes, generation=generation, stock_version=step, low_water=3
                )
            elif what == "stock":
                answer = await scripts.stock(pool, step // 3, generation=sent)
            elif what == "exhausted":
                answer = await scripts.exhausted(pool, step, leases[pool], generation=generation)
            elif what == "publish":
                answer = await scripts.publish(version)
            elif what == "open":
                answer = await scripts.open(
                    await scripts.generation(), generation, version=version, restoring=step % 3 == 0
                )
            elif what == "flush":
                outbox = f"{{0}}:{generation}:outbox"
                entries = await scripts.redis.xrange(outbox)
                some = [(id, int(fields["codes"]), int(fields["bytes"])) for id, fields in entries[:3]]
                taken = await scripts.flushed("ledger", some, generation=generation, seq=step)
                answer = [taken, [held for _, *held in some]]
            else:
                answer = await scripts.books(["P", "Q"], generation=sent)
            answers.append(answer)
        assert answers[0] == answers[1], f"step {step}: {what}"
        if what == "restock" and answers[0].status == "OK":
            leases[pool] = lease
    await real.aclose()
