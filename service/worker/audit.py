"""The audit: whether the promises hold, by what is in the store and in Redis (P1-P3, P5, P8).

The same in tests, after load, and in production.  What only the store can say is here; what it takes Redis for is in
``balance``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from service.errors import StoreIsOlder
from service.scripts import Scripts
from service.settings import Settings
from service.store import books, inspection
from service.store.books import Quarantined, StockBalance
from service.store.database import Database
from service.store.inspection import Incident
from service.worker.balance import Finding, PartitionFigures, Promise, examine, position_name
from service.worker.currency import refuse_older

# Seconds that a key stands for its first answer, unless the settings say otherwise.
RETENTION_S: Final = Settings().replay_retention_s


class Report(msgspec.Struct, frozen=True):
    """``findings`` is empty if the books balance.  ``partition`` is None where no generation is open.

    ``quarantine`` is no finding: these codes are lost to everybody, counted and named (P2).
    """

    findings: list[Finding]
    pools: list[StockBalance]
    partition: PartitionFigures | None
    quarantine: list[Quarantined]


async def audit(database: Database, scripts: Scripts, *, retention_s: int = RETENTION_S) -> Report:
    """Everything that can be told from the store and from Redis.

    Raises RedisUnreachable or StoreUnreachable: then nothing was found out.  Reads every row of the ledger: pass a
    database with a patient statement time-out.
    """
    findings: list[Finding] = []
    try:
        await refuse_older(database, scripts)
    except StoreIsOlder as fault:
        findings.append(Finding("P1", "store", f"{fault}; leasing, importing and publishing have stopped"))
    async with database.read() as conn:
        balances = await books.stock_balance(conn)
        quarantine = await books.quarantine(conn)
        findings += _stock_findings(balances)
        doubled = await books.double_codes(conn)
        findings += [Finding("P1", position_name(one.lot, one.seq), f"given twice: {one.detail}") for one in doubled]
        findings += [
            Finding(
                "P3", f"client {one.client}", f"a key of API {one.api} has several requests: {one.key}",
                {"requests": one.requests},
            )
            for one in await books.double_keys(conn, retention_s)
        ]  # fmt: skip
        findings += [_over_cap(one) for one in await books.over_caps(conn)]
        findings += [
            Finding(
                "P2", _entry(one.generation, one.outbox_seq, one.ordinal),
                "a request without all of its codes" if one.expected else "codes without their request",
                {"expected": one.expected, "found": one.found},
            )
            for one in await inspection.torn_requests(conn)
        ]  # fmt: skip
        findings += _incident_findings(await inspection.open_incidents(conn))
        findings += [
            Finding("P2", f"parked {one.entry_id}", f"generation {one.generation}: {one.reason}", {"codes": one.codes})
            for one in await inspection.parked_entries(conn)
        ]
    found, figures = await examine(database, scripts)
    return Report(findings + found, balances, figures, quarantine)


# --- the store by itself -----------------------------------------------------------------------------------------


def _stock_findings(balances: Iterable[StockBalance]) -> list[Finding]:
    return [
        Finding(
            "P5", f"pool {one.pool}", "imported is not stored + leased",
            {"imported": one.imported, "stored": one.stored, "leased": one.leased},
        )
        for one in balances
        if not one.balanced
    ]  # fmt: skip


def _over_cap(one: books.OverCap) -> Finding:
    who = f" of {' '.join(filter(None, (one.distributor, one.terminal)))}" if one.distributor else ""
    when = f" from Unix second {one.starts_at}" if one.starts_at else ""
    return Finding(
        "P8", f"campaign {one.campaign}", f"over the cap per {one.holder} and {one.period}{who}{when}",
        {"limit": one.limit, "issued": one.codes},
    )  # fmt: skip


_INCIDENTS: Final[dict[str, Promise]] = {"forked_lease": "P5", "conflicting_entry": "P2"}


def _incident_findings(incidents: Iterable[Incident]) -> list[Finding]:
    return [
        Finding(_INCIDENTS.get(one.kind, "P1"), one.subject, f"incident {one.kind}: {one.detail}", {"codes": one.codes})
        for one in incidents
        if one.kind != "double_issue"  # those are among the double codes
    ]


def _entry(generation: int, outbox_seq: int, ordinal: int) -> str:
    return f"entry {generation}/{outbox_seq}.{ordinal}"
