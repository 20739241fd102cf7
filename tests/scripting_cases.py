"""What every script does, through its door: the same cases on fakeredis and on real servers.

A tier subclasses ``ScriptCases`` and gives it a ``bench``.  When all cases of a class have run, each status that
some script's header promises must have been answered (``RecordingScripts`` notes them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from service import keys
from service.domain import Code, RateLimit, Record, Rule
from service.errors import RedisFull, ScriptFailed
from service.scripts import SET_ASIDE_MAX, Count, Counter, Routed, parse_separated
from tests.scripting import (
    DISTRIBUTOR,
    NOTHING,
    YEAR_S,
    Bench,
    Produced,
    candidate,
    cap,
    missing_statuses,
    plan,
    record_of,
    request,
)

PERIODS = ("total", "day", "hour")


class ScriptCases:
    """Cases for every script; ``exempt`` are (script, status) pairs that this tier can't produce."""

    exempt: ClassVar[set[tuple[str, str]]] = set()

    @pytest.fixture(scope="class")
    @classmethod
    def produced(cls) -> Produced:
        return defaultdict(set)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _every_status_is_produced(cls, request: pytest.FixtureRequest, produced: Produced) -> Iterator[None]:
        """Looked at when the last case is through, and only if none was left out by a selection."""
        yield
        cases = {name for name in dir(cls) if name.startswith("test_")}
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        ran = {item.function.__name__ for item in items if item.cls is cls}
        if ran == cases and not request.session.testsfailed:
            assert not missing_statuses(produced, cls.exempt), "statuses that no case produced"

    # --- issue: one request -----------------------------------------------------------------------------------------

    async def test_a_code_is_given_and_nothing_about_it_is_lost(self, bench: Bench) -> None:
        first, second, *_ = await bench.restock(count=10)
        before = await bench.now()
        reply = await bench.issue(Routed(request("req-1"), plan()), retention_s=1_000)
        after = await bench.now()
        [answer] = reply.answers
        record = record_of(request("req-1"), answer.detail)
        assert (reply.generation, answer.status) == (1, "ISSUED")
        assert before <= reply.now <= after
        assert record == Record(
            "T-1\tPAY", "v1", DISTRIBUTOR, DISTRIBUTOR, "req-1", reply.now, Rule("CAMP", "P", "CAT", "PAY", 0), (first,)
        )
        assert record.pack() == answer.detail
        key = keys.replay(0, 1, "v1", DISTRIBUTOR, "req-1")
        assert await bench.redis.get(key) == answer.detail
        assert 990 < await bench.redis.ttl(key) <= 1_000
        [(_, fields)] = await bench.outbox()
        entry = record.pack_entry()
        assert fields == {
            "generation": "1", "seq": "1", "codes": "1", "bytes": str(len(entry) + 1), "issued": entry, "asides": "",
        }  # fmt: skip
        assert (await bench.window())[0] == second

    async def test_a_trace_goes_into_the_outbox_with_what_was_issued_and_nowhere_else(self, bench: Bench) -> None:
        await bench.restock(count=10)
        await bench.issue(Routed(request("old"), plan()))
        reply = await bench.issue(
            Routed(request("old", trace="of a replay"), plan()),
            Routed(request("a", quantity=2, trace="of a"), plan()),
            Routed(request("none", trace="of nothing"), NOTHING),
            Routed(request("b"), plan()),
        )
        assert [answer.status for answer in reply.answers] == ["REPLAY", "ISSUED", "NONE", "ISSUED"]
        (_, untraced), (_, fields) = await bench.outbox()
        assert "traces" not in untraced
        assert fields["traces"] == "of a\x1e"
        assert int(fields["bytes"]) == len(fields["issued"]) + len(fields["traces"]) + 2
        given = record_of(request("a"), reply.answers[1].detail)
        assert "of a" not in given.pack()

    async def test_traces_of_requests_that_got_nothing_leave_no_trace(self, bench: Bench) -> None:
        await bench.restock(count=1, expires_at=await bench.now() - 1)
        assert await bench.words(Routed(request(trace="of nothing"), plan())) == ["REFILL"]
        [(_, fields)] = await bench.outbox()
        assert "traces" not in fields

    async def test_a_trace_counts_against_the_bytes_of_the_outbox(self, bench: Bench) -> None:
        await bench.restock()
        given = (await bench.issue(Routed(request("a"), plan()))).answers[0].detail
        entry = len(record_of(request("a"), given).pack_entry())
        [(_, _, held)] = await bench.waiting()
        room = held + entry + 1  # for one more like it
        traced = Routed(request("b", trace="a trace"), plan())
        assert await bench.words(traced, outbox_bytes_max=room) == ["BACKLOG"]
        assert await bench.words(traced, outbox_bytes_max=room + len("a trace") + 1) == ["ISSUED"]

    async def test_quantity_n_gets_n_codes_in_their_order(self, bench: Bench) -> None:
        codes = await bench.restock(count=10)
        reply = await bench.issue(
            Routed(request("a", quantity=3), plan()),
            Routed(request("b"), plan()),
            Routed(request("c", quantity=2), plan()),
        )
        given = [Record.unpack(answer.detail).codes for answer in reply.answers]
        assert given == [tuple(codes[:3]), tuple(codes[3:4]), tuple(codes[4:6])]
        assert await bench.window() == codes[6:]
        assert len(await bench.outbox()) == 1, "one entry a batch"

    async def test_same_request_twice_gets_one_code(self, bench: Bench) -> None:
        await bench.restock()
        first = await bench.issue(Routed(request(quantity=2), plan()))
        before = await bench.contents()
        again = await bench.issue(Routed(request(quantity=2), plan()))
        assert again.answers[0].status == "REPLAY"
        assert again.answers[0].detail == first.answers[0].detail
        assert await bench.contents() == before

    async def test_same_request_twice_in_one_batch_gets_one_code(self, bench: Bench) -> None:
        await bench.restock()
        same = plan()
        reply = await bench.issue(
            Routed(request("a"), same), Routed(request("b"), same), Routed(request("a"), same),
            Routed(request("a", payload="another"), same), Routed(request("b"), plan()),
        )  # fmt: skip
        assert [answer.status for answer in reply.answers] == ["ISSUED", "ISSUED", "REPLAY", "REUSED", "REPLAY"]
        assert reply.answers[2].detail == reply.answers[0].detail
        assert len(await bench.window()) == 8

    @pytest.mark.parametrize("payload", ["", "T-1", "T-1\tPA", "T-1\tPAYY", "T-1\tPAY,MOB", "%a-1\tPAY", ".*", "1"])
    async def test_another_payload_under_a_used_key_gets_nothing(self, bench: Bench, payload: str) -> None:
        await bench.restock()
        assert await bench.words(Routed(request(), plan())) == ["ISSUED"]
        before = await bench.contents()
        assert await bench.words(Routed(request(payload=payload), plan())) == ["REUSED"]
        assert (await bench.scripts.replay([request(payload=payload)], generation=1, version=1)).answers[
            0
        ].status == "REUSED"
        assert await bench.contents() == before

    async def test_a_replay_does_not_depend_on_todays_campaigns(self, bench: Bench) -> None:
        await bench.restock(count=1)
        issued = (await bench.issue(Routed(request(), plan()))).answers[0].detail
        now = await bench.now()
        for today in (
            plan(candidate(until=now - 10)),
            plan(candidate(starts_at=now + 1_000)),
            plan(candidate(cap(0))),
            plan(candidate(pool="ANOTHER")),
        ):
            reply = await bench.issue(Routed(request(), today), outbox_max=0)
            assert (reply.answers[0].status, reply.answers[0].detail) == ("REPLAY", issued)
        assert (await bench.issue(Routed(request(), NOTHING))).answers[0].detail == issued

    async def test_a_request_without_a_candidate_gets_none(self, bench: Bench) -> None:
        before = await bench.contents()
        reply = await bench.issue(Routed(request(), NOTHING))
        assert (reply.answers[0].status, reply.answers[0].detail) == ("NONE", "")
        assert await bench.contents() == before

    async def test_an_empty_batch_changes_nothing(self, bench: Bench) -> None:
        before = await bench.contents()
        assert (await bench.issue()).answers == []
        assert await bench.contents() == before

    # --- issue: time ------------------------------------------------------------------------------------------------

    async def test_nothing_is_issued_before_its_time_or_after(self, bench: Bench) -> None:
        await bench.restock()
        now = await bench.now()
        closed = plan(candidate(starts_at=now + 1_000, campaign="C1"), candidate(until=now, campaign="C2"))
        reply = await bench.issue(Routed(request(), closed))
        assert (reply.answers[0].status, reply.answers[0].detail) == ("NONE", "before,after")
        assert await bench.words(Routed(request(), plan(candidate(starts_at=now, until=now + 1_000)))) == ["ISSUED"]

    async def test_the_first_campaign_that_is_open_issues(self, bench: Bench) -> None:
        await bench.restock("P", 5)
        await bench.restock("Q", 5)
        now = await bench.now()
        both = plan(
            candidate(pool="P", campaign="C1", starts_at=now + 1_000),
            candidate(cap(0, campaign="C2"), pool="P", campaign="C2"),
            candidate(pool="Q", campaign="C3"),
            candidate(pool="P", campaign="C4"),
        )
        reply = await bench.issue(Routed(request(), both))
        assert Record.unpack(reply.answers[0].detail).rule.campaign == "C3"

    # --- issue: caps ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("period", PERIODS)
    @pytest.mark.parametrize(("holder", "shared"), [("campaign", 8), ("distributor", 4), ("terminal", 2)])
    @pytest.mark.parametrize("plans", [1, 2])
    async def test_no_cap_is_exceeded(self, bench: Bench, plans: int, holder: str, period: str, shared: int) -> None:
        """Two distributors with two terminals each send two requests each, by one plan or by one for each distributor;
        ``shared`` of the 8 are under one cap."""
        await bench.restock(count=20)
        made = [plan(candidate(cap(shared - 1, holder=holder, period=period))) for _ in range(plans)]
        by = {"D1": made[0], "D2": made[-1]}
        batch = [
            Routed(request(f"{d}-{t}-{i}", distributor=d, terminal=t), by[d])
            for d in ("D1", "D2") for t in ("T1", "T2") for i in (1, 2)
        ]  # fmt: skip
        words = await bench.words(*batch)
        assert words.count("NONE") == 8 // shared
        assert words.count("ISSUED") == 8 - 8 // shared
        for routed in batch:  # and never again
            after = await bench.issue(Routed(request("x" + routed.request.key, distributor=routed.request.distributor,
                                                     terminal=routed.request.terminal), routed.plan))  # fmt: skip
            assert (after.answers[0].status, after.answers[0].detail) == ("NONE", "capped")

    async def test_quantity_is_cut_to_what_is_left_under_the_least_cap(self, bench: Bench) -> None:
        await bench.restock(count=20)
        capped = plan(candidate(cap(5), cap(3, holder="distributor"), cap(4, holder="terminal", period="day")))
        reply = await bench.issue(Routed(request("a", quantity=2), capped), Routed(request("b", quantity=5), capped))
        assert [len(Record.unpack(answer.detail).codes) for answer in reply.answers] == [2, 1]
        assert await bench.words(Routed(request("c"), capped)) == ["NONE"]

    async def test_a_request_that_gets_nothing_uses_up_no_cap(self, bench: Bench) -> None:
        await bench.restock(count=2)
        capped = plan(candidate(cap(2), cap(2, holder="distributor", period="hour")))
        assert await bench.words(Routed(request("a", quantity=2), capped), outbox_max=1) == ["BACKLOG"]
        assert await bench.words(Routed(request("b", quantity=2), capped)) == ["ISSUED"]

    async def test_a_cap_counts_in_the_period_that_holds_now(self, bench: Bench) -> None:
        await bench.restock(count=20)
        now = await bench.now()
        hour, day = Counter("CAMP", "hour", "UTC"), Counter("CAMP", "day", "UTC")
        capped = plan(candidate(cap(1, period="hour"), cap(2, period="day")))
        this = {hour: (now - 900, now + 900, now + 1_800), day: (now - 9_000, now + 9_000, now + 18_000)}
        next_hour = {**this, hour: (now - 1_800, now - 900, now + 900)}
        assert await bench.words(Routed(request("a"), capped), Routed(request("b"), capped), bounds=this) == [
            "ISSUED",
            "NONE",
        ]
        # The same second hash, whether it is sent as this hour or as the one after.
        assert await bench.words(Routed(request("c"), capped), bounds=this) == ["NONE"]
        assert await bench.words(
            Routed(request("d"), capped), bounds={**next_hour, hour: (now - 3_600, now - 900, now + 900)}
        ) == ["NONE"]
        fresh = {**this, hour: (now - 5_400, now - 600, now + 3_600)}
        assert await bench.words(Routed(request("e"), capped), bounds=fresh) == ["ISSUED"]
        assert await bench.words(
            Routed(request("f"), capped), bounds={**fresh, hour: (now - 100, now + 3_500, now + 7_100)}
        ) == ["NONE"]
        assert await bench.redis.hgetall(keys.caps(0, 1, "CAMP", f"day:{now - 9_000}")) == {"c": "2"}

    async def test_counters_outlive_their_period_and_no_more(self, bench: Bench) -> None:
        await bench.restock()
        now = await bench.now()
        hour, day = Counter("CAMP", "hour", "UTC"), Counter("CAMP", "day", "UTC")
        bounds = {
            hour: (now - 100, now + 3_500, now + 7_100),
            day: (now - 172_700, now - 100, now + 86_300),
            Counter("CAMP", "total", "UTC"): (0, 1 << 52, 1 << 52),
        }
        capped = plan(candidate(cap(9), cap(9, period="hour"), cap(9, period="day")))
        assert await bench.words(Routed(request(), capped), bounds=bounds) == ["ISSUED"]
        assert await bench.redis.expiretime(keys.caps(0, 1, "CAMP", f"hour:{now - 100}")) == now + 7_100
        assert await bench.redis.expiretime(keys.caps(0, 1, "CAMP", f"day:{now - 100}")) == now + 172_700
        assert await bench.redis.expiretime(keys.caps(0, 1, "CAMP", "total")) == -1

    @pytest.mark.parametrize("shift", [-7_200, 7_200])
    async def test_periods_that_do_not_hold_now_write_nothing(self, bench: Bench, shift: int) -> None:
        await bench.restock()
        now = await bench.now() + shift
        before = await bench.contents()
        reply = await bench.issue(
            Routed(request(), plan(candidate(cap(9, period="hour")))),
            bounds={Counter("CAMP", "hour", "UTC"): (now - 1_800, now + 1_800, now + 3_600)},
        )
        assert (reply.status, reply.answers) == ("CLOCK", [])
        assert abs(reply.now - now + shift) < 60
        assert await bench.contents() == before

    # --- issue: who may ---------------------------------------------------------------------------------------------

    async def test_an_older_catalogue_issues_nothing(self, bench: Bench) -> None:
        await bench.restock()
        assert await bench.scripts.publish(7) == "OK"
        before = await bench.contents()
        reply = await bench.issue(Routed(request(), plan()), version=6)
        assert (reply.status, reply.fence, reply.generation) == ("STALE", 7, 1)
        reply = await bench.scripts.replay([request()], generation=1, version=6)
        assert (reply.status, reply.fence) == ("STALE", 7)
        assert await bench.contents() == before
        for version in (7, 8):
            assert await bench.words(Routed(request(f"v{version}"), plan()), version=version) == ["ISSUED"]

    @pytest.mark.parametrize("fault", ["generation", "identity", "fence", "nothing open"])
    async def test_other_data_or_another_server_issues_nothing(self, bench: Bench, fault: str) -> None:
        await bench.restock()
        assert await bench.words(Routed(request("used"), plan())) == ["ISSUED"]
        generation, opened = 1, 1
        match fault:
            case "generation":
                generation = 2
            case "identity":
                await bench.change_identity()
            case "fence":
                await bench.redis.delete(keys.fence(0))
            case _:
                await bench.redis.delete(keys.generation(0))
                opened = 0
        before = await bench.contents()
        for asked in (request("used"), request("new")):
            reply = await bench.issue(Routed(asked, plan()), generation=generation)
            assert (reply.status, reply.generation, reply.answers) == ("LOST", opened, [])
            reply = await bench.scripts.replay([asked], generation=generation, version=1)
            assert (reply.status, reply.generation) == ("LOST", opened)
        if fault != "fence":
            codes = bench.codes(1, expires_at=await bench.now() + YEAR_S)
            lost = await bench.scripts.restock(
                "P", "next", bench.last_lease(), codes, generation=generation, stock_version=1, low_water=0
            )
            assert lost.status == "LOST"
            assert await bench.scripts.stock("P", 9, generation=generation) == "LOST"
            assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=generation) == "LOST"
        assert await bench.contents() == before

    async def test_a_server_that_was_demoted_meanwhile_is_noticed_on_the_same_connection(self, bench: Bench) -> None:
        await bench.restock()
        assert (await bench.scripts.generation()).agrees
        await bench.change_identity()
        assert (await bench.issue(Routed(request(), plan()))).status == "LOST"
        seen = await bench.scripts.generation()
        assert not seen.agrees
        assert seen.server_replid2 == seen.replid
        assert await bench.open(1) == "OK"
        assert await bench.words(Routed(request(), plan())) == ["ISSUED"]

    # --- issue: stock -----------------------------------------------------------------------------------------------

    async def test_a_late_refill_is_never_exhausted(self, bench: Bench) -> None:
        await bench.restock("Q", 5)
        before = await bench.contents()
        reply = await bench.issue(Routed(request("q"), plan(candidate(pool="Q"))), Routed(request(), plan()))
        assert reply.answers[1].status == "REFILL"
        assert reply.pools[int(reply.answers[1].detail) - 1] == "P"
        assert await bench.redis.zrange(keys.demand(0), 0, -1, withscores=True) == [("P", 0.0)]
        assert not await bench.redis.exists(keys.replay(0, 1, "v1", DISTRIBUTOR, "req-1"))
        assert before.keys() < (await bench.contents()).keys()

    async def test_the_first_matching_campaign_wins_although_the_second_has_codes(self, bench: Bench) -> None:
        await bench.restock("Q", 5)
        both = plan(candidate(pool="P", campaign="C1"), candidate(pool="Q", campaign="C2"))
        assert await bench.words(Routed(request(), both)) == ["REFILL"]
        await bench.restock("P", 1)
        reply = await bench.issue(Routed(request(), both))
        assert Record.unpack(reply.answers[0].detail).rule.campaign == "C1"
        assert await bench.words(Routed(request("next"), both)) == ["REFILL"]

    async def test_a_short_window_gives_no_part_of_a_quantity(self, bench: Bench) -> None:
        codes = await bench.restock(count=2)
        words = await bench.words(Routed(request("a", quantity=3), plan()), Routed(request("b", quantity=2), plan()))
        assert words == ["REFILL", "ISSUED"]
        assert await bench.window() == codes[2:]

    async def test_exhausted_is_said_only_while_its_stock_version_is_current(self, bench: Bench) -> None:
        await bench.restock("P", 1, stock_version=3, low_water=5)
        await bench.restock("Q", 5)
        both = plan(candidate(pool="P", campaign="C1"), candidate(pool="Q", campaign="C2"))
        alone = plan(candidate(pool="P", campaign="C1"))
        assert await bench.scripts.exhausted("P", 3, bench.last_lease("P"), generation=1) == "OK"
        reply = await bench.issue(Routed(request("a"), both), Routed(request("b"), both), Routed(request("c"), alone))
        campaigns = [Record.unpack(answer.detail).rule.campaign for answer in reply.answers[:2]]
        assert campaigns == ["C1", "C2"]
        assert (reply.answers[2].status, reply.answers[2].detail) == ("NONE", "exhausted")
        assert await bench.redis.zscore(keys.demand(0), "P") is None
        assert await bench.scripts.stock("P", 4, generation=1) == "OK"
        assert await bench.words(Routed(request("d"), both), Routed(request("e"), alone)) == ["REFILL", "REFILL"]
        await bench.restock("P", 1, stock_version=4)
        assert await bench.words(Routed(request("d"), both)) == ["ISSUED"]

    async def test_an_exhausted_pool_gives_its_last_codes_but_no_part_of_a_quantity(self, bench: Bench) -> None:
        codes = await bench.restock(count=3, stock_version=1)
        assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=1) == "OK"
        reply = await bench.issue(
            Routed(request("a", quantity=4), plan()),
            Routed(request("b", quantity=2), plan()),
            Routed(request("c"), plan()),
        )
        assert [answer.status for answer in reply.answers] == ["NONE", "ISSUED", "ISSUED"]
        assert reply.answers[0].detail == "exhausted"
        assert Record.unpack(reply.answers[2].detail).codes == (codes[2],)

    async def test_demand_is_asked_for_below_low_water_only(self, bench: Bench) -> None:
        await bench.restock(count=6, low_water=4)
        assert await bench.words(Routed(request("a", quantity=2), plan())) == ["ISSUED"]
        assert await bench.redis.zscore(keys.demand(0), "P") is None
        assert await bench.words(Routed(request("b"), plan())) == ["ISSUED"]
        assert await bench.redis.zscore(keys.demand(0), "P") == 3

    # --- issue: outbox ----------------------------------------------------------------------------------------------

    async def test_the_outbox_never_holds_more_than_its_bound(self, bench: Bench) -> None:
        await bench.restock(count=20)
        same = plan()
        assert await bench.words(Routed(request("a", quantity=4), same), outbox_max=5) == ["ISSUED"]
        words = await bench.words(
            Routed(request("b", quantity=2), same), Routed(request("c"), same), Routed(request("d"), same),
            Routed(request("a", quantity=4), same), Routed(request("a", payload="x"), same),
            Routed(request("e"), plan(candidate(cap(0)))), outbox_max=5,
        )  # fmt: skip
        assert words == ["BACKLOG", "ISSUED", "BACKLOG", "REPLAY", "REUSED", "NONE"]
        before = await bench.contents()
        assert await bench.words(Routed(request("d"), same), outbox_max=5) == ["BACKLOG"]
        assert await bench.contents() == before
        [entry, _] = await bench.waiting()
        assert await bench.scripts.flushed("ledger", [entry], generation=1, seq=1) == 1
        assert await bench.words(Routed(request("b", quantity=2), same), outbox_max=5) == ["ISSUED"]

    async def test_the_outbox_never_holds_more_bytes_than_its_bound(self, bench: Bench) -> None:
        await bench.restock(count=20)
        assert await bench.words(Routed(request("a"), plan())) == ["ISSUED"]
        [(_, _, size)] = await bench.waiting()  # keys as long as this one make entries as long
        batch = [Routed(request(key), plan()) for key in "bcd"]
        reply = await bench.issue(*batch, Routed(request("a"), plan()), outbox_bytes_max=3 * size + size - 1)
        assert [answer.status for answer in reply.answers] == ["ISSUED", "ISSUED", "BACKLOG", "REPLAY"]
        assert reply.answers[2].detail == "bytes"
        before = await bench.contents()
        assert await bench.words(Routed(request("d"), plan()), outbox_bytes_max=4 * size - 1) == ["BACKLOG"]
        assert await bench.contents() == before
        assert await bench.words(Routed(request("d"), plan()), outbox_bytes_max=4 * size) == ["ISSUED"]
        assert await bench.scripts.flushed("ledger", (await bench.waiting())[:1], generation=1, seq=1) == 1
        assert await bench.words(Routed(request("e"), plan()), outbox_bytes_max=4 * size) == ["ISSUED"]

    async def test_set_asides_keep_the_bound_in_bytes_too(self, bench: Bench) -> None:
        old = await bench.restock(count=3, expires_at=await bench.now() - 1)
        await bench.restock(count=1)
        size = len(old[0].pack()) + 1
        reply = await bench.issue(Routed(request(), plan()), outbox_bytes_max=2 * size)
        assert [(answer.status, answer.detail) for answer in reply.answers] == [("BACKLOG", "bytes")]
        assert [fields["asides"].count("CODE") for _, fields in await bench.outbox()] == [2]
        assert await bench.words(Routed(request(), plan()), outbox_bytes_max=3 * size) == ["BACKLOG"]
        assert await bench.words(Routed(request(), plan()), outbox_bytes_max=3 * size) == ["BACKLOG"]
        assert len(await bench.window()) == 1
        assert await bench.words(Routed(request(), plan())) == ["ISSUED"]

    async def test_bytes_that_a_worker_of_before_did_not_count_are_not_in_the_way_for_ever(self, bench: Bench) -> None:
        await bench.restock()
        assert await bench.words(Routed(request("a"), plan())) == ["ISSUED"]
        [(entry, codes, size)] = await bench.waiting()
        assert await bench.scripts.flushed("ledger", [(entry, codes, 0)], generation=1, seq=1) == 1
        assert await bench.words(Routed(request("b"), plan()), outbox_bytes_max=size) == ["ISSUED"]

    # --- issue: rate limit ------------------------------------------------------------------------------------------

    async def test_a_distributor_is_issued_its_burst_at_once_and_no_more(self, bench: Bench) -> None:
        """Replays are exempt, and so is every other distributor."""
        await bench.restock(count=40)
        limit = RateLimit(1, 5)
        mine = [Routed(request(f"r{i}"), plan(), limit=limit) for i in range(7)]
        other = [Routed(request(f"o{i}", distributor="DIST-2"), plan()) for i in range(7)]
        reply = await bench.issue(*mine[:4], mine[0], *other, *mine[4:], mine[6])
        words = [answer.status for answer in reply.answers]
        assert words == ["ISSUED"] * 4 + ["REPLAY"] + ["ISSUED"] * 7 + ["ISSUED"] + ["LIMITED"] * 3
        wait_us, left = map(int, reply.answers[-1].detail.split(","))
        assert 0 < wait_us <= 1_000_000
        assert left == 0
        assert await bench.words(mine[1], mine[5]) == ["REPLAY", "LIMITED"]

    async def test_in_no_stretch_of_time_is_more_issued_than_burst_and_rate_allow(self, bench: Bench) -> None:
        await bench.restock(count=60)
        limit, given, began = RateLimit(400, 20), 0, await _microseconds(bench)
        while given < 60:  # as fast as it goes, several at a time
            batch = [Routed(request(f"r{given}-{i}", quantity=2), plan(), limit=limit) for i in range(3)]
            reply = await bench.issue(*batch)
            given += 2 * sum(answer.status == "ISSUED" for answer in reply.answers)
            assert given <= limit.burst + limit.rate * (await _microseconds(bench) - began) / 1_000_000
            assert await _microseconds(bench) - began < 60_000_000, f"{given} vouchers in a minute"
            if bench.memory is not None:
                bench.memory.now = (bench.memory.now or await bench.now()) + 1

    async def test_a_limit_counts_vouchers_and_only_those_that_were_issued(self, bench: Bench) -> None:
        await bench.restock(count=30)
        limit, capped = RateLimit(1, 20), plan(candidate(cap(3)))
        shut, dry = plan(candidate(cap(0, campaign="SHUT"))), plan(candidate(pool="DRY"))

        async def ask(key: str, quantity: int, which: Any = None, **options: Any) -> tuple[str, str]:
            routed = Routed(request(key, quantity=quantity), which or plan(), limit=limit)
            [answer] = (await bench.issue(routed, **options)).answers
            return answer.status, answer.detail

        assert (await ask("shut", 20, shut))[0] == "NONE"
        assert (await ask("dry", 20, dry))[0] == "REFILL"
        assert (await ask("full", 20, outbox_max=1))[0] == "BACKLOG"
        assert (await ask("capped", 20, capped))[0] == "ISSUED"  # three of them
        assert (await ask("many", 15))[0] == "ISSUED"
        status, detail = await ask("more", 20)
        wait_us, left = map(int, detail.split(","))
        assert status == "LIMITED"
        assert left in (2, 3)  # with what a slow moment of the test itself gives
        assert 16_000_000 < wait_us <= 18_000_000
        assert (await ask("few", 2))[0] == "ISSUED"
        assert (await ask("gone", 20, NOTHING))[0] == "LIMITED", "before any campaign is looked at"

    async def test_the_state_of_a_limit_goes_when_it_says_nothing_any_more(self, bench: Bench) -> None:
        await bench.restock(count=30)
        key, now_us = keys.rate(0, 1, DISTRIBUTOR), await _microseconds(bench)
        assert await bench.words(Routed(request("none", quantity=9), NOTHING, limit=RateLimit(2, 20))) == ["NONE"]
        assert not await bench.redis.exists(key)
        assert await bench.words(Routed(request("some", quantity=9), plan(), limit=RateLimit(2, 20))) == ["ISSUED"]
        assert 4_500_000 <= int(await bench.redis.get(key)) - now_us < 60_000_000
        assert 4_500 < await bench.redis.pttl(key) <= 6_000

    async def test_a_limit_that_was_lowered_or_a_clock_that_went_back_keeps_nobody_out_for_longer_than_a_burst(
        self, bench: Bench
    ) -> None:
        await bench.restock(count=30)
        await bench.redis.set(keys.rate(0, 1, DISTRIBUTOR), await _microseconds(bench) + 3_600_000_000, ex=3_600)
        reply = await bench.issue(Routed(request(), plan(), limit=RateLimit(2, 20)))
        assert (reply.answers[0].status, reply.answers[0].detail) == ("LIMITED", "500000,0")

    @pytest.mark.parametrize("limit", [RateLimit(0, 20), RateLimit(1, 0), RateLimit(1, 3_601), RateLimit(-1, 20)])
    async def test_a_limit_that_can_not_be_counted_issues_nothing(self, bench: Bench, limit: RateLimit) -> None:
        await bench.restock()
        with pytest.raises(ScriptFailed):
            await bench.issue(Routed(request(), plan(), limit=limit))
        assert len(await bench.window()) == 10

    # --- issue: set aside -------------------------------------------------------------------------------------------

    async def test_codes_with_too_little_life_are_never_issued(self, bench: Bench) -> None:
        now = await bench.now()
        old = await bench.restock(count=2, expires_at=now)
        short = await bench.restock(count=1, expires_at=now + 1_000)
        good = await bench.restock(count=3)
        reply = await bench.issue(Routed(request(quantity=2), plan(candidate(least_life_s=1_000))))
        assert Record.unpack(reply.answers[0].detail).codes == tuple(good[:2])
        assert await bench.window() == good[2:]
        [(_, fields)] = await bench.outbox()
        assert fields["asides"].split("\x1e") == [code.pack() for code in (*old, *short)]
        assert fields["codes"] == "5"
        books = await bench.scripts.books(["P"], generation=1)
        assert books is not None
        assert (books.popped, books.set_aside, books.codes) == (2, 3, 5)

    async def test_codes_between_two_that_are_over_are_not_lost(self, bench: Bench) -> None:
        now = await bench.now()
        a = await bench.restock(count=1)
        await bench.restock(count=2, expires_at=now - 5)
        b = await bench.restock(count=1)
        await bench.restock(count=1, expires_at=now - 5)
        c = await bench.restock(count=2)
        reply = await bench.issue(Routed(request("x", quantity=2), plan()), Routed(request("y"), plan()))
        given = [Record.unpack(answer.detail).codes for answer in reply.answers]
        assert given == [(*a, *b), (c[0],)]
        assert await bench.window() == c[1:]

    async def test_set_asides_of_a_request_that_waits_for_a_refill_are_kept(self, bench: Bench) -> None:
        await bench.restock(count=3, expires_at=await bench.now() - 1)
        assert await bench.words(Routed(request(), plan())) == ["REFILL"]
        [(_, fields)] = await bench.outbox()
        assert (fields["codes"], fields["issued"]) == ("3", "")
        assert await bench.window() == []
        await bench.restock(count=1)
        assert await bench.words(Routed(request(), plan())) == ["ISSUED"]

    async def test_one_call_sets_a_bounded_number_aside(self, bench: Bench) -> None:
        await bench.restock(count=SET_ASIDE_MAX + 8, expires_at=await bench.now() - 1)
        good = await bench.restock(count=2)
        assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=1) == "OK"
        assert await bench.words(Routed(request("a"), plan()), Routed(request("b"), plan())) == ["REFILL", "REFILL"]
        assert len(await bench.window()) == 10
        reply = await bench.issue(Routed(request("a", quantity=2), plan()), Routed(request("b"), plan()))
        assert Record.unpack(reply.answers[0].detail).codes == tuple(good)
        assert reply.answers[1].detail == "exhausted"

    async def test_set_asides_keep_the_outbox_bound_too(self, bench: Bench) -> None:
        await bench.restock(count=3, expires_at=await bench.now() - 1)
        await bench.restock(count=2)
        assert await bench.words(Routed(request(), plan()), outbox_max=2) == ["BACKLOG"]
        assert len(await bench.window()) == 3
        assert await bench.words(Routed(request(), plan()), outbox_max=2) == ["BACKLOG"]
        assert len(await bench.window()) == 3
        assert await bench.words(Routed(request(), plan()), outbox_max=3) == ["BACKLOG"]
        assert await bench.words(Routed(request(), plan()), outbox_max=4) == ["ISSUED"]

    async def test_a_capped_request_sets_nothing_aside(self, bench: Bench) -> None:
        await bench.restock(count=3, expires_at=await bench.now() - 1)
        before = await bench.contents()
        assert await bench.words(Routed(request(), plan(candidate(cap(0))))) == ["NONE"]
        assert await bench.contents() == before

    # --- issue: restoring -------------------------------------------------------------------------------------------

    async def test_while_records_are_restored_nothing_is_issued_without_a_look_in_the_ledger(
        self, bench: Bench
    ) -> None:
        assert await bench.open(2, restoring=True) == "OK"
        await bench.restock()
        same = plan()
        assert await bench.words(Routed(request("a"), same), Routed(request("b"), same, looked_up=True)) == [
            "LOOKUP",
            "ISSUED",
        ]
        assert await bench.words(Routed(request("b"), same), Routed(request("a"), plan(candidate(cap(0))))) == [
            "REPLAY",
            "LOOKUP",
        ]
        assert await bench.open(2) == "OK"
        assert await bench.words(Routed(request("a"), same)) == ["ISSUED"]

    # --- issue: what nothing of ours can have written ---------------------------------------------------------------

    @pytest.mark.parametrize("where", ["window", "cap", "totals", "low"])
    async def test_broken_data_stops_the_whole_batch_before_its_first_write(self, bench: Bench, where: str) -> None:
        await bench.restock(count=3)
        capped = plan(candidate(cap(5)))
        match where:
            case "window":
                await bench.redis.lset(keys.window(0, 1, "P"), 1, "no code")
            case "cap":
                await bench.redis.hset(keys.caps(0, 1, "CAMP", "total"), "c", "1.5")
            case "totals":
                await bench.redis.hset(keys.totals(0, 1), "seq", "x")
            case _:
                await bench.redis.hset(keys.pool(0, 1, "P"), "low", "x")
        before = await bench.contents()
        with pytest.raises(ScriptFailed, match="issue"):
            await bench.issue(Routed(request("a"), capped), Routed(request("b"), capped))
        assert await bench.contents() == before
        await bench.redis.flushall()

    # --- restock, stock, exhausted ----------------------------------------------------------------------------------

    async def test_a_lease_is_applied_once_and_onto_its_predecessor_only(self, bench: Bench) -> None:
        codes = bench.codes(6, expires_at=await bench.now() + YEAR_S)
        one = await bench.lease("P", codes[:2], lease_id="one", predecessor="")
        assert (one.status, one.length, one.last_lease) == ("OK", 2, "")
        before = await bench.contents()
        assert (await bench.lease("P", codes[:2], lease_id="one", predecessor="")).status == "DONE"
        forked = await bench.lease("P", codes[2:4], lease_id="two", predecessor="")
        assert (forked.status, forked.length, forked.last_lease) == ("FORKED", 2, "one")
        assert (await bench.lease("P", codes[2:4], lease_id="two", predecessor="three")).status == "FORKED"
        assert await bench.contents() == before
        assert (await bench.lease("P", codes[2:4], lease_id="two", predecessor="one")).length == 4
        assert (await bench.lease("P", codes[:2], lease_id="one", predecessor="")).status == "FORKED"
        assert await bench.window() == codes[:4]
        assert await bench.words(Routed(request(quantity=4), plan())) == ["ISSUED"]
        assert (await bench.lease("P", codes[2:4], lease_id="two", predecessor="one")).status == "DONE"
        assert await bench.window() == []

    async def test_a_stock_version_is_never_lowered(self, bench: Bench) -> None:
        async def stock() -> int:
            books = await bench.scripts.books(["P"], generation=1)
            assert books is not None
            return books.windows["P"].stock

        assert await bench.scripts.stock("P", 5, generation=1) == "OK"
        assert await bench.redis.zrange(keys.demand(0), 0, -1) == ["P"]
        await bench.redis.delete(keys.demand(0))
        for version in (5, 4, 0):
            assert await bench.scripts.stock("P", version, generation=1) == "OK"
        assert not await bench.redis.exists(keys.demand(0)), "in demand only if it was raised"
        await bench.restock(count=1, stock_version=3)
        assert await stock() == 5
        await bench.restock(count=1, stock_version=6)
        assert await stock() == 6

    async def test_exhausted_is_not_noted_after_stock_or_lease_moved_on(self, bench: Bench) -> None:
        assert await bench.scripts.exhausted("P", 2, "", generation=1) == "OK"
        await bench.restock(count=1, stock_version=3)
        before = await bench.contents()
        for version, lease in ((2, bench.last_lease()), (3, ""), (3, "another")):
            assert await bench.scripts.exhausted("P", version, lease, generation=1) == "CHANGED"
        assert await bench.contents() == before
        assert await bench.scripts.exhausted("P", 4, bench.last_lease(), generation=1) == "OK"
        books = await bench.scripts.books(["P"], generation=1)
        assert books is not None
        assert (books.windows["P"].stock, books.windows["P"].exhausted) == (4, 4)

    # --- publish, open ----------------------------------------------------------------------------------------------

    async def test_a_fence_is_never_lowered(self, bench: Bench) -> None:
        for version, expected in ((5, 5), (3, 5), (5, 5), (6, 6)):
            assert await bench.scripts.publish(version) == "OK"
            assert (await bench.scripts.generation()).fence == expected
        assert await bench.open(2, version=4) == "OK"
        assert (await bench.scripts.generation()).fence == 6
        assert await bench.open(3, version=9) == "OK"
        assert (await bench.scripts.generation()).fence == 9

    async def test_publishing_to_a_partition_without_data_leaves_no_fence(self, bench: Bench) -> None:
        await bench.redis.flushall()
        assert await bench.scripts.publish(5) == "LOST"
        assert await bench.contents() == {}

    async def test_a_generation_is_opened_only_over_the_one_that_was_seen(self, bench: Bench) -> None:
        stale = await bench.scripts.generation()
        assert await bench.open(2) == "OK"
        before = await bench.contents()
        assert await bench.scripts.open(stale, 3, version=1, restoring=False) == "MOVED"
        seen = await bench.scripts.generation()
        await bench.redis.delete(keys.generation(0))
        assert await bench.scripts.open(seen, 3, version=1, restoring=False) == "MOVED"
        assert await bench.open(2) == "OK"
        assert await bench.contents() == before

    async def test_a_server_that_changed_since_it_was_examined_is_not_accepted(self, bench: Bench) -> None:
        seen = await bench.scripts.generation()
        await bench.change_identity()
        before = await bench.contents()
        assert await bench.scripts.open(seen, 2, version=1, restoring=False) == "LOST"
        assert await bench.contents() == before

    # --- restore ----------------------------------------------------------------------------------------------------

    async def test_restoring_leaves_records_that_are_there_alone(self, bench: Bench) -> None:
        await bench.restock()
        here = (await bench.issue(Routed(request("here"), plan()))).answers[0].detail
        [code] = bench.codes(1, expires_at=await bench.now() + YEAR_S)
        gone = Record(
            "T-1\tPAY", "v1", DISTRIBUTOR, DISTRIBUTOR, "gone", 1, Rule("CAMP", "P", "CAT", "PAY", 0), (code,)
        ).pack()
        records = [("v1", DISTRIBUTOR, "here", gone), ("v1", DISTRIBUTOR, "gone", gone)]
        for missing in (1, 0):
            restored = await bench.scripts.restore(records, [], open_generation=1, generation=1, retention_s=500)
            assert restored == ("OK", missing)
        reply = await bench.issue(Routed(request("here"), plan()), Routed(request("gone"), plan()))
        assert [answer.detail for answer in reply.answers] == [here, gone]
        assert 400 < await bench.redis.ttl(keys.replay(0, 1, "v1", DISTRIBUTOR, "gone")) <= 500
        before = await bench.contents()
        moved = await bench.scripts.restore(records, [], open_generation=2, generation=1, retention_s=500)
        assert moved == ("MOVED", 0)
        assert await bench.contents() == before

    async def test_restored_counts_are_under_the_caps(self, bench: Bench) -> None:
        await bench.restock(count=20)
        end = await bench.now() + 5_000
        total, day = keys.caps(0, 1, "CAMP", "total"), keys.caps(0, 1, "CAMP", f"day:{end - 86_400}")
        counts = [Count(total, "c", 3, 0), Count(day, "d:DIST-1", 2, end + 86_400), Count(total, "c", 4, 0)]
        assert await bench.scripts.restore([], counts, open_generation=1, generation=1, retention_s=500) == ("OK", 0)
        assert await bench.redis.hgetall(total) == {"c": "7"}
        assert await bench.redis.expiretime(total) == -1
        assert await bench.redis.expiretime(day) == end + 86_400
        bounds = {
            Counter("CAMP", "total", "UTC"): (0, 1 << 52, 1 << 52),
            Counter("CAMP", "day", "UTC"): (end - 86_400, end, end + 86_400),
        }
        capped = plan(candidate(cap(9), cap(3, holder="distributor", period="day")))
        words = await bench.words(Routed(request("a"), capped), Routed(request("b"), capped), bounds=bounds)
        assert words == ["ISSUED", "NONE"]

    async def test_a_generation_is_restored_before_it_is_open(self, bench: Bench) -> None:
        counts = [Count(keys.caps(0, 2, "CAMP", "total"), "c", 5, 0)]
        assert await bench.scripts.restore([], counts, open_generation=1, generation=2, retention_s=500) == ("OK", 0)
        assert await bench.open(2) == "OK"
        await bench.restock()
        assert await bench.words(Routed(request(), plan(candidate(cap(5))))) == ["NONE"]

    # --- withdraw ---------------------------------------------------------------------------------------------------

    async def test_withdrawn_codes_leave_the_window_by_the_outbox_and_others_stay(self, bench: Bench) -> None:
        await bench.restock(count=6)
        window = [Code.unpack(text) for text in await bench.redis.lrange(keys.window(0, 1, "P"), 0, -1)]
        never_there = bench.codes(1, expires_at=window[0].expires_at)
        some = [window[4], *never_there, window[1]]
        assert await bench.scripts.withdraw("P", some, generation=1) == [True, False, True]
        [(_, fields)] = await bench.outbox()
        assert (fields["why"], fields["issued"], fields["codes"]) == ("withdrawn", "", "2")
        assert parse_separated(fields["asides"]) == [window[4].pack(), window[1].pack()]
        left = [window[i].pack() for i in (0, 2, 3, 5)]
        assert await bench.redis.lrange(keys.window(0, 1, "P"), 0, -1) == left
        before = await bench.contents()
        assert await bench.scripts.withdraw("P", some, generation=1) == [False, False, False]
        assert await bench.contents() == before
        reply = await bench.issue(Routed(request(quantity=4), plan()))
        assert [code.pack() for code in Record.unpack(reply.answers[0].detail).codes] == left

    async def test_withdrawing_for_another_generation_writes_nothing(self, bench: Bench) -> None:
        await bench.restock(count=2)
        window = [Code.unpack(text) for text in await bench.redis.lrange(keys.window(0, 1, "P"), 0, -1)]
        before = await bench.contents()
        assert await bench.scripts.withdraw("P", window, generation=2) is None
        assert await bench.contents() == before

    # --- take_back --------------------------------------------------------------------------------------------------

    async def test_codes_taken_back_leave_the_window_by_the_outbox_once(self, bench: Bench) -> None:
        await bench.restock(count=5)
        window = await bench.redis.lrange(keys.window(0, 1, "P"), 0, -1)
        taken = await bench.scripts.take_back("P", 3, generation=1, outbox_max=100)
        assert [code.pack() for code in taken if isinstance(code, Code)] == window[:3]
        [(_, fields)] = await bench.outbox()
        assert (fields["why"], fields["issued"], fields["codes"]) == ("taken_back", "", "3")
        assert parse_separated(fields["asides"]) == window[:3]
        rest = await bench.scripts.take_back("P", 3, generation=1, outbox_max=100)
        assert [code.pack() for code in rest if isinstance(code, Code)] == window[3:]
        before = await bench.contents()
        assert await bench.scripts.take_back("P", 3, generation=1, outbox_max=100) == []
        assert await bench.contents() == before
        books = await bench.scripts.books(["P"], generation=1)
        assert books is not None
        assert (books.restocked, books.taken_back, books.codes, books.windows["P"].length) == (5, 5, 5, 0)

    async def test_the_outbox_bound_holds_for_what_is_taken_back(self, bench: Bench) -> None:
        await bench.restock(count=5)
        taken = await bench.scripts.take_back("P", 5, generation=1, outbox_max=2)
        assert len(taken) == 2
        before = await bench.contents()
        assert await bench.scripts.take_back("P", 5, generation=1, outbox_max=2) == "BACKLOG"
        assert await bench.scripts.take_back("P", 5, generation=2, outbox_max=100) == "LOST"
        assert await bench.contents() == before

    async def test_a_pool_is_not_exhausted_while_its_codes_are_on_their_way_back_to_stock(self, bench: Bench) -> None:
        await bench.restock(count=3)
        assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=1) == "OK"
        await bench.scripts.take_back("P", 3, generation=1, outbox_max=100)
        assert await bench.words(Routed(request("a"), plan())) == ["REFILL"]
        assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=1) == "CHANGED"
        await bench.redis.xgroup_create(keys.outbox(0, 1), "ledger", "0")
        await bench.scripts.flushed("ledger", await bench.waiting(), generation=1, seq=1)
        assert await bench.scripts.exhausted("P", 1, bench.last_lease(), generation=1) == "OK"

    # --- flushed, books ---------------------------------------------------------------------------------------------

    async def test_flushed_counts_only_what_was_still_there(self, bench: Bench) -> None:
        await bench.restock(count=20)
        outbox = keys.outbox(0, 1)
        await bench.redis.xgroup_create(outbox, "ledger", "0", mkstream=True)
        for i in range(4):
            await bench.words(Routed(request(f"r{i}", quantity=i + 1), plan()))
        read = await bench.redis.xreadgroup("ledger", "me", {outbox: ">"})
        entries = await bench.waiting()
        assert [entry for entry, _ in read[0][1]] == [entry for entry, _, _ in entries]
        assert await bench.scripts.flushed("ledger", entries[:2], generation=1, seq=2) == 2
        again = [*entries[:3], entries[2], ("1-1", 50, 5_000)]
        assert await bench.scripts.flushed("ledger", again, generation=1, seq=1) == 1
        books = await bench.scripts.books(["P"], generation=1)
        assert books is not None
        assert (books.codes, books.entries, books.flushed, books.seq) == (4, 1, (2, 1), 4)
        assert books.bytes == entries[3][2]
        assert (await bench.redis.xpending(outbox, "ledger"))["pending"] == 1
        await bench.redis.delete(outbox)
        assert await bench.scripts.flushed("ledger", entries[3:], generation=1, seq=4) == 0
        await bench.redis.hset(keys.totals(0, 1), mapping={"codes": 0, "bytes": 0})

    async def test_the_last_flushes_are_noted_and_no_more(self, bench: Bench) -> None:
        await bench.restock(count=20)
        for i in range(20):
            await bench.words(Routed(request(f"r{i}"), plan()))
        entries = await bench.waiting()
        for seq in (2, 1, *range(3, 21)):
            assert await bench.scripts.flushed("ledger", [entries[seq - 1]], generation=1, seq=seq) == 1
            assert await bench.scripts.flushed("ledger", [entries[seq - 1]], generation=1, seq=seq) == 0
            books = await bench.scripts.books([], generation=1)
            assert books is not None
            assert books.flushed == (2, 1, *range(3, 21))[: 1 if seq == 2 else max(seq, 2)][-16:]
        assert books.codes == 0

    async def test_a_gap_in_the_store_stays_known(self, bench: Bench) -> None:
        await bench.restock()
        before = await bench.contents()
        assert await bench.scripts.distrust(2, 1) == "GONE"
        assert await bench.contents() == before
        for seq in (3, 5):
            assert await bench.scripts.distrust(1, seq) == "OK"
            books = await bench.scripts.books([], generation=1)
            assert books is not None
            assert books.lost == 3

    async def test_only_a_generation_that_was_left_and_is_flushed_is_forgotten(self, bench: Bench) -> None:
        await bench.restock(count=3)
        await bench.words(Routed(request(), plan()))
        of_it = [keys.window(0, 1, "P"), keys.pool(0, 1, "P"), keys.outbox(0, 1), keys.totals(0, 1)]
        before = await bench.contents()
        assert await bench.scripts.forget(of_it, generation=1) == ("OPEN", 0)
        assert await bench.contents() == before
        [entry] = await bench.waiting()
        assert await bench.open(2) == "OK"
        before = await bench.contents()
        assert await bench.scripts.forget(of_it, generation=1) == ("HELD", 0)
        assert await bench.contents() == before
        await bench.scripts.flushed("ledger", [entry], generation=1, seq=1)
        assert await bench.scripts.forget([*of_it, keys.window(0, 1, "Q")], generation=1) == ("OK", 4)
        assert [key for key in await bench.contents() if key in of_it] == []
        await bench.redis.flushall()

    async def test_books_say_what_is_there(self, bench: Bench) -> None:
        await bench.restock("P", 5, expires_at=await bench.now() - 1)
        await bench.restock("P", 5, stock_version=2)
        await bench.words(Routed(request(quantity=2), plan()))
        books = await bench.scripts.books(["P", "Q"], generation=1)
        assert books is not None
        assert (books.seq, books.codes, books.restocked, books.popped, books.set_aside, books.taken_back) == (
            1,
            7,
            10,
            2,
            5,
            0,
        )
        window, empty = books.windows["P"], books.windows["Q"]
        assert (window.length, window.lease, window.stock, window.exhausted) == (3, bench.last_lease(), 2, -1)
        assert (empty.length, empty.lease, empty.stock, empty.exhausted) == (0, "", 0, -1)
        assert await bench.scripts.books(["P"], generation=2) is None

    # --- replay, rights ---------------------------------------------------------------------------------------------

    async def test_a_full_memory_stops_new_vouchers_and_no_replay(self, bench: Bench) -> None:
        await bench.restock()
        issued = (await bench.issue(Routed(request("old"), plan()))).answers[0].detail
        [entry] = await bench.waiting()
        await bench.set_full(True)
        try:
            before = await bench.contents()
            with pytest.raises(RedisFull):
                await bench.issue(Routed(request("old"), plan()), Routed(request("new"), plan()))
            assert await bench.contents() == before
            reply = await bench.scripts.replay([request("old"), request("new")], generation=1, version=1)
            assert [(one.status, one.detail) for one in reply.answers] == [("REPLAY", issued), ("MISS", "")]
            assert await bench.scripts.flushed("ledger", [entry], generation=1, seq=1) == 1
        finally:
            await bench.set_full(False)
        assert await bench.words(Routed(request("new"), plan())) == ["ISSUED"]

    async def test_a_bare_check_confirms_the_catalogue(self, bench: Bench) -> None:
        assert (await bench.scripts.replay([], generation=1, version=1)).status == "OK"
        assert await bench.scripts.publish(2) == "OK"
        assert (await bench.scripts.replay([], generation=1, version=1)).status == "STALE"

    async def test_every_right_is_there(self, bench: Bench) -> None:
        assert await bench.scripts.rights(["get", "set", "info", "lpop"]) == []

    # --- the doors --------------------------------------------------------------------------------------------------

    async def test_a_flushed_script_cache_is_not_noticed(self, bench: Bench) -> None:
        await bench.restock()
        for i in range(3):
            await bench.redis.script_flush()
            assert await bench.words(Routed(request(f"r{i}"), plan())) == ["ISSUED"]

    async def test_text_goes_through_untouched(self, bench: Bench) -> None:
        await bench.restock()
        payload: Any = "T-ü€😀\tPAY,{}[]%1.10\t9007199254740993"
        first = await bench.issue(Routed(request("k:%{1}", terminal="T-ü", payload=payload), plan()))
        assert Record.unpack(first.answers[0].detail).payload == payload
        again = await bench.issue(Routed(request("k:%{1}", terminal="T-ü", payload=payload), plan()))
        assert again.answers[0].detail == first.answers[0].detail


async def _microseconds(bench: Bench) -> int:
    """The server's clock, in Unix microseconds."""
    second, microsecond = await bench.redis.time()
    return int(second) * 1_000_000 + int(microsecond)
