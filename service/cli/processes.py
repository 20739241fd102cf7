"""``voucherd serve``, ``voucherd work`` and ``voucherd migrate``."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service import logs
from service.cli import options
from service.cli.connections import settings_of
from service.cli.console import say
from service.cli.lock import only_one
from service.garbage import collect_rarely
from service.store.database import Database
from service.store.migration import migrate as migrate_store
from service.vetting import until_vetted
from service.worker.runner import work as work_until

if TYPE_CHECKING:
    from service.web.serve import Addresses


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
    # What serves takes a fifth of the time in which all commands are imported, and no other one needs it.
    from service.web.serve import serve as serve_until_stopped

    settings = settings_of(data_dir, port=port, ops_port=ops_port, workers=workers)
    vetted = partial(until_vetted, settings)
    raise typer.Exit(asyncio.run(serve_until_stopped(settings, announce=_announce, vetted=vetted)))


def work(data_dir: options.DataDir = None) -> None:
    """Run the background worker: refill windows, write the ledger, recover. Several may run on PostgreSQL."""
    logs.configure()
    collect_rarely()
    settings = settings_of(data_dir)
    database = Database.connect(settings.store_url)

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work_until(settings, stop)

    if not database.is_sqlite:
        asyncio.run(run())
        return
    store = Path(str(database.url.database))
    taken = f"another `voucherd work` (pid {{pid}}) runs on {store}: one is enough, and several need PostgreSQL"
    with only_one(Path(f"{store}.worker"), taken):
        asyncio.run(run())


def migrate(data_dir: options.DataDir = None) -> None:
    """Bring the store's schema to this version, from any older one or from nothing. May be repeated."""
    settings = settings_of(data_dir)

    async def run() -> None:
        database = Database.connect(settings.store_url)
        if database.is_sqlite:
            Path(str(database.url.database)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            await migrate_store(database)
        finally:
            await database.close()

    asyncio.run(run())
    say("the store is at this version's schema")


def _announce(at: Addresses) -> None:
    say(f"serving the API on {_shown(at.public)}, metrics and health on {_shown(at.ops)}")


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
