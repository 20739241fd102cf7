"""The store and Redis of one command, and changes of the control plane that are in force when it returns."""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli import options
from service.cli.console import complain
from service.errors import Misconfigured
from service.line import connect
from service.scripts import Scripts
from service.settings import Settings
from service.store.database import STATEMENT_S, Database, check_migrated
from service.worker.publish import change

T = TypeVar("T")


class Connected(msgspec.Struct, frozen=True):
    """What a command works with."""

    settings: Settings
    database: Database
    scripts: Scripts

    @property
    def actor(self) -> str:
        """Who runs this command, for the audit log: the user that the process belongs to, whatever the environment
        says; what it says by VOUCHERD_ACTOR, which nobody can check, goes before that."""
        return f"{self.settings.actor} ({_user()})" if self.settings.actor else _user()


@asynccontextmanager
async def connected(
    data_dir: Path | None, *, statement_s: float = STATEMENT_S, store_may_be_away: bool = False
) -> AsyncIterator[Connected]:
    """The store and Redis of the settings; all connections are closed at the end.

    Raises Misconfigured if there is no store yet or its schema is not this version's; with ``store_may_be_away`` that
    is left to whoever reads.  ``statement_s`` bounds one statement of the store.
    """
    settings = options.settings_of(data_dir)
    database = Database.connect(settings.store_url, statement_s=statement_s)
    redis = connect(settings.redis_url, timeout_ms=settings.redis_timeout_ms)
    try:
        _refuse_missing(database)
        if not store_may_be_away:
            await check_migrated(database)
        yield Connected(settings, database, Scripts(redis))
    finally:
        await redis.aclose()
        await database.close()


async def put_in_force(
    here: Connected,
    edit: Callable[[AsyncConnection], Awaitable[T]],
    *,
    action: str,
    subject: str,
    detail: str = "",
    told: Callable[[T], None],
) -> None:
    """``edit`` is made, ``told`` has its result, and the command ends: with 0 if the change is in force everywhere."""
    published = await change(
        here.database, here.scripts, edit, actor=here.actor, action=action, subject=subject, detail=detail
    )
    told(published.result)
    if published.unreached:
        complain(
            f"stored as catalogue {published.version}, but NOT YET IN FORCE in partition "
            f"{', '.join(published.unreached)}; `voucherd work` goes on trying, `voucherd status` says when it is"
        )
        raise typer.Exit(1)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without a passwd entry
        return f"uid {os.getuid()}"


def _refuse_missing(database: Database) -> None:
    """Connecting would make an empty file where somebody mistyped a path."""
    if database.is_sqlite and not Path(str(database.url.database)).exists():
        raise Misconfigured(
            f"there is no store at {database.url.database}: run `voucherd migrate` to make it, "
            "or say with --data-dir or VOUCHERD_STORE_URL where it is"
        )
