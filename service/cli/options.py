"""Options that several commands share, the settings they lead to, and what is said of one that was typed wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from service.settings import Settings, in_data_dir, load

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


def settings_of(data_dir: Path | None, **overrides: object) -> Settings:
    """The settings of the environment, pointed at the servers in ``data_dir`` if one is given.

    Raises Misconfigured.
    """
    return load(None, **{**(in_data_dir(data_dir) if data_dir is not None else {}), **overrides})


def id_of(noun: str, name: str) -> Any:
    """The argument that names a campaign, a product."""
    return typer.Argument(metavar=name, help=f"The {noun}: 1 to 64 of A-Z a-z 0-9 . _ -")


def if_version(noun: str) -> Any:
    """The option of a command that changes a campaign, a product."""
    return typer.Option(
        "--if-version",
        metavar="N",
        min=0,
        help=f"Only if nobody has changed the {noun} since `{noun} show` said that it is at this version.",
        show_default=False,
    )


def typed(form: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What one of ``service.worker.forms`` makes of an option.  Raises typer.BadParameter if it can't."""
    try:
        return form(*given, **named)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
