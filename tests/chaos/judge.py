"""After the faults: everything is healed and drained, then answers and evidence are held against each other."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from tests.chaos.answers import Answers
from tests.chaos.checker import Allowances, Verdict, check
from tests.chaos.evidence import Evidence, collect
from tests.chaos.stage import Load, Stage

FINISH_S: Final = 120.0

# A refill may be between store and Redis for as long as anything was just asked for: what is off then is looked at
# again.  What is really off stays off.
LOOKS: Final = 5
LOOK_S: Final = 1.0


def settle(stage: Stage, *loads: Load) -> None:
    """Every client has its answers and has ended, and nothing is on its way to the ledger any more.

    Raises Stuck if that does not come by itself.
    """
    stage.mend()
    for load in loads:
        load.finish(FINISH_S)
    stage.mend()
    stage.drain()


def judge(stage: Stage, allowed: Allowances) -> tuple[Answers, Evidence, Verdict]:
    """All that any client was told on this stage, whatever it says of the promises."""
    answers = Answers(load.file for load in stage.loads)
    told = answers.codes
    for look in range(1, LOOKS + 1):
        evidence = asyncio.run(collect(stage.store_url, stage.redis.port, told))
        verdict = check(answers, evidence, stage.world, allowed)
        if not verdict.broken or look == LOOKS:
            break
        time.sleep(LOOK_S)
    return answers, evidence, verdict


def assert_kept(verdict: Verdict) -> None:
    """Fails, saying each, unless every promise was kept."""
    said = [f"{promise}: {one}" for promise, some in verdict.violations.items() for one in some[:10]]
    assert not verdict.broken, "\n".join([*said, *verdict.defects[:10]])
