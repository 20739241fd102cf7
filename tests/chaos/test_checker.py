"""The checker sees each way in which a promise can be broken: what is whole passes, and each break of it is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.chaos.answers import Answers
from tests.chaos.checker import Allowances, Loss, Verdict, check
from tests.chaos.client import UNTOLD
from tests.chaos.evidence import Evidence, Issued
from tests.chaos.nemesis import Happened, allowances
from tests.chaos.stage import Campaign, Paused, World

WORLD = World(
    ("D",),
    (
        Campaign("PLENTY", "PAY", 1),
        Campaign("TINY", "TIN", 1, codes=1),
        Campaign("CAPPED", "CAP", 1, cap=1),
        Campaign("HOLDERS", "HOL", 1, distributor_cap=2, terminal_cap=1),
    ),
)


class Scene:
    """Two vouchers that clients were told; what else happens is added to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []
        self._calls = 0
        self.evidence = Evidence(
            generation=2,
            issued={},
            doubled=[],
            windows={"W-1"},
            twice=[],
            outbox=0,
            places={},
            imported=Counter({"PLENTY": 10, "TINY": 1}),
            stored=Counter({"PLENTY": 4}),
            leased=Counter({"PLENTY": 6, "TINY": 1}),
            out=Counter({"PLENTY": 1}),
            held=Counter({"PLENTY": 1}),
            quarantine=Counter(),
            incidents=[],
            parked=0,
            findings=[],
        )
        self.voucher("K-1", "C-1")
        self.voucher("K-2", "C-2")

    def call(
        self, key: str, status: int, code: str = "", *, voucher: str = "", body: str = "", product: str = "PAY",
        at: float = 100.0, terminal: str = "T", token: str = "old", changed: bool = False, campaign: str = "PLENTY",
    ) -> None:  # fmt: skip
        """One, and its answer half a second later."""
        self._calls += 1
        self._lines += [
            f"C\t{self._calls}\t{at}\tD\t{key}\t{product}\t{terminal}\t{token}\t{'changed' if changed else ''}",
            f"A\t{self._calls}\t{at + 0.5}\t{status}\t{code}\t{body or voucher}\t{voucher}\tS\t{campaign}",
        ]

    def voucher(self, key: str, code: str, *, in_ledger: bool = True, campaign: str = "PLENTY", **how: object) -> None:
        self.call(key, 200, voucher=code, campaign=campaign, **how)  # type: ignore[arg-type]
        if in_ledger:
            self.issued(code, key, campaign, str(how.get("terminal", "T")))

    def issued(self, code: str, key: str, campaign: str = "PLENTY", terminal: str = "T", *, request: int = 0) -> None:
        """In the ledger; by a request of its own, unless its number is given."""
        way = (0, 1, request or 1_000 + len(self.evidence.issued), 0)
        self.evidence.issued[code] = Issued(("D", key), campaign, terminal, way)

    def verdict(self, allowed: Allowances) -> Verdict:
        self._path.write_text("".join(f"{line}\n" for line in self._lines))
        return check(Answers([self._path]), self.evidence, WORLD, allowed)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "calls")


def lost(scene: Scene, place: str = "quarantine", **how: object) -> None:
    scene.voucher("K-3", "C-3", in_ledger=False, **how)
    scene.evidence.places["C-3"] = place  # type: ignore[assignment]


def refused(scene: Scene, code: str, product: str, **how: object) -> None:
    scene.call("K-9", 409, code, product=product, **how)  # type: ignore[arg-type]


BREAKS: dict[str, tuple[str, Callable[[Scene], object]]] = {
    "a code told to two keys": ("P1", lambda on: on.call("K-2", 200, voucher="C-1")),
    "a code of another key in the ledger": ("P1", lambda on: on.issued("C-1", "K-7")),
    "a code told and in a window": ("P1", lambda on: on.evidence.windows.add("C-1")),
    "a code in the ledger and in a window": (
        "P1",
        lambda on: (on.issued("C-8", "K-8"), on.evidence.windows.add("C-8")),
    ),
    "a code twice in the windows": ("P1", lambda on: on.evidence.twice.append("W-1")),
    "a code twice in the ledger": ("P1", lambda on: on.evidence.doubled.append("C-1 is there twice")),
    "a code told and in stock": ("P1", lambda on: lost(on, "stock")),
    "a code that was never imported": ("P1", lambda on: lost(on, "nowhere")),
    "a double issue on record": ("P1", lambda on: on.evidence.incidents.append(("double_issue", "PLENTY", 1))),
    "an audit that finds something": ("P1", lambda on: on.evidence.findings.append(("P1", "lot 1: given twice"))),
    "told, in quarantine without a loss": ("P2", lost),
    "told, lost before the loss": ("P2", lambda on: lost(on, at=10.0)),
    "told, asked for after the loss": ("P2", lambda on: lost(on, at=310.1)),
    "told, set aside": ("P2", lambda on: lost(on, "set aside")),
    "told, accounted for nowhere": ("P2", lambda on: lost(on, "on its way")),
    "told with another, and in quarantine without a loss": (
        "P2",
        lambda on: (
            on.voucher("K-3", "C-3,C-4", in_ledger=False),
            on.issued("C-3", "K-3"),
            on.evidence.places.update({"C-4": "quarantine"}),
        ),
    ),
    "an outbox that nobody empties": ("P2", lambda on: setattr(on.evidence, "outbox", 1)),
    "an entry parked that nobody forged": ("P2", lambda on: setattr(on.evidence, "parked", 1)),
    "an entry that conflicts": ("P2", lambda on: on.evidence.incidents.append(("conflicting_entry", "PLENTY", 1))),
    "another answer to the same key": ("P3", lambda on: on.voucher("K-1", "C-3")),
    "the same voucher in other bytes": ("P3", lambda on: on.call("K-1", 200, voucher="C-1", body="other")),
    "a voucher for another body": ("P3", lambda on: on.voucher("K-1", "C-3", changed=True)),
    "a replay refused as another body": ("P3", lambda on: on.call("K-1", 422, "key_reused")),
    "two requests of one key in the ledger": ("P3", lambda on: on.issued("C-3", "K-1")),
    "exhausted although codes are left": (
        "P4",
        lambda on: (on.evidence.held.update(TINY=1), on.evidence.out.update(TINY=1), refused(on, "exhausted", "TIN")),
    ),
    "exhausted where there is always more": ("P4", lambda on: refused(on, "exhausted", "PAY")),
    "a cap that is not reached": ("P4", lambda on: refused(on, "cap_reached", "CAP")),
    "a cap where there is none": ("P4", lambda on: refused(on, "cap_reached", "PAY")),
    "not running although it runs": ("P4", lambda on: refused(on, "not_running", "PAY", at=500.0)),
    "codes that are missing from stock": ("P5", lambda on: on.evidence.stored.subtract(PLENTY=1)),
    "codes that are missing from a window": ("P5", lambda on: on.evidence.held.subtract(PLENTY=1)),
    "more codes gone than were leased": ("P5", lambda on: on.evidence.quarantine.update(PLENTY=-1)),
    "a revoked token that is good": ("P6", lambda on: on.voucher("K-3", "C-3", token="revoked", at=201.0)),
    "a good token that is refused": ("P6", lambda on: on.call("K-3", 401, "token_unknown")),
    "a paused campaign that issues": ("P6", lambda on: on.voucher("K-3", "C-3", at=251.0)),
    "a campaign's cap exceeded": (
        "P8",
        lambda on: [on.voucher(f"K-{code}", code, campaign="CAPPED", product="CAP") for code in ("C-3", "C-4")],
    ),
    "a distributor's cap exceeded": (
        "P8",
        lambda on: [
            on.voucher(f"K-{code}", code, campaign="HOLDERS", product="HOL", terminal=code)
            for code in ("C-3", "C-4", "C-5")
        ],
    ),
    "a terminal's cap exceeded": (
        "P8",
        lambda on: [on.voucher(f"K-{code}", code, campaign="HOLDERS", product="HOL") for code in ("C-3", "C-4")],
    ),
}

ALLOWED = Allowances(
    losses=[Loss(300.0, 310.0)],
    revoking=["revoked"],
    revoked={"revoked": 200.0},
    paused=[Paused("PLENTY", 249.0, 250.0, 260.0, 261.0)],
)


@pytest.mark.parametrize("how", BREAKS)
def test_no_broken_promise_passes(scene: Scene, how: str) -> None:
    promise, happen = BREAKS[how]
    happen(scene)
    verdict = scene.verdict(ALLOWED)
    assert verdict.violations[promise], verdict
    assert verdict.broken


@pytest.mark.parametrize(
    "how",
    [
        (500, "internal"),
        (404, "not_found"),
        (403, "distributor_mismatch"),
        (0, "reset"),
        (503, f"overloaded{UNTOLD}"),
    ],
)
def test_no_answer_that_nothing_excuses_passes(scene: Scene, how: tuple[int, str]) -> None:
    scene.call("K-3", *how)
    verdict = scene.verdict(ALLOWED)
    assert verdict.defects and verdict.broken
    assert not any(verdict.violations.values())


def test_what_is_whole_passes(scene: Scene) -> None:
    scene.call("K-1", 200, voucher="C-1", at=400.0)
    scene.call("K-1", 422, "key_reused", changed=True)
    scene.call("K-3", 503, "store_unreachable")
    scene.voucher("K-3", "C-3", at=101.0)
    scene.voucher("K-4", "C-4", token="revoked", at=199.0)
    scene.voucher("K-5", "C-5", campaign="TINY", product="TIN")
    scene.voucher("K-6", "C-6", campaign="CAPPED", product="CAP")
    scene.voucher("K-7", "C-7", campaign="HOLDERS", product="HOL")
    scene.voucher("K-8", "C-8,C-9", in_ledger=False)
    for code in ("C-8", "C-9"):
        scene.issued(code, "K-8", request=7)
    refused(scene, "exhausted", "TIN")
    refused(scene, "cap_reached", "CAP")
    refused(scene, "cap_reached", "HOL")
    refused(scene, "not_running", "PAY", at=251.0)
    scene.call("K-10", 401, "token_unknown", token="revoked", at=199.5)
    verdict = scene.verdict(ALLOWED)
    assert not verdict.broken, verdict
    assert verdict.lost == 0


def test_what_was_lost_with_its_last_copy_passes_if_it_is_in_quarantine(scene: Scene) -> None:
    lost(scene, at=309.9)  # the answer is there half a second later, when what it tells of is lost already
    scene.evidence.quarantine.update(PLENTY=1)
    scene.voucher("K-3", "C-4", at=320.0)
    verdict = scene.verdict(ALLOWED)
    assert not verdict.broken, verdict
    assert (verdict.lost, verdict.quarantine) == (1, {"PLENTY": 1})
    scene.evidence.places["C-3"] = "stock"
    assert scene.verdict(ALLOWED).violations["P1"]


def test_a_campaigns_cap_counts_what_was_told_and_lost(scene: Scene) -> None:
    lost(scene, at=304.0, campaign="CAPPED", product="CAP")
    scene.evidence.quarantine.update(CAPPED=1)
    scene.voucher("K-4", "C-4", campaign="CAPPED", product="CAP", at=320.0)
    verdict = scene.verdict(ALLOWED)
    assert verdict.lost == 1
    assert verdict.violations["P8"]


def test_a_distributor_may_go_past_its_cap_by_what_was_lost_and_not_further(scene: Scene) -> None:
    lost(scene, at=304.0, campaign="HOLDERS", product="HOL", terminal="A")
    scene.evidence.quarantine.update(HOLDERS=1)
    for number, terminal in enumerate("BC", 4):
        scene.voucher(f"K-{number}", f"C-{number}", campaign="HOLDERS", product="HOL", terminal=terminal, at=320.0)
    assert not scene.verdict(ALLOWED).broken
    scene.voucher("K-6", "C-6", campaign="HOLDERS", product="HOL", terminal="D", at=320.0)
    assert scene.verdict(ALLOWED).violations["P8"]


def test_what_one_terminal_lost_is_no_excuse_for_another_nor_are_codes_that_were_never_given(scene: Scene) -> None:
    lost(scene, at=304.0, campaign="HOLDERS", product="HOL", terminal="A")
    scene.evidence.quarantine.update(HOLDERS=50)
    for number in (4, 5):
        scene.voucher(f"K-{number}", f"C-{number}", campaign="HOLDERS", product="HOL", terminal="B", at=320.0)
    assert scene.verdict(ALLOWED).violations["P8"] == ["HOLDERS: 2 vouchers of D B, the cap is 1"]


def test_a_call_that_was_never_answered_is_no_final_answer(scene: Scene, tmp_path: Path) -> None:
    verdict = scene.verdict(ALLOWED)
    assert not verdict.broken
    with (tmp_path / "calls").open("a") as file:
        file.write("C\t99\t100.0\tD\tK-9\tPAY\tT\told\t\n")
    again = check(Answers([tmp_path / "calls"]), scene.evidence, WORLD, ALLOWED)
    assert again.defects == ["no final answer to K-9 of D"]


def test_what_was_provoked_is_no_violation(scene: Scene) -> None:
    scene.evidence.incidents.append(("double_issue", "PLENTY", 1))
    scene.evidence.parked = 2
    scene.evidence.findings.append(("P1", "lot 1, seq 2: given twice: in generation 2"))
    scene.evidence.findings.append(("P5", "generation 2: more codes than left the windows {'too_many': 1}"))
    allowed = msgspec.structs.replace(ALLOWED, incidents=("double_issue",), parked=2, forged=1)
    assert not scene.verdict(allowed).broken
    assert scene.verdict(msgspec.structs.replace(allowed, parked=3)).broken
    assert not scene.verdict(msgspec.structs.replace(allowed, parked=3, perhaps=1)).broken
    assert scene.verdict(msgspec.structs.replace(allowed, parked=4, perhaps=1)).broken
    assert scene.verdict(msgspec.structs.replace(allowed, parked=1, perhaps=1)).broken, "more than were forged"


@pytest.mark.parametrize(
    ("other", "began", "until", "perhaps"),
    [
        ("the store came back older", 101.0, 105.0, 1), ("the store came back older", 90.0, 99.0, 0),
        ("the store came back older", 150.0, 155.0, 0), ("Redis is empty", 101.0, 105.0, 1),
        ("Redis is restarted", 101.0, 105.0, 0),
    ],
)  # fmt: skip
def test_a_parked_entry_may_be_lost_with_the_server_that_it_was_on_and_with_no_other(
    other: str, began: float, until: float, perhaps: int
) -> None:
    stage: Any = SimpleNamespace(revoking=(), revoked={}, paused=())
    since = began if other == "Redis is empty" else 0.0
    happened = [
        Happened("a malformed entry is in the outbox", 16, 100.0, 100.1, 100.2),
        Happened(other, 20, began, until, until, since),
    ]
    allowed = allowances(stage, happened)
    assert (allowed.parked, allowed.perhaps) == (1, perhaps)
