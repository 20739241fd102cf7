"""The store is put back as it was an hour ago, under a service that has issued since (reliability.md, fault 20)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from loadtest.servers import PostgresServer, until
from tests.acceptance.service import Service
from tests.acceptance.test_up import ROOT

ISSUED_SINCE = 1_000


@pytest.fixture
def backup(
    running: Service, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Callable[[], None], ...]]:
    """Keeps the store as it is, under the running service, and puts that back when nobody uses it: as docs/runbook.md
    says, "Back up and restore"."""
    name, copy = str(make_url(running.store_url).database), tmp_path / "backup"
    if running.store_url.startswith("sqlite"):

        def keep() -> None:
            with (
                contextlib.closing(sqlite3.connect(name)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)  # what `.backup` of its shell is

        def put_back() -> None:
            for end in ("-wal", "-shm"):
                Path(f"{name}{end}").unlink(missing_ok=True)
            shutil.copyfile(copy, name)

        yield keep, put_back
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    at = ("--host", "127.0.0.1", "--port", str(postgres.port), "--username", "postgres")
    shared = postgres.directory / f"{name}.dump"  # the server's user writes it

    def dump() -> None:
        shared.touch()
        if postgres.user is not None:
            shutil.chown(shared, postgres.user)
        postgres._run("pg_dump", *at, "--format=custom", "--file", str(shared), name)

    def restore() -> None:
        for program, *words in restoring():
            named = [str(shared) if word == "voucherd.dump" else word.replace("voucherd", name) for word in words]
            postgres._run(program, *at, *named)

    yield dump, restore
    postgres.sql(f"drop database if exists {name}_before with (force)")


def restoring() -> list[list[str]]:
    """What docs/runbook.md says to type on PostgreSQL, of a dump of the database `voucherd`."""
    text = (ROOT / "docs" / "runbook.md").read_text()
    section = text.partition("\n## Back up and restore\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(("psql ", "createdb ", "pg_restore "))]
    assert len(lines) == 3
    assert "`pg_dump --format=custom`" in section
    return [shlex.split(line, comments=True) for line in lines]


async def test_row_20_nothing_is_given_twice_or_lost_when_an_old_store_is_put_back(
    service: Service, backup: tuple[Callable[[], None], ...]
) -> None:
    keep, put_back = backup
    await service.furnish(30 * ISSUED_SINCE)  # at this pace a window holds ten times as many
    async with service.client() as client:
        await asyncio.gather(*(service.voucher(client, f"before-{n}") for n in range(50)))
    service.quiet()
    keep()
    keys = [f"since-{n}" for n in range(ISSUED_SINCE)]
    leaked, service.token = service.token, service.succeed("token", "issue", service.distributor).strip()
    service.succeed("token", "revoke", "--token", leaked)
    async with service.client() as client:
        answers = await asyncio.gather(*(service.voucher(client, key) for key in keys))
    assert {answer.status_code for answer in answers} == {200}
    service.quiet()
    service.stop()
    put_back()
    before = service.log.stat().st_size
    service.start("serve", "work")

    until(lambda: "older than Redis" in service.log.read_bytes()[before:].decode(), "the alarm")
    status = service.run("status")
    assert status.returncode == 1
    assert "older than Redis" in status.stdout + status.stderr
    for refused in (("token", "issue", service.distributor), ("pool", "create", "ANOTHER")):
        done = service.run(*refused)
        assert done.returncode == 1
        assert "voucherd recover-store" in done.stderr
    async with service.client() as client:
        meanwhile = await service.ask(client, "meanwhile")
        assert meanwhile.status_code == 200, "issuing goes on from the windows"
        assert [(await service.voucher(client, key)).content for key in keys[:20]] == [
            answer.content for answer in answers[:20]
        ]

    shown = service.succeed("recover-store")
    assert "Nothing was changed" in shown
    assert "older than Redis" in service.run("status").stderr
    done = json.loads(service.succeed("recover-store", "--yes", "--json"))
    assert (done["older"], done["done"]) == (True, True)
    assert done["vouchers_recreated"] >= ISSUED_SINCE
    assert len(done["tokens_revoked"]) == 1
    assert json.loads(service.succeed("recover-store", "--yes", "--json")) == {"older": False, "done": False}

    async with service.client() as client:
        replays = await asyncio.gather(*(service.voucher(client, key) for key in keys))
        assert [replay.content for replay in replays] == [answer.content for answer in answers]
        assert (await service.voucher(client, "meanwhile")).content == meanwhile.content
        new = await asyncio.gather(*(service.voucher(client, f"after-{n}") for n in range(200)))
        assert {answer.status_code for answer in new} == {200}
        assert (await service.voucher(client, "leaked", token=leaked)).status_code == 401
    codes = [answer.json()["voucher_code"] for answer in (*answers, meanwhile, *new)]
    assert len(set(codes)) == len(codes) == ISSUED_SINCE + 201
    await service.audit()
