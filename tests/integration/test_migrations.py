"""Migrations: from nothing to the schema in the code, on both databases."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, select, text

from service.errors import Misconfigured
from service.store import schema
from service.store.database import Database, check_migrated
from service.store.migration import migrate

VERSIONS = Path(schema.__file__).parent / "migrations" / "versions"


@pytest.fixture
async def empty(empty_url: str) -> Any:
    opened = Database.connect(empty_url)
    yield opened
    await opened.close()


def _differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return list(compare_metadata(context, schema.metadata))


def _checks(connection: Connection) -> set[tuple[str, str]]:
    from sqlalchemy import inspect

    inspector = inspect(connection)
    return {
        (table, str(check["name"]))
        for table in schema.metadata.tables
        for check in inspector.get_check_constraints(table)
        if check["name"]
    }


def test_revisions_are_those_of_the_migrations() -> None:
    script = ScriptDirectory(str(VERSIONS.parent))
    assert [one.revision for one in script.walk_revisions()][::-1] == list(schema.REVISIONS)


async def test_an_empty_store_is_not_taken_for_a_migrated_one(empty: Database) -> None:
    with pytest.raises(Misconfigured, match="voucherd migrate"):
        await check_migrated(empty)


async def test_migrated_schema_does_not_differ_from_the_code(empty: Database) -> None:
    await migrate(empty)
    async with empty.read() as connection:
        assert await connection.run_sync(_differences) == []
        migrated_checks = await connection.run_sync(_checks)
    wanted = {
        (table.name, f"ck_{table.name}_{str(constraint.name).removeprefix(f'ck_{table.name}_')}")
        for table in schema.metadata.tables.values()
        for constraint in table.constraints
        if type(constraint).__name__ == "CheckConstraint"
    }
    assert wanted
    assert wanted <= migrated_checks


async def test_data_of_an_older_schema_are_not_lost_and_its_workers_go_on(empty: Database) -> None:
    """What the version before writes, before the migration and after it, is whole."""
    await _to(empty, "pre_0005")
    for seq in (1, 2):
        async with empty.write() as connection:
            await connection.execute(text(OLD_REQUEST), {"seq": seq})
            await connection.execute(text(OLD_CHANGE), {"at": 10 + seq})
        await migrate(empty)
    async with empty.read() as connection:
        requests = (await connection.execute(select(schema.requests).order_by(schema.requests.c.outbox_seq))).all()
        log = (await connection.execute(select(schema.audit_log).order_by(schema.audit_log.c.id))).all()
    assert [(row.outbox_seq, row.key, row.answer_id, row.trace_id, row.parent_id) for row in requests] == [
        (1, "req", None, "", ""), (2, "req", None, "", ""),
    ]  # fmt: skip
    assert [(row.at, row.version, row.refused, row.written_at) for row in log] == [
        (11, None, False, 11), (12, None, False, None),
    ]  # fmt: skip


OLD_REQUEST = """
insert into requests (partition, generation, outbox_seq, ordinal, quantity, api, distributor, client, key, payload,
terminal, campaign, pool, category, product, until, issued_at, flushed_at)
values (0, 1, :seq, 0, 1, 'v1', 'D', 'D', 'req', 'T', 'T', 'C', 'P', '', 'PAY', 0, 10, 10)
"""
OLD_CHANGE = "insert into audit_log (at, actor, action, subject, detail) values (:at, 'a', 'campaign pause', 'C', '')"


async def _to(database: Database, revision: str) -> None:
    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "service.store:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    async with database.write() as connection:
        await connection.run_sync(upgrade)


async def test_migrating_again_changes_nothing(empty: Database) -> None:
    await migrate(empty)
    await migrate(empty)
    await check_migrated(empty)
    async with empty.read() as connection:
        assert (await connection.execute(select(schema.catalogue_head.c.version))).scalars().all() == [0]
        assert (await connection.execute(select(schema.partitions.c.partition))).scalars().all() == [0]


async def test_several_processes_migrating_at_once_do_not_fail(empty: Database) -> None:
    others = [Database.connect(empty.url.render_as_string(hide_password=False)) for _ in range(3)]
    try:
        await asyncio.gather(*(migrate(each) for each in (empty, *others)))
    finally:
        for each in others:
            await each.close()
    await check_migrated(empty)
    async with empty.read() as connection:
        assert (await connection.execute(select(func.count()).select_from(schema.partitions))).scalar_one() == 1


@pytest.mark.parametrize(
    ("revision", "accepted"), [("pre_9999", True), ("post_9999", False)], ids=["pre rollout", "post rollout"]
)
async def test_newer_schema_is_refused_only_if_old_processes_can_not_run_on_it(
    database: Database, revision: str, accepted: bool
) -> None:
    async with database.write() as connection:
        await connection.execute(text("update alembic_version set version_num = :to"), {"to": revision})
    if accepted:
        await check_migrated(database)
    else:
        with pytest.raises(Misconfigured, match="newer"):
            await check_migrated(database)


def test_no_migration_hides_when_it_has_to_run() -> None:
    files = [path.name for path in VERSIONS.glob("*.py") if path.name != "__init__.py"]
    assert files
    for name in files:
        assert re.match(r"(pre|post)_\d{4}_\w+\.py$", name), name
        revision = re.search(r'^revision = "(\w+)"$', (VERSIONS / name).read_text(), re.MULTILINE)
        assert revision is not None
        assert name.startswith(revision[1] + "_")
