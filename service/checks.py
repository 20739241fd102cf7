"""What Redis and the store must be like for the promises to hold: one table, and how a row is judged.

Nothing is read here: ``service.vetting`` reads the facts, by the names used below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

Server = Literal["redis", "postgresql", "sqlite"]

# What is known of one server, by name.  A fact that may not be read (a managed service, a narrow ACL) is missing.
Facts = Mapping[str, str]

# None: it can't be told.  '': it is as needed.  Else what is wrong, in a few words.
Judge = Callable[[Facts], str | None]


class Check(msgspec.Struct, frozen=True):
    """One row.  ``name`` is what VOUCHERD_ACCEPT and the metric call it; ``reads``: where its facts come from."""

    name: str
    server: Server
    reads: str
    wrong: Judge
    why: str
    do: str


class Finding(msgspec.Struct, frozen=True):
    """A check that is not passed: its setting is wrong, or can't be read.  ``accepted``: the settings name it as an
    exception.  ``text`` is one line: what is wrong, why it matters, what to do."""

    check: str
    state: Literal["wrong", "unknown"]
    accepted: bool
    text: str


def judged(server: Server, facts: Facts, accepted: frozenset[str]) -> list[Finding]:
    """The checks of ``server`` that these facts do not pass, in the order of the table."""
    found = []
    for check in CHECKS.values():
        if check.server == server and (wrong := check.wrong(facts)) != "":
            state: Literal["wrong", "unknown"] = "unknown" if wrong is None else "wrong"
            what = f"{check.name} can't be read ({check.reads})" if wrong is None else wrong
            do = f"let it be read, or see to it yourself that it is right: {check.do}" if wrong is None else check.do
            found.append(Finding(check.name, state, check.name in accepted, f"{what}: {check.why}; {do}"))
    return found


def unknown_names(names: frozenset[str]) -> list[str]:
    """Those that are no checks."""
    return sorted(names - CHECKS.keys())


def _must_be(name: str, *allowed: str) -> Judge:
    def wrong(facts: Facts) -> str | None:
        if name not in facts:
            return None
        return "" if facts[name] in allowed else f"{name} is {facts[name]}, must be {allowed[0]}"

    return wrong


# Where ways out of the Lua sandbox were closed (CVE-2025-49844 and others), by line of releases; above the last line
# they never were open.
SAFE_VERSIONS: Final = {"Redis": ((7, 2, 11), (7, 4, 6), (8, 2, 2)), "Valkey": ((8, 0, 6), (8, 1, 4))}
POSTGRESQL_LEAST: Final = 14  # major version; older ones get no more corrections


def _old_redis(facts: Facts) -> str | None:
    kind = "Valkey" if "valkey_version" in facts else "Redis"
    text = facts.get(f"{kind.lower()}_version")
    if text is None:
        return None
    version = tuple(int(part) for part in text.split(".")[:3])
    safe = next((one for one in SAFE_VERSIONS[kind] if one[:2] >= version[:2]), version)
    return "" if version >= safe else f"{kind} {text} is below {'.'.join(map(str, safe))}"


def _small_memory(facts: Facts) -> str | None:
    if "maxmemory" not in facts:
        return None
    memory, needed = int(facts["maxmemory"]), int(facts["memory_needed"])
    return f"maxmemory is {memory:,} bytes, records need {needed:,}" if 0 < memory < needed else ""


def _replicated(facts: Facts) -> str | None:
    if "role" not in facts:
        return None
    if facts["role"] != "master":
        return "this Redis is a replica"
    count = int(facts.get("connected_slaves", "0"))
    return f"replicas are attached ({count})" if count else ""


def _few_replicas(facts: Facts) -> str | None:
    if "min-replicas-to-write" not in facts or "role" not in facts:
        return None
    wanted, there = int(facts["min-replicas-to-write"]), int(facts.get("connected_slaves", "0"))
    if facts["role"] != "master" or there >= wanted:
        return ""
    return f"min-replicas-to-write is {wanted}, and {there} replicas are attached"


def _cluster(facts: Facts) -> str | None:
    if "cluster_enabled" not in facts:
        return None
    return "" if facts["cluster_enabled"] == "0" else "this Redis is a node of a cluster"


def _refused(facts: Facts) -> str | None:
    if "refused" not in facts:
        return None
    return f"this Redis user may not run {facts['refused']}" if facts["refused"] else ""


def _old_postgresql(facts: Facts) -> str | None:
    if "server_version_num" not in facts:
        return None
    major = int(facts["server_version_num"]) // 10_000
    return "" if major >= POSTGRESQL_LEAST else f"PostgreSQL {major} is below {POSTGRESQL_LEAST}"


def _few_connections(facts: Facts) -> str | None:
    if "max_connections" not in facts:
        return None
    most, needed = int(facts["max_connections"]), int(facts["connections_needed"])
    return "" if most >= needed else f"max_connections leaves {most} for users, the processes may open {needed}"


_CONFIG: Final = "CONFIG GET"
_SHOW: Final = "pg_settings"
_LOST: Final = "acknowledged vouchers are lost in a power cut: they end in quarantine, and their keys get others"

_TABLE: Final = (
    Check(
        "appendonly", "redis", f"{_CONFIG}, INFO persistence", _must_be("appendonly", "yes"),
        "without the append-only file a restart forgets acknowledged vouchers", "set `appendonly yes`",
    ),
    Check(
        "appendfsync", "redis", _CONFIG, _must_be("appendfsync", "always"), _LOST, "set `appendfsync always`",
    ),
    Check(
        "no-appendfsync-on-rewrite", "redis", _CONFIG, _must_be("no-appendfsync-on-rewrite", "no"),
        "it switches appendfsync off while the file is rewritten", "set `no-appendfsync-on-rewrite no`",
    ),
    Check(
        "maxmemory-policy", "redis", f"{_CONFIG}, INFO memory", _must_be("maxmemory-policy", "noeviction"),
        "an evicted key is a voucher issued twice", "set `maxmemory-policy noeviction`",
    ),
    Check(
        "maxmemory", "redis", f"{_CONFIG}, INFO memory", _small_memory,
        "replay records at the planned rate over the retention do not fit, and new requests will be refused",
        "raise maxmemory, or lower VOUCHERD_PLANNED_RATE or VOUCHERD_REPLAY_RETENTION_S",
    ),
    Check(
        "version", "redis", "INFO server", _old_redis,
        "scripts can break out of their sandbox there",
        "upgrade it, or make sure that your distribution has patched it",
    ),
    Check(
        "replicas", "redis", "INFO replication", _replicated,
        "replication is asynchronous, and a failover loses acknowledged vouchers into quarantine",
        "run a single server under `appendfsync always`, or accept this by name",
    ),
    Check(
        "min-replicas-to-write", "redis", f"{_CONFIG}, INFO replication", _few_replicas,
        "every write is refused until there are more, and nothing can be issued", "attach replicas, or set it to 0",
    ),
    Check(
        "cluster", "redis", "INFO cluster", _cluster,
        "keys live on several nodes, and voucherd speaks to one", "use a server that is not in cluster mode",
    ),
    Check(
        "rights", "redis", "the script lua/rights.lua", _refused,
        "a script that is stopped half-way destroys a code", "grant these commands to the user by ACL SETUSER",
    ),
    Check(
        "synchronous_commit", "postgresql", _SHOW, _must_be("synchronous_commit", "on", "remote_apply"),
        "rows are lost in a crash after the outbox has forgotten them",
        "let sessions keep `synchronous_commit = on` (a pooler that forgets settings of a session loses it)",
    ),
    Check("fsync", "postgresql", _SHOW, _must_be("fsync", "on"),
          "a power cut corrupts the store", "set `fsync = on` and restart it"),
    Check("full_page_writes", "postgresql", _SHOW, _must_be("full_page_writes", "on"),
          "a power cut can leave half-written pages", "set `full_page_writes = on`"),
    Check("postgresql-version", "postgresql", _SHOW, _old_postgresql,
          "it is not tested, and gets no corrections", "upgrade it"),
    Check("server_encoding", "postgresql", _SHOW, _must_be("server_encoding", "UTF8"),
          "text outside that encoding is refused in the middle of a flush", "make the database with `encoding utf8`"),
    Check("max_connections", "postgresql", _SHOW, _few_connections,
          "at a peak, processes wait for a connection in vain", "raise it, or lower VOUCHERD_WORKERS"),
    Check("journal_mode", "sqlite", "PRAGMA", _must_be("journal_mode", "wal"),
          "readers and the one writer shut each other out",
          "keep the store on a local disk: a network file system has no write-ahead log"),
    Check("synchronous", "sqlite", "PRAGMA", _must_be("synchronous", "2", "3"),
          "rows are lost in a power cut after the outbox has forgotten them", "report this: voucherd sets it itself"),
)  # fmt: skip

CHECKS: Final[dict[str, Check]] = {check.name: check for check in _TABLE}
