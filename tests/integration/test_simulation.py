"""Some hundred schedules of the simulation, and the proof that it would see a protocol with a hole in it."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from service import scripts
from tests.simulation.__main__ import results, schedule_seed
from tests.simulation.world import Family, simulate

SCHEDULES = 200
JOBS = 2
# A slow machine does fewer: the long run is `make sim`.
SECONDS_MAX = 25
SCHEDULES_LEAST = 60
# It goes on until everything below has happened.  The rarest, a store found to be older, happens in one schedule of 40,
# so this many without it are a defect and not bad luck.
SCHEDULES_MAX = 1_000
# A simulation in which nothing happens proves nothing.
HAPPENED = (
    "Issued", "KeyReused", "Unavailable exhausted", "Unavailable cap_reached", "Busy refilling", "destroyed",
    "older_copy", "empty", "promoted", "demoted", "rename", "store_older", "store older noticed", "sleeper", "jump",
    "taken back", "adopted", "returned unseen", "went on",
)  # fmt: skip
# Of these, at least one must break a promise if a check is taken out of a script; one in three to one in thirty does.
MUTATED_SCHEDULES_MAX = 400

# What is taken out: the script, its text, what stands there instead, the faults under which it is
# needed, and the promise that it keeps.
HOLES: dict[str, tuple[str, str, str, Family, str]] = {
    "replay check": ("issue", "issued[key] or replays[i]", "issued[key]", "network", "P3"),
    "fence check": ("issue", "if fence > version then", "if false then", "calm", "P6"),
    "identity check": ("issue", "or replid ~= present or", "or", "redis", "P1"),
    "predecessor check": ("restock", "if last ~= ARGV[3] then", "if false then", "network", "P1"),
    "look into the ledger": ("issue", "if restoring and not shape.looked_up then", "if false then", "redis", "P3"),
    "stock version": ("issue", "stock and stock == exhausted", "exhausted", "calm", "P4"),
}


def test_no_schedule_breaks_a_promise(seed: int, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    end = time.monotonic() + SECONDS_MAX
    for number, result in results(seed, range(SCHEDULES_MAX), JOBS):
        if result.violations:
            whole = tmp_path / "trace.txt"
            whole.write_text("\n".join((*result.trace, *result.violations)) + "\n")
            pytest.fail("\n".join((
                *result.trace[-30:], *result.violations[:3], f"the whole trace is in {whole}",
                f"python -m tests.simulation --seed {seed} --first {number} --schedules 1 --jobs 1 --trace trace.txt",
            )))  # fmt: skip
        counts.update(result.counts)
        enough = number + 1 >= SCHEDULES or (number + 1 >= SCHEDULES_LEAST and time.monotonic() > end)
        if enough and all(counts[happened] for happened in HAPPENED):
            break
    else:
        missing = [happened for happened in HAPPENED if not counts[happened]]
        pytest.fail(f"in {SCHEDULES_MAX} schedules there was none of {missing}")


def test_the_same_seed_does_the_same_again(rng: random.Random) -> None:
    """Also in another process, where texts hash to other numbers and other schedules came before."""
    run = rng.randrange(1_000)
    here = [simulate(schedule_seed(run, number)) for number in reversed(range(4))]
    assert [there for _, there in results(run, range(4), JOBS)] == here[::-1]


@pytest.mark.parametrize("hole", sorted(HOLES))
def test_no_hole_in_a_script_stays_unseen(hole: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    name, check, instead, family, promise = HOLES[hole]
    monkeypatch.setattr(scripts, "load", _with_hole(scripts.load, name, check, instead))
    begin = rng.randrange(1_000_000)
    for seed in range(begin, begin + MUTATED_SCHEDULES_MAX):
        if any(violation.startswith(promise) for violation in simulate(seed, family).violations):
            return
    pytest.fail(f"{MUTATED_SCHEDULES_MAX} schedules from seed {begin} did not see that the {hole} is gone")


def _with_hole(
    load: Callable[[str], scripts.Script], name: str, check: str, instead: str
) -> Callable[[str], scripts.Script]:
    whole = load(name)
    assert whole.text.count(check) == 1, f"{check!r} is no longer in {name}.lua: say here what takes its place"
    text = whole.text.replace(check, instead)
    holed = scripts.Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    return lambda wanted: holed if wanted == name else load(wanted)
