"""``voucherd serve``."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import typer

from service.cli import options
from service.cli.console import say
from service.vetting import until_vetted
from service.web.serve import Addresses
from service.web.serve import serve as serve_until_stopped


def serve(
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port of the API, 0 picks a free one.", show_default="8080")
    ] = None,
    ops_port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="Port of metrics and health, 0 picks a free one.", show_default="8081"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that serve the API.", show_default="1")
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Serve the API, and metrics and health on the ops port, until SIGTERM or Ctrl-C; then drain and end."""
    settings = options.settings_of(data_dir, port=port, ops_port=ops_port, workers=workers)
    vetted = partial(until_vetted, settings)

    def announce(at: Addresses) -> None:
        public = _shown(at.public, "https" if settings.tls_cert_file else "http")
        say(f"serving the API on {public}, metrics and health on {_shown(at.ops, 'http')}")

    raise typer.Exit(asyncio.run(serve_until_stopped(settings, announce=announce, vetted=vetted)))


def _shown(address: tuple[str, int], scheme: str) -> str:
    host, port = address
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
