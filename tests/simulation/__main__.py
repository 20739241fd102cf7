"""``python -m tests.simulation``: many schedules, until one breaks a promise.

Every schedule has a number, and the seed and the number together decide everything in it: what fails here fails
again anywhere.  Exit status 1, the trace and the command that repeats it, if any promise was broken.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Final, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.simulation.world import Family, Result, simulate

KINDS: Final[tuple[Family, ...]] = get_args(Family)

# The last lines of a trace that are printed; all of it is in the file.
TRACE_SHOWN: Final = 60


def schedule_seed(seed: int, number: int) -> int:
    """The seed of one schedule of a run: ``number`` itself for the run of seed 0."""
    return seed * 1_000_000 + number


def main(
    schedules: Annotated[int, typer.Option(min=1, help="how many schedules to run")] = 1_000,
    seed: Annotated[int | None, typer.Option(min=0, help="of the run; a random one if not given")] = None,
    first: Annotated[int, typer.Option(min=0, help="number of the first schedule")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = max(1, os.cpu_count() or 1),
    family: Annotated[str | None, typer.Option(help=f"only faults of one kind: {', '.join(KINDS)}")] = None,
    trace: Annotated[Path | None, typer.Option(help="where the trace of a failure goes")] = None,
) -> None:
    """Simulates the protocol under faults, in virtual time, and checks the promises after each schedule."""
    console = Console()
    if family is not None and family not in KINDS:
        raise typer.BadParameter(f"there is no {family!r}")
    kind: Family | None = next((one for one in KINDS if one == family), None)
    run = random.SystemRandom().randrange(100_000) if seed is None else seed
    counts: Counter[str] = Counter()
    console.print(f"seed {run}, schedules {first} to {first + schedules - 1}, {jobs} at a time")
    columns = (TextColumn("schedules"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=schedules)
        for number, result in results(run, range(first, first + schedules), jobs, kind):
            progress.advance(task)
            counts.update(result.counts)
            counts[f"family: {result.family}"] += 1
            if result.violations:
                progress.stop()
                _tell(console, run, number, result, trace, f" --family {family}" if family else "")
                raise typer.Exit(1)
    table = Table("what happened", "times", title="no promise was broken")
    for what, times in sorted(counts.items()):
        table.add_row(what, f"{times:,}")
    console.print(table)


def results(run: int, numbers: range, jobs: int, family: Family | None = None) -> Iterator[tuple[int, Result]]:
    """Runs these schedules of a run, ``jobs`` at a time, and yields each with its number, in order."""
    if jobs == 1:
        for number in numbers:
            yield number, simulate(schedule_seed(run, number), family)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        seeds = (schedule_seed(run, number) for number in numbers)
        yield from zip(numbers, pool.imap(partial(simulate, family=family), seeds, chunksize=4), strict=True)


def _tell(console: Console, run: int, number: int, result: Result, trace: Path | None, options: str) -> None:
    for line in result.trace[-TRACE_SHOWN:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for violation in result.violations[:5]:
        console.print(violation, style="bold red", markup=False, soft_wrap=True)
    if trace is not None:
        trace.write_text("\n".join(result.trace) + "\n")
        console.print(f"the whole trace ({len(result.trace)} lines) is in {trace}")
    console.print(
        f"schedule {number} of seed {run} ({result.family}) broke a promise; it does so again with", style="bold"
    )
    console.print(
        f"  python -m tests.simulation --seed {run} --first {number} --schedules 1 --jobs 1{options} --trace trace.txt",
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
