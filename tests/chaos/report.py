"""What happened in a run at random, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from tests.chaos.answers import Answers
from tests.chaos.checker import Verdict
from tests.chaos.evidence import Evidence
from tests.chaos.nemesis import Happened

SHOWN: Final = 20  # violations of one promise that are told one by one


class Report(msgspec.Struct, frozen=True):
    """``answers`` by status and problem; ``vouchers``: different ones that clients were told, of which ``lost`` were in
    quarantine at the end; ``outage_s``: the longest time without a final answer although some were wanted, and what was
    broken then; ``happened``: every fault, in the order of their ends."""

    seed: int
    seconds: float
    store: str
    server: str
    calls: int
    keys: int
    vouchers: int
    answers: dict[str, int]
    slowest_s: float
    outage_s: float
    outage_under: list[str]
    faults: dict[str, int]
    missed: dict[str, int]
    generations: int
    violations: dict[str, int]
    shown: list[str]
    lost: int
    quarantine: dict[str, int]
    incidents: list[tuple[str, str, int]]
    parked: int
    defects: list[str]
    stuck: list[str]
    happened: list[Happened]

    @property
    def broken(self) -> bool:
        return bool(self.defects or self.stuck) or any(self.violations.values())

    def json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def report(
    seed: int,
    seconds: float,
    store: str,
    server: str,
    answers: Answers,
    evidence: Evidence,
    verdict: Verdict,
    happened: Sequence[Happened],
    stuck: list[str],
) -> Report:
    done = [one for one in happened if not one.missed]
    silent = (answers.outage_at, answers.outage_at + answers.outage_s)
    return Report(
        seed=seed,
        seconds=round(seconds, 1),
        store=store,
        server=server,
        calls=answers.calls,
        keys=len(answers.keys),
        vouchers=len(answers.codes),
        answers=dict(sorted(answers.kinds.items())),
        slowest_s=round(answers.slowest_s, 3),
        outage_s=round(answers.outage_s, 3),
        outage_under=[one.name for one in done if one.began < silent[1] and one.healed > silent[0]],
        faults=dict(sorted(Counter(one.name for one in done).items())),
        missed=dict(sorted(Counter(one.name for one in happened if one.missed).items())),
        generations=evidence.generation,
        violations={promise: len(some) for promise, some in verdict.violations.items()},
        shown=[f"{promise}: {one}" for promise, some in verdict.violations.items() for one in some[:SHOWN]],
        lost=verdict.lost,
        quarantine=verdict.quarantine,
        incidents=evidence.incidents,
        parked=evidence.parked,
        defects=verdict.defects[:SHOWN],
        stuck=stuck,
        happened=list(happened),
    )


def show(of: Report, console: Console) -> None:
    table = Table("what", "how much", title=f"chaos, seed {of.seed}: {of.store}, {of.server}, {of.seconds:.0f} s")
    table.add_row("calls", f"{of.calls:,}")
    table.add_row("keys", f"{of.keys:,}")
    table.add_row("vouchers told", f"{of.vouchers:,}")
    for kind, count in of.answers.items():
        table.add_row(f"  {kind}", f"{count:,}")
    table.add_row("slowest final answer", f"{of.slowest_s:.2f} s")
    table.add_row("longest outage", f"{of.outage_s:.2f} s, {' and '.join(of.outage_under) or 'no fault'}")
    table.add_row("generations", f"{of.generations}")
    table.add_section()
    table.add_row("faults", f"{sum(of.faults.values()):,}")
    for name, count in of.faults.items():
        table.add_row(f"  {name}", f"{count}")
    for name, count in of.missed.items():
        table.add_row(f"  found nothing to break: {name}", f"{count}")
    table.add_section()
    for promise, count in of.violations.items():
        table.add_row(f"{promise} broken", f"{count}")
    table.add_row("told, lost, in quarantine", f"{of.lost:,}")
    for pool, count in of.quarantine.items():
        table.add_row(f"  quarantine of {pool}", f"{count:,}")
    table.add_row("malformed entries parked", f"{of.parked}")
    console.print(table)
    for line in (*of.shown, *of.defects, *of.stuck):
        console.print(line, style="bold red", markup=False, soft_wrap=True)
    console.print(f"repeat the faults with --seed {of.seed}" if of.broken else "no promise was broken")
