"""What the commands print: tables and sentences for people, JSON for programs; faults on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.domain import instant as instant  # how every command prints a time

# Nothing that is printed is markup, an emoji or a number to be coloured: it comes from files and from clients.
_PLAIN: Final = {"markup": False, "emoji": False, "highlight": False}


def say(text: str = "") -> None:
    """One sentence on standard output, wrapped for people and whole for programs."""
    console = screen()
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
    """Prints a ``table``."""
    show(table(columns, rows, title=title, numbers=numbers, whole=whole))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    numbers: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> Table:
    """A table that fits the terminal.  The columns named in ``numbers`` are aligned to the right; these, and the ones
    named in ``whole``, are never broken into lines."""
    made = Table(
        box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", header_style="", pad_edge=False
    )
    for column in columns:
        right = column in numbers
        made.add_column(
            column.replace(" ", "\n") if right else column,  # numbers are short, their headings need not be wide
            justify="right" if right else "left", overflow="fold", no_wrap=right or column in whole,
        )  # fmt: skip
    for row in rows:
        made.add_row(*(shown(cell) for cell in row))
    return made


def print_facts(named: Mapping[str, object]) -> None:
    """Prints ``facts``."""
    show(facts(named))


def facts(named: Mapping[str, object]) -> Table:
    """Names and what they are, one a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in named.items():
        grid.add_row(name, shown(value))
    return grid


def show(page: RenderableType) -> None:
    """Prints tables and facts on standard output."""
    screen().print(page)


def print_json(value: object, *, indent: bool = True) -> None:
    """``value`` (structs, lists, dictionaries) as JSON on standard output, indented or as one line."""
    text = orjson.dumps(msgspec.to_builtins(value), option=orjson.OPT_INDENT_2 if indent else None).decode()
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


def screen() -> Console:
    """Standard output."""
    return Console(**_PLAIN)  # type: ignore[arg-type]
