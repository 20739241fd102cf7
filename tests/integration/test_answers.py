"""Replays out of the ledger while Redis is away: to whom they belong, and to nobody else."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from service import tokens
from service.catalogue import Catalogue, credential_of, encode, load
from service.domain import Busy, Issued, KeyReused, Record, Request
from service.errors import RedisDiskFull
from service.issuance import BREAKER_FAILURES, Issuer
from service.line import connect
from service.scripts import Routed, Scripts
from service.store import clients, control
from service.store.answers import Answers
from service.store.database import Database
from service.store.schema import signing_keys
from service.store.stock import Row, begin_import, import_rows
from service.worker.publish import change
from tests.integration.stage import CLIENT, DISTRIBUTOR, OUTBOX_BYTES_MAX, OUTBOX_MAX, RETENTION_S, Stage, staged
from tests.scripting import Bench, own_server, plan, request

TOKEN, OTHER = tokens.new_token(), tokens.new_token()
OF_CLIENT = credential_of("key-1", CLIENT)


class Flushed:
    """An installation whose ledger knows one request of each API, OLD and OLD_V3."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.answers = Answers(stage.database)

    async def edit(self, edit: Callable[[AsyncConnection], Awaitable[object]]) -> None:
        published = await change(
            self.stage.database, self.stage.scripts, edit, actor="test", action="test", subject="test"
        )
        assert not published.unreached

    async def version(self) -> int:
        async with self.stage.database.read() as conn:
            return await control.version(conn)

    async def keys_told(self, *asked: tuple[str, Request], version: int | None = None) -> set[str]:
        """The keys that are answered."""
        known = await self.answers.replays(await self.version() if version is None else version, asked)
        return {asked.key for asked in known}


@pytest.fixture
async def flushed(database: Database, valkey_url: str) -> AsyncIterator[Flushed]:
    now = int(time.time())
    async with staged(database, valkey_url) as stage:
        await stage.campaign()
        made = Flushed(stage)

        async def furnish(conn: AsyncConnection) -> None:
            await control.add_credential(conn, DISTRIBUTOR, tokens.digest(TOKEN), now)
            await control.create_distributor(conn, "DIST-002", "Another", now)
            await control.add_credential(conn, "DIST-002", tokens.digest(OTHER), now)
            await clients.create(conn, CLIENT, DISTRIBUTOR, "0" * 64, ["issue_vouchers"], now)
            key = {"kid": "key-1", "public": "{}", "sealed": "", "made_at": now, "verifies_until": None}
            await conn.execute(signing_keys.insert(), key)
            await begin_import(conn, "i", "CAMP-001", now)
            await import_rows(conn, "i", "CAMP-001", [Row(n, f"CODE-{n}", None, None) for n in range(1, 30)], now)

        await made.edit(furnish)
        await stage.refill.run_once()
        assert [answer.status for answer in await stage.issue("old")] == ["ISSUED"]
        await stage.issue_v3("11111111-1111-4111-8111-111111111111", 2)
        assert (await stage.flush.run_once()).codes == 3
        yield made


OLD = Request("v1", DISTRIBUTOR, "old", DISTRIBUTOR, ("PAY",), "T1\tPAY")
OLD_V3 = Request(
    "v3", CLIENT, "11111111-1111-4111-8111-111111111111", DISTRIBUTOR, ("CAMP-001",), "\tCAMP-001\t2\t1051\tsale", 2
)


async def test_whose_credential_holds_gets_the_same_record_and_whose_does_not_gets_nothing(flushed: Flushed) -> None:
    known = await flushed.answers.replays(0, [(TOKEN, OLD), (OF_CLIENT, OLD_V3)])
    assert known[OLD].pack() == (await flushed.stage.issue("old"))[0].detail
    assert len(known[OLD_V3].codes) == 2
    new = Request("v1", DISTRIBUTOR, "new", DISTRIBUTOR, ("PAY",), "T1\tPAY")
    others = Request("v1", "DIST-002", "old", "DIST-002", ("PAY",), "T1\tPAY")
    assert await flushed.keys_told((TOKEN, new), (OTHER, others)) == set(), "another distributor's key"
    for wrong in (OTHER, tokens.new_token(), "", ":", "key-1:", credential_of("key-2", CLIENT), "key-1:nobody"):
        assert await flushed.keys_told((wrong, OLD), (wrong, OLD_V3)) == set(), wrong
    assert await flushed.keys_told() == set()


async def test_what_was_revoked_or_suspended_gets_nothing_from_the_moment_that_the_command_returns(
    flushed: Flushed,
) -> None:
    now = int(time.time())
    edits: list[tuple[Any, Any, set[str]]] = [
        (
            lambda c: control.set_active(c, DISTRIBUTOR, False),
            lambda c: control.set_active(c, DISTRIBUTOR, True),
            set(),
        ),
        (lambda c: clients.set_active(c, CLIENT, False), lambda c: clients.set_active(c, CLIENT, True), {"old"}),
        (
            lambda c: control.revoke_credentials(c, token_sha256=tokens.digest(TOKEN), now=now),
            lambda c: c.execute(signing_keys.delete()),
            {OLD_V3.key},
        ),
    ]
    both = ((TOKEN, OLD), (OF_CLIENT, OLD_V3))
    for edit, undo, left in edits:
        assert await flushed.keys_told(*both) == {"old", OLD_V3.key}
        await flushed.edit(edit)
        assert await flushed.keys_told(*both) == left
        await flushed.edit(undo)
    assert await flushed.keys_told(*both) == set(), "the signing key is gone too"


async def test_a_store_older_than_the_catalogue_in_use_tells_nothing(flushed: Flushed) -> None:
    version = await flushed.version()
    assert await flushed.keys_told((TOKEN, OLD), version=version) == {"old"}
    assert await flushed.keys_told((TOKEN, OLD), version=version + 1) == set()


async def _in_the_end(service: Issuer, request: Request) -> object:
    """What a client hears that asks again after 503: a store that takes too long is away for a moment."""
    async with asyncio.timeout(20):
        while isinstance(said := await service.issue(TOKEN, request), Busy):
            await asyncio.sleep(0.05)
    return said


async def test_with_redis_gone_the_issuer_replays_from_the_ledger_and_issues_nothing(flushed: Flushed) -> None:
    stage = flushed.stage
    with socket.create_server(("127.0.0.1", 0)) as taken:  # closed below: a port that refuses
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0"
    redis = connect(url, timeout_ms=300)
    async with stage.database.read() as conn:
        blob = encode(await control.snapshot(conn, await control.version(conn)))
    *_, catalogue = load(blob)
    assert isinstance(catalogue, Catalogue)

    async def loaded(_: int) -> Catalogue:
        return catalogue

    service = Issuer(
        Scripts(redis), loaded, flushed.answers.known, flushed.answers.replays, outbox_max=OUTBOX_MAX,
        outbox_bytes_max=OUTBOX_BYTES_MAX, retention_s=RETENTION_S, queue_max=4_096, deadline_s=2.0,
    )  # fmt: skip
    service.start()
    try:
        [answer] = await stage.issue("old")
        took: list[float] = []
        for number in range(BREAKER_FAILURES + 20):
            new = Request("v1", DISTRIBUTOR, f"new-{number}", DISTRIBUTOR, ("PAY",), "T1\tPAY")
            began = time.perf_counter()
            assert await service.issue(TOKEN, new) == Busy("store_unreachable")
            took.append(time.perf_counter() - began)
            assert await _in_the_end(service, OLD) == Issued(answer.detail, replayed=True)
            assert await service.issue(OTHER, OLD) == Busy("store_unreachable")
        reused = Request("v1", DISTRIBUTOR, "old", DISTRIBUTOR, ("MOB",), "T1\tMOB")
        assert await _in_the_end(service, reused) == KeyReused()
        print(f"503 after a look in the ledger, median: {sorted(took)[len(took) // 2] * 1e3:.1f} ms")
        assert await stage.scripts.redis.llen("{0}:1:window:CAMP-001") == 26, "something new was issued"
    finally:
        await service.drain()
        await redis.aclose()


async def test_a_disk_that_can_not_be_written_to_stops_new_vouchers_and_no_replay(tmp_path: Path) -> None:
    server = own_server("valkey", tmp_path)
    redis = connect(server.url, timeout_ms=2_000)
    try:
        bench = Bench(redis)
        await bench.open()
        await bench.restock()
        old: Sequence[Routed] = [Routed(request("old"), plan())]
        [told] = (await bench.issue(*old)).answers
        await bench.redis.config_set("save", "3600 1")
        shutil.rmtree(server.directory)  # no snapshot can be made in it any more
        await bench.redis.bgsave()
        async with asyncio.timeout(10):
            while (await bench.redis.info("persistence"))["rdb_last_bgsave_status"] == "ok":
                await asyncio.sleep(0.01)
        before = await bench.contents()
        with pytest.raises(RedisDiskFull):
            await bench.issue(*old, Routed(request("new"), plan()))
        reply = await bench.scripts.replay([request("old"), request("new")], generation=1, version=1)
        assert [(one.status, one.detail) for one in reply.answers] == [("REPLAY", told.detail), ("MISS", "")]
        assert await bench.contents() == before
        assert Record.unpack(told.detail).payload == request("old").payload
    finally:
        await redis.aclose()
        server.stop()
