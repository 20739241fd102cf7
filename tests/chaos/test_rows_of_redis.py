"""Each fault of Redis alone, under load, on real processes: rows of the table of faults."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable

import pytest

from tests.chaos import power
from tests.chaos.stage import Stage
from tests.chaos.trial import Trial

pytestmark = pytest.mark.stage("sqlite", "postgresql")

# What a client may be told while Redis is away: nothing of it says that a voucher was not issued.
PATIENCE = {"503 store_unreachable", "503 refilling", "503 overloaded"}
FINAL = {"200", "409 cap_reached", "409 exhausted", "422 key_reused"}


def test_row_02_no_lost_reply_of_redis_costs_or_doubles_a_voucher(trial: Trial) -> None:
    with trial.load():
        for _ in range(3):
            trial.happens("replies of Redis are lost")
    assert trial.stage.relay.lost > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


def test_row_03_no_key_gets_two_codes_when_redis_stands_still(trial: Trial) -> None:
    with trial.load():
        trial.happens("Redis stands still", seconds=3.0)
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE  # so nobody waited for longer than the client does


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


def test_row_06_nothing_is_lost_or_doubled_when_the_disk_is_full(trial: Trial) -> None:
    with trial.load():
        before = trial.stage.redis.process
        trial.happens("the disk of Redis is full")
        assert trial.stage.redis.process is not before, "the disk was full"
    assert trial.kinds["503 store_unreachable"] > 0
    assert set(trial.kinds) <= FINAL | PATIENCE


def test_row_07_replays_go_on_and_nothing_is_half_done_when_memory_is_full(trial: Trial) -> None:
    with trial.load(), trial.stage.admin() as admin:
        known = trial.ask("full-known")
        trial.happens("the memory of Redis is full")
        admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) - 1)
        new, again = trial.ask("full-new"), trial.ask("full-known")
        admin.config_set("maxmemory", 0)
    assert (new.status_code, new.json()["code"]) == (503, "overloaded")
    assert (again.status_code, again.content) == (200, known.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert trial.ask("full-new").status_code == 200
    assert set(trial.kinds) <= FINAL | PATIENCE


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


def test_row_10_a_restored_old_copy_is_noticed_before_the_first_issue(trial: Trial) -> None:
    with trial.load() as load:
        trial.no_work()
        before = trial.past.lost
        trial.happens("Redis is restored from an old copy")
        load.answered(50)
    assert trial.past.lost > before, "the copy was older"


def test_row_11_an_emptied_redis_is_no_reason_to_say_unavailable(trial: Trial) -> None:
    with trial.load() as load:
        trial.happens("Redis is empty")
        load.answered(50)
    assert set(trial.kinds) <= FINAL | PATIENCE  # and P4 says that no 409 was wrong


def test_row_21_a_server_that_was_a_replica_is_not_trusted(trial: Trial) -> None:
    with trial.stage.admin() as admin:
        before = int(admin.hget("{0}:generation", "open") or 0)
    with trial.load() as load:
        trial.happens("Redis was demoted and promoted")
        load.answered(50)
    assert trial.evidence.generation > before, "the generation was left"


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_row_05_no_power_cut_loses_what_was_told_and_one_that_does_is_seen(
    new_stage: Callable[..., Stage], rng: random.Random, fsync: str
) -> None:
    if why := power.missing():
        pytest.skip(why)
    sees = pytest.raises(AssertionError, match="P2") if fsync == "everysec" else contextlib.nullcontext()
    with new_stage("sqlite", "valkey", redis_options={"appendfsync": fsync}, through=power.watched) as stage:
        trial = Trial(stage, ("sqlite", "valkey"), rng)
        with sees, trial.load(first=200, rate=400.0):
            trial.no_work()  # what is in the ledger is safe from this
            time.sleep(rng.uniform(0.5, 1.0))
            gone = power.cut(stage.redis)
            stage.redis.start()
    print(f"{fsync}: {gone} bytes were written and were not on the disk")
    if fsync == "everysec":
        assert gone > 0


@pytest.mark.parametrize(
    ("calls", "on_disk"),
    [
        (["1  write(7, ''..., 10) = 10", "1  fdatasync(7) = 0", "1  write(7, ''..., 5) = 5"], 10),
        (["1  write(7, ''..., 10) = 10", "1  fdatasync(7 <unfinished ...>", "1  +++ killed by SIGKILL +++"], 0),
        (
            ["1  write(7, ''..., 10) = 10", "2  fdatasync(7 <unfinished ...>", "1  write(7, ''..., 5) = 5",
             "2  <... fdatasync resumed>) = 0"],
            10,
        ),
        (["1  write(7, ''..., 10) = 4", "1  write(7, ''..., 6) = -1 ENOSPC", "1  fdatasync(7) = 0"], 4),
        (["1  write(7, ''..., 10) = 10", "1  fdatasync(7) = -1 EIO"], 0),
    ],
)  # fmt: skip
def test_only_what_was_written_before_a_completed_fdatasync_began_is_on_the_disk(
    calls: list[str], on_disk: int
) -> None:
    assert power.on_disk(calls) == on_disk
