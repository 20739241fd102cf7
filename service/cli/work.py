"""``voucherd work``."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import uvloop

from service import logs
from service.cli import options
from service.cli.lock import only_one
from service.exposition import of_this_process
from service.store.database import Database
from service.worker.runner import work as work_until


def work(data_dir: options.DataDir = None) -> None:
    """Run the background worker: refill windows, write the ledger, recover. Several may run on PostgreSQL."""
    settings = options.settings_of(data_dir)
    logs.configure("work", style=settings.log_format, level=settings.log_level)
    database = Database.connect(settings.store_url)

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if not settings.work_ops_port:
            await work_until(settings, stop)
            return
        from service.web import ops  # a web server, which a worker beside `serve` does without

        with ops.listening(settings, "ops_host", "work_ops_port") as listener:
            async with ops.serving_ops(ops.ops(of_this_process), listener, settings):
                await work_until(settings, stop)

    if not database.is_sqlite:
        uvloop.run(run())
        return
    store = Path(str(database.url.database))
    taken = f"another `voucherd work` (pid {{pid}}) runs on {store}: one is enough, and several need PostgreSQL"
    with only_one(Path(f"{store}.worker"), taken):
        uvloop.run(run())
