"""One fault alone, under load, and whether every promise was kept."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from tests.chaos.answers import Answers
from tests.chaos.checker import Verdict
from tests.chaos.evidence import Evidence
from tests.chaos.faults import FAULTS
from tests.chaos.judge import assert_kept, judge, settle
from tests.chaos.nemesis import Happened, allowances, inject
from tests.chaos.stage import Load, Stage, Store

_numbers = itertools.count(1)


class Past(msgspec.Struct):
    """What was done to a stage so far, by all trials on it; ``lost``: vouchers that are in quarantine by now."""

    happened: list[Happened] = []
    incidents: set[str] = set()
    forged: int = 0
    lost: int = 0


class Trial:
    """After the load has ended: ``kinds`` of this trial's answers, and ``answers``, ``evidence`` and ``verdict`` of all
    that were given on the stage."""

    def __init__(self, stage: Stage, where: tuple[Store, str], rng: random.Random, past: Past | None = None) -> None:
        self.stage, self.where, self.rng = stage, where, rng
        self.past = past or Past()
        self.spoilt = False  # nobody after it can have the stage
        self.kinds = Counter[str]()
        self.answers: Answers
        self.evidence: Evidence
        self.verdict: Verdict

    @contextlib.contextmanager
    def load(self, *, first: int = 50, **how: Any) -> Iterator[Load]:
        """Clients ask; afterwards everything has been healed and drained, and every promise was kept.

        ``first``: so many vouchers have been given when it begins; ``how``: as ``Plan`` has it.
        """
        given = {"rate": 200.0, "lanes": 16, "later_s": (0.1, 1.5), **how}
        load = self.stage.load(f"load-{next(_numbers)}", seed=self.rng.randrange(2**32), **given)
        load.answered(first)
        yield load
        settle(self.stage, load)
        self.check()
        self.kinds = Answers([load.file]).kinds

    def check(self) -> None:
        """Fails unless every promise was kept to all clients of this stage."""
        allowed = allowances(self.stage, self.past.happened)
        allowed = msgspec.structs.replace(
            allowed, incidents={*allowed.incidents, *self.past.incidents}, forged=self.past.forged
        )
        self.answers, self.evidence, self.verdict = judge(self.stage, allowed)
        self.past.lost = self.verdict.lost
        assert_kept(self.verdict)

    def happens(self, name: str, **how: Any) -> Happened:
        """The fault of this name, as ``how`` says if anything, and everything is there again."""
        fault = next(one for one in FAULTS if one.name == name)
        happened = inject(self.stage, fault, random.Random(self.rng.random()), **how)
        self.past.happened.append(happened)
        assert not happened.missed, happened
        return happened

    def no_work(self) -> None:
        """Every worker is dead, until something is mended."""
        for program in self.stage.works:
            program.kill()

    def ask(
        self, key: str, *, product: str = "PAY", token: str = "", terminal: str = "T-asked", port: int = 0
    ) -> httpx.Response:
        """One request by itself, in nobody's file; at whichever ``port`` if none is given."""
        distributor = self.stage.world.distributors[0]
        token = token or next(iter(self.stage.tokens[distributor].values()))
        body = {"request_id": key, "distributor_id": distributor, "terminal_id": terminal, "product_ids": [product]}
        return httpx.post(
            f"http://127.0.0.1:{port or self.rng.choice(self.stage.ports)}/api/v1/voucher/request", json=body,
            headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False,
        )  # fmt: skip
