"""The simulated store: a real SQLite file behind the service's own statements, without the threads of its driver.

A schedule decides when a transaction waits, fails, commits unseen or loses its connection, and which state of the store
comes back after a loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, cast

from sqlalchemy import create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Connection as SyncConnection
from sqlalchemy.engine import CursorResult, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from service.errors import StoreUnreachable
from service.store.database import Database
from service.store.migration import migrate
from tests.simulation.schedule import Process, Scheduler

# As in world.py: long waits made shorter, here what a writer waits for the lock and what an idle transaction may last.
LOCK_S: Final = 1.0
IDLE_S: Final = 2.0


class Connection:
    """As much of SQLAlchemy's AsyncConnection as ``service.store`` uses, without the threads behind it.

    They would cost ten times what the statements do, and nothing in a schedule depends on them.
    """

    def __init__(self, sync: SyncConnection, alive: Callable[[], bool]) -> None:
        self._sync = sync
        self._alive = alive

    @property
    def dialect(self) -> Dialect:
        return self._sync.dialect

    def _here(self) -> SyncConnection:
        if not self._alive():
            raise StoreUnreachable("the store did not answer: the connection is gone")
        return self._sync

    async def execute(self, *arguments: Any) -> CursorResult[Any]:
        return self._here().execute(*arguments)

    async def scalar(self, *arguments: Any) -> Any:
        return self._here().scalar(*arguments)

    async def scalars(self, *arguments: Any) -> Any:
        return self._here().scalars(*arguments)

    async def exec_driver_sql(self, *arguments: Any) -> CursorResult[Any]:
        return self._here().exec_driver_sql(*arguments)

    @contextlib.asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        with self._here().begin_nested():
            yield


class Transaction:
    """One that is open.  ``dead``: its connection was closed by the other side."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.dead = False
        self.connection: sqlite3.Connection | None = None

    def end(self) -> None:
        """The other side closes the connection: nothing was written, and no lock is held."""
        self.dead = True
        if self.connection is not None:
            self.connection.rollback()


class Store:
    """The durable store: a real SQLite file, which may be away and may come back as it once was."""

    def __init__(self, scheduler: Scheduler, directory: Path) -> None:
        self._scheduler = scheduler
        self._directory = directory
        self._numbers = itertools.count(1)
        self.away = False
        self._open: dict[Transaction, None] = {}
        self._writer: Transaction | None = None
        self._use(template())

    def _use(self, content: bytes) -> None:
        self.path = self._directory / f"store-{next(self._numbers)}.db"
        self.path.write_bytes(content)
        self._peeking = _connected(self.path)
        self._pool: list[sqlite3.Connection] = []

    def peek(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What is committed, read besides everybody."""
        if len(parameters) == 1 and isinstance(parameters[0], dict):
            return self._peeking.execute(sql, parameters[0]).fetchall()
        return self._peeking.execute(sql, cast(Any, parameters)).fetchall()

    def snapshot(self) -> bytes:
        return self._peeking.serialize()

    def _answers(self) -> bool:
        return not self.away

    def drop(self) -> None:
        """Every connection is closed; what was not committed never happened."""
        for transaction in self._open:
            transaction.end()
        self._writer = None

    def restore(self, content: bytes) -> None:
        """The store is as it was when ``content`` was taken."""
        self.drop()
        self.close()
        self._use(content)

    def close(self) -> None:
        for connection in (*self._pool, self._peeking):
            connection.close()
        self._pool = []

    def door(self, process: Process) -> Database:
        """The store as ``process`` has it."""
        return cast(Database, _Door(self, process))

    @contextlib.asynccontextmanager
    async def transaction(self, process: Process, *, writing: bool) -> AsyncIterator[Connection]:
        scheduler = self._scheduler
        await scheduler.pause(process)
        await scheduler.may_crash(process, "before a transaction")
        if not self._answers():
            raise StoreUnreachable("the store can't be reached: OSError")
        transaction = Transaction(scheduler.loop.time())
        if writing:
            await self._lock(transaction)
        self._open[transaction] = None
        path, raw = self.path, self._pool.pop() if self._pool else _connected(self.path)
        transaction.connection = raw
        CHECKED_OUT.append(raw)
        sync = (_writing if writing else _reading).connect()
        clean = False
        try:
            with sync.begin() as outer:
                yield Connection(sync, lambda: not transaction.dead)
                if writing:
                    await scheduler.pause(process)
                    await scheduler.may_crash(process, "before the commit")
                odds, rng = scheduler.odds, scheduler.rng
                if transaction.dead or (writing and not self._answers()):
                    outer.rollback()
                    raise StoreUnreachable("the store did not answer: the connection is gone")
                unknown = writing and rng.random() < odds.commit_unknown
                if unknown and rng.random() < 0.5:
                    scheduler.note(process.name, "commit", "did not arrive")
                    outer.rollback()
                    raise StoreUnreachable("the store did not answer: TimeoutError")
            clean = True
            if writing:
                scheduler.note(process.name, "commit")
        finally:
            sync.close()
            del self._open[transaction]
            if self._writer is transaction:
                self._writer = None
            if not transaction.dead and path == self.path:
                self._pool.append(raw)
            else:
                raw.close()
        if unknown:
            scheduler.note(process.name, "commit", "the answer is lost")
            raise StoreUnreachable("the store did not answer: TimeoutError")
        if clean and writing:
            await scheduler.may_crash(process, "after the commit")
            await scheduler.pause(process)

    async def _lock(self, transaction: Transaction) -> None:
        give_up = self._scheduler.loop.time() + LOCK_S
        while self._writer is not None:
            now = self._scheduler.loop.time()
            if now - self._writer.began > IDLE_S:
                self._writer.end()  # as PostgreSQL ends a transaction that was idle for too long
                break
            if now > give_up:
                raise StoreUnreachable("the store gave up (SQLSTATE 55P03)")
            await asyncio.sleep(0.002 + 0.02 * self._scheduler.rng.random())
        transaction.began = self._scheduler.loop.time()
        self._writer = transaction


Entered = contextlib.AbstractAsyncContextManager[AsyncConnection]


class _Door:
    """One process's Database."""

    is_sqlite: Final = True

    def __init__(self, store: Store, process: Process) -> None:
        self._store = store
        self._process = process

    def read(self) -> Entered:
        return cast(Entered, self._store.transaction(self._process, writing=False))

    def write(self) -> Entered:
        return cast(Entered, self._store.transaction(self._process, writing=True))


# The engine lives as long as the process, for its cache of compiled statements; it is handed one connection at a time.
CHECKED_OUT: Final[list[sqlite3.Connection]] = []


class _Cursor(sqlite3.Cursor):
    """Fetches everything at once, as the asynchronous driver does: a result that nobody reads to its end would keep
    its snapshot, and the next transaction of the connection with it."""

    def execute(self, *arguments: Any) -> _Cursor:
        super().execute(*arguments)
        self._rows = deque(super().fetchall() if self.description else ())
        return self

    def fetchone(self) -> Any:
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = 1) -> list[Any]:
        return [self._rows.popleft() for _ in range(min(size or 1, len(self._rows)))]

    def fetchall(self) -> list[Any]:
        rows, self._rows = list(self._rows), deque()
        return rows


class _Kept:
    """A connection that SQLAlchemy may "close" and that stays open."""

    def __init__(self, real: sqlite3.Connection) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cursor(self) -> _Cursor:
        return self._real.cursor(_Cursor)

    def close(self) -> None: ...


class _Dialect(SQLiteDialect_pysqlite):
    """SQLAlchemy's own, without what it sets up on every connection it is handed: here that is each transaction."""

    supports_statement_cache = True

    def on_connect(self) -> Any: ...


def _engine() -> Engine:
    registry.impls["sqlite.simulated"] = lambda: _Dialect
    engine = create_engine("sqlite+simulated://", creator=lambda: _Kept(CHECKED_OUT.pop()), poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def begin(connection: SyncConnection) -> None:
        connection.exec_driver_sql(connection.get_execution_options()["simulated_begin"])

    return engine


_engines: Final = _engine()
_reading: Final = _engines.execution_options(simulated_begin="BEGIN")
_writing: Final = _engines.execution_options(simulated_begin="BEGIN IMMEDIATE")


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=0, cached_statements=512)
    # Nothing here survives the schedule, so nothing is synced.
    connection.execute("pragma synchronous=off")
    connection.execute("pragma foreign_keys=on")
    return connection


_templates: Final[list[bytes]] = []


def template() -> bytes:
    """A migrated store."""
    if not _templates:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "template.db"

            async def make() -> None:
                database = Database.connect(f"sqlite+aiosqlite:///{path}")
                await migrate(database)
                await database.close()

            with asyncio.Runner() as runner:
                runner.run(make())
            _templates.append(path.read_bytes())
    return _templates[0]
