"""``voucherd migrate``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from service.cli import options
from service.cli.console import say
from service.store.database import Database
from service.store.migration import migrate as migrate_store


def migrate(data_dir: options.DataDir = None) -> None:
    """Bring the store's schema to this version, from any older one or from nothing. May be repeated."""
    settings = options.settings_of(data_dir)

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
