"""The script suite on fakeredis, and what the doors do with replies that no server should send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest

from service.errors import Misconfigured, ReplyMismatch
from service.line import connect
from service.scripts import Counter, Routed, load
from tests.scripting import Bench, MemoryServer, Produced, candidate, cap, plan, request
from tests.scripting_cases import ScriptCases

NOON = 1_750_000_000


class TestScriptsInMemory(ScriptCases):
    exempt: ClassVar[set[tuple[str, str]]] = {("rights", "REFUSED")}  # fakeredis has no acl_check_cmd

    @pytest.fixture
    async def bench(self, produced: Produced) -> AsyncIterator[Bench]:
        memory = MemoryServer(now=NOON)
        bench = Bench(memory.client(), memory=memory, produced=produced)
        await bench.open()
        yield bench
        await bench.check()
        await bench.redis.aclose()

    async def test_a_campaign_opens_and_closes_on_the_second(self, bench: Bench) -> None:
        assert bench.memory is not None
        await bench.restock()
        hour = plan(candidate(starts_at=NOON + 10, until=NOON + 20))
        for second, word in ((9, "NONE"), (10, "ISSUED"), (19, "ISSUED"), (20, "NONE")):
            bench.memory.now = NOON + second
            assert await bench.words(Routed(request(f"at-{second}"), hour)) == [word]

    async def test_a_period_ends_on_the_second(self, bench: Bench) -> None:
        assert bench.memory is not None
        await bench.restock()
        hourly = plan(candidate(cap(1, period="hour")))
        bounds = {Counter("CAMP", "hour", "UTC"): (NOON, NOON + 3_600, NOON + 7_200)}
        for second, word in ((0, "ISSUED"), (3_599, "NONE"), (3_600, "ISSUED"), (7_199, "NONE")):
            bench.memory.now = NOON + second
            assert await bench.words(Routed(request(f"at-{second}"), hourly), bounds=bounds) == [word]
        for second in (-1, 7_200):
            bench.memory.now = NOON + second
            assert (await bench.issue(Routed(request(f"at-{second}"), hourly), bounds=bounds)).status == "CLOCK"

    async def test_a_record_is_there_for_its_retention(self, bench: Bench) -> None:
        assert bench.memory is not None
        await bench.restock()
        assert await bench.words(Routed(request(), plan()), retention_s=100) == ["ISSUED"]
        bench.memory.now = NOON + 99
        assert await bench.words(Routed(request(), plan())) == ["REPLAY"]


@pytest.mark.parametrize(
    "broken",
    [
        lambda raw: ["OK", 5],
        lambda raw: "OK",
        lambda raw: [raw[0], "another call's nonce", *raw[2:]],
        lambda raw: raw[:-1],
        lambda raw: raw[:-2],
        lambda raw: [*raw, "ISSUED", raw[5]],
        lambda raw: [*raw[:5], raw[5].replace("T-1\t", "T-2\t")],
        lambda raw: [*raw[:5], raw[5].replace("PAY\n", "PAY,MOB\n")],
    ],
)
async def test_a_reply_of_another_call_reaches_nobody(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryServer(now=NOON)
    bench = Bench(memory.client(), memory=memory)
    await bench.open()
    await bench.restock()
    assert await bench.words(Routed(request(), plan())) == ["ISSUED"]
    evalsha = bench.redis.evalsha

    async def mixed_up(*arguments: Any) -> Any:
        return broken(await evalsha(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(bench.redis, "evalsha", mixed_up)
        patched.setattr(bench.scripts, "_call", super(type(bench.scripts), bench.scripts)._call)
        with pytest.raises(ReplyMismatch):
            await bench.issue(Routed(request(), plan()))
    assert await bench.words(Routed(request(), plan())) == ["REPLAY"]
    await bench.redis.aclose()


def test_a_missing_script_stops_the_boot() -> None:
    with pytest.raises(Misconfigured, match="lua/nonsense.lua is missing"):
        load("nonsense")


def test_an_unusable_url_names_its_setting() -> None:
    with pytest.raises(Misconfigured, match="VOUCHERD_REDIS_URL"):
        connect("http://localhost", timeout_ms=100)
