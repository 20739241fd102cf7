"""The queue's bounds: nobody waits in vain, nobody takes it all, and it never stays shut."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission

QUEUE, BATCH, DEADLINE_S = 4_096, 256, 2.0


def admission(*, batch_s: float | None = None) -> Admission:
    """With nothing under way, after many batches that took so long."""
    made = Admission(QUEUE, BATCH, DEADLINE_S)
    for _ in range(200 if batch_s else 0):
        made.began(0.0)
        made.ended(batch_s or 0.0)
    return made


def fill(queue: Admission, holder: str, now: float = 0.0, quantity: int = 1) -> int:
    """How many vouchers of ``holder`` are taken if it asks for ever."""
    taken = 0
    while not queue.take(holder, quantity, now):
        taken += quantity
    return taken


def test_one_alone_never_has_more_than_half_and_the_next_one_always_finds_room() -> None:
    queue = admission()
    assert fill(queue, "noisy") == QUEUE // 2
    assert queue.take("noisy", 1, 0.0) == "share"
    others = [fill(queue, f"other-{number}") for number in range(5)]
    assert others == sorted(others, reverse=True)
    assert others[-1] > 0
    assert queue.take("quiet", 1, 0.0) == ""


def test_those_who_ask_for_more_than_there_is_get_equal_shares(rng: random.Random) -> None:
    queue, held = admission(), Counter[str]()
    for _ in range(20_000):
        holder = rng.choice("abc")
        held[holder] += not queue.take(holder, 1, 0.0)
    for holder in "abc":  # of four shares the last one is for who comes next
        assert held[holder] == pytest.approx(QUEUE / 4, rel=0.1), held


def test_what_was_called_for_makes_room_again() -> None:
    queue = admission()
    fill(queue, "a", quantity=20)
    for _ in range(queue.queued // 20):
        queue.leave("a", 20)
    assert (queue.queued, queue._held) == (0, {}), "the queue remembers who is gone"
    assert fill(queue, "a") == QUEUE // 2


def test_a_slow_redis_shortens_the_queue_to_what_can_be_called_for_in_time() -> None:
    queue = admission(batch_s=0.5)
    queue.began(10.0)
    holders = [f"h{number}" for number in range(1_000)]
    taken = sum(not queue.take(holder, 1, 10.0) for holder in holders)
    assert taken == (DEADLINE_S / 0.5 - 1) * BATCH, "three more batches after the one under way"
    assert queue.take("late", 1, 10.0) == "delay"


def test_a_batch_that_hangs_is_noticed_before_it_ends() -> None:
    queue = admission(batch_s=0.005)
    queue.began(10.0)
    assert queue.take("a", 1, 10.0) == ""
    assert fill(queue, "a", 10.5) == 3 * BATCH // 2 - 1, "half of three batches like this one"
    assert queue.take("b", 1, 11.0) == "delay", "half a second more, and there is time for one"


@given(st.lists(st.floats(0.0, 30.0), max_size=30), st.integers(1, 20))
def test_with_nothing_under_way_somebody_is_always_taken(seconds: list[float], quantity: int) -> None:
    queue = admission()
    for batch_s in seconds:
        queue.began(0.0)
        queue.ended(batch_s)
    assert queue.take("a", quantity, 1e9) == ""


def test_a_clock_that_stands_still_locks_nobody_out() -> None:
    queue = admission()
    queue.began(5.0)
    assert queue.take("a", 1, 5.0) == ""
    queue.ended(5.0)
    assert queue.take("a", 1, 5.0) == ""


@pytest.mark.parametrize("batch_s", [0.001, 0.02, 0.3, 0.9])
def test_nobody_who_was_taken_waits_past_the_deadline_and_a_quiet_one_is_served(
    batch_s: float, rng: random.Random
) -> None:
    """A queue as the issuer works it: five times as much is asked for as can be served, nearly all by one holder."""
    queue = Admission(QUEUE, BATCH, DEADLINE_S)
    waiting: deque[tuple[str, float]] = deque()
    now, served, asked, waits = 0.0, Counter[str](), Counter[str](), list[float]()
    for round_ in range(60):
        for _ in range(min(BATCH, len(waiting))):
            holder, since = waiting.popleft()
            queue.leave(holder, 1)
            served[holder] += 1
            waits.append(now - since)
        took = batch_s * rng.uniform(0.7, 1.3)
        queue.began(now)
        for step in range(5 * BATCH):
            at = now + took * step / (5 * BATCH)
            holder = "quiet" if step % 100 == 0 else "noisy"
            asked[holder] += round_ >= 20
            if not queue.take(holder, 1, at):
                waiting.append((holder, at))
            elif holder == "quiet" and round_ >= 20 and batch_s < DEADLINE_S / 4:
                pytest.fail(f"the quiet one was refused in round {round_}")
        now += took
        queue.ended(now)
        if round_ == 20:
            served.clear()
            waits.clear()
    assert max(waits) <= DEADLINE_S * 1.2, "the spread of single batches"
    assert served.total() >= 0.8 * BATCH * 39 * (0.5 if batch_s > DEADLINE_S / 4 else 1)
