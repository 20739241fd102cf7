"""Brings a store to this version's schema."""

from __future__ import annotations

from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from service.store.database import Database

MIGRATION_S: Final = 3_600.0
# Any number, the same in every process: only one of them migrates at a time.
MIGRATION_LOCK: Final = 0x766F7563


async def migrate(database: Database) -> None:
    """The schema is at this version's head, from whatever older one (or nothing) was there.

    One transaction; several processes may try at once.  Raises StoreUnreachable (nothing was changed, or all).
    """
    patient = Database(database.url, MIGRATION_S)
    try:
        async with patient.write() as connection:
            if not patient.is_sqlite:
                await connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)
    finally:
        await patient.close()


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "service.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
