"""How fast replay records come back after a loss of Redis, and what issuing feels of it: `make bench-recover`.

On each store a ledger is filled in bulk, as if all of it had been issued within the retention, and beside it an empty
Valkey with appendfsync always is opened by the worker's own step: it rolls, then restores until no record is missing.
Meanwhile one request after the other is issued, each with a look into the ledger first, as `serve` does.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.figures import verdict
from loadtest.servers import RedisServer, postgresql, redis_like
from service import scripts as scripting
from service.domain import Code, Record, Request, Rule
from service.identity import NO_KEYS
from service.line import connect
from service.scripts import Candidate, Plan, Routed, Scripts
from service.store import generations, ledger
from service.store.database import Database, insert_records
from service.store.entries import Entry, rows_of
from service.store.migration import migrate
from service.store.schema import issuances, requests
from service.worker.flush import Flush
from service.worker.recover import RESTORE_MAX, Recover

SECONDS_MAX = 30.0  # the target, for RECORDS of them
RECORDS = 1_000_000
BATCH = 32  # records of one outbox entry
CHUNK = 20_000  # records put into the ledger at once
RETENTION_S = 86_400
POOL = "CAMP-001"
EXPIRES_AT = 1_893_456_000
DISTRIBUTORS = 100
SLOW_US = 200  # a script call from here on is noted by Valkey
SLOW_CALLS = 100_000
STATEMENT_S = 600.0


class Measured(msgspec.Struct, frozen=True):
    """One store.  ``seconds`` from the beginning of the roll to the last record; ``longest_ms``: the longest that one
    call of restore.lua held Valkey; ``issued`` meanwhile, one after the other, and how long the longest took.
    ``ledger_bytes`` that one voucher takes in the store, with its indexes."""

    store: str
    records: int
    seconds: float
    roll_seconds: float
    longest_ms: float
    issued: int
    issue_p50_ms: float
    issue_max_ms: float
    ledger_bytes: float

    @property
    def met(self) -> bool:
        return self.seconds * RECORDS / self.records <= SECONDS_MAX


def main() -> int:
    """Measures and prints; exit status 1 if the target is missed."""
    parser = argparse.ArgumentParser(prog="make bench-recover", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=RECORDS, help=f"records in the ledger (default {RECORDS:,})")
    parser.add_argument("--store", choices=("postgresql", "sqlite"), help="one of the two alone")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    found = []
    for store in ("postgresql", "sqlite") if options.store is None else (options.store,):
        with (
            tempfile.TemporaryDirectory(prefix="voucherd-bench-") as folder,
            _store(store, Path(folder)) as url,
            redis_like(Path(folder)) as valkey,
        ):
            found.append(asyncio.run(_measure(store, url, valkey, options.records)))
    return _print(found, as_json=options.json)


@contextmanager
def _store(store: str, folder: Path) -> Iterator[str]:
    if store == "sqlite":
        yield f"sqlite+aiosqlite:///{folder / 'store.db'}"
        return
    with postgresql(folder) as postgres:
        yield postgres.url()


async def _measure(store: str, url: str, valkey: RedisServer, records: int) -> Measured:
    database = Database.connect(url, statement_s=STATEMENT_S)
    redis = connect(valkey.url, timeout_ms=5_000)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        await migrate(database)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{store}: into the ledger", total=records)
            await _fill(database, records, lambda done: progress.update(task, completed=done))
            task = progress.add_task(f"{store}: back into Valkey", total=records)
            return await _recovered(store, database, redis, lambda done: progress.update(task, completed=done), records)
    finally:
        await redis.aclose()
        await database.close()


async def _fill(database: Database, records: int, told: Any) -> None:
    now = int(time.time())
    rule = Rule(POOL, POOL, "PAY", "PAY", 0)
    async with database.write() as conn:
        await generations.make(conn, 0, "bench", now)
        await generations.close(conn, 0, 1, now)
    for start in range(0, records, CHUNK):
        entries = []
        for first in range(start, min(start + CHUNK, records), BATCH):
            some = []
            for n in range(first, min(first + BATCH, start + CHUNK, records)):
                owner = f"DIST-{n % DISTRIBUTORS:03}"
                code = Code(EXPIRES_AT, 1, n, f"PSCF-{n:010x}", f"SER-{n:08d}")
                at = now - RETENTION_S // 2 + n * (RETENTION_S // 2 - 60) // records
                some.append(Record(f"AT-{n % 997}\tPAY", "v1", owner, owner, str(uuid.uuid4()), at, rule, (code,)))
            entries.append(Entry(0, 1, first // BATCH + 1, "0-0", tuple(some), ()))
        rows = rows_of(entries, now, NO_KEYS)
        async with database.write() as conn:
            await insert_records(conn, requests, [column.name for column in requests.c], rows.requests)
            await insert_records(conn, issuances, [column.name for column in issuances.c], rows.issuances)
        told(start + CHUNK)
    if not database.is_sqlite:  # as its own worker does it for a ledger that has grown over days
        async with database.write() as conn:
            await conn.exec_driver_sql("analyze requests, issuances")


async def _ledger_bytes(database: Database) -> int:
    """What the filled ledger takes: of SQLite the whole file, in which there is little else."""
    sql = (
        "select page_count * page_size from pragma_page_count, pragma_page_size"
        if database.is_sqlite
        else "select pg_total_relation_size('requests') + pg_total_relation_size('issuances')"
    )
    async with database.read() as conn:
        return int((await conn.exec_driver_sql(sql)).scalar_one())


async def _recovered(store: str, database: Database, redis: Any, told: Any, records: int) -> Measured:
    scripts = Scripts(redis)
    flush = Flush(database, scripts, consumer="bench", retention_s=RETENTION_S)
    ledger_bytes = await _ledger_bytes(database) / records
    recover = Recover(database, scripts, flush, outbox_max=RECORDS, retention_s=RETENTION_S)
    await redis.config_set("slowlog-log-slower-than", SLOW_US)
    await redis.config_set("slowlog-max-len", SLOW_CALLS)
    began, restored = time.perf_counter(), 0
    await recover.run_once()
    roll_s = time.perf_counter() - began
    stop = asyncio.Event()
    issuing = asyncio.create_task(_issue(database, Scripts(redis), stop))
    while (await scripts.generation()).restoring:
        restored += (await recover.run_once()).restored
        told(restored)
    seconds = time.perf_counter() - began
    stop.set()
    latencies = sorted(await issuing)
    if restored != records:
        raise SystemExit(f"{restored:,} of {records:,} records came back")
    sha = scripting.load("restore").sha
    calls = [call["duration"] for call in await redis.slowlog_get(SLOW_CALLS) if sha in str(call["command"])]
    return Measured(
        store, records, seconds, roll_s, max(calls, default=0) / 1e3, len(latencies),
        latencies[len(latencies) // 2], latencies[-1], ledger_bytes,
    )  # fmt: skip


async def _issue(database: Database, scripts: Scripts, stop: asyncio.Event) -> list[float]:
    """Milliseconds of each request that was issued, the look into the ledger included."""
    seen = await scripts.generation()
    plan = Plan((Candidate(POOL, 0, 0, 0, Rule(POOL, POOL, "PAY", "PAY", 0).pack(), ()),))
    taken: list[float] = []
    lease = ""
    while not stop.is_set():
        if len(taken) % RESTORE_MAX == 0:
            at = RECORDS * 100 + len(taken)
            codes = [Code(EXPIRES_AT, 2, at + n, f"NEW-{at + n}", f"NEW-{at + n}") for n in range(RESTORE_MAX)]
            before, lease = lease, uuid.uuid4().hex
            await scripts.restock(POOL, lease, before, codes, generation=seen.open, stock_version=1, low_water=0)
        request = Request("v1", "DIST-001", str(uuid.uuid4()), "DIST-001", ("PAY",), "AT-1\tPAY")
        began = time.perf_counter()
        for looked_up in (False, True):
            if looked_up:
                async with database.read() as conn:
                    await ledger.lookup(conn, "v1", "DIST-001", [request.key])
            reply = await scripts.issue(
                [Routed(request, plan, looked_up)], generation=seen.open, version=0, outbox_max=10**9,
                outbox_bytes_max=10**12, retention_s=RETENTION_S, bounds={},
            )  # fmt: skip
            if reply.answers[0].status != "LOOKUP":
                break
        if reply.answers[0].status != "ISSUED":
            raise SystemExit(f"a request was not issued: {reply.answers[0].status}")
        taken.append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.01)
    return taken


def _print(found: list[Measured], *, as_json: bool) -> int:
    met = all(one.met for one in found)
    if as_json:
        print(msgspec.json.encode({"measured": found, "seconds_max": SECONDS_MAX, "met": met}).decode())
        return 0 if met else 1
    table = Table(title="Replay records restored from the ledger into an empty Valkey, issuing meanwhile")
    for column in (
        "store",
        "records",
        "s",
        "roll, s",
        "longest call, ms",
        "issued",
        "p50, ms",
        "longest, ms",
        "ledger, B",
    ):
        table.add_column(column, justify="left" if column == "store" else "right", no_wrap=True)
    for one in found:
        table.add_row(
            one.store, f"{one.records:,}", f"{one.seconds:.1f}", f"{one.roll_seconds:.1f}", f"{one.longest_ms:.1f}",
            f"{one.issued:,}", f"{one.issue_p50_ms:.1f}", f"{one.issue_max_ms:.1f}", f"{one.ledger_bytes:.0f}",
        )  # fmt: skip
    Console().print(table)
    for one in found:
        print(
            f"{one.store}: {one.seconds * RECORDS / one.records:.1f} s for {RECORDS:,} records, at most "
            f"{SECONDS_MAX:g}: {verdict(one.met)}"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
