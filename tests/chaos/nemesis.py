"""Chooses what goes wrong and when, by its seed.  The same seed chooses the same faults in the same order; what they
hit depends on what the processes are doing just then."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import msgspec
import redis

from tests.chaos.checker import Allowances, Loss
from tests.chaos.faults import FAULTS, Fault, a_malformed_entry, the_store_came_back_older
from tests.chaos.stage import Stage, Stuck

# Longest from the moment when every process runs again until what is in the outbox has been looked at.
PARKED_S: Final = 10.0

PAUSE_S: Final = (0.5, 4.0)  # between the end of one fault and the next one of the same lane

# Faults of Redis and of the store one after the other, beside them those of processes.
LANES: Final = (("redis", "store"), ("process",))


class Happened(msgspec.Struct, frozen=True):
    """One fault.  Unix seconds: ``began``, ``healed`` when everything was there again.  ``lost_since``: what was told
    from then on until ``until`` may be lost, 0 if nothing may.  ``missed``: why it found nothing to break."""

    name: str
    row: int
    began: float
    until: float
    healed: float
    lost_since: float = 0.0
    missed: str = ""


class Nemesis:
    """Use as a context: while it lasts, faults happen.  ``stuck``: what did not come back by itself, if anything."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._seed = seed
        self.happened: list[Happened] = []
        self.stuck: list[str] = []
        self.under_way: dict[int, str] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in range(len(LANES))]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _lane(self, lane: int) -> None:
        rng = random.Random(f"{self._seed}:{lane}")
        mine = [one for one in FAULTS if one.place in LANES[lane] and one.possible(self._stage)]
        bag: list[Fault] = []
        while not self._over.wait(rng.uniform(*PAUSE_S)):
            if not bag:
                bag = rng.sample(mine, len(mine))
            fault = bag.pop()
            self.under_way[lane] = fault.name
            try:
                self.happened.append(inject(self._stage, fault, random.Random(rng.random())))
            except Exception as error:  # noqa: BLE001 - what can't be healed ends this lane, and the verdict says so
                self.stuck.append(f"after {fault.name!r}: {type(error).__name__}: {error}")
                return
            finally:
                del self.under_way[lane]


def inject(stage: Stage, fault: Fault, rng: random.Random, **how: Any) -> Happened:
    """It happened, as ``how`` says if anything, and everything is there again.  Raises Stuck if it does not come
    back."""
    began, since, missed = time.time(), 0.0, ""
    try:
        done = fault.happen(stage, rng, **how)
        if fault.loses:
            since = float(done)
        elif done is False:
            missed = "nothing was there for it"
    except (redis.RedisError, subprocess.TimeoutExpired) as error:  # another fault was there before
        missed = type(error).__name__
    until = time.time()
    if fault.loses and missed:
        raise Stuck(f"{fault.name}: {missed}")
    stage.mend()
    return Happened(fault.name, fault.row, began, until, time.time(), since, missed)


def allowances(stage: Stage, happened: Sequence[Happened]) -> Allowances:
    """What the checker has to know of these faults and of what operators did."""
    losses = [Loss(one.lost_since, one.until) for one in happened if one.lost_since]
    malformed = [one for one in _those(happened, a_malformed_entry) if not one.missed]
    # What was parked after the copy of the store was made goes with it, and no replay record tells of it.
    of_parked = [*losses, *(Loss(one.began, one.until) for one in _those(happened, the_store_came_back_older))]
    names = {one.name for one in happened}
    return Allowances(
        losses=losses,
        revoking=stage.revoking,
        revoked=stage.revoked,
        paused=stage.paused,
        incidents={kind for one in FAULTS if one.name in names for kind in one.incidents},
        parked=len(malformed),
        perhaps=sum(
            any(one.began <= loss.until and loss.since <= one.healed + PARKED_S for loss in of_parked)
            for one in malformed
        ),
    )


def _those(happened: Sequence[Happened], what: Callable[..., object]) -> list[Happened]:
    """Those of ``happened`` that were ``what``."""
    names = {one.name for one in FAULTS if one.happen is what}
    return [one for one in happened if one.name in names]
