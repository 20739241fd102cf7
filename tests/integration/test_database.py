"""The door to the store: transactions, bulk inserts, and what a store that goes away does to its callers."""

# ruff: noqa: PT012 - what raises is a transaction, and that is a block

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from loadtest.servers import PostgresServer
from service.errors import Misconfigured, StoreUnreachable
from service.store import schema
from service.store.database import CLIENT_MARGIN_S, CONNECT_S, Database, check_migrated, insert_records
from service.store.migration import migrate

POOL = {"id": "P", "least_life_s": 0, "stock_version": 0, "created_at": 1}
SOON_S = 1.0  # statement time-out of the tests that make a server hang
BOUND_S = SOON_S + CLIENT_MARGIN_S + CONNECT_S + 2.0  # 2 s: closing a connection that does not answer


async def _pools(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(select(schema.pools.c.id).order_by(schema.pools.c.id))).scalars())


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "mysql://host/db", "sqlite:///file.db", "postgresql://host/db", "sqlite+aiosqlite://",
     "sqlite+aiosqlite:///:memory:", "redis://127.0.0.1"],
)  # fmt: skip
def test_url_that_can_not_hold_a_ledger_is_refused_at_boot(url: str) -> None:
    with pytest.raises(Misconfigured):
        Database.connect(url)


async def test_what_was_not_committed_is_not_seen(database: Database) -> None:
    with pytest.raises(RuntimeError, match="half-way"):
        async with database.write() as connection:
            await connection.execute(insert(schema.pools), POOL)
            raise RuntimeError("half-way")
    assert await _pools(database) == []
    async with database.write() as connection:
        await connection.execute(insert(schema.pools), POOL)
    assert await _pools(database) == ["P"]


async def test_cancelled_transaction_leaves_nothing_and_blocks_nobody(database: Database) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with database.write() as connection:
            await connection.execute(insert(schema.pools), POOL)
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.write() as connection:
        await connection.execute(insert(schema.pools), POOL)
    assert await _pools(database) == ["P"]


async def test_cancelled_statement_does_not_keep_its_locks(database: Database) -> None:
    """A statement that takes long is cut at random points; the next writer never has to wait for a time-out."""
    numbers = (
        "with recursive t(x) as (select 1 union all select x + 1 from t where x < 30000000) select count(*) from t"
    )
    head = schema.catalogue_head

    async def write() -> None:
        async with database.write() as connection:
            await connection.execute(head.update().values(version=-1))
            await connection.execute(text(numbers))

    for delay_ms in (1, 3, 10, 30, 60):
        task = asyncio.create_task(write())
        await asyncio.wait([task], timeout=delay_ms / 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begun = time.monotonic()
        async with database.write() as connection:
            await connection.execute(head.update().values(version=head.c.version + 1))
        assert time.monotonic() - begun < 1.0
    async with database.read() as connection:
        assert (await connection.execute(select(head.c.version))).scalar_one() == 5


async def test_a_read_does_not_see_what_was_committed_after_it_began(database: Database) -> None:
    count = select(func.count()).select_from(schema.pools)
    async with database.read() as reading:
        before = (await reading.execute(count)).scalar_one()
        async with database.write() as writing:
            await writing.execute(insert(schema.pools), POOL)
        assert (await reading.execute(count)).scalar_one() == before
    assert await _pools(database) == ["P"]


async def test_two_writers_do_not_lose_an_update(database: Database) -> None:
    head = schema.catalogue_head

    async def raise_it() -> None:
        async with database.write() as connection:
            found = (await connection.execute(select(head.c.version).with_for_update())).scalar_one()
            await connection.execute(head.update().values(version=found + 1))

    await asyncio.gather(*(raise_it() for _ in range(20)))
    async with database.read() as connection:
        assert (await connection.execute(select(head.c.version))).scalar_one() == 20


async def _insert(connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> None:
    columns = [*(rows[0] if rows else POOL)]
    await insert_records(connection, schema.pools, columns, [tuple(row[name] for name in columns) for row in rows])


async def test_bulk_rows_are_not_committed_before_the_transaction_is(database: Database) -> None:
    rows = [POOL | {"id": f"P{number:04}", "default_expires_at": None} for number in range(1000)]
    with pytest.raises(RuntimeError, match="half-way"):
        async with database.write() as connection:
            await _insert(connection, rows)  # the first statement of the transaction
            raise RuntimeError("half-way")
    assert await _pools(database) == []
    async with database.write() as connection:
        await _insert(connection, [])
        await _insert(connection, rows)
    assert await _pools(database) == [row["id"] for row in rows]


async def test_bulk_rows_that_break_a_wall_raise_an_integrity_error_and_spare_the_savepoint(
    database: Database,
) -> None:
    async with database.write() as connection:
        await connection.execute(insert(schema.pools), POOL | {"id": "kept"})
        with pytest.raises(IntegrityError) as caught:
            async with connection.begin_nested():
                await _insert(connection, [POOL | {"id": "other"}, POOL | {"id": "kept"}])
        assert "pools" in str(caught.value)
    assert await _pools(database) == ["kept"]


async def test_integrity_errors_pass_and_show_no_parameter(database: Database) -> None:
    row = {"token_sha256": "s3cret" * 10, "distributor": "nobody", "created_at": 1}
    with pytest.raises(IntegrityError) as caught:
        async with database.write() as connection:
            await connection.execute(insert(schema.credentials), row)
    assert "s3cret" not in str(caught.value)


async def test_a_mistake_in_a_statement_is_not_taken_for_a_store_that_is_away(database: Database) -> None:
    with pytest.raises(SQLAlchemyError):
        async with database.read() as connection:
            await connection.execute(text("select nothing from nowhere"))
    with pytest.raises(FileNotFoundError):
        async with database.read() as connection:
            await connection.execute(text("select 1"))
            Path("/nowhere/at/all").read_bytes()  # any OSError that is not the store's


# --- SQLite --------------------------------------------------------------------------------------------------


async def test_sqlite_commits_survive_a_power_cut_by_its_settings(migrated_sqlite_url: str) -> None:
    database = Database.connect(migrated_sqlite_url)
    async with database.read() as connection:
        found = [
            (await connection.execute(text(f"pragma {name}"))).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    await database.close()
    assert found == ["wal", 2, 1]


async def test_sqlite_locked_by_another_process_is_unreachable_in_bounded_time(migrated_sqlite_url: str) -> None:
    holder, waiter = Database.connect(migrated_sqlite_url), Database.connect(migrated_sqlite_url, statement_s=0.2)
    async with holder.write():
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable, match="SQLITE_BUSY"):
            async with waiter.write():
                pytest.fail("two transactions hold the write lock")
        assert time.monotonic() - begun < 2
        assert await _pools(waiter) == []  # reading goes on
    async with waiter.write() as connection:
        await connection.execute(insert(schema.pools), POOL)
    await holder.close()
    await waiter.close()


@pytest.fixture
def made_now(tmp_path: Path) -> Iterator[tuple[str, sqlite3.Connection]]:
    """The URL of a new file that another process is just making, without a write-ahead log so far."""
    path = tmp_path / "new.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    other.execute("create table theirs (x)")
    yield f"sqlite+aiosqlite:///{path}", other
    other.close()


async def test_sqlite_file_that_another_makes_just_now_is_waited_for(made_now: tuple[str, sqlite3.Connection]) -> None:
    url, other = made_now
    database = Database.connect(url)
    asyncio.get_running_loop().call_later(0.2, other.execute, "commit")
    async with database.read() as connection:
        assert (await connection.execute(text("pragma journal_mode"))).scalar_one() == "wal"
        assert (await connection.execute(text("select count(*) from theirs"))).scalar_one() == 0
    await database.close()


async def test_sqlite_file_that_another_never_ends_making_is_unreachable_in_bounded_time(
    made_now: tuple[str, sqlite3.Connection],
) -> None:
    database = Database.connect(made_now[0], statement_s=0.2)
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match="SQLITE_BUSY"):
        async with database.read():
            pass
    assert 0.2 <= time.monotonic() - began < 5
    await database.close()


async def test_sqlite_file_in_no_directory_is_unreachable(tmp_path: Path) -> None:
    database = Database.connect(f"sqlite+aiosqlite:///{tmp_path}/missing/voucherd.db")
    with pytest.raises(StoreUnreachable, match="SQLITE_CANTOPEN"):
        async with database.read():
            pytest.fail("a database in a directory that does not exist")
    await database.close()


# --- PostgreSQL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile_server(_postgres_binaries: Path, servers_dir: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(_postgres_binaries, servers_dir / "fragile")
    yield server
    server.stop(signal.SIGQUIT)


@pytest.fixture
async def fragile(fragile_server: PostgresServer) -> AsyncIterator[tuple[PostgresServer, Database]]:
    """A migrated PostgreSQL, running and empty, that the test may stop."""
    server = fragile_server
    if server.process is None:
        server.start()
    database = Database.connect(server.url(), statement_s=SOON_S)
    await migrate(database)
    await check_migrated(database)
    yield server, database
    await database.close()


async def test_postgresql_commits_are_durable_whatever_the_servers_default(
    postgres_url: str, postgres: PostgresServer
) -> None:
    name = postgres_url.rsplit("/", 1)[1]
    postgres.sql(f"alter database {name} set synchronous_commit = off")
    postgres.sql(f"alter database {name} set default_transaction_isolation = 'serializable'")
    database = Database.connect(postgres_url)
    async with database.write() as connection:
        assert (await connection.execute(text("show synchronous_commit"))).scalar_one() == "on"
        assert (await connection.execute(text("show transaction_isolation"))).scalar_one() == "read committed"
    postgres.sql(f"alter database {name} set synchronous_commit = remote_apply")
    await database.close()
    async with database.write() as connection:  # stronger than asked for: kept
        assert (await connection.execute(text("show synchronous_commit"))).scalar_one() == "remote_apply"
    await database.close()


async def test_postgresql_reads_can_not_write(postgres_url: str) -> None:
    database = Database.connect(postgres_url)
    with pytest.raises(StoreUnreachable, match="25006"):
        async with database.read() as connection:
            await connection.execute(insert(schema.pools), POOL)
    assert await _pools(database) == []
    await database.close()


async def test_postgresql_database_that_is_not_there_is_named_a_misconfiguration(postgres: PostgresServer) -> None:
    database = Database.connect(postgres.url("nowhere"))
    with pytest.raises(Misconfigured, match="3D000"):
        async with database.read():
            pytest.fail("a database that does not exist")
    await database.close()


async def test_postgresql_that_is_not_there_is_unreachable_in_bounded_time(postgres: PostgresServer) -> None:
    database = Database.connect("postgresql+asyncpg://postgres@127.0.0.1:1/postgres")
    begun = time.monotonic()
    with pytest.raises(StoreUnreachable):
        async with database.read():
            pytest.fail("a server on port 1")
    assert time.monotonic() - begun < CONNECT_S + 1
    await database.close()


async def test_postgresql_stopped_immediately_is_unreachable_in_bounded_time_and_comes_back(
    fragile: tuple[PostgresServer, Database],
) -> None:
    server, database = fragile
    begun = 0.0
    with pytest.raises(StoreUnreachable):
        async with database.write() as connection:
            await connection.execute(insert(schema.pools), POOL)
            await asyncio.to_thread(server.stop, signal.SIGQUIT)
            begun = time.monotonic()
            await connection.execute(select(schema.pools))
    assert time.monotonic() - begun < BOUND_S
    for transaction in (database.read, database.write):
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable):
            async with transaction() as connection:
                await connection.execute(select(schema.pools))
        assert time.monotonic() - begun < BOUND_S
    await asyncio.to_thread(server.start)
    assert await _pools(database) == []  # the very first try: no connection of before is handed out


async def test_postgresql_stopped_before_the_commit_does_not_say_it_was_committed(
    fragile: tuple[PostgresServer, Database],
) -> None:
    server, database = fragile
    with pytest.raises(StoreUnreachable):
        async with database.write() as connection:
            await connection.execute(insert(schema.pools), POOL)
            await asyncio.to_thread(server.stop, signal.SIGQUIT)
    with pytest.raises(StoreUnreachable):
        async with database.write() as connection:
            await _insert(connection, [POOL])


@pytest.mark.parametrize("bulk", [False, True], ids=["statement", "copy"])
async def test_postgresql_that_stands_still_is_unreachable_in_bounded_time_and_comes_back(
    fragile: tuple[PostgresServer, Database], bulk: bool
) -> None:
    server, database = fragile
    assert await _pools(database) == []
    pids = server.pids()
    begun = 0.0
    try:
        with pytest.raises(StoreUnreachable):
            async with database.write() as connection:
                await connection.execute(select(schema.pools))
                pids = server.pids()
                for pid in pids:
                    server.send(signal.SIGSTOP, pid)
                begun = time.monotonic()
                if bulk:
                    await _insert(connection, [POOL])
                else:
                    await connection.execute(insert(schema.pools), POOL)
        assert time.monotonic() - begun < BOUND_S
        if bulk:
            begun = time.monotonic()
            with pytest.raises(StoreUnreachable):
                async with database.read():  # not even connecting hangs
                    pytest.fail("a server that stands still")
            assert time.monotonic() - begun < BOUND_S
    finally:
        for pid in pids:
            server.send(signal.SIGCONT, pid)
    assert await _pools(database) == []


async def test_postgresql_row_lock_held_for_too_long_is_unreachable_not_a_hang(
    fragile: tuple[PostgresServer, Database],
) -> None:
    _, database = fragile
    lock = select(schema.catalogue_head).with_for_update()
    async with database.write() as holder:
        await holder.execute(lock)
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable):
            async with database.write() as waiter:
                await waiter.execute(lock)
        assert time.monotonic() - begun < BOUND_S
