"""The typed door to each Lua script, and the only caller of EVALSHA.

A script's header (``lua/<name>.lua``) is its contract; the functions here have the scripts' names and turn
replies into values.  Every script checks generation and identity by itself, so the caller learns from a reply,
never from an earlier look, whether the data is the data it thinks it is.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service import keys
from service.domain import RECORD_SEPARATOR, CapHolder, Code, RateLimit, Request
from service.errors import Misconfigured, RedisDiskFull, RedisFull, RedisUnreachable, ReplyMismatch, ScriptFailed

NAMES: Final = (
    "issue", "replay", "restock", "stock", "exhausted", "withdraw", "take_back", "publish", "open", "restore",
    "flushed", "distrust", "forget", "books", "rights",
)  # fmt: skip

# Codes set aside by one call: enough that an expired lot of a full window is stepped over within a few hundred
# calls, few enough that a call stays below a millisecond.
SET_ASIDE_MAX: Final = 32


class Script(msgspec.Struct, frozen=True):
    """One Lua file: its text and the SHA-1 by which the server knows it."""

    name: str
    text: str
    sha: str


@cache
def load(name: str) -> Script:
    """The script ``lua/<name>.lua``, from the installed package or from the checkout.

    Raises Misconfigured if the file is not there: a service without its scripts must not start.
    """
    package = Path(__file__).parent
    for folder in (package / "lua", package.parent / "lua"):
        path = folder / f"{name}.lua"
        if path.is_file():
            text = path.read_text(encoding="ascii")
            return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    raise Misconfigured(f"lua/{name}.lua is missing from this installation: install voucherd again")


# --- what issue is asked ------------------------------------------------------------------------------------------

PeriodBounds = tuple[int, int, int]


class Counter(msgspec.Struct, frozen=True):
    """What a cap is counted in: one campaign's vouchers over one kind of period."""

    campaign: str
    period: Literal["total", "day", "hour"]
    time_zone: str


class CountedCap(msgspec.Struct, frozen=True):
    """What ``holder`` has of ``counter`` may not pass ``limit``.  The script completes whose it is by the request, so
    that requests of many distributors share one plan."""

    counter: Counter
    holder: CapHolder
    limit: int


class Candidate(msgspec.Struct, frozen=True, eq=False):
    """One campaign that may issue: from which pool, when, under which caps.  ``rule`` goes into the record.

    Compared by identity: one catalogue makes each once."""

    pool: str
    least_life_s: int
    starts_at: int
    until: int
    rule: str
    caps: tuple[CountedCap, ...]


class Plan(msgspec.Struct, frozen=True, eq=False):
    """Candidates in the order in which they are tried.  Compared by identity: one catalogue makes each once."""

    candidates: tuple[Candidate, ...]


class Routed(msgspec.Struct):
    """One request on its way into a batch.  ``looked_up``: its key is not in the ledger, as of a moment ago.
    ``limit``: its distributor's, the same for all requests of it in a batch."""

    request: Request
    plan: Plan
    looked_up: bool = False
    limit: RateLimit | None = None


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What ``issue`` (or ``replay``) said of one request; see the script's header for status and detail."""

    status: str
    detail: str


class Reply(msgspec.Struct, frozen=True):
    """What ``issue`` or ``replay`` said.  ``generation`` is the one that is open (0: none), ``now`` Unix seconds by the
    server's clock, ``fence`` the version to load if STALE, ``pools`` what a REFILL's index points into."""

    status: Literal["OK", "STALE", "LOST", "CLOCK"]
    generation: int
    now: int
    fence: int
    answers: list[Answer]
    pools: Sequence[str] = ()


class Restocked(msgspec.Struct, frozen=True):
    status: Literal["OK", "DONE", "FORKED", "LOST"]
    length: int
    last_lease: str


class Window(msgspec.Struct, frozen=True):
    """One pool as Redis has it.  ``exhausted`` is the stock version at which it was, -1 if it was not."""

    length: int
    lease: str
    stock: int
    exhausted: int


class Books(msgspec.Struct, frozen=True):
    """A generation's books in Redis, read at one moment; all counts are codes but ``bytes`` and ``entries``."""

    seq: int
    codes: int
    restocked: int
    popped: int
    set_aside: int
    taken_back: int
    withdrawn: int
    lost: int  # outbox sequence that was flushed and that the store lost; 0 if it did not
    bytes: int  # in the outbox
    entries: int
    flushed: tuple[int, ...]  # outbox sequences that were flushed last
    windows: dict[str, Window]


class Count(msgspec.Struct, frozen=True):
    """Codes to add to one cap counter.  ``key`` is the caps hash, ``expires_at`` Unix seconds, 0: never."""

    key: str
    field: str
    codes: int
    expires_at: int


NO_SECOND_REPLID: Final = "0" * 40


class Generation(msgspec.Struct, frozen=True):
    """``{p}:generation`` and the server it is on, read together.  ``open`` is 0 if nothing is open; ``synced`` is the
    ``run_id`` of a server that was seen to sync before it answers (``service.worker.restart``), '' if none was."""

    open: int
    replid: str
    run_id: str
    restoring: bool
    synced: str
    fence: int  # -1: none
    server_replid: str
    server_replid2: str
    server_run_id: str
    server_role: str

    @property
    def agrees(self) -> bool:
        """Scripts that are sent ``open`` are accepted."""
        return self.open > 0 and self.replid == self.server_replid and self.fence >= 0


class Scripts:
    """The scripts of one partition.

    Each function raises RedisUnreachable if the server did not answer (what was sent may have been executed),
    RedisFull or RedisDiskFull if a writing script was refused before its first line, ScriptFailed if our own code or
    data is wrong.
    """

    def __init__(self, redis: Redis, partition: int = 0) -> None:
        self.redis: Any = redis  # redis-py's reply types don't know what decode_responses does
        self.partition = partition
        self._fence = keys.fence(partition)
        self._generation = keys.generation(partition)
        self._demand = keys.demand(partition)

    # --- the hot path -------------------------------------------------------------------------------------------

    async def issue(
        self,
        batch: Sequence[Routed],
        *,
        generation: int,
        version: int,
        outbox_max: int,
        outbox_bytes_max: int,
        retention_s: int,
        bounds: Mapping[Counter, PeriodBounds],
    ) -> Reply:
        """Runs ``lua/issue.lua``.  ``bounds`` holds, for each counter of the plans, start, middle and end; the outbox
        is to hold no more than ``outbox_max`` codes and ``outbox_bytes_max`` bytes.

        Raises ReplyMismatch if the reply is not this call's; nothing of it was used and the connection is gone.
        """
        p, g = self.partition, generation
        pools: dict[str, int] = {}
        counters: dict[Counter, int] = {}
        plans: dict[Plan, int] = {}
        limits: dict[str, RateLimit] = {}
        pool_args: list[str | int] = []
        pool_keys: list[str] = []
        counter_args: list[str | int] = []
        counter_keys: list[str] = []
        plan_args: list[str | int] = []
        request_args: list[str | int] = []
        replay_keys: list[str] = []
        traced = False
        replays = keys.replays(p, g)
        for routed in batch:
            plan, request = routed.plan, routed.request
            index = plans.get(plan)
            if index is None:
                if plan.candidates:
                    index = plans[plan] = len(plans) + 1
                    self._add_plan(
                        plan, g, bounds, pools, pool_keys, pool_args, counters, counter_keys, counter_args, plan_args
                    )
                else:
                    index = 0
            if routed.limit is not None:
                limits[request.distributor] = routed.limit
            api, client, key = request.api, request.client, request.key
            replay_keys.append(f"{replays}{api}:{client}:{keys.short(key)}")
            request_args += (
                f"{index}:{request.quantity}:{1 if routed.looked_up else 0}:{request.distributor}", request.payload,
                f"{api}\n{request.distributor}\n{client}\n{key}",
            )  # fmt: skip
            if request.trace:
                traced = True
        traces = [routed.request.trace for routed in batch] if traced else []
        nonce = secrets.token_hex(8)
        raw = await self._call(
            "issue",
            [self._generation, self._fence, keys.totals(p, g), keys.outbox(p, g), self._demand,
             *pool_keys, *counter_keys, *[keys.rate(p, g, distributor) for distributor in limits], *replay_keys],
            [g, version, nonce, outbox_max, outbox_bytes_max, SET_ASIDE_MAX, retention_s,
             len(pools), len(counters), len(limits), len(plans), len(batch), len(traces), *pool_args, *counter_args,
             *[value for distributor, limit in limits.items() for value in (distributor, limit.rate, limit.burst)],
             *plan_args, *request_args, *traces],
        )  # fmt: skip
        return await self._batch_reply(raw, nonce, [routed.request for routed in batch], tuple(pools))

    def _add_plan(
        self,
        plan: Plan,
        generation: int,
        bounds: Mapping[Counter, PeriodBounds],
        pools: dict[str, int],
        pool_keys: list[str],
        pool_args: list[str | int],
        counters: dict[Counter, int],
        counter_keys: list[str],
        counter_args: list[str | int],
        plan_args: list[str | int],
    ) -> None:
        p = self.partition
        plan_args.append(len(plan.candidates))
        for candidate in plan.candidates:
            pool = pools.get(candidate.pool)
            if pool is None:
                pool = pools[candidate.pool] = len(pools) + 1
                pool_keys += (keys.window(p, generation, candidate.pool), keys.pool(p, generation, candidate.pool))
                pool_args += (candidate.pool, candidate.least_life_s)
            plan_args += (pool, candidate.starts_at, candidate.until, candidate.rule, len(candidate.caps))
            for cap in candidate.caps:
                counter = counters.get(cap.counter)
                if counter is None:
                    counter = counters[cap.counter] = len(counters) + 1
                    start, middle, end = bounds[cap.counter]
                    counter_keys += (
                        counter_key(p, generation, cap.counter, start),
                        counter_key(p, generation, cap.counter, middle),
                    )
                    counter_args += (start, middle, end)
                plan_args += (counter, cap.holder[0], cap.limit)

    async def replay(self, requests: Sequence[Request], *, generation: int, version: int) -> Reply:
        """Runs ``lua/replay.lua``: the records of ``requests``, or, for none, whether ``version`` is in force."""
        p = self.partition
        nonce = secrets.token_hex(8)
        raw = await self._call(
            "replay",
            [self._generation, self._fence, *(keys.replay(p, generation, r.api, r.client, r.key) for r in requests)],
            [generation, version, nonce, *(r.payload for r in requests)],
        )
        return await self._batch_reply(raw, nonce, requests, ())

    async def _batch_reply(self, raw: Any, nonce: str, requests: Sequence[Request], pools: Sequence[str]) -> Reply:
        """The reply as values.  Raises ReplyMismatch if it is not this call's: a reply names the call by its nonce, and
        a record what was asked for, so that no answer can reach anyone else (reliability.md 15)."""
        if isinstance(raw, list) and len(raw) >= 4 and raw[1] == nonce:
            status: Literal["OK", "STALE", "LOST", "CLOCK"] = raw[0]
            answers = list(map(Answer, raw[4::2], raw[5::2])) if status == "OK" else []
            fence = int(raw[4]) if status == "STALE" else 0
            if status != "OK" or (
                len(raw) == 4 + 2 * len(requests)
                and all(
                    _belongs(answer.detail, request)
                    for answer, request in zip(answers, requests, strict=True)
                    if answer.status in ("ISSUED", "REPLAY")
                )
            ):
                return Reply(status, int(raw[2] or 0), int(raw[3]), fence, answers, pools)
        await self.redis.connection_pool.disconnect(inuse_connections=True)
        raise ReplyMismatch

    # --- the worker and the commands ----------------------------------------------------------------------------

    async def restock(
        self, pool: str, lease_id: str, predecessor: str, codes: Iterable[Code], *,
        generation: int, stock_version: int, low_water: int,
    ) -> Restocked:  # fmt: skip
        """Runs ``lua/restock.lua``: afterwards the lease is in the window exactly once, or the status says why not."""
        p = self.partition
        raw = await self._call(
            "restock",
            [
                self._generation,
                keys.totals(p, generation),
                keys.window(p, generation, pool),
                keys.pool(p, generation, pool),
            ],
            [generation, lease_id, predecessor, stock_version, low_water, *(code.pack() for code in codes)],
        )
        return Restocked(raw[0], int(raw[1]), raw[2] if len(raw) > 2 else "")

    async def stock(self, pool: str, stock_version: int, *, generation: int) -> Literal["OK", "LOST"]:
        """Runs ``lua/stock.lua``: nothing that was exhausted at an older stock version still is, in this partition."""
        raw = await self._call(
            "stock",
            [self._generation, keys.pool(self.partition, generation, pool), self._demand],
            [generation, pool, stock_version],
        )
        status: Literal["OK", "LOST"] = raw[0]
        return status

    async def exhausted(
        self, pool: str, stock_version: int, last_lease: str, *, generation: int
    ) -> Literal["OK", "CHANGED", "LOST"]:
        """Runs ``lua/exhausted.lua``: notes that at this version nothing was left to lease after this lease."""
        raw = await self._call(
            "exhausted",
            [
                self._generation,
                keys.pool(self.partition, generation, pool),
                keys.outbox(self.partition, generation),
            ],
            [generation, stock_version, last_lease],
        )
        status: Literal["OK", "CHANGED", "LOST"] = raw[0]
        return status

    async def withdraw(self, pool: str, codes: Iterable[Code], *, generation: int) -> list[bool] | None:
        """Runs ``lua/withdraw.lua``: none of ``codes`` is in the pool's window any more, and those that were are on
        their way to the store; for each, whether it was.  None if the generation is not the open one."""
        p = self.partition
        raw = await self._call(
            "withdraw",
            [
                self._generation,
                keys.totals(p, generation),
                keys.window(p, generation, pool),
                keys.outbox(p, generation),
            ],
            [generation, *(code.pack() for code in codes)],
        )
        return None if raw[0] == "LOST" else [flag == 1 for flag in raw[1:]]

    async def take_back(
        self, pool: str, codes: int, *, generation: int, outbox_max: int
    ) -> list[Code] | Literal["BACKLOG", "LOST"]:
        """Runs ``lua/take_back.lua``: the codes returned, at most ``codes``, are in the pool's window no more and on
        their way to the store.  None if the window is empty; nothing was taken if a word is returned."""
        p = self.partition
        raw = await self._call(
            "take_back",
            [
                self._generation,
                keys.totals(p, generation),
                keys.window(p, generation, pool),
                keys.outbox(p, generation),
                keys.pool(p, generation, pool),
            ],
            [generation, codes, outbox_max],
        )
        return [Code.unpack(text) for text in raw[1:]] if raw[0] == "OK" else raw[0]

    async def publish(self, version: int) -> Literal["OK", "LOST"]:
        """Runs ``lua/publish.lua``: afterwards no script of this partition accepts a catalogue below ``version``."""
        status: Literal["OK", "LOST"] = (await self._call("publish", [self._fence], [version]))[0]
        return status

    async def open(
        self, seen: Generation, generation: int, *, version: int, restoring: bool
    ) -> Literal["OK", "MOVED", "LOST"]:
        """Runs ``lua/open.lua``: opens ``generation`` if Redis is still as it was ``seen``."""
        raw = await self._call(
            "open",
            [self._generation, self._fence],
            [seen.open or "", generation, seen.server_replid, seen.server_run_id, version, int(restoring)],
        )
        status: Literal["OK", "MOVED", "LOST"] = raw[0]
        return status

    async def restore(
        self, records: Sequence[tuple[str, str, str, str]], counts: Sequence[Count], *,
        open_generation: int, generation: int, retention_s: int,
    ) -> tuple[Literal["OK", "MOVED"], int]:  # fmt: skip
        """Runs ``lua/restore.lua`` with ``records`` as (api, client, key, record text); says how many were missing."""
        p = self.partition
        raw = await self._call(
            "restore",
            [
                self._generation,
                *(keys.replay(p, generation, api, client, key) for api, client, key, _ in records),
                *(count.key for count in counts),
            ],
            [
                open_generation or "", retention_s, len(records),
                *(text for _, _, _, text in records),
                *(value for count in counts for value in (count.field, count.codes, count.expires_at)),
            ],
        )  # fmt: skip
        return raw[0], int(raw[1])

    async def flushed(self, group: str, entries: Sequence[tuple[str, int, int]], *, generation: int, seq: int) -> int:
        """Runs ``lua/flushed.lua`` for ``entries`` of (stream id, codes, bytes): how many were still in the outbox.

        ``seq``: outbox sequence of one of them that is in the ledger, 0 if none is.
        """
        p = self.partition
        raw = await self._call(
            "flushed",
            [keys.totals(p, generation), keys.outbox(p, generation)],
            [group, seq, *(value for entry in entries for value in entry)],
        )
        return int(raw[1])

    async def distrust(self, generation: int, seq: int) -> Literal["OK", "GONE"]:
        """Runs ``lua/distrust.lua``: it is noted that the store lost the entry ``seq``, which was flushed."""
        raw = await self._call("distrust", [keys.totals(self.partition, generation)], [seq])
        status: Literal["OK", "GONE"] = raw[0]
        return status

    async def forget(self, found: Sequence[str], *, generation: int) -> tuple[Literal["OK", "OPEN", "HELD"], int]:
        """Runs ``lua/forget.lua``: the keys ``found`` of a generation that was left are gone; how many there were."""
        p = self.partition
        raw = await self._call("forget", [self._generation, keys.outbox(p, generation), *found], [generation])
        return raw[0], int(raw[1])

    async def books(self, pools: Sequence[str], *, generation: int) -> Books | None:
        """Runs ``lua/books.lua``: the books of ``generation`` over ``pools``, or None if another one is open."""
        p = self.partition
        raw = await self._call(
            "books",
            [
                self._generation, keys.totals(p, generation), keys.outbox(p, generation),
                *(key for pool in pools for key in (keys.window(p, generation, pool), keys.pool(p, generation, pool))),
            ],
            [generation or ""],
        )  # fmt: skip
        if raw[0] == "MOVED":
            return None
        seq, codes, restocked, popped, set_aside, taken_back, withdrawn, lost, held, entries = (
            int(value) for value in raw[2:12]
        )
        flushed, windows = sequences(raw[12]), raw[13:]
        return Books(
            seq, codes, restocked, popped, set_aside, taken_back, withdrawn, lost, held, entries, flushed,
            {
                pool: Window(int(windows[i]), windows[i + 1], int(windows[i + 2]), int(windows[i + 3] or -1))
                for i, pool in zip(range(0, len(windows), 4), pools, strict=True)
            },
        )  # fmt: skip

    async def is_full(self) -> bool:
        """Whether the server's memory is at its limit, so that scripts that need some are refused."""
        try:
            memory = await self.redis.info("memory")
        except ResponseError:
            return False  # it is not told
        except RedisError as error:
            raise _fault(error) from error
        return 0 < int(memory.get("maxmemory", 0)) <= int(memory.get("used_memory", 0))

    async def rights(self, commands: Sequence[str]) -> list[str]:
        """Runs ``lua/rights.lua``: those of ``commands`` that this Redis user may not run."""
        raw = await self._call("rights", [], list(commands))
        return list(raw[1:])

    async def generation(self) -> Generation:
        """The open generation and the server it is on, read in one transaction."""
        try:
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.hmget(self._generation, ["open", "replid", "run_id", "restoring", "synced"])
                pipe.get(self._fence)
                pipe.info("replication")
                pipe.info("server")
                (opened, replid, run_id, restoring, synced), fence, replication, server = await pipe.execute()
        except RedisError as error:
            raise _fault(error) from error
        return Generation(
            open=int(opened or 0),
            replid=replid or "",
            run_id=run_id or "",
            restoring=restoring is not None,
            synced=synced or "",
            fence=-1 if fence is None else int(fence),
            server_replid=_identifier(replication["master_replid"]),
            server_replid2=_identifier(replication["master_replid2"]),
            server_run_id=_identifier(server["run_id"]),
            server_role=str(replication["role"]),
        )

    async def _call(self, name: str, script_keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        script = load(name)
        try:
            try:
                reply = await self.redis.evalsha(script.sha, len(script_keys), *script_keys, *arguments)
            except NoScriptError:  # not executed: the server restarted or its script cache was flushed
                await self.redis.script_load(script.text)
                reply = await self.redis.evalsha(script.sha, len(script_keys), *script_keys, *arguments)
        except RedisError as error:
            raise _fault(error, name) from error
        except OSError as error:
            raise RedisUnreachable from error
        return reply


def counter_key(partition: int, generation: int, counter: Counter, start: int) -> str:
    """The caps hash of ``counter`` for the period that starts at ``start`` (0 for a total)."""
    period = counter.period if counter.period == "total" else f"{counter.period}:{start}"
    return keys.caps(partition, generation, counter.campaign, period)


def sequences(text: str) -> tuple[int, ...]:
    """The outbox sequences that ``flushed`` noted last."""
    return tuple(map(int, text.split(","))) if text else ()


def parse_separated(text: str) -> list[str]:
    """What ``issue`` joined in one field of an outbox entry."""
    return text.split(RECORD_SEPARATOR) if text else []


def _identifier(value: object) -> str:
    """40 hex digits.  redis-py takes those that are all decimal for a number: 40 zeros, "none", came as 0."""
    return f"{value:040d}" if isinstance(value, int) else str(value)


def _belongs(record: str, request: Request) -> bool:
    return record.startswith(request.payload + "\n", 1)


def _fault(error: RedisError, name: str = "") -> Exception:
    if isinstance(error, OutOfMemoryError) or str(error).startswith("OOM "):
        return RedisFull()
    if isinstance(
        error, (RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError, AuthenticationError)
    ):
        return RedisUnreachable()
    if isinstance(error, NoScriptError):  # restarted again since the script was loaded: not executed
        return RedisUnreachable()
    if isinstance(error, ResponseError):
        word = str(error).split(" ", 1)[0]
        if word == "MISCONF":
            return RedisDiskFull()
        if word in (
            "BUSY",
            "LOADING",
            "READONLY",
            "MASTERDOWN",
            "NOREPLICAS",
            "CLUSTERDOWN",
            "TRYAGAIN",
            "UNBLOCKED",
        ):
            return RedisUnreachable()
        # Only the first words: an error may quote what was sent, and a code in it would end up in a log.
        return ScriptFailed(f"the script {name or 'call'} failed: {' '.join(str(error).split()[:4])}")
    return RedisUnreachable()
