"""What alembic runs: on the connection it is given (``migration.migrate``, the tests), else on the settings' store.

The second way is for developers: ``alembic -c service/store/migrations/alembic.ini revision --autogenerate``.
"""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection

from service import settings
from service.store import schema
from service.store.database import Database


def run(connection: Connection) -> None:
    # The caller's transaction is the one: all of an upgrade or nothing, on SQLite too.
    context.configure(connection=connection, target_metadata=schema.metadata, transactional_ddl=True)
    context.run_migrations()


async def connect_and_run() -> None:
    database = Database.connect(settings.load().store_url)
    try:
        async with database.write() as connection:
            await connection.run_sync(run)
    finally:
        await database.close()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    asyncio.run(connect_and_run())
