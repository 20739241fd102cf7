"""Each row of the table of faults alone, under load, on real processes.

Those that find most for their time are tried in every run of the tests, the others (`long`) by `make chaos-rows`, which
tries all of them on both stores and on Valkey and Redis.  Row 20 is in tests/acceptance/test_recover_store.py too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.domain import Record
from tests.chaos import power
from tests.chaos.answers import Answers
from tests.chaos.client import Answer, Call, read
from tests.chaos.stage import OUTAGE_S, PLANNED_RATE, READY_S, Load, Stage, until
from tests.chaos.trial import Trial
from tests.wire import Client

pytestmark = pytest.mark.stage("postgresql", "sqlite")

# What a client may be told while Redis is away: nothing of it says that a voucher was not issued.
PATIENCE = {"503 store_unreachable", "503 refilling", "503 overloaded"}
FINAL = {"200", "409 cap_reached", "409 exhausted", "422 key_reused"}
LATE = {"503 refilling"}  # while workers are away, on a machine that is slow to start others
CUT = {"reset", "refused"}  # what a client sees of a process that is gone


def test_row_01_a_process_that_dies_before_it_answers_costs_and_doubles_nothing(trial: Trial) -> None:
    with trial.load() as load:
        for _ in range(2):
            trial.happens("a process dies after the script, before the answer", within_s=READY_S)
            load.answered(20)
        trial.happens("serving processes die")
    assert trial.kinds["reset"] > 0
    assert set(trial.kinds) <= FINAL | LATE | CUT


@pytest.mark.long
def test_row_02_no_lost_reply_of_redis_costs_or_doubles_a_voucher(trial: Trial) -> None:
    with trial.load():
        for _ in range(3):
            trial.happens("replies of Redis are lost")
    assert trial.stage.relay.lost > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_03_no_key_gets_two_codes_when_redis_stands_still(trial: Trial) -> None:
    with trial.load():
        trial.happens("Redis stands still", seconds=3.0)
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE  # so nobody waited for longer than the client does


@pytest.mark.long
def test_row_04_nothing_is_lost_or_doubled_when_redis_dies_and_comes_back(trial: Trial) -> None:
    with trial.load() as load:
        trial.happens("Redis dies and comes back")
        load.answered(50)
        trial.happens("Redis is restarted")
    assert set(trial.kinds) <= FINAL | PATIENCE  # LOADING and NOSCRIPT are hidden


@pytest.mark.long
def test_row_04_nothing_is_lost_or_doubled_when_redis_is_away_for_ten_seconds(trial: Trial) -> None:
    with trial.load():
        trial.happens("Redis dies and comes back", seconds=10.0)
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_04_what_the_ledger_has_is_replayed_while_redis_is_away_and_nothing_is_issued(trial: Trial) -> None:
    stage = trial.stage
    keys = [f"ledger-{number}" for number in range(5)]
    with trial.load() as load:
        known = {key: trial.ask(key) for key in keys}
        for key in keys:
            find = ("ledger", "find", "--request-id", key, "--json")
            until(lambda find=find: json.loads(stage.command(*find).stdout), f"{key} in the ledger")
        stage.redis.kill()
        try:
            for key, first in known.items():  # 503 until that is noticed, or while others are looked up
                again, _ = _first_that(200, itertools.repeat(key), trial)
                assert again.content == first.content
                assert again.headers["Idempotent-Replayed"] == "true"
            for number in range(10):
                new = trial.ask(f"nobody-{number}")
                assert (new.status_code, new.json()["code"]) == (503, "store_unreachable")
                assert new.headers["Retry-After"] == "1"
        finally:
            stage.redis.start()
        stage.mend()
        load.answered(50)
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_04_where_that_was_promised_a_restarted_redis_goes_on_with_its_windows(
    new_stage: Callable[..., Stage], rng: random.Random
) -> None:
    """Without a copy of anything, and with power cuts: nothing that was told is lost, and hardly anything is left."""
    with new_stage(
        "sqlite", "valkey", through=() if power.missing() else power.watched,
        VOUCHERD_WORKERS="1", VOUCHERD_RESTART_IN_PLACE="true", VOUCHERD_ACCEPT="",
    ) as stage:  # fmt: skip
        trial = Trial(stage, ("sqlite", "valkey"), rng)
        faults = ["Redis dies and comes back", "Redis is restarted", "the power is cut"]
        with trial.load() as load:
            for fault in faults[: 2 if power.missing() else 3]:
                until(stage.is_synced, "a generation that is known to be synced")
                trial.happens(fault)
                load.answered(50)
        # One that fell between a lease and its codes would have been left.
        assert stage.generation() <= 2
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.parametrize("fsync", ["always", pytest.param("everysec", marks=pytest.mark.long)])
def test_row_05_no_power_cut_loses_what_was_told_and_one_that_does_is_seen(
    new_stage: Callable[..., Stage], rng: random.Random, fsync: str
) -> None:
    if why := power.missing():
        pytest.skip(why)
    sees = pytest.raises(AssertionError, match="P2") if fsync == "everysec" else contextlib.nullcontext()
    options = {"appendfsync": fsync} if fsync == "everysec" else {}  # the other is what all tests have
    with new_stage("sqlite", "valkey", redis_options=options, through=power.watched, VOUCHERD_WORKERS="1") as stage:
        trial = Trial(stage, ("sqlite", "valkey"), rng)
        with sees, trial.load(first=200, rate=400.0):
            trial.no_work()  # what is in the ledger is safe from this
            time.sleep(rng.uniform(0.5, 1.0))
            gone = power.cut(stage.redis)
            stage.redis.start()
    print(f"{fsync}: {gone} bytes were written and were not on the disk")
    if fsync == "everysec":
        assert gone > 0


@pytest.mark.long
def test_row_05_no_power_cut_loses_what_was_told_into_a_file_that_was_rewritten_or_gone_on_with(
    new_stage: Callable[..., Stage], rng: random.Random
) -> None:
    if why := power.missing():
        pytest.skip(why)
    with new_stage("sqlite", "valkey", through=power.watched, VOUCHERD_WORKERS="1") as stage:
        trial = Trial(stage, ("sqlite", "valkey"), rng)
        with trial.load() as load:
            for before in ("the append-only file is rewritten", "Redis is restarted"):
                trial.happens(before)
                load.answered(50)
                trial.happens("the power is cut")
                load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_06_nothing_is_lost_or_doubled_when_the_disk_is_full(trial: Trial) -> None:
    with trial.load():
        before = trial.stage.redis.process
        trial.happens("the disk of Redis is full")
        assert trial.stage.redis.process is not before, "the disk was full"
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_07_replays_go_on_and_nothing_is_half_done_when_memory_is_full(trial: Trial) -> None:
    with trial.load(), trial.stage.admin() as admin:
        known = trial.ask("full-known")
        trial.happens("the memory of Redis is full")
        admin.config_set("maxmemory", 1)  # whatever a flush frees meanwhile
        new, again = trial.ask("full-new"), trial.ask("full-known")
        changed = trial.ask("full-known", terminal="T-other")
        admin.config_set("maxmemory", 0)
    assert (new.status_code, new.json()["code"]) == (503, "overloaded")
    assert new.headers["Retry-After"] == "1"
    assert (again.status_code, again.content) == (200, known.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (changed.status_code, changed.json()["code"]) == (422, "key_reused")
    assert trial.ask("full-new").status_code == 200
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_08_nobody_notices_that_scripts_are_forgotten(trial: Trial) -> None:
    with trial.load():
        trial.happens("scripts are forgotten")
    assert set(trial.kinds) <= FINAL


def test_row_09_what_a_lagging_replica_did_not_know_is_in_quarantine(trial: Trial) -> None:
    with trial.load() as load:
        before = trial.past.lost
        trial.happens("a lagging replica is promoted", cut_off=trial.no_work)  # what it lacks is nowhere else
        load.answered(50)
    assert trial.past.lost > before, "the replica lagged"


@pytest.mark.long
def test_row_10_a_restored_old_copy_is_noticed_before_the_first_issue(trial: Trial) -> None:
    with trial.load() as load:
        trial.no_work()
        before = trial.past.lost
        trial.happens("Redis is restored from an old copy")
        load.answered(50)
    assert trial.past.lost > before, "the copy was older"


@pytest.mark.long
def test_row_11_an_emptied_redis_is_no_reason_to_say_unavailable(trial: Trial) -> None:
    with trial.load() as load:
        trial.happens("Redis is empty")
        load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE  # and P4 says that no 409 was wrong


@pytest.mark.long
def test_row_12_issuing_goes_on_while_the_store_is_away_and_nothing_is_lost(trial: Trial) -> None:
    sources = trial.stage.world.sources_of("PAY", "TRM")
    with trial.load(sources=sources, rate=float(PLANNED_RATE)) as load:
        trial.happens("the store is away", seconds=float(OUTAGE_S))
        load.answered(20)
    assert set(trial.kinds) <= FINAL, "P7: at the planned rate, for as long as was planned, nobody notices"


@pytest.mark.long
@pytest.mark.stage("postgresql")
def test_row_12_at_the_bound_new_requests_are_refused_and_replays_go_on(trial: Trial) -> None:
    sources = trial.stage.world.sources_of("PAY")
    with trial.load(sources=sources, rate=400.0) as load:
        known = trial.ask("bound-known")
        assert trial.stage.postgres is not None
        trial.stage.postgres.stop()
        until(lambda: load.progress.kinds.get("503 refilling", 0) + load.progress.kinds.get("503 overloaded", 0), "it")
        again = trial.ask("bound-known")
        refused = trial.ask("bound-new")
        trial.stage.postgres.start()
    assert (again.status_code, again.content) == (200, known.content)
    assert refused.status_code == 503
    assert trial.ask("bound-new").status_code == 200
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
@pytest.mark.stage("postgresql")
def test_row_13_what_was_committed_is_there_after_the_store_died(trial: Trial) -> None:
    with trial.load() as load:
        for _ in range(3):
            trial.happens("the store dies")
            shown = trial.stage.command("status")
            assert "older than Redis" not in shown.stdout + shown.stderr, "the store lost what it had committed"
            load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_14_a_worker_that_dies_before_it_acknowledges_writes_nothing_twice(trial: Trial) -> None:
    with trial.load() as load:
        for _ in range(2):
            trial.happens("a worker dies between commit and acknowledge", within_s=READY_S)
            load.answered(20)
        trial.happens("workers die")
    assert set(trial.kinds) <= FINAL | LATE


@pytest.mark.long
@pytest.mark.stage("postgresql")
def test_row_15_what_a_sleeping_worker_had_read_is_not_written_twice(trial: Trial) -> None:
    with trial.load():
        trial.happens("a worker sleeps past the claim")
    assert set(trial.kinds) <= FINAL | LATE


@pytest.mark.long
def test_row_17_nothing_is_issued_after_a_revocation_or_a_pause_has_returned(trial: Trial) -> None:
    stage, distributor = trial.stage, trial.stage.world.distributors[0]
    with trial.load(lanes=32) as load:
        assert trial.ask("token-made", token=stage.new_token(distributor)).status_code == 200, "it works at once"
        trial.happens("a token is revoked")
        load.answered(20)
        trial.happens("a campaign is paused", campaign="PLENTY")
        assert trial.ask("resumed").status_code == 200, "it issues at once"
    assert trial.kinds["401 token_unknown"] > 0
    assert trial.kinds["409 not_running"] > 0
    assert set(trial.kinds) <= FINAL | LATE | {"401 token_unknown", "409 not_running"}


# Redis takes so long for a batch, and so many vouchers may wait for one, three quarters of them of three distributors:
# whatever the machine, a process issues 384 a second.
BATCH_S = 0.5
QUEUE = 256


@pytest.mark.long
def test_row_18_what_is_too_much_is_refused_at_once_and_what_is_taken_is_issued_in_time(
    new_stage: Callable[..., Stage], rng: random.Random
) -> None:
    """As much as one process can, then more than five times as much, then as before."""
    settings = {
        "VOUCHERD_WORKERS": "1", "VOUCHERD_QUEUE_MAX": str(QUEUE), "VOUCHERD_PLANNED_RATE": "2000",
    }  # fmt: skip
    with new_stage("sqlite", "valkey", **settings) as stage:
        trial = Trial(stage, ("sqlite", "valkey"), rng)
        one = {"sources": stage.world.sources_of("PAY"), "ports": stage.ports[:1], "rate": 10_000.0}
        with trial.load(lanes=300, **one) as load:
            stage.relay.delay_s = BATCH_S
            load.answered(500)
            began = time.time()
            load.answered(2_000)
            much = time.time()
            more = stage.load("more", seed=rng.randrange(2**32), lanes=900, later_s=(0.1, 0.5), **one)
            until(lambda: more.progress.kinds.get("503 overloaded", 0) > 2_000, "what is too much")
            too_much = time.time()
            more.answered(1_500)
            refused, _ = _first_that(503, (f"much-{n}" for n in itertools.count()), trial, port=stage.ports[0])
            until_ = time.time()
            more.finish(30.0)
            normal = time.time() + 2 * BATCH_S
            load.answered(2_000)
            ended = time.time()
            stage.relay.delay_s = 0.0

    peak, during = _Phase([load], began, much), _Phase([load, more], too_much, until_)
    after = _Phase([load], normal, ended)
    print(f"peak {peak}; too much {during}; after {after}")
    assert during.called > 5 * peak.issued, "five times what it can do"
    assert during.issued > 0.8 * peak.issued
    assert during.kinds <= {"200", "422 key_reused", "503 overloaded"}
    assert during.refused_s(0.5) < 0.1
    assert during.refused_s(0.99) < BATCH_S, "nobody waits for a batch to hear that it is too much"
    assert during.taken_s(0.99) < 4 * BATCH_S, "one batch is waited for, and the next one is one's own"
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert until_ + 10 > normal, "as before within ten seconds"
    assert after.issued > 0.8 * peak.issued
    assert after.called < 1.5 * peak.called, "nobody has to ask again any more, but for the few of before"


@pytest.mark.long
def test_row_18_a_thousand_clients_more_all_get_what_they_ask_for_in_the_end(trial: Trial) -> None:
    with trial.load() as load:
        trial.happens("more is asked for than can be issued")
        load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE


class _Phase:
    """Calls that began in some seconds, with their answers; ``called`` and ``issued`` a second."""

    def __init__(self, loads: list[Load], begin: float, end: float) -> None:
        some: list[tuple[Call, Answer]] = [
            (call, answer) for load in loads for call, answer in read(load.file) if answer and begin <= call.at < end
        ]
        self._taken = sorted(answer.at - call.at for call, answer in some if answer.status == 200)
        self._refused = sorted(answer.at - call.at for call, answer in some if answer.status == 503)
        self.kinds = {f"{answer.status} {answer.code}".strip() for _, answer in some}
        self.called, self.issued = len(some) / (end - begin), len(self._taken) / (end - begin)

    def taken_s(self, share: float) -> float:
        """Which ``share`` of those that got a voucher did not wait for longer."""
        return self._taken[int(share * len(self._taken))]

    def refused_s(self, share: float) -> float:
        return self._refused[int(share * len(self._refused))]

    def __str__(self) -> str:
        return f"{self.called:.0f} calls/s, {self.issued:.0f} vouchers/s, p99 {self.taken_s(0.99):.2f} s, {self.kinds}"


@pytest.mark.long
def test_row_18_a_noisy_distributor_is_told_when_to_come_back_and_takes_nothing_from_others(trial: Trial) -> None:
    """Its limit holds over all processes and through a loss of Redis, which forgets what was used up of it."""
    stage, rate, burst = trial.stage, 20, 40
    noisy = stage.world.distributors[0]
    sources = stage.world.sources_of("PAY")
    with trial.load(sources=[one for one in sources if one.distributor != noisy]) as load:
        known = trial.ask("limit-known")
        stage.succeed("distributor", "limit", noisy, str(rate), "--burst", str(burst))
        limited, before = time.time(), _generation(stage)
        loud = stage.load(
            f"{load.file.stem}-loud", seed=trial.rng.randrange(2**32), rate=200.0, lanes=64, later_s=(0.1, 0.5),
            sources=[one for one in sources if one.distributor == noisy],
        )  # fmt: skip
        loud.answered(burst)
        trial.happens("Redis is restarted")
        loud.answered(burst)
        load.answered(50)
        refused, key = _first_that(429, (f"limit-{n}" for n in itertools.count()), trial)
        again = trial.ask("limit-known")
        rolls, until_ = _generation(stage) - before, time.time()
        stage.succeed("distributor", "limit", noisy, "none")
        assert trial.ask(key).status_code == 200, "nothing is in the way of the same key any more"
        loud.finish(60.0)
    assert refused.json()["code"] == "rate_limited"
    assert refused.headers["RateLimit-Policy"] == f'"vouchers";q={burst};w={burst // rate}'
    left, wait_s = refused.headers["RateLimit"].removeprefix('"vouchers";r=').split(";t=")
    assert (left, wait_s) == ("0", refused.headers["Retry-After"])
    assert int(wait_s) >= 1
    assert (again.status_code, again.content) == (200, known.content), "a replay is exempt"
    firsts = dict[str, tuple[Call, Answer]]()
    for call, answer in read(loud.file):
        if answer is not None and answer.status == 200:
            firsts.setdefault(call.key, (call, answer))
    issued = sum(answer.at <= until_ for _, answer in firsts.values())
    assert burst <= issued <= burst * (1 + rolls) + rate * (until_ - limited)
    assert Answers([loud.file]).kinds["429 rate_limited"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE, "nobody else was limited"


def _first_that(status: int, keys: Iterator[str], trial: Trial, **how: Any) -> tuple[httpx.Response, str]:
    """The first answer of this status to a request by one of ``keys``, and its key."""
    end = time.monotonic() + READY_S
    while (told := trial.ask(key := next(keys), **how)).status_code != status:
        assert time.monotonic() < end, f"no {status}, but {told.status_code} {told.text}"
    return told, key


def _generation(stage: Stage) -> int:
    with stage.admin() as admin:
        return int(admin.hget("{0}:generation", "open") or 0)


@pytest.mark.long
@pytest.mark.stage("postgresql")
def test_row_19_slow_and_silent_clients_take_nothing_from_others(trial: Trial) -> None:
    """What others wait for is measured with and without them; a tenth of a second is nothing on a busy machine."""

    def p99(begin: float, end: float) -> float:
        answers = Answers([load.file])
        assert not answers.odd
        waits = sorted(wait for at, wait in answers.waits if begin <= at < end)
        assert len(waits) > 100
        return waits[int(0.99 * len(waits))]

    with trial.load() as load:
        began = time.time()
        time.sleep(4.0)
        slow = [Client(("127.0.0.1", port)) for port in trial.stage.ports for _ in range(250)]
        with_them = time.time()
        for number, client in enumerate(slow):
            client.socket.sendall(b"" if number % 2 else b"POST /api/v1/voucher/request HTTP/1.1\r\nHost: x\r\n")
        time.sleep(4.0)
        ended = time.time()
        for client in slow:
            client.socket.close()
    without, beside = p99(began, with_them), p99(with_them, ended)
    print(f"p99 {without * 1e3:.1f} ms without them, {beside * 1e3:.1f} ms beside them")
    assert beside <= max(2 * without, 0.1)
    assert set(trial.kinds) <= FINAL


@pytest.mark.long
@pytest.mark.stage("postgresql")
def test_row_20_nothing_is_given_twice_or_lost_under_load_when_an_old_store_is_put_back(trial: Trial) -> None:
    with trial.load() as load:
        trial.happens("the store came back older")
        load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE


@pytest.mark.long
def test_row_21_a_server_that_was_a_replica_is_not_trusted(trial: Trial) -> None:
    before = _generation(trial.stage)
    with trial.load() as load:
        trial.happens("Redis was demoted and promoted")
        load.answered(50)
    assert trial.evidence.generation > before, "the generation was left"


def test_row_16_what_nobody_should_have_written_holds_nothing_up(trial: Trial) -> None:
    """A code that was given twice stays on record, so this is the last test of its stage."""
    trial.spoilt = True
    stage, world = trial.stage, trial.stage.world
    with trial.load(sources=world.sources_of("PAY")) as load:
        trial.happens("a malformed entry is in the outbox")
        trial.no_work()
        load.answered(20)
        trial.happens("entries come twice")
        trial.no_work()
        given = trial.ask("given", product="TRM", terminal="T-forger").json()
        with stage.admin() as admin:
            generation = admin.hget("{0}:generation", "open")
            outbox, totals = f"{{0}}:{generation}:outbox", f"{{0}}:{generation}:totals"
            [fields] = [entry for _, entry in admin.xrange(outbox) if given["voucher_code"] in entry.get("issued", "")]
            [text] = [one for one in fields["issued"].split("\x1e") if given["voucher_code"] in one]
            assert Record.unpack_entry(text).key == "given"
            with admin.pipeline(transaction=True) as pipe:  # as issue would have, had it given the code twice
                seq = admin.hincrby(totals, "seq", 1)
                pipe.xadd(outbox, {
                    "generation": generation, "seq": seq, "codes": 1, "asides": "",
                    "issued": text.replace("\ngiven\n", "\nforged\n"),
                })  # fmt: skip
                pipe.hincrby(totals, "codes", 1)
                pipe.execute()
        trial.past.incidents.add("double_issue")
        trial.past.forged += 1
        stage.mend()
        asked = (trial.ask(f"paused-{n}", product="TRM", terminal=f"T-{n}") for n in itertools.count())
        until(lambda: next(asked).json().get("code") == "not_running", "a pause of the campaign")
        load.answered(20)
    # An older store, say, that the row before had on this stage is another matter, which the checker has judged.
    assert [subject for kind, subject, _ in trial.evidence.incidents if kind == "double_issue"] == ["TERMINAL"]
    assert trial.evidence.issued[given["voucher_code"]].key[1] == "given"
    assert trial.evidence.parked == 1
    assert set(trial.kinds) <= FINAL | LATE, "the rest went on"


@pytest.mark.parametrize(
    ("calls", "gone"),
    [
        (["1  write(7<a>, \"\"..., 10) = 10", "1  fdatasync(7<a>) = 0", "1  write(7<a>, \"\"..., 5) = 5"], 5),
        (["1  write(7<a>, \"\"..., 10) = 10", "1  fdatasync(7<a> <unfinished ...>", "1  +++ killed by SIGKILL"], 10),
        (
            ["1  write(7<a>, \"\"..., 10) = 10", "2  fdatasync(7<a> <unfinished ...>", "1  write(7<a>, \"\"..., 5) = 5",
             "2  <... fdatasync resumed>) = 0"],
            5,
        ),
        (["1  write(7<a>, \"\"..., 10) = 4", "1  write(7<a>, \"\"..., 6) = -1 ENOSPC", "1  fdatasync(7<a>) = 0"], 0),
        (["1  write(7<a>, \"\"..., 10) = 10", "1  fdatasync(7<a>) = -1 EIO"], 10),
        (["1  write(7<a>, \"\"..., 10) = 10", "1  fdatasync(8<b>) = 0", "1  write(8<b>, \"\"..., 3) = 3"], 10),
        (
            ["1  write(7<a>, \"\"..., 10 <unfinished ...>", "2  fdatasync(7<a>) = 0", "1  <... write resumed>) = 10",
             "1  write(9<socket:[1]>, \"\"..., 3) = 3"],
            10,
        ),
    ],
)  # fmt: skip
def test_only_what_was_written_before_a_completed_fdatasync_began_is_on_the_disk(calls: list[str], gone: int) -> None:
    assert power.not_on_disk(calls)["a"] == gone
