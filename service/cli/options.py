"""Options that several commands share, and what is said of one that was typed wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
T = TypeVar("T")

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Data of a `voucherd up`; without it the VOUCHERD_… settings say where Redis and the store are.",
        file_okay=False,
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IfVersion = Annotated[
    int | None,
    typer.Option(
        "--if-version",
        metavar="N",
        min=0,
        help="Only if nobody has changed the campaign since `campaign show` said that it is at this version.",
        show_default=False,
    ),
]


def typed(form: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What one of ``service.worker.forms`` makes of an option.  Raises typer.BadParameter if it can't."""
    try:
        return form(*given, **named)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
