"""The audit log: a row for each change and for each that a rule refused, and one line of the log for each row."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import pwd
from collections import Counter
from typing import Any

import pytest
import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, StoreUnreachable
from service.store import audit_log, control, schema
from service.store.audit_log import Change
from service.store.database import Database
from service.tokens import new_token
from service.worker.changes import HELD_S, LINES_MAX, Changes
from service.worker.publish import change
from tests.integration.stage import Stage, staged
from tests.integration.typed import OnStage, ok, refused, run
from tests.secrecy import leaks

NOW = 1_800_000_000


def lines_of(logged: Any) -> list[Any]:
    return [one for one in logged if one["event"] == "change"]


def test_a_change_is_one_line_with_who_what_on_which_object_and_what_came_of_it(store: OnStage) -> None:
    ok("distributor", "create", "DIST-001")
    refused("distributor", "create", "DIST-001", says="exists already")
    ok("token", "issue", "DIST-001")
    ok("pool", "create", "P", "--expires", "2035-12-31")

    async def written(stage: Stage) -> Any:
        changes = Changes(stage.database, stage.scripts)
        with structlog.testing.capture_logs() as logged:
            assert not await changes.run_once()
            assert not await changes.run_once()
        return lines_of(logged)

    lines = store(written)
    assert [(line["action"], line["subject"], line["outcome"], line["catalogue"]) for line in lines] == [
        ("distributor create", "DIST-001", "done", 1),
        ("distributor create", "DIST-001", "refused", None),
        ("token issue", "DIST-001", "done", 2),
        ("pool create", "P", "done", 3),
    ]
    assert {line["actor"] for line in lines} == {pwd.getpwuid(os.getuid()).pw_name}
    assert "exists already" in lines[1]["detail"]
    assert leaks(json.dumps(lines), []) == []

    shown = json.loads(ok("audit-log", "--json").stdout)
    assert [one["entry"] for one in shown] == [line["entry"] for line in reversed(lines)]
    assert [{name: line[name] for name in shown[0]} for line in reversed(lines)] == shown, (
        "the command and the log say the same"
    )
    assert [one["action"] for one in json.loads(ok("audit-log", "--action", "token issue", "--json").stdout)] == [
        "token issue"
    ]
    assert json.loads(ok("audit-log", "--since", "2100-01-01", "--json").stdout) == []
    assert json.loads(ok("audit-log", "--actor", "nobody", "--subject", "P", "--json").stdout) == []
    assert len(json.loads(ok("audit-log", "--limit", "2", "--json").stdout)) == 2
    table = run("audit-log", columns=200)
    assert "refused" in table.stdout and "pool create" in " ".join(table.stdout.split())


def test_who_somebody_says_to_be_never_hides_the_user_that_it_was(
    store: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by(*options: str) -> list[str]:
        return [one["actor"] for one in json.loads(ok("audit-log", *options, "--json").stdout)]

    user = pwd.getpwuid(os.getuid()).pw_name
    ok("distributor", "create", "DIST-001")
    monkeypatch.setenv("VOUCHERD_ACTOR", "alice")
    ok("distributor", "create", "DIST-002")
    assert by() == [f"alice ({user})", user]
    for said in ("alice", f"alice ({user})"):
        assert by("--actor", said) == [f"alice ({user})"]
    assert by("--actor", user) == [f"alice ({user})", user]
    for nobody in ("ali", "al_ce", "%", f"({user})"):
        assert by("--actor", nobody) == []


def test_a_token_typed_in_the_place_of_a_name_is_not_kept(store: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("distributor", "suspend", new_token(), says="there is no distributor")
    monkeypatch.setenv("VOUCHERD_ACTOR", new_token())
    ok("distributor", "create", "DIST-001")
    shown = ok("audit-log", "--json").stdout
    assert "distributor suspend" in shown and "struck out" in shown
    assert leaks(shown, []) == []


@pytest.mark.parametrize("typed", ["\0", "a\nb", "\udcff", "\x1b[31m"])
def test_what_is_no_text_is_refused_for_what_it_is_and_kept_as_text(store: OnStage, typed: str) -> None:
    refused("distributor", "create", typed, says="can't name a distributor")
    [kept] = json.loads(ok("audit-log", "--json").stdout)
    assert kept["outcome"] == "refused" and kept["subject"].isprintable() and kept["detail"].isprintable()


def test_a_change_that_is_not_in_force_is_not_called_done(store: OnStage) -> None:
    ok("distributor", "create", "DIST-001")

    async def later(stage: Stage) -> str:
        async with stage.database.write() as conn:
            version = await control.raise_version(conn)
            await control.log(conn, actor="a", action="b", subject="c", detail="", now=NOW, version=version)
        with structlog.testing.capture_logs() as logged:
            await Changes(stage.database, stage.scripts).run_once()
        return str(lines_of(logged)[-1]["outcome"])

    assert store(later) == "not in force yet"
    assert [one["outcome"] for one in json.loads(ok("audit-log", "--json").stdout)] == ["not in force yet", "done"]


@pytest.mark.parametrize(
    ("version", "was_refused", "fence", "outcome"),
    [
        (3, False, 3, "done"), (3, False, 2, "not in force yet"), (3, False, None, "stored"),
        (None, False, None, "done"), (None, True, 9, "refused"),
    ],
)  # fmt: skip
def test_what_came_of_a_change(version: int | None, was_refused: bool, fence: int | None, outcome: str) -> None:
    assert Change(1, NOW, "a", "b", "c", "", version, was_refused).outcome(fence) == outcome


class _NoRedis:
    """Scripts that are asked for nothing but how far the fence is."""

    fence = 0

    async def generation(self) -> Any:
        return self


async def noted(database: Database, count: int) -> None:
    async with database.write() as conn:
        for number in range(count):
            await control.log(conn, actor="a", action="b", subject=str(number), detail="", now=NOW)


async def test_no_line_is_written_twice_by_several_workers_and_none_is_left_out(database: Database) -> None:
    count = LINES_MAX + 20
    await noted(database, count)
    workers: list[Any] = [Changes(database, _NoRedis()) for _ in range(3)]  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await asyncio.gather(*(worker.run_once() for worker in workers))
    assert Counter(one["subject"] for one in lines_of(logged)) == Counter(map(str, range(count)))


async def test_a_worker_that_dies_over_a_line_leaves_it_to_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await noted(database, 3)
    changes = Changes(database, _NoRedis())  # type: ignore[arg-type]
    real, tries = audit_log.mark_written, itertools.count()

    async def dies(conn: AsyncConnection, ids: Any, now: int) -> None:
        if next(tries) == 0:
            raise StoreUnreachable
        await real(conn, ids, now)

    monkeypatch.setattr(audit_log, "mark_written", dies)
    with structlog.testing.capture_logs() as logged:
        with pytest.raises(StoreUnreachable):
            await changes.run_once()
        await changes.run_once()
        await changes.run_once()
    assert Counter(one["subject"] for one in lines_of(logged)) == {"0": 2, "1": 2, "2": 2}


@pytest.mark.parametrize("step", [1, -1], ids=["a clock", "a clock behind that of the command"])
async def test_a_change_between_its_commit_and_its_fence_gets_one_line_and_that_says_done(
    database: Database, step: int
) -> None:
    redis = _NoRedis()
    clock = itertools.count(NOW, step)
    changes = Changes(database, redis, now=lambda: next(clock))  # type: ignore[arg-type]
    async with database.write() as conn:
        await control.log(conn, actor="a", action="b", subject="published", detail="", now=NOW, version=7)
        await control.log(conn, actor="a", action="b", subject="stock", detail="", now=NOW)
    with structlog.testing.capture_logs() as logged:
        await changes.run_once()
        await changes.run_once()
        assert [line["subject"] for line in lines_of(logged)] == ["stock"]
        redis.fence = 7
        await changes.run_once()
        await changes.run_once()
    assert [(line["subject"], line["outcome"]) for line in lines_of(logged)] == [
        ("stock", "done"), ("published", "done"),
    ]  # fmt: skip


async def test_a_change_whose_command_gave_up_on_the_fence_is_said_to_be_not_in_force(database: Database) -> None:
    changes = Changes(database, _NoRedis(), now=lambda: NOW + math.ceil(HELD_S) + 1)  # type: ignore[arg-type]
    async with database.write() as conn:
        await control.log(conn, actor="a", action="b", subject="c", detail="", now=NOW, version=7)
    with structlog.testing.capture_logs() as logged:
        await changes.run_once()
        await changes.run_once()
    assert [line["outcome"] for line in lines_of(logged)] == ["not in force yet"]


async def test_a_refused_change_leaves_nothing_but_its_row(database: Database, valkey_url: str) -> None:
    async with staged(database, valkey_url) as stage:

        async def edit(conn: AsyncConnection) -> None:
            await control.create_distributor(conn, "DIST-009", "Nine", NOW)
            raise Conflict("a rule forbids it")

        with pytest.raises(Conflict):
            await change(database, stage.scripts, edit, actor="a", action="b", subject="c", detail="d")
        async with database.read() as conn:
            assert await control.version(conn) == 0
            assert (await conn.execute(select(schema.distributors))).all() == []
            [row] = (await conn.execute(select(schema.audit_log))).all()
    assert (row.refused, row.version, row.detail) == (True, None, "d: a rule forbids it")
