"""``voucherd codes``: stock comes in."""

from __future__ import annotations

import typer

from service.cli import generating, imports

app = typer.Typer(help="Codes: stock comes in.", no_args_is_help=True)
app.command("import")(imports.import_)
app.command("generate")(generating.generate)
app.command("count")(generating.count)
