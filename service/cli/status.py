"""``voucherd status``: whether all is well, at a glance, once or again and again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from service.cli import options
from service.cli.connections import Connected, connected
from service.cli.console import complain, facts, instant, print_json, screen, show, table
from service.worker import status as looking
from service.worker.status import PartitionStatus, PoolStatus, Status

# Seconds between two looks of --watch: each asks the store for the vouchers of the last minute.
EVERY_S: Final = 2.0

POOLS_SHOWN: Final = 50  # of an installation that has thousands those that need somebody are on the screen


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="With --watch, how often.")] = EVERY_S,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Show stock, windows, burn rate, time to empty, outbox, fence, incidents, and how long the store may be away.

    The burn rate is that of the last minute. Exit status 1 if something needs attention. With --watch --json each look
    is one line.
    """
    try:
        wrong = asyncio.run(_watch(data_dir, every, as_json) if watch else _once(data_dir, as_json))
    except KeyboardInterrupt:
        return
    if wrong:
        raise typer.Exit(1)


async def _once(data_dir: Path | None, as_json: bool) -> bool:
    async with connected(data_dir, store_may_be_away=True) as here:
        found = await _look(here)
    if as_json:
        print_json(found)
    else:
        show(_page(found))
        for line in found.wrong:
            complain(line)
    return bool(found.wrong)


async def _watch(data_dir: Path | None, every_s: float, as_json: bool) -> bool:
    async with connected(data_dir, store_may_be_away=True) as here:
        if as_json:
            async for found in _looks(here, every_s):
                print_json(found, indent=False)
        with Live(console=screen(), screen=screen().is_terminal, auto_refresh=False) as live:
            async for found in _looks(here, every_s):
                lines = [Text(f"voucherd: {line}", style="bold") for line in found.wrong]
                page = Group(
                    Text(f"{instant(int(time.time()))}, every {every_s:g} s, Ctrl-C ends"), _page(found), *lines
                )
                live.update(page, refresh=True)
    return False


async def _looks(here: Connected, every_s: float) -> AsyncIterator[Status]:
    while True:
        yield await _look(here)
        await asyncio.sleep(every_s)


async def _look(here: Connected) -> Status:
    return await looking.status(here.database, here.scripts, here.settings)


def _page(found: Status) -> RenderableType:
    head: dict[str, object] = {}
    if found.partition is not None:
        head |= _facts(found.partition, found)
    head["catalogue"] = _catalogue(found)
    head["incidents"] = found.incidents
    head["parked entries"] = found.parked
    head["quarantine"] = f"{found.quarantined:,} codes"
    parts: list[RenderableType] = [facts(head)]
    numbers = ["in stock", "in window", "low water", "a minute", "quarantine"]
    pools = sorted(found.pools, key=_urgency)
    rows = [_row(one) for one in pools[:POOLS_SHOWN]]
    parts.append(table(["pool", *numbers, "empty in"], rows, numbers=numbers, whole=["empty in"]))
    if len(pools) > POOLS_SHOWN:
        parts.append(Text(f"and {len(pools) - POOLS_SHOWN:,} pools more that need nobody sooner: --json has them all"))
    if found.newest_incidents:
        incidents = [(instant(one.raised_at), one.kind, one.subject, one.detail) for one in found.newest_incidents]
        parts.append(table(["raised at", "incident", "where", "detail"], incidents))
    return Group(*parts)


def _urgency(pool: PoolStatus) -> tuple[float, str]:
    """Pools that are empty and asked, then by when they will be, then those of which nothing was issued."""
    return math.inf if pool.empty_in_s is None else pool.empty_in_s, pool.pool


def _row(pool: PoolStatus) -> tuple[object, ...]:
    return (
        pool.pool, pool.left, pool.window, pool.low_water, pool.last_minute, pool.quarantined,
        "exhausted" if pool.empty_in_s == 0 or (pool.exhausted and not pool.window) else span(pool.empty_in_s),
    )  # fmt: skip


def span(seconds: int | None) -> str:
    """A stretch of time in its two largest units."""
    if seconds is None:
        return "–"
    for unit, size, next_unit, next_size in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size:,} {unit} {seconds % size // next_size} {next_unit}"
    return f"{seconds} s"


def _facts(partition: PartitionStatus, found: Status) -> dict[str, object]:
    state = "issuing" if partition.issuing else "NOT ISSUING"
    return {
        "state": f"{state}, restoring records" if partition.restoring else state,
        "generation": partition.generation,
        "outbox": f"{partition.outbox_codes:,} codes in {partition.outbox_entries:,} entries, "
        f"room for {partition.outbox_max:,}",
        "outbox lag": f"{partition.outbox_age_s:.1f} s",
        "without the store": f"{partition.outage_s:,} s at {found.planned_rate:,} vouchers/s "
        f"(wanted: {found.store_outage_s:,} s)",
    }


def _catalogue(found: Status) -> str:
    store = "store away" if found.catalogue is None else f"version {found.catalogue}"
    return store if found.partition is None else f"{store}, in force from {max(found.partition.fence, 0)}"
