"""What is forged in trials goes where a script could have written it, or nowhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from service import keys
from tests.chaos.faults import a_malformed_entry, entries_come_twice
from tests.chaos.stage import Stage

ENTRY = {"generation": "7", "seq": "1", "codes": "1", "bytes": "9", "issued": "x", "asides": ""}
OUTBOX, TOTALS = keys.outbox(0, 7), keys.totals(0, 7)

Forge = Callable[[Stage, random.Random], bool]


@pytest.fixture
def at(valkey_url: str) -> redis.Redis:
    return redis.Redis.from_url(valkey_url, decode_responses=True)


@pytest.fixture
def stage(at: redis.Redis, valkey_url: str) -> Stage:
    return cast(Stage, SimpleNamespace(admin=lambda: redis.Redis.from_url(valkey_url, decode_responses=True)))


def _opened(at: redis.Redis, replid: str = "") -> None:
    of_server = cast(dict[str, Any], at.info("replication"))["master_replid"]
    at.hset(keys.generation(0), mapping={"open": "7", "replid": replid or of_server})
    at.xadd(OUTBOX, ENTRY)  # type: ignore[arg-type]
    at.expire(OUTBOX, 60)


@pytest.mark.parametrize("forge", [a_malformed_entry, entries_come_twice])
def test_nothing_is_forged_where_no_generation_is_open(
    forge: Forge, stage: Stage, at: redis.Redis, rng: random.Random
) -> None:
    assert forge(stage, rng) is False
    assert at.keys() == []
    _opened(at, replid="of the server that this one is a copy of")
    assert forge(stage, rng) is False
    assert at.xlen(OUTBOX) == 1


@pytest.mark.parametrize(("forge", "codes"), [(a_malformed_entry, None), (entries_come_twice, "1")])
def test_what_is_forged_in_an_open_generation_is_there(
    forge: Forge, codes: str | None, stage: Stage, at: redis.Redis, rng: random.Random
) -> None:
    _opened(at)
    assert forge(stage, rng) is True
    assert at.xlen(OUTBOX) == 2
    assert at.hget(TOTALS, "codes") == codes
    at.delete(TOTALS)
