"""What the commands print: tables and sentences for people, JSON for programs; faults on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.domain import instant as instant  # how every command prints a time

# Nothing that is printed is markup, an emoji or a number to be coloured: it comes from files and from clients.
_PLAIN: Final = {"markup": False, "emoji": False, "highlight": False}


def say(text: str = "") -> None:
    """One sentence on standard output, wrapped for people and whole for programs."""
    console = _console()
    console.print(text, soft_wrap=not console.is_terminal)


def complain(text: str) -> None:
    """One line on standard error, however long."""
    Console(stderr=True, soft_wrap=True, **_PLAIN).print(f"voucherd: {text}")  # type: ignore[arg-type]


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    numbers: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """A table that fits the terminal.  The columns named in ``numbers`` are aligned to the right; these, and the ones
    named in ``whole``, are never broken into lines."""
    table = Table(
        box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", header_style="", pad_edge=False
    )
    for column in columns:
        right = column in numbers
        table.add_column(
            column.replace(" ", "\n") if right else column,  # numbers are short, their headings need not be wide
            justify="right" if right else "left", overflow="fold", no_wrap=right or column in whole,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    _console().print(table)


def print_facts(facts: Mapping[str, object]) -> None:
    """Names and what they are, one a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, shown(value))
    _console().print(grid)


def print_json(value: object) -> None:
    """``value`` (structs, lists, dictionaries) as indented JSON on standard output."""
    text = orjson.dumps(msgspec.to_builtins(value), option=orjson.OPT_INDENT_2).decode()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int], None]]:
    """Shows on standard error, if that is a terminal, how many there are so far and how long it took."""
    console = Console(stderr=True, **_PLAIN)  # type: ignore[arg-type]
    columns = (TextColumn("{task.completed:,} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done: shown.update(task, completed=done)


def shown(value: object) -> str:
    """How a value looks in a table: numbers with separators, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _console() -> Console:
    return Console(**_PLAIN)  # type: ignore[arg-type]
