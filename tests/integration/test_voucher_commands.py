"""What becomes of vouchers after they were issued, as typed: what is allowed, what is logged, and what is final."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import orjson
import pytest
from sqlalchemy import select

from service.errors import Conflict
from service.store import schema, vouchers
from service.store.database import Database
from service.store.stock import Row
from service.worker.stocking import import_codes
from tests.integration.stage import IDS, TERMS, Stage, staged
from tests.integration.typed import OnStage, ok, refused, run, stocked, three_issued

ONCE = msgspec.structs.replace(TERMS, is_multiple_use=False)
NOW = 1_800_000_000


async def _two(stage: Stage) -> list[tuple[str, str]]:
    """Id and code of a voucher of multiple use worth 1,051 cents, and of one of single use."""
    await stage.refill.run_once()
    records = [await stage.issue_v3("many"), await stage.issue_v3("once", terms=ONCE)]
    await stage.flush.run_once()
    return [
        (IDS.identity("k1", code.lot, code.seq).voucher_id, code.code) for record in records for code in record.codes
    ]


async def _log(stage: Stage) -> list[Any]:
    async with stage.database.read() as conn:
        rows = await conn.execute(select(schema.audit_log).where(schema.audit_log.c.action.like("voucher %")))
        return list(rows)


def test_states_as_typed_and_a_void_is_final(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    (many, code), (once, _) = store(_two)

    def shown(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(ok("voucher", *arguments, "--json").stdout)
        return found

    by_id = shown("show", many.upper())
    assert by_id == shown("show", "--code", code)
    assert (by_id["voucher_id"], by_id["status"], by_id["remaining_amount"]) == (many, "active", 1_051)
    assert (by_id["name"], by_id["client_id"], by_id["client_reference"]) == (
        "Card of $10.51",
        "CLIENT-001",
        "sale-many",
    )
    assert code not in ok("voucher", "show", many).stdout

    assert shown("activate", many)["changed_at"] is None  # it is active: nothing changes
    assert "is inactive" in ok("voucher", "deactivate", many).stdout
    ok("voucher", "deactivate", many)  # said again: nothing changes
    left = shown("mark-used", many, "--remaining", "51")
    assert (left["status"], left["remaining_amount"]) == ("inactive", 51)
    assert shown("activate", many)["status"] == "active"
    refused("voucher", "mark-used", many, "--remaining", "1052", says="issued with 1051")
    used = shown("mark-used", many)
    assert (used["status"], used["remaining_amount"]) == ("used", 0)
    refused("voucher", "activate", many, says="is used")
    refused("voucher", "deactivate", many, says="is used")
    assert shown("mark-used", many, "--remaining", "1051")["status"] == "active"

    refused("voucher", "mark-used", once, "--remaining", "1", says="single use")
    ok("voucher", "mark-used", once)
    for _ in range(2):
        assert shown("void", once)["status"] == "voided"
    for arguments in (("activate", once), ("deactivate", once), ("mark-used", once)):
        refused("voucher", *arguments, says="final")
    assert shown("show", once)["remaining_amount"] == 0

    log = store(_log)
    assert [(row.action, row.detail) for row in log if row.subject == many] == [
        ("voucher deactivate", "active -> inactive"),
        ("voucher mark-used", "inactive -> inactive, 51 left"),
        ("voucher activate", "inactive -> active, 51 left"),
        ("voucher mark-used", "active -> used, 0 left"),
        ("voucher mark-used", "used -> active, 1051 left"),
    ]
    assert [row.action for row in log if row.subject == once] == ["voucher mark-used", "voucher void"]
    assert all(row.actor for row in log)
    assert "CODE-" not in repr(log)
    assert "The books balance." in ok("audit").stdout


def test_voucher_that_is_not_there_or_was_typed_wrong(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    store(three_issued)
    nobody = "00000000-0000-4000-8000-000000000000"
    refused("voucher", "show", nobody, says="no such voucher")
    refused("voucher", "void", nobody, says="no such voucher")
    refused("voucher", "show", "--code", "CODE-0000", says="no such voucher")  # issued, on v1
    for arguments in (
        ("show",), ("show", nobody, "--code", "X"), ("show", "x"), ("void",), ("void", "' or 1=1"),
        ("mark-used", nobody, "--remaining", "-1"), ("mark-used", nobody, "--remaining", "some"),
    ):  # fmt: skip
        result = run("voucher", *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments


def test_ledger_names_vouchers_by_id_and_reference(store: OnStage, tmp_path: Path) -> None:
    stocked(tmp_path)
    (many, code), (once, _) = store(_two)
    store(lambda stage: stage.issue("v1"))
    store(lambda stage: stage.flush.run_once())
    (found,) = orjson.loads(ok("ledger", "find", "--voucher-id", many.upper(), "--json").stdout)
    assert (found["voucher_code"], found["voucher_id"], found["client_reference"]) == (code, many, "sale-many")
    rows = list(csv.DictReader(io.StringIO(ok("ledger", "export").stdout, newline="")))
    told = {row["request_id"]: (row["voucher_id"], row["client_reference"]) for row in rows}
    assert told == {"many": (many, "sale-many"), "once": (once, "sale-once"), "v1": ("", "")}
    lines = [orjson.loads(line) for line in ok("ledger", "export", "--format", "ndjson").stdout.splitlines()]
    assert [line["voucher_id"] for line in lines] == [row["voucher_id"] for row in rows]
    nobody = "00000000-0000-4000-8000-000000000000"
    refused("ledger", "find", "--voucher-id", nobody, says="nothing in the ledger fits")
    assert run("ledger", "find", "--voucher-id", "x").exit_code == 2


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign()
        rows = [Row(line, f"CODE-{line:04}", None, None) for line in range(1, 31)]
        await import_codes(stage.database, stage.scripts, "CAMP-001", rows, import_id="first")
        yield stage


async def test_operators_at_once_lose_no_change_and_none_undoes_a_void(stage: Stage) -> None:
    ((many, _), _) = await _two(stage)
    id = UUID(many).bytes

    async def say(what: vouchers.Change, remaining: int = 0) -> vouchers.Held | Conflict:
        try:
            async with stage.database.write() as conn:
                return await vouchers.change(conn, id, what, NOW, actor="test", remaining=remaining)
        except Conflict as fault:
            return fault

    first = await asyncio.gather(say("deactivate"), say("mark-used", 7))
    assert all(isinstance(one, vouchers.Held) for one in first)
    async with stage.database.read() as conn:
        both = await vouchers.find(conn, voucher_id=id)
    assert both.remaining == 7  # whichever came first, neither is forgotten
    assert both.status == "inactive"
    said = await asyncio.gather(*(say("activate"), say("void"), say("mark-used", 3), say("void"), say("deactivate")))
    assert [one.status for one in said if isinstance(one, vouchers.Held)].count("voided") == 2
    async with stage.database.read() as conn:
        assert (await vouchers.find(conn, voucher_id=id)).status == "voided"
    assert [row.action for row in await _log(stage)].count("voucher void") == 1
