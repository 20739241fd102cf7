"""The table of checks: each row is passed by what is right, failed by what is wrong, and unknown without its facts."""

from __future__ import annotations

from typing import Any

import pytest

from service.checks import CHECKS, Facts, judged

GOOD: dict[str, dict[str, str]] = {
    "redis": {
        "appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no",
        "maxmemory-policy": "noeviction", "maxmemory": "0", "memory_needed": "1000", "redis_version": "8.2.2",
        "role": "master", "connected_slaves": "0", "min-replicas-to-write": "0", "cluster_enabled": "0",
        "refused": "",
    },
    "postgresql": {
        "synchronous_commit": "on", "fsync": "on", "full_page_writes": "on", "server_version_num": "140000",
        "server_encoding": "UTF8", "max_connections": "97", "connections_needed": "97",
    },
    "sqlite": {"journal_mode": "wal", "synchronous": "2"},
}  # fmt: skip

WRONG: list[tuple[str, dict[str, str]]] = [
    ("appendonly", {"appendonly": "no"}),
    ("appendfsync", {"appendfsync": "everysec"}),
    ("appendfsync", {"appendfsync": "no"}),
    ("no-appendfsync-on-rewrite", {"no-appendfsync-on-rewrite": "yes"}),
    ("maxmemory-policy", {"maxmemory-policy": "allkeys-lru"}),
    ("maxmemory", {"maxmemory": "999"}),
    ("version", {"redis_version": "7.0.15"}),
    ("version", {"redis_version": "7.2.10"}),
    ("version", {"redis_version": "7.4.5"}),
    ("version", {"redis_version": "8.2.1"}),
    ("version", {"valkey_version": "8.0.5"}),
    ("version", {"valkey_version": "8.1.3"}),
    ("version", {"valkey_version": "7.2.11"}),
    ("replicas", {"connected_slaves": "2", "min-replicas-to-write": "1"}),
    ("replicas", {"role": "slave"}),
    ("min-replicas-to-write", {"min-replicas-to-write": "1"}),
    ("cluster", {"cluster_enabled": "1"}),
    ("rights", {"refused": "xadd, lpop"}),
    ("synchronous_commit", {"synchronous_commit": "off"}),
    ("synchronous_commit", {"synchronous_commit": "local"}),
    ("fsync", {"fsync": "off"}),
    ("full_page_writes", {"full_page_writes": "off"}),
    ("postgresql-version", {"server_version_num": "130022"}),
    ("server_encoding", {"server_encoding": "SQL_ASCII"}),
    ("max_connections", {"max_connections": "96"}),
    ("journal_mode", {"journal_mode": "delete"}),
    ("synchronous", {"synchronous": "1"}),
]  # fmt: skip

FINE: list[tuple[str, dict[str, str]]] = [
    ("redis", {"redis_version": "7.2.11"}),
    ("redis", {"redis_version": "7.4.6"}),
    ("redis", {"redis_version": "8.4.0"}),
    ("redis", {"valkey_version": "8.0.6", "redis_version": "7.2.4"}),
    ("redis", {"valkey_version": "9.1.2", "redis_version": "7.2.4"}),
    ("redis", {"maxmemory": "1000"}),
    ("postgresql", {"synchronous_commit": "remote_apply"}),
    ("postgresql", {"server_version_num": "180001"}),
    ("sqlite", {"synchronous": "3"}),
]

# What a check can't be judged without.
NEEDS = {
    "maxmemory": "maxmemory", "version": "redis_version", "replicas": "role", "min-replicas-to-write": "role",
    "cluster": "cluster_enabled", "rights": "refused", "postgresql-version": "server_version_num",
}  # fmt: skip


def verdicts(server: Any, facts: Facts, *accepted: str) -> dict[str, tuple[str, bool]]:
    return {one.check: (one.state, one.accepted) for one in judged(server, facts, frozenset(accepted))}


@pytest.mark.parametrize("server", GOOD)
def test_what_is_right_passes(server: str) -> None:
    assert verdicts(server, GOOD[server]) == {}


@pytest.mark.parametrize(("server", "facts"), FINE)
def test_what_is_as_good_passes_too(server: str, facts: dict[str, str]) -> None:
    assert verdicts(server, GOOD[server] | facts) == {}


@pytest.mark.parametrize(("name", "facts"), WRONG)
def test_what_is_wrong_fails_its_check_and_no_other(name: str, facts: dict[str, str]) -> None:
    server = CHECKS[name].server
    assert verdicts(server, GOOD[server] | facts) == {name: ("wrong", False)}
    assert verdicts(server, GOOD[server] | facts, name) == {name: ("wrong", True)}
    [found] = judged(server, GOOD[server] | facts, frozenset())
    assert CHECKS[name].why in found.text
    assert CHECKS[name].do in found.text
    assert "\n" not in found.text


def test_every_check_is_seen_to_fail() -> None:
    assert {name for name, _ in WRONG} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_what_can_t_be_read_is_unknown_and_not_passed(name: str) -> None:
    facts = dict(GOOD[CHECKS[name].server])
    del facts[NEEDS.get(name, name)]
    assert verdicts(CHECKS[name].server, facts)[name] == ("unknown", False)
