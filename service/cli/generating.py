"""``voucherd codes generate`` and ``codes count``: codes are made, and how many there are of each kind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, instant, print_json, print_table, say
from service.cli.imports import INTERRUPTED
from service.errors import Misconfigured
from service.store import whereabouts
from service.store.whereabouts import Whereabouts
from service.worker import forms
from service.worker.generating import CODES_MAX, generate_codes
from service.worker.pattern import Pattern, folded
from service.worker.stocking import ImportReport, Listener, Progress

# Codes that a dry run shows: enough to see what the pattern looks like.
SAMPLES: Final = 5

PATTERN: Final = typer.Option(
    "--pattern",
    metavar="PATTERN",
    help="# a letter or digit of which no two look alike, % a digit, * a check character over those before it; "
    "all else stands for itself: 'SPR-####-###*'.",
    show_default=False,
)
Words = Annotated[
    Path | None,
    typer.Option(
        "--no-words",
        metavar="FILE",
        help="Words, one a line, that are not to be read in a code, 4 read as A and so on.",
        show_default=False,
    ),
]


def generate(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Where the codes go.")],
    count: Annotated[int, typer.Argument(metavar="N", help="How many.", min=1, max=CODES_MAX)],
    pattern: Annotated[str, PATTERN],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="DATE", help="Their expiry: a day (its end in UTC) or a time.", show_default="that of the pool"
        ),
    ] = None,
    words: Words = None,
    id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Name it: the same ID makes its codes once, and goes on after an interruption.",
            show_default="a new one",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; show what codes look like.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Make codes by a pattern and put them into a pool. They can be issued when this returns.

    They are drawn from the system's secure random source. A pattern of which
    more than one code in a thousand would be one of ours is refused: such
    codes can be guessed. The check character tells every single wrong
    character and every two neighbours that changed places.

    Exactly N codes are in stock afterwards, also if some that were drawn were
    there already. Interrupted, the command with the --id that it named goes on.
    """
    wanted = pattern_of(pattern, words)
    expires_at = None if expires is None else options.typed(forms.expiry_of, expires)
    import_id = id or f"generated-{secrets.token_hex(8)}"
    if dry_run:
        _show_samples(wanted, count, as_json)
        return

    async def run(terminal: Listener) -> ImportReport:
        async with connected(data_dir) as here:
            return await generate_codes(
                here.database, here.scripts, pool, count, wanted, expires_at=expires_at, import_id=import_id,
                listener=terminal, actor=here.actor,
            )  # fmt: skip

    try:
        with _bar() as bar:
            done = asyncio.run(run(_Terminal(bar, count)))
    except KeyboardInterrupt:
        complain(f"interrupted: what was made is in stock, and the same command with --id {import_id} makes the rest")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(done)
    elif done.known:
        say(f"import {import_id} into pool {pool} was finished before: nothing was done")
    else:
        before = f", {done.inserted_before:,} of them before" if done.inserted_before else ""
        made = done.inserted + done.inserted_before
        say(f"{made:,} codes of {pattern} are in pool {pool}{before} (import {import_id})")
    if done.unreached:
        complain(
            f"the codes are in stock, but partition {', '.join(done.unreached)} could not be told: it may take "
            "the pool for exhausted until `voucherd work` has told it"
        )
        raise typer.Exit(1)


def count(
    pool: Annotated[str | None, typer.Argument(metavar="[POOL]", help="This pool alone.", show_default=False)] = None,
    lots: Annotated[bool, typer.Option("--lots", help="Each lot by itself.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Count codes by where they are: in stock, out in windows, issued, set aside, withdrawn, in quarantine.

    Each code is in one place, so the columns add up to what was imported. Out
    are those in a window of Redis, and those that were issued and are not in
    the ledger yet. Taken back were those that left a window for stock: there
    they are once more. Counts the ledger: with many millions of vouchers it takes
    some seconds.
    """

    async def run() -> list[Whereabouts]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await whereabouts.by_lot(conn, pool)

    found = asyncio.run(run())
    rare = [name for name in ("taken_back", "incidents") if any(getattr(one, name) for one in found)]
    names = [name for name in (*_COUNTED, "incidents") if name in rare or name not in ("taken_back", "incidents")]
    if as_json:
        print_json(
            [
                {"pool": one.pool, "lot": one.lot, "expires_at": instant(one.expires_at)}
                | {name: getattr(one, name) for name in (*_COUNTED, "incidents")}
                for one in found
            ]
            if lots
            else [{"pool": id} | counts for id, counts in _by_pool(found, (*_COUNTED, "incidents")).items()]
        )
    elif lots:
        names = [name for name in names if name not in _SELDOM or any(getattr(one, name) for one in found)]
        print_table(
            [*(["pool"] if pool is None else []), "lot", "expires", *map(_head, names)],
            [
                (
                    *([one.pool] if pool is None else []), str(one.lot), instant(one.expires_at)[:10],
                    *(getattr(one, name) for name in names),
                )
                for one in found
            ],
            numbers=["lot", *map(_head, names)],
            whole=["expires"],
        )  # fmt: skip
    else:
        rows = [(id, *counts.values()) for id, counts in _by_pool(found, names).items()]
        print_table(["pool", *map(_head, names)], rows, numbers=[*map(_head, names)])


# A lot of which none are is shown without such a column.
_SELDOM: Final = ("set_aside", "withdrawn", "taken_back", "quarantined")
_COUNTED: Final = ("imported", "stored", "out", "issued", "set_aside", "withdrawn", "taken_back", "quarantined")


def _head(name: str) -> str:
    return name.replace("_", " ")


def _by_pool(lots: list[Whereabouts], names: tuple[str, ...] | list[str]) -> dict[str, dict[str, int]]:
    pools: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for lot in lots:
        for name in names:
            pools[lot.pool][name] += getattr(lot, name)
    return pools


def pattern_of(text: str, words: Path | None) -> Pattern:
    """The pattern, with the words of the file kept out.  Raises Conflict and Misconfigured."""
    try:
        unwanted = () if words is None else folded(words.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Misconfigured(f"the words in {words} can't be read: {reason}") from None
    return Pattern(text, unwanted)


def _show_samples(pattern: Pattern, count: int, as_json: bool) -> None:
    samples = list(islice(pattern.draw(random.SystemRandom()), SAMPLES))
    if as_json:
        print_json({"pattern": pattern.text, "space": pattern.space, "capacity": pattern.capacity, "samples": samples})
        return
    for sample in samples:
        print(sample)
    fits = "enough" if count <= pattern.capacity else "too few"
    say(f"{pattern.space:,} codes, {fits} for {count:,} that can't be guessed. A dry run: nothing was written.")


class _Terminal(Listener):
    """Keeps the bar at what is done."""

    def __init__(self, bar: Bar, count: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=count)

    def progress(self, so_far: Progress) -> None:
        self._bar.update(self._task, completed=so_far.inserted)


def _bar() -> contextlib.AbstractContextManager[Bar]:
    console = Console(stderr=True)
    return Bar(
        BarColumn(bar_width=10), TaskProgressColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        TextColumn("left"), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
