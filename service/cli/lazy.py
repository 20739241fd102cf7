"""A group of commands whose modules are imported when one of them is asked for, and none to list them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_group


class Listed(NamedTuple):
    """A command that may not have been imported yet."""

    where: str
    """``module:name`` of a function, or of the ``typer.Typer`` of a noun"""
    says: str
    """its line in the list of commands: the first paragraph of its help, which a test holds it to"""


class LazyGroup(TyperGroup):
    """The commands in ``listed``, in that order.

    They are listed, completed and suggested by what is said there.  What is run, asked for its own help, or completed
    further is the command itself.
    """

    listed: Mapping[str, Listed] = {}

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        lines = typer.Typer()
        for name, command in self.listed.items():
            lines.command(name, help=command.says)(_line)
        self.commands = get_group(lines).commands

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.imported(name), rest

    def imported(self, name: str) -> Any:
        """The command itself; its module is imported now."""
        module, _, attribute = self.listed[name].where.partition(":")
        found: typer.Typer | Callable[..., None] = getattr(import_module(module), attribute)
        alone = typer.Typer()
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=name)
        else:
            alone.command(name)(found)
        return get_group(alone).commands[name]


def _line() -> None:
    """Stands for a command in the list; ``resolve_command`` takes the command itself."""
