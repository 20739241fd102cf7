"""A small Redis in memory: only the commands that the scripts and the workers use, and the real ``lua/*.lua``.

``Server`` is the server's side: data, identity, scripts, time.  ``Client`` is as much of ``redis.asyncio.Redis`` as
``service`` uses, over a ``Send`` that decides what becomes of each call: who simulates a network loses, delays or
repeats calls there.  A test compares the two with a real Valkey, command by command.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

from lupa import lua51  # type: ignore[import-untyped]
from redis.exceptions import BusyLoadingError, NoScriptError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

# What a command may answer: an integer, a bulk string, nothing, a status, or a list of these.
Answer = int | str | None | list[Any]
Command = tuple[str, ...]

NO_REPLID: Final = "0" * 40
WRONGTYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"
NOT_AN_INTEGER: Final = "value is not an integer or out of range"


class Status(str):
    """A simple string: ``OK``."""

    __slots__ = ()


OK: Final = Status("OK")

StreamId = tuple[int, int]
Fields = tuple[str, ...]


class Pending:
    """One entry that a consumer has read and nobody has acknowledged."""

    __slots__ = ("consumer", "delivered_ms")

    def __init__(self, consumer: str, delivered_ms: int) -> None:
        self.consumer = consumer
        self.delivered_ms = delivered_ms


class Group:
    """A consumer group of a stream."""

    __slots__ = ("last", "pending")

    def __init__(self, last: StreamId) -> None:
        self.last = last
        self.pending: dict[StreamId, Pending] = {}

    def copy(self) -> Group:
        other = Group(self.last)
        other.pending = {id: Pending(one.consumer, one.delivered_ms) for id, one in self.pending.items()}
        return other


class Stream:
    """Entries in the order of their ids, and the groups that read them."""

    __slots__ = ("entries", "groups", "last")

    def __init__(self) -> None:
        self.entries: dict[StreamId, Fields] = {}
        self.last: StreamId = (0, 0)
        self.groups: dict[str, Group] = {}

    def copy(self) -> Stream:
        other = Stream()
        other.entries = dict(self.entries)
        other.last = self.last
        other.groups = {name: group.copy() for name, group in self.groups.items()}
        return other


class Ranked(dict[str, float]):
    """A sorted set: member -> score."""


Value = str | dict[str, str] | list[str] | Ranked | Stream

_V = TypeVar("_V", str, "dict[str, str]", "list[str]", Ranked, Stream)


class Data:
    """Everything that a server would find again on its disk."""

    __slots__ = ("expires", "keys")

    def __init__(self) -> None:
        self.keys: dict[str, Value] = {}
        self.expires: dict[str, int] = {}  # Unix milliseconds

    def copy(self) -> Data:
        """A snapshot that shares nothing with this one."""
        other = Data()
        other.keys = {key: value if isinstance(value, str) else _copied(value) for key, value in self.keys.items()}
        other.expires = dict(self.expires)
        return other


def _copied(value: dict[str, str] | list[str] | Ranked | Stream) -> Value:
    if isinstance(value, Stream):
        return value.copy()
    if isinstance(value, Ranked):
        return Ranked(value)
    return list(value) if isinstance(value, list) else dict(value)


class Server:
    """One server.  ``clock`` gives Unix seconds; every command takes one moment.

    ``on_add`` is told of every entry that any script adds to a stream: what really happened, whoever got to know.
    """

    def __init__(self, clock: Callable[[], float], identity: Callable[[], str]) -> None:
        self.clock = clock
        self.data = Data()
        self._identity = identity
        self.replid = identity()
        self.replid2 = NO_REPLID
        self.run_id = identity()
        self.role = "master"
        self.loading = False
        self.config = {
            "appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no",
            "maxmemory-policy": "noeviction",
        }  # fmt: skip
        self.scripts: dict[str, str] = {}
        self.on_add: Callable[[str, dict[str, str]], None] = lambda _key, _fields: None
        self.on_push: Callable[[str, str], None] = lambda _key, _member: None
        self._now_ms = 0
        self._lua = _lua()
        self._read_only_script = False

    # --- what may happen to it ---------------------------------------------------------------------------------

    def restart(self, data: Data, *, follows: bool = False) -> None:
        """The process is another one, over ``data``.  ``follows``: it was a replica of the one before until now."""
        self.data = data
        self.replid2 = self.replid if follows else NO_REPLID
        self.replid, self.run_id, self.role = self._identity(), self._identity(), "master"
        self.scripts.clear()

    def identity(self) -> tuple[Data, str, str, str]:
        """All that makes this server this server."""
        return self.data, self.replid, self.replid2, self.run_id

    def become(self, identity: tuple[Data, str, str, str]) -> None:
        """Another server answers at this address, one that was there before."""
        self.data, self.replid, self.replid2, self.run_id = identity
        self.role = "master"
        self.scripts.clear()

    def demote(self) -> None:
        """It follows some other server."""
        self.role = "slave"
        self.replid = self._identity()

    def promote(self, data: Data) -> None:
        """It is a master again, in the same process, with what the other server had."""
        self.data = data
        self.role, self.replid2, self.replid = "master", self.replid, self._identity()

    def rename(self) -> None:
        """A first replica or a backup: another replication id, and nothing else."""
        self.replid = self._identity()

    # --- calls -------------------------------------------------------------------------------------------------

    def call(self, command: Command) -> Answer:
        """Runs one command.  Raises redis-py's errors, as its client would."""
        self._now_ms = int(self.clock() * 1000)
        if self.loading:
            raise BusyLoadingError("Redis is loading the dataset in memory")
        name = command[0].lower()
        if self.role != "master" and name in _WRITES:
            raise ReadOnlyError("You can't write against a read only replica.")
        return self._run(name, command[1:])

    def _run(self, name: str, arguments: Sequence[str]) -> Answer:
        method = _COMMANDS.get(name)
        if method is None:
            raise ResponseError(f"unknown command '{name}'")
        least, most = _ARITY[name]
        if not least <= len(arguments) <= most:
            raise ResponseError(f"wrong number of arguments for '{name}' command")
        return method(self, *arguments)

    def evalsha(self, sha: str, key_count: str, *rest: str) -> Answer:
        text = self.scripts.get(sha)
        if text is None:
            raise NoScriptError("No matching script. Please use EVAL.")
        flags = text.split("\n", 1)[0]
        self._read_only_script = "no-writes" in flags
        if self.role != "master" and not self._read_only_script:
            raise ReadOnlyError("Can not run script with write flag on readonly replica.")
        keys = int(key_count)
        return self._lua.run(self, sha, text, rest[:keys], rest[keys:])

    def from_script(self, name: str, arguments: Sequence[str]) -> Answer:
        name = name.lower()
        if self._read_only_script and name in _WRITES:
            raise ResponseError("Write commands are not allowed from read-only scripts.")
        return self._run(name, arguments)

    def script(self, verb: str, text: str = "") -> Answer:
        if verb.lower() == "flush":
            self.scripts.clear()
            return OK
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.scripts[sha] = text
        return sha

    # --- keys --------------------------------------------------------------------------------------------------

    def _get(self, key: str, kind: type[_V]) -> _V | None:
        value = self._live(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise ResponseError(WRONGTYPE)
        return value

    def _live(self, key: str) -> Value | None:
        expires = self.data.expires.get(key)
        if expires is not None and expires <= self._now_ms:
            self._drop(key)
        return self.data.keys.get(key)

    def _drop(self, key: str) -> None:
        self.data.keys.pop(key, None)
        self.data.expires.pop(key, None)

    def _hash(self, key: str) -> dict[str, str]:
        value = self._get(key, dict)
        if value is None:
            value = self.data.keys[key] = {}
        return value

    def exists(self, *keys: str) -> int:
        return sum(self._live(key) is not None for key in keys)

    def delete(self, *keys: str) -> int:
        count = 0
        for key in keys:
            count += self._live(key) is not None
            self._drop(key)
        return count

    def expire(self, key: str, seconds: str) -> int:
        return self._expire_at_ms(key, self._now_ms + 1000 * _integer(seconds))

    def expireat(self, key: str, second: str) -> int:
        return self._expire_at_ms(key, 1000 * _integer(second))

    def _expire_at_ms(self, key: str, at_ms: int) -> int:
        if self._live(key) is None:
            return 0
        self.data.expires[key] = at_ms
        self._live(key)
        return 1

    def scan(self, cursor: str, *options: str) -> Answer:
        pattern = next((options[i + 1] for i in range(0, len(options), 2) if options[i].lower() == "match"), "*")
        # A brace or a bracket has no meaning in fnmatch's nor in our patterns' use of Redis' globs, but for "[".
        matches = re.compile(fnmatch.translate(pattern)).match
        return ["0", [key for key in list(self.data.keys) if self._live(key) is not None and matches(key)]]

    # --- strings -----------------------------------------------------------------------------------------------

    def get(self, key: str) -> Answer:
        return self._get(key, str)

    def mget(self, *keys: str) -> Answer:
        values = [self._live(key) for key in keys]
        return [value if isinstance(value, str) else None for value in values]

    def set(self, key: str, value: str, *options: str) -> Answer:
        seconds, missing_only, at = None, False, 0
        while at < len(options):
            option = options[at].lower()
            if option == "ex" and at + 1 < len(options):
                seconds, at = _integer(options[at + 1]), at + 1
                if seconds <= 0:
                    raise ResponseError("invalid expire time in 'set' command")
            elif option == "nx":
                missing_only = True
            else:
                raise ResponseError("syntax error")
            at += 1
        if missing_only and self._live(key) is not None:
            return None
        self._drop(key)
        self.data.keys[key] = value
        if seconds is not None:
            self.data.expires[key] = self._now_ms + 1000 * seconds
        return OK

    # --- hashes ------------------------------------------------------------------------------------------------

    def hget(self, key: str, field: str) -> Answer:
        return (self._get(key, dict) or {}).get(field)

    def hmget(self, key: str, *fields: str) -> Answer:
        value: dict[str, str] = self._get(key, dict) or {}
        return [value.get(field) for field in fields]

    def hgetall(self, key: str) -> Answer:
        return [text for pair in (self._get(key, dict) or {}).items() for text in pair]

    def hset(self, key: str, *pairs: str) -> Answer:
        if len(pairs) % 2:
            raise ResponseError("wrong number of arguments for 'hset' command")
        value = self._hash(key)
        before = len(value)
        value.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(value) - before

    def hdel(self, key: str, *fields: str) -> Answer:
        value: dict[str, str] | None = self._get(key, dict)
        if value is None:
            return 0
        count = sum(value.pop(field, None) is not None for field in fields)
        if not value:
            self._drop(key)
        return count

    def hincrby(self, key: str, field: str, by: str) -> Answer:
        add = _integer(by)
        present: dict[str, str] = self._get(key, dict) or {}
        try:
            total = _integer(present.get(field, "0")) + add
        except ResponseError:
            raise ResponseError("hash value is not an integer") from None
        self._hash(key)[field] = str(total)
        return total

    # --- lists -------------------------------------------------------------------------------------------------

    def llen(self, key: str) -> Answer:
        return len(self._get(key, list) or ())

    def lrange(self, key: str, first: str, last: str) -> Answer:
        start, stop = _integer(first), _integer(last)
        value: list[str] = self._get(key, list) or []
        start = max(0, start + len(value)) if start < 0 else start
        stop = stop + len(value) if stop < 0 else stop
        return value[start : stop + 1] if stop >= 0 else []

    def rpush(self, key: str, *members: str) -> Answer:
        value: list[str] | None = self._get(key, list)
        if value is None:
            value = []
            self.data.keys[key] = value
        for member in members:
            self.on_push(key, member)
        value.extend(members)
        return len(value)

    def lpop(self, key: str, count: str | None = None) -> Answer:
        wanted = 1 if count is None else _integer(count)
        if wanted < 0:
            raise ResponseError("value is out of range, must be positive")
        value: list[str] | None = self._get(key, list)
        if value is None:
            return None
        popped = value[:wanted]
        del value[:wanted]
        if not value:
            self._drop(key)
        return popped if count is not None else popped[0]

    def lpos(self, key: str, member: str) -> Answer:
        value: list[str] = self._get(key, list) or []
        return value.index(member) if member in value else None

    def lrem(self, key: str, count: str, member: str) -> Answer:
        if _integer(count) != 1:
            raise ResponseError("this server only removes the first")
        value: list[str] = self._get(key, list) or []
        if member not in value:
            return 0
        value.remove(member)
        if not value:
            self._drop(key)
        return 1

    # --- sorted sets -------------------------------------------------------------------------------------------

    def zadd(self, key: str, score: str, member: str) -> Answer:
        try:
            number = float(score)
        except ValueError:
            raise ResponseError("value is not a valid float") from None
        value: Ranked | None = self._get(key, Ranked)
        if value is None:
            value = Ranked()
            self.data.keys[key] = value
        added = member not in value
        value[member] = number
        return int(added)

    def zcard(self, key: str) -> Answer:
        return len(self._get(key, Ranked) or ())

    def zpopmin(self, key: str) -> Answer:
        value: Ranked | None = self._get(key, Ranked)
        if not value:
            return []
        member = min(value, key=lambda name: (value[name], name))
        score = value.pop(member)
        if not value:
            self._drop(key)
        return [member, _number(score)]

    # --- streams -----------------------------------------------------------------------------------------------

    def xadd(self, key: str, id: str, *pairs: str) -> Answer:
        if id != "*" or not pairs or len(pairs) % 2:
            raise ResponseError("wrong number of arguments for 'xadd' command")
        stream = self._get(key, Stream)
        if stream is None:
            stream = Stream()
            self.data.keys[key] = stream
        stream.last = max((self._now_ms, 0), (stream.last[0], stream.last[1] + 1))
        stream.entries[stream.last] = tuple(pairs)
        self.on_add(key, dict(zip(pairs[::2], pairs[1::2], strict=True)))
        return _id(stream.last)

    def xlen(self, key: str) -> Answer:
        stream = self._get(key, Stream)
        return 0 if stream is None else len(stream.entries)

    def xdel(self, key: str, *ids: str) -> Answer:
        stream = self._get(key, Stream)
        return 0 if stream is None else sum(stream.entries.pop(_parsed(id), None) is not None for id in ids)

    def xack(self, key: str, group: str, *ids: str) -> Answer:
        stream = self._get(key, Stream)
        found = stream.groups.get(group) if stream is not None else None
        return 0 if found is None else sum(found.pending.pop(_parsed(id), None) is not None for id in ids)

    def xrange(self, key: str, first: str, last: str, *options: str) -> Answer:
        stream = self._get(key, Stream)
        if stream is None:
            return []
        count = int(options[1]) if options else len(stream.entries)
        ids = list(stream.entries)
        if first == "-":
            at = 0
        elif first.startswith("("):
            at = bisect_right(ids, _parsed(first[1:]))
        else:
            start = _parsed(first)
            at = next((i for i, id in enumerate(ids) if id >= start), len(ids))
        end = None if last == "+" else _parsed(last)
        return [_entry(stream, id) for id in ids[at : at + count] if end is None or id <= end]

    def xgroup(self, verb: str, key: str, group: str, id: str, *options: str) -> Answer:
        if verb.lower() != "create" or id != "0":
            raise ResponseError("this server only creates groups that begin at 0")
        stream = self._get(key, Stream)
        if stream is None:
            if "mkstream" not in (option.lower() for option in options):
                raise ResponseError("The XGROUP subcommand requires the key to exist.")
            stream = Stream()
            self.data.keys[key] = stream
        if group in stream.groups:
            raise ResponseError("BUSYGROUP Consumer Group name already exists")
        stream.groups[group] = Group((0, 0))
        return OK

    def _group(self, key: str, group: str) -> tuple[Stream, Group]:
        stream = self._get(key, Stream)
        if stream is None or group not in stream.groups:
            raise ResponseError(f"NOGROUP No such key '{key}' or consumer group '{group}'")
        return stream, stream.groups[group]

    def xreadgroup(self, _group: str, group: str, consumer: str, *rest: str) -> Answer:
        options = [text.lower() for text in rest]
        count = int(rest[options.index("count") + 1])
        key, after = rest[-2], rest[-1]
        stream, found = self._group(key, group)
        if after == ">":
            ids = [id for id in stream.entries if id > found.last][:count]
            for id in ids:
                found.last = id
                found.pending[id] = Pending(consumer, self._now_ms)
            if not ids:
                return None
            return [[key, [_entry(stream, id) for id in ids]]]
        start = _parsed(after)
        mine = sorted(id for id, one in found.pending.items() if one.consumer == consumer and id > start)[:count]
        return [[key, [_entry(stream, id) for id in mine]]]

    def xautoclaim(self, key: str, group: str, consumer: str, idle_ms: str, start: str, *options: str) -> Answer:
        count = int(options[1]) if options else 100
        stream, found = self._group(key, group)
        first = _parsed(start)
        due = sorted(
            id for id, one in found.pending.items() if id >= first and self._now_ms - one.delivered_ms >= int(idle_ms)
        )[:count]
        claimed: list[Any] = []
        deleted: list[str] = []
        for id in due:
            if id not in stream.entries:
                del found.pending[id]
                deleted.append(_id(id))
                continue
            found.pending[id] = Pending(consumer, self._now_ms)
            claimed.append(_entry(stream, id))
        return ["0-0", claimed, deleted]

    # --- the server --------------------------------------------------------------------------------------------

    def time(self) -> Answer:
        return [str(self._now_ms // 1000), str(self._now_ms % 1000 * 1000)]

    def info(self, section: str) -> Answer:
        if section.lower() == "replication":
            lines = {
                "role": self.role, "connected_slaves": "0",
                "master_replid": self.replid, "master_replid2": self.replid2,
            }  # fmt: skip
        else:
            lines = {"valkey_version": "9.1.2", "redis_version": "7.2.4", "run_id": self.run_id}
        return f"# {section}\r\n" + "".join(f"{name}:{value}\r\n" for name, value in lines.items())

    def config_get(self, verb: str, *names: str) -> Answer:
        if verb.lower() != "get":
            raise ResponseError("this server's settings can only be read")
        return [text for name in names if name in self.config for text in (name, self.config[name])]


_MANY: Final = 1 << 20
# name: (method, least and most arguments after the name, whether it writes)
_TABLE: Final[dict[str, tuple[Callable[..., Answer], int, int, bool]]] = {
    "exists": (Server.exists, 1, _MANY, False),
    "del": (Server.delete, 1, _MANY, True),
    "unlink": (Server.delete, 1, _MANY, True),
    "expire": (Server.expire, 2, 2, True),
    "expireat": (Server.expireat, 2, 2, True),
    "scan": (Server.scan, 1, 5, False),
    "get": (Server.get, 1, 1, False),
    "mget": (Server.mget, 1, _MANY, False),
    "set": (Server.set, 2, _MANY, True),
    "hget": (Server.hget, 2, 2, False),
    "hmget": (Server.hmget, 2, _MANY, False),
    "hgetall": (Server.hgetall, 1, 1, False),
    "hset": (Server.hset, 3, _MANY, True),
    "hdel": (Server.hdel, 2, _MANY, True),
    "hincrby": (Server.hincrby, 3, 3, True),
    "llen": (Server.llen, 1, 1, False),
    "lrange": (Server.lrange, 3, 3, False),
    "rpush": (Server.rpush, 2, _MANY, True),
    "lpop": (Server.lpop, 1, 2, True),
    "lpos": (Server.lpos, 2, 2, False),
    "lrem": (Server.lrem, 3, 3, True),
    "zadd": (Server.zadd, 3, 3, True),
    "zcard": (Server.zcard, 1, 1, False),
    "zpopmin": (Server.zpopmin, 1, 1, True),
    "xadd": (Server.xadd, 4, _MANY, True),
    "xlen": (Server.xlen, 1, 1, False),
    "xdel": (Server.xdel, 2, _MANY, True),
    "xack": (Server.xack, 3, _MANY, True),
    "xrange": (Server.xrange, 3, 5, False),
    "xgroup": (Server.xgroup, 4, 5, True),
    "xreadgroup": (Server.xreadgroup, 8, 8, True),
    "xautoclaim": (Server.xautoclaim, 5, 7, True),
    "time": (Server.time, 0, 0, False),
    "info": (Server.info, 1, 1, False),
    "config": (Server.config_get, 2, _MANY, False),
    "script": (Server.script, 1, 2, False),
    "evalsha": (Server.evalsha, 2, _MANY, False),
}
_COMMANDS: Final = {name: row[0] for name, row in _TABLE.items()}
_ARITY: Final = {name: (row[1], row[2]) for name, row in _TABLE.items()}
_WRITES: Final = frozenset(name for name, row in _TABLE.items() if row[3])


def _integer(text: str) -> int:
    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text) is None or not -(2**63) <= int(text) < 2**63:
        raise ResponseError(NOT_AN_INTEGER)
    return int(text)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _id(id: StreamId) -> str:
    return f"{id[0]}-{id[1]}"


def _parsed(id: str) -> StreamId:
    milliseconds, _, number = id.partition("-")
    return int(milliseconds), int(number or 0)


def _entry(stream: Stream, id: StreamId) -> list[Any]:
    fields = stream.entries.get(id)
    return [_id(id), None if fields is None else list(fields)]


# --- Lua -----------------------------------------------------------------------------------------------------------


class _Lua:
    """One interpreter for all servers; each script is compiled once."""

    def __init__(self) -> None:
        self._runtime = lua51.LuaRuntime(encoding="utf-8", register_eval=False, unpack_returned_tuples=False)
        self._compiled: dict[str, Any] = {}
        self._server: Server | None = None
        self._table_from = self._runtime.table_from
        make = self._runtime.execute(f"return function(...) {_PRELUDE} end")
        self._set = make(self._call)

    def run(self, server: Server, sha: str, text: str, keys: Sequence[str], arguments: Sequence[str]) -> Answer:
        compiled = self._compiled.get(sha)
        if compiled is None:
            # Line 1 is for the server; an empty one keeps the line numbers of errors.
            compiled = self._compiled[sha] = self._runtime.compile(re.sub(r"\A#!lua[^\n]*", "", text))
        self._server = server
        self._set(self._table_from(keys), self._table_from(arguments))
        try:
            return self._converted(compiled())
        except lua51.LuaError as error:
            raise ResponseError(f"{str(error)[:200]} script: {sha}, on @user_script") from None

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._server is not None
        reply = self._server.from_script(name, [_text(argument) for argument in arguments])
        if reply is None:
            return False
        if isinstance(reply, Status):
            return self._table_from({"ok": str(reply)})
        if isinstance(reply, list):
            return self._table_from([False if one is None else one for one in reply])
        return reply

    def _converted(self, value: Any) -> Answer:
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, (int, float)):
            return int(value)
        if isinstance(value, str):
            return value
        if (error := value["err"]) is not None:
            raise ResponseError(error)
        if (ok := value["ok"]) is not None:
            return Status(ok)
        replies: list[Any] = []
        at = 1
        while (one := value[at]) is not None:
            replies.append(self._converted(one))
            at += 1
        return replies


# Scripts see what a server would give them, and the same globals from call to call.
_PRELUDE: Final = """
local call = ...
redis = {call = call, error_reply = function(text) return {err = text} end}
return function(keys, arguments) KEYS, ARGV = keys, arguments end
"""


_interpreters: list[_Lua] = []


def _lua() -> _Lua:
    if not _interpreters:
        _interpreters.append(_Lua())
    return _interpreters[0]


def _text(argument: Any) -> str:
    if isinstance(argument, str):
        return argument
    if isinstance(argument, float) and argument == int(argument):
        return str(int(argument))
    if isinstance(argument, bool) or not isinstance(argument, (int, float)):
        raise ResponseError("Lua redis lib command arguments must be strings or integers")
    return str(argument) if isinstance(argument, int) else f"{argument:.17g}"


# --- the client ----------------------------------------------------------------------------------------------------

Send = Callable[[Sequence[Command]], Awaitable[list[Any]]]


class Client:
    """What ``service`` uses of ``redis.asyncio.Redis`` with ``decode_responses=True``.

    ``send`` runs some commands in one go and returns their replies, a fault of one of them as its reply; it raises
    what the network did.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.connection_pool = _Pool()

    async def _one(self, *command: Any) -> Any:
        (reply,) = await self._send([_encoded(command)])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def pipeline(self, transaction: bool = True) -> Pipeline:
        return Pipeline(self._send)

    async def evalsha(self, sha: str, key_count: int, *rest: Any) -> Any:
        return await self._one("evalsha", sha, key_count, *rest)

    async def script_load(self, text: str) -> Any:
        return await self._one("script", "load", text)

    async def get(self, key: str) -> Any:
        return await self._one("get", key)

    async def mget(self, keys: Sequence[str]) -> Any:
        return await self._one("mget", *keys)

    async def lrange(self, key: str, first: int, last: int) -> Any:
        return await self._one("lrange", key, first, last)

    async def set(self, key: str, value: Any) -> Any:
        return await self._one("set", key, value)

    async def hset(self, key: str, field: str, value: Any) -> Any:
        return await self._one("hset", key, field, value)

    async def hget(self, key: str, field: str) -> Any:
        return await self._one("hget", key, field)

    async def hdel(self, key: str, *fields: str) -> Any:
        return await self._one("hdel", key, *fields)

    async def hgetall(self, key: str) -> dict[str, str]:
        return _paired(await self._one("hgetall", key))

    async def exists(self, *keys: str) -> Any:
        return await self._one("exists", *keys)

    async def delete(self, *keys: str) -> Any:
        return await self._one("del", *keys)

    async def unlink(self, *keys: str) -> Any:
        return await self._one("unlink", *keys)

    async def scan(self, cursor: int, match: str, count: int) -> tuple[int, list[str]]:
        after, found = await self._one("scan", cursor, "match", match, "count", count)
        return int(after), found

    async def info(self, section: str) -> dict[str, str]:
        return _information(await self._one("info", section))

    async def config_get(self, *names: str) -> dict[str, str]:
        return _paired(await self._one("config", "get", *names))

    async def zpopmin(self, key: str, count: int) -> list[tuple[str, float]]:
        found = list[tuple[str, float]]()
        while len(found) < count and (reply := await self._one("zpopmin", key)):
            found.append((reply[0], float(reply[1])))
        return found

    async def bzpopmin(self, key: str, timeout: float) -> tuple[str, str, float] | None:
        """Does not wait: whoever simulates time looks again later."""
        reply = await self._one("zpopmin", key)
        return (key, reply[0], float(reply[1])) if reply else None

    async def xlen(self, key: str) -> Any:
        return await self._one("xlen", key)

    async def xrange(self, key: str, first: str = "-", last: str = "+", count: int | None = None) -> Any:
        reply = await self._one("xrange", key, first, last, *(("count", count) if count is not None else ()))
        return [_parsed_entry(entry) for entry in reply]

    async def xgroup_create(self, key: str, group: str, *, id: str, mkstream: bool) -> Any:
        return await self._one("xgroup", "create", key, group, id, *(("mkstream",) if mkstream else ()))

    async def xreadgroup(
        self, group: str, consumer: str, streams: Mapping[str, str], count: int, block: int | None = None
    ) -> Any:
        """Does not block: whoever simulates time looks again later."""
        ((key, after),) = streams.items()
        reply = await self._one("xreadgroup", "group", group, consumer, "count", count, "streams", key, after)
        return [[name, [_parsed_entry(entry) for entry in entries]] for name, entries in reply or ()]

    async def xautoclaim(self, key: str, group: str, consumer: str, min_idle_time: int, *, count: int) -> Any:
        after, claimed, deleted = await self._one(
            "xautoclaim", key, group, consumer, min_idle_time, "0-0", "count", count
        )
        return [after, [_parsed_entry(entry) for entry in claimed], deleted]

    async def aclose(self) -> None:
        """Nothing is open."""


class Pipeline:
    """Commands that are sent together."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._commands: list[Command] = []
        self._parsers: list[Callable[[Any], Any]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._commands = []

    def _add(self, *command: Any, parser: Callable[[Any], Any] = lambda reply: reply) -> None:
        self._commands.append(_encoded(command))
        self._parsers.append(parser)

    def hmget(self, key: str, fields: Iterable[str]) -> None:
        self._add("hmget", key, *fields)

    def get(self, key: str) -> None:
        self._add("get", key)

    def set(self, key: str, value: Any) -> None:
        self._add("set", key, value)

    def expire(self, key: str, seconds: int) -> None:
        self._add("expire", key, seconds)

    def info(self, section: str) -> None:
        self._add("info", section, parser=_information)

    def config_get(self, *names: str) -> None:
        self._add("config", "get", *names, parser=_paired)

    async def execute(self) -> list[Any]:
        replies = await self._send(self._commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return [parse(reply) for parse, reply in zip(self._parsers, replies, strict=True)]


class _Pool:
    async def disconnect(self, inuse_connections: bool = True) -> None:
        """There are no connections."""


def direct(server: Server) -> Send:
    """A network on which nothing ever happens."""

    async def send(commands: Sequence[Command]) -> list[Any]:
        return answered(server, commands)

    return send


def answered(server: Server, commands: Sequence[Command]) -> list[Any]:
    """Runs ``commands``; an error that the server answers is that command's reply.  Connection errors are raised."""
    replies: list[Any] = []
    for command in commands:
        try:
            replies.append(server.call(command))
        except BusyLoadingError:
            raise
        except RedisConnectionError:
            raise
        except ResponseError as error:
            replies.append(error)
    return replies


def _encoded(command: Iterable[Any]) -> Command:
    return tuple(
        one if isinstance(one, str) else one.decode() if isinstance(one, bytes) else str(one) for one in command
    )


def _paired(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _information(text: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _parsed_entry(entry: Sequence[Any]) -> tuple[str, dict[str, str] | None]:
    return entry[0], None if entry[1] is None else _paired(entry[1])
