"""One door to the durable store, whichever of the two databases it is.

Every connection is set up here, so that what the promises rest on does not depend on a server's defaults:
commits are durable before they return, no wait is unbounded, and no error message holds a parameter.
"""

from __future__ import annotations

import asyncio
import sqlite3
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeVar
from weakref import WeakSet

import aiosqlite
import asyncpg
from sqlalchemy import Connection, Table, event, inspect, text
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

from service.errors import Misconfigured, StoreUnreachable
from service.settings import refused
from service.store.schema import REVISIONS

SQLITE: Final = "sqlite+aiosqlite"
POSTGRESQL: Final = "postgresql+asyncpg"

# A worker runs about six loops, an operator's command one or two transactions at a time: more connections
# than this are a leak, and many processes share one server's connection limit (100 by default).
CONNECTIONS_MAX: Final = 8
# Values in one IN list: below every limit of both databases (SQLite: 32,766 parameters), large enough that the
# statements themselves don't count.
IN_MAX: Final = 500
CONNECT_S: Final = 3.0
# The longest statement of the hot paths, 5,000 rows by COPY, takes well under a second; five of them say that
# the server is stuck rather than slow.  Audits and migrations pass a longer one.
STATEMENT_S: Final = 5.0
# A client that hears nothing gives up a little after the server would have, so that the server's own, more
# telling error comes first.
CLIENT_MARGIN_S: Final = 1.0
# A process that was stopped inside a transaction must not hold its row locks for ever.
IDLE_IN_TRANSACTION_S: Final = 10.0
# A thread of the SQLite driver that still has an answer for an event loop that is gone prints a traceback; once
# told to stop it ends within microseconds, or after the statement that it is in.
THREAD_END_S: Final = 1.0
# SQLite's page cache of one connection, and after how many pages its journal is written back.  With the 2 MB and 1,000
# pages that it comes with, each flush reads its indexes again and writes them back at once (docs/performance.md).
SQLITE_CACHE_KIB: Final = 32_768
SQLITE_CHECKPOINT_PAGES: Final = 10_000
BUSY_POLL_S: Final = 0.01  # between two tries at what SQLite refuses at once while another has the file
CUT_S: Final = 0.01  # between two tries to cut a statement of SQLite whose task was cancelled

# PostgreSQL: the transaction did not happen or nobody knows, and the same one may well succeed later.
_UNREACHABLE_STATES: Final = (
    "08",  # connection
    "25006",  # read only: a standby, before or after a failover
    "25P03",  # idle in transaction for too long
    "40",  # rolled back: deadlock, serialization
    "53",  # out of connections, memory, disk
    "55P03",  # lock not had in time
    "57",  # statement timeout, shutdown, crash, starting up
    "58",  # input/output error
)
_MISCONFIGURED_STATES: Final = ("28", "3D000")  # password or role refused, no such database
_UNREACHABLE_SQLITE: Final = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_FULL",
                              "SQLITE_PROTOCOL", "SQLITE_READONLY")  # fmt: skip

_T = TypeVar("_T")


def connections_most(serving: int, works: int) -> int:
    """Connections that so many serving processes, so many `voucherd work` (a patient pool besides each one's own) and
    one command may have open to the store."""
    return CONNECTIONS_MAX * (serving + 2 * works + 1)


class Database:
    """The durable store behind one URL: a bounded pool of connections, opened when first needed."""

    def __init__(self, url: URL, statement_s: float) -> None:
        self.url: Final = url
        self.is_sqlite: Final = url.drivername == SQLITE
        self._opened = WeakSet[aiosqlite.Connection]()
        self._engine = _engine(url, statement_s, self._opened)
        if self.is_sqlite:
            self._reading = self._engine.execution_options(voucherd_begin="BEGIN")
            self._writing = self._engine.execution_options(voucherd_begin="BEGIN IMMEDIATE")
        else:
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._writing = self._engine.execution_options(isolation_level="READ COMMITTED")

    @classmethod
    def connect(cls, url: str, *, statement_s: float = STATEMENT_S) -> Database:
        """A database at ``url``; nothing is opened yet.  ``statement_s`` bounds each statement (PostgreSQL).

        A URL of PostgreSQL may say, in libpq's word, `sslrootcert`: then TLS is required, with a certificate of that
        host from an authority in that file.  Raises Misconfigured if the URL is not one of a file of SQLite or of a
        PostgreSQL server.
        """
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # a port that is no number is the latter
            raise refused("store_url", url, f"is no URL of a store ({_FORMS})") from None
        if parsed.drivername not in (SQLITE, POSTGRESQL):
            raise refused("store_url", url, f"begins with {parsed.drivername!r} ({_FORMS})")
        if parsed.drivername == SQLITE and parsed.database in (None, "", ":memory:"):
            raise refused(
                "store_url", url, "names no file, and a store in memory would forget what was issued",
                f"{SQLITE}:///var/voucherd.db",
            )  # fmt: skip
        return cls(parsed, statement_s)

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One consistent snapshot for as many statements as wanted; nothing can be written on PostgreSQL.

        Raises StoreUnreachable, entering or inside.
        """
        return self._transaction(self._reading)

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One transaction: committed durably at the exit, rolled back if the body raises.

        On SQLite it waits for the one write lock before anything is read, on PostgreSQL it is READ COMMITTED,
        and rows are locked by the statements.  Raises StoreUnreachable, entering, inside or at the commit: in
        the last case nobody knows whether it was committed.  Integrity errors pass through unchanged.
        """
        return self._transaction(self._writing)

    async def close(self) -> None:
        """No connection is left open; a later transaction would open one again."""
        await self._engine.dispose()
        for connection in list(self._opened):
            if not connection._running:  # ended, or given up when its task was cancelled
                await asyncio.to_thread(connection._thread.join, THREAD_END_S)

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        connection = engine.connect()
        try:
            await connection.start()
        except (OSError, TimeoutError, PoolTimeout) as error:
            # Drivers raise these two bare while connecting; anything later passes _translate.
            raise StoreUnreachable(f"the store can't be reached: {type(error).__name__}") from error
        try:
            await connection.begin()
            yield connection
            await connection.commit()
        except StoreUnreachable:
            # A server in an unknown state must not be waited for again, not even to roll back.
            if not self.is_sqlite:
                await connection.invalidate()
            raise
        finally:
            await connection.close()


async def check_migrated(database: Database) -> None:
    """The schema is one that this version can work with.  Raises Misconfigured, saying what to do, if not.

    A schema newer than this version is accepted as long as all that is newer was made to be applied *before*
    a rollout (a revision named ``pre_…``): old and new processes run side by side then.
    """
    async with database.read() as connection:
        found: list[str] = []
        if await connection.run_sync(lambda sync: inspect(sync).has_table("alembic_version")):
            found += await connection.scalars(text("select version_num from alembic_version"))
    newer = [revision for revision in found if revision not in REVISIONS]
    if not found:
        raise Misconfigured("the store is empty: run `voucherd migrate` first")
    if newer:
        if all(revision.startswith("pre_") for revision in newer):
            return
        raise Misconfigured(f"the store's schema {newer[0]} is newer than this voucherd: run that version instead")
    if found != [REVISIONS[-1]]:
        raise Misconfigured(f"the store's schema is {found[0]}, not {REVISIONS[-1]}: run `voucherd migrate` first")


def chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """``values`` in parts that fit into an IN list."""
    for start in range(0, len(values), IN_MAX):
        yield values[start : start + IN_MAX]


async def insert_records(
    connection: AsyncConnection, table: Table, columns: Sequence[str], records: Sequence[tuple[object, ...]]
) -> None:
    """All ``records`` (tuples in the order of ``columns``) are in ``table``, by the driver's bulk way, in the
    transaction of ``connection``.

    Raises IntegrityError: then no record is in, and on PostgreSQL the transaction is of no more use unless this was
    inside a savepoint.
    """
    if not records:
        return
    if connection.dialect.name == "sqlite":
        places = ", ".join("?" * len(columns))
        statement = f"insert into {table.name} ({', '.join(columns)}) values ({places})"  # noqa: S608 - our own names
        await connection.exec_driver_sql(statement, list(records))
    else:
        await _copy(connection, table, columns, records)


async def _copy(
    connection: AsyncConnection, table: Table, columns: Sequence[str], records: Sequence[tuple[object, ...]]
) -> None:
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if not driver.is_in_transaction():  # SQLAlchemy begins with its first statement; COPY would commit by itself
        await connection.exec_driver_sql("select 1")
    try:
        await driver.copy_records_to_table(table.name, records=records, columns=columns)
    except asyncpg.IntegrityConstraintViolationError as error:
        raise IntegrityError(f"COPY {table.name}", None, error, hide_parameters=True) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        fault = _fault(error, lost=driver.is_closed())
        if fault is None:
            raise DBAPIError(f"COPY {table.name}", None, error, hide_parameters=True) from error
        raise fault from error


_FORMS: Final = f"it has to be {SQLITE}:///FILE or {POSTGRESQL}://USER:PASSWORD@HOST:PORT/DATABASE"


def _engine(url: URL, statement_s: float, opened: WeakSet[aiosqlite.Connection]) -> AsyncEngine:
    """An engine whose every connection is set up as the promises need it; SQLite's are noted in ``opened``."""
    sqlite = url.drivername == SQLITE

    async def open_sqlite(*arguments: Any, **options: Any) -> aiosqlite.Connection:
        connection = aiosqlite.connect(*arguments, **options)
        connection._thread.daemon = True  # a process that ends does not wait for a statement
        opened.add(connection)
        return await connection

    reached, verified = _verified(url)
    engine = create_async_engine(
        reached,
        pool_size=CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=statement_s,
        pool_pre_ping=not sqlite,  # after a restart of the server the first retry succeeds, not the ninth
        hide_parameters=True,  # an error's text ends in a log, a code must not
        connect_args={"timeout": statement_s, "async_creator_fn": open_sqlite}
        if sqlite
        else {"timeout": CONNECT_S, "command_timeout": statement_s + CLIENT_MARGIN_S, **verified},
    )
    event.listen(engine.sync_engine, "connect", (_set_up_sqlite if sqlite else _set_up_postgresql)(statement_s))
    event.listen(engine.sync_engine, "handle_error", _translate)
    if sqlite:
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        event.listen(engine.sync_engine, "invalidate", _let_go_sqlite)
    return engine


def _verified(url: URL) -> tuple[URL, dict[str, ssl.SSLContext]]:
    """``url`` without libpq's word for the authority, and what the driver knows it by; it has no way of its own."""
    authority = url.query.get("sslrootcert")
    if authority is None:
        return url, {}
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except OSError as error:
        raise refused(
            "store_url", url, f"sslrootcert={authority} is no file of certificates: {error.strerror}",
            f"{POSTGRESQL}://voucherd:password@host:5432/voucherd?sslrootcert=/etc/voucherd/ca.pem",
        ) from None  # fmt: skip
    return url.difference_update_query(["sslrootcert"]), {"ssl": context}


def _set_up_sqlite(statement_s: float) -> Any:
    def set_up(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own: _begin_sqlite does
        cursor = connection.cursor()
        _keep_journal_in_wal(cursor, statement_s)
        # With the journal in WAL, FULL is what makes a commit survive a power cut.
        for pragma in ("synchronous=FULL", "foreign_keys=ON",
                       f"cache_size=-{SQLITE_CACHE_KIB}", f"wal_autocheckpoint={SQLITE_CHECKPOINT_PAGES}"):  # fmt: skip
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return set_up


def _keep_journal_in_wal(cursor: Any, statement_s: float) -> None:
    # Of several that open a new file at once SQLite refuses this to all but one, and doesn't wait as it does for
    # any other lock: 5 of 1,200 connections, four at a time.
    deadline = time.monotonic() + statement_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
        await_only(asyncio.sleep(BUSY_POLL_S))


def _begin_sqlite(connection: Connection) -> None:
    # Reading first and writing later fails at once with "database is locked", busy_timeout or not: a writing
    # transaction takes the lock at its beginning.
    connection.exec_driver_sql(connection.get_execution_options().get("voucherd_begin", "BEGIN IMMEDIATE"))


def _let_go_sqlite(connection: Any, _record: object, _error: object) -> None:
    # A task was cancelled inside a statement.  Closing alone would wait for the end of the statement, and keep the
    # write lock until the garbage collector finds the cursor; so the statement is cut, and rolled back.
    driver: aiosqlite.Connection = connection.driver_connection
    held = driver._connection
    if held is None:
        return
    past = threading.Event()

    def roll_back() -> None:
        past.set()
        held.rollback()

    def cut() -> None:
        # Again and again: the statement may stand in the thread's queue, where nothing can interrupt it yet.
        if not past.is_set():
            held.interrupt()
            loop.call_later(CUT_S, cut)

    driver._tx.put_nowait((None, roll_back))
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # the garbage collector gives it up: nothing is running on it
        return
    cut()


def _set_up_postgresql(statement_s: float) -> Any:
    milliseconds = {
        "statement_timeout": statement_s,
        "lock_timeout": statement_s,
        "idle_in_transaction_session_timeout": max(IDLE_IN_TRANSACTION_S, statement_s),
    }
    settings = ", ".join(f"set_config('{name}', '{int(s * 1000)}', false)" for name, s in milliseconds.items())
    # With anything weaker, what was acknowledged to Redis could be gone after a crash of the server.
    durable = (
        "select set_config('synchronous_commit', 'on', false) "
        "where current_setting('synchronous_commit') not in ('on', 'remote_apply')"
    )

    def set_up(connection: Any, _record: object) -> None:
        # By statements and not by startup parameters: poolers in between refuse those.
        cursor = connection.cursor()
        cursor.execute(f"select {settings}, set_config('application_name', 'voucherd', false)")
        cursor.execute(durable)
        cursor.close()
        connection.commit()

    return set_up


def _translate(context: ExceptionContext) -> StoreUnreachable | Misconfigured | None:
    """Called by SQLAlchemy for whatever a driver raised; what is returned is raised instead."""
    error = context.original_exception
    if not isinstance(error, Exception):
        return None
    fault = _fault(error, lost=context.is_disconnect)
    if isinstance(error, (OSError, TimeoutError)):
        context.is_disconnect = True  # an answer may still arrive on this connection: nobody may read it
    return fault


def _fault(error: BaseException, *, lost: bool) -> StoreUnreachable | Misconfigured | None:
    """The fault that a driver's error means, None if it is about the statement itself."""
    state = str(getattr(error, "sqlstate", None) or "")
    name = str(getattr(error, "sqlite_errorname", None) or "")
    if state.startswith(_MISCONFIGURED_STATES):
        return refused("store_url", "", f"the server refuses its user, password or database (SQLSTATE {state})")
    if state.startswith(_UNREACHABLE_STATES):
        return StoreUnreachable(f"the store gave up (SQLSTATE {state})")
    if name.startswith(_UNREACHABLE_SQLITE):
        return StoreUnreachable(f"the store's file can't be used ({name})")
    if lost or isinstance(error, (OSError, TimeoutError)):
        return StoreUnreachable(f"the store did not answer: {type(error).__name__}")
    return None
