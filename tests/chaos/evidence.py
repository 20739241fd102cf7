"""What the stores say when everything is healed and drained: every code, wherever it is now.

Read by plain SQL and plain Redis commands, past everything that the service itself makes of them; what its own audit
finds is one more witness.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any, Literal

import msgspec
import redis
from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Code
from service.line import connect
from service.scripts import Scripts
from service.store.database import Database
from service.worker.audit import audit
from tests.chaos.answers import Key

# Where a code can be that somebody was told and that the ledger does not have.
Place = Literal["quarantine", "stock", "window", "set aside", "on its way", "nowhere"]

IN_MAX = 500
STATEMENT_S = 120.0


Position = tuple[int, int]  # lot, seq
Way = tuple[int, ...]  # of a row of the ledger: partition, generation, outbox sequence, ordinal


class Issued(msgspec.Struct, frozen=True, gc=False):
    """A code's row in the ledger.  ``key``: whose request it is; ``request``: the row of that."""

    key: Key
    campaign: str
    terminal: str
    request: Way


class Evidence(msgspec.Struct):
    """``issued``: the ledger, by code; ``doubled``: what it says that can't be.  ``windows``: every code of the open
    generation's windows, ``twice`` those that are there more than once.  ``outbox``: entries in any outbox.
    ``places``: where codes are that were told and that the ledger lacks.

    By pool: ``imported``, ``stored``, ``leased`` codes; ``out`` those of the open generation that the store accounts
    for nowhere, ``held`` those that its window holds; ``quarantine``: those of closed ones that the store accounts for
    nowhere.  ``incidents``: kind, subject and codes of those that are no quarantine.  ``findings``: the audit's, each a
    promise and a text."""

    generation: int
    issued: dict[str, Issued]
    doubled: list[str]
    windows: set[str]
    twice: list[str]
    outbox: int
    places: dict[str, Place]
    imported: Counter[str]
    stored: Counter[str]
    leased: Counter[str]
    out: Counter[str]
    held: Counter[str]
    quarantine: Counter[str]
    incidents: list[tuple[str, str, int]]
    parked: int
    findings: list[tuple[str, str]]


async def collect(store_url: str, redis_port: int, told: Collection[str]) -> Evidence:
    """``told``: the codes that clients were told."""
    database = Database.connect(store_url, statement_s=STATEMENT_S)
    url = f"redis://127.0.0.1:{redis_port}/0"
    client = connect(url, timeout_ms=10_000)
    try:
        report = await audit(database, Scripts(client))
        with redis.Redis.from_url(url, decode_responses=True, encoding_errors="surrogateescape") as admin:
            generation, windows, outbox = _in_redis(admin)
        findings = [
            (one.promise, f"{one.subject}: {one.detail} {one.figures or ''}".strip()) for one in report.findings
        ]
        async with database.read() as conn:
            return await _in_store(conn, told, generation, windows, outbox, findings)
    finally:
        await client.aclose()
        await database.close()


def _in_redis(admin: redis.Redis) -> tuple[int, dict[str, list[Code]], int]:
    generation = int(admin.hget("{0}:generation", "open") or 0)
    prefix = f"{{0}}:{generation}:window:"
    windows: dict[str, list[Code]] = {}
    for key in admin.scan_iter(f"{prefix}*"):
        windows[key.removeprefix(prefix)] = [Code.unpack(packed) for packed in admin.lrange(key, 0, -1)]
    outbox = sum(admin.xlen(key) for key in admin.scan_iter("{0}:*:outbox"))
    return generation, windows, outbox


async def _in_store(
    conn: AsyncConnection,
    told: Collection[str],
    generation: int,
    windows: dict[str, list[Code]],
    outbox: int,
    findings: list[tuple[str, str]],
) -> Evidence:
    async def rows(sql: str, **values: Any) -> list[Any]:
        return list((await conn.execute(text(sql), values)).all())

    pool_of = {int(lot): str(pool) for lot, pool in await rows("select id, pool from lots")}
    closed = {int(one) for (one,) in await rows("select generation from generations where state = 'closed'")}
    leases = _Leases()
    leased, out, quarantine = Counter[str](), Counter[str](), Counter[str]()
    for lot, seq_from, seq_to, codes, of in await rows("select lot, seq_from, seq_to, codes, generation from leases"):
        leases.add(lot, seq_from, seq_to, of)
        leased[pool_of[lot]] += codes
        if of in closed:
            quarantine[pool_of[lot]] += codes
        elif of == generation:
            out[pool_of[lot]] += codes

    requests = {
        tuple(way): (str(client), str(key), str(campaign), str(terminal))
        for *way, client, key, campaign, terminal in await rows(
            "select partition, generation, outbox_seq, ordinal, client, key, campaign, terminal from requests"
        )
    }
    issued: dict[str, Issued] = {}
    doubled: list[str] = []
    gone: set[Position] = set()  # what the store accounts for
    found = await conn.stream(
        text("select partition, generation, outbox_seq, request_ordinal, lot, seq, code from issuances")
    )
    async for *way, lot, seq, code in found:
        whose = requests.get(tuple(way))
        if whose is None:
            doubled.append(f"{code} is in the ledger without its request")
            continue
        if code in issued or (lot, seq) in gone:
            doubled.append(f"{code} (lot {lot}, seq {seq}) is in the ledger twice")
        gone.add((lot, seq))
        issued[code] = Issued((whose[0], whose[1]), whose[2], whose[3], tuple(way))
    aside = {(int(lot), int(seq)) for lot, seq in await rows("select lot, seq from set_asides")}
    incidents = await rows("select kind, subject, codes, lot, seq from incidents where kind <> 'quarantine'")
    gone |= aside | {(lot, seq) for *_, lot, seq in incidents if lot is not None and seq is not None}
    for lot, seq in gone:
        of = leases.generation(lot, seq)
        if of in closed:
            quarantine[pool_of[lot]] -= 1
        elif of == generation:
            out[pool_of[lot]] -= 1

    in_windows = {(code.lot, code.seq) for codes in windows.values() for code in codes}
    places: dict[str, Place] = {code: "nowhere" for code in told if code not in issued}
    for some in _cut(list(places)):
        query = text("select code, lot, seq from codes where code in :codes").bindparams(
            bindparam("codes", expanding=True)
        )
        for code, lot, seq in (await conn.execute(query, {"codes": some})).all():
            of = leases.generation(lot, seq)
            if (lot, seq) in in_windows:
                places[code] = "window"
            elif (lot, seq) in aside:
                places[code] = "set aside"
            elif of is None:
                places[code] = "stock"
            else:
                places[code] = "quarantine" if of in closed else "on its way"
    stored = await rows(
        "select lots.pool, count(*) from lots join codes on codes.lot = lots.id and codes.seq >= lots.leased_to "
        "group by lots.pool"
    )
    imported = await rows("select pool, count(*) from codes group by pool")
    [(parked,)] = await rows("select count(*) from parked")
    seen = Counter(code.code for codes in windows.values() for code in codes)
    return Evidence(
        generation=generation,
        issued=issued,
        doubled=doubled,
        windows=set(seen),
        twice=[code for code, times in seen.items() if times > 1],
        outbox=outbox,
        places=places,
        imported=Counter({pool: int(count) for pool, count in imported}),
        stored=Counter({pool: int(count) for pool, count in stored}),
        leased=leased,
        out=out,
        held=Counter({pool: len(codes) for pool, codes in windows.items()}),
        quarantine=quarantine,
        incidents=[(str(kind), str(subject), int(codes)) for kind, subject, codes, *_ in incidents],
        parked=int(parked),
        findings=findings,
    )


class _Leases:
    """Which generation each position was leased to."""

    def __init__(self) -> None:
        self._of = defaultdict[int, list[tuple[int, int, int]]](list)
        self._sorted = False

    def add(self, lot: int, seq_from: int, seq_to: int, generation: int) -> None:
        self._of[lot].append((seq_from, seq_to, generation))
        self._sorted = False

    def generation(self, lot: int, seq: int) -> int | None:
        """None: it never was."""
        if not self._sorted:
            for some in self._of.values():
                some.sort()
            self._sorted = True
        of = self._of[lot]
        at = bisect_right(of, seq, key=lambda lease: lease[0]) - 1
        return of[at][2] if at >= 0 and seq < of[at][1] else None


def _cut(values: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(values), IN_MAX):
        yield values[start : start + IN_MAX]
