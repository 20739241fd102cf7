"""A declaration is brought about in one transaction, and only by the steps that somebody has seen."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from msgspec.structs import replace
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Campaign
from service.errors import Conflict, NotFound
from service.store import campaigns, control, register
from service.store.database import Database
from service.worker.declaration import Declaration, UnusableDeclaration
from service.worker.plan import Distributor, Existing, Plan, Pool, Step, ordered, plan

# Entries and assignments that one transaction makes or changes.  On SQLite nobody else writes meanwhile: 1.5 s, of the
# 5 s that others wait.
WRITES_MAX: Final = 1_000


class _RehearsedError(Exception):
    """Rolls a rehearsal back."""


async def rehearse(database: Database, wanted: Declaration, now: int) -> Plan:
    """What ``apply`` would do now.  All of it was tried, and nothing has changed.

    Raises as ``apply`` does, so that a plan which is shown is one that can be carried out.
    """
    try:
        async with database.write() as conn:
            shown = await _planned(conn, wanted, now)
            await _carry_out(conn, shown, now)
            raise _RehearsedError
    except _RehearsedError:
        return shown


async def apply(connection: AsyncConnection, wanted: Declaration, shown: Plan, planned_at: int, now: int) -> None:
    """What there is is as ``wanted``, by the steps that were ``shown``, planned at that second.  The caller publishes.

    Raises Conflict, and nothing is done, if other steps would be needed by now; UnusableDeclaration for what can't be.
    """
    if (await _planned(connection, wanted, planned_at)).steps != shown.steps:
        raise Conflict("somebody else has changed this meanwhile, and nothing was applied: look at the new plan first")
    await _carry_out(connection, shown, now)


async def _planned(connection: AsyncConnection, wanted: Declaration, now: int) -> Plan:
    await control.lock(connection)
    pools = await register.all_pools(connection)
    distributors = await register.all_distributors(connection)
    made = plan(
        wanted,
        Existing(
            {one.id: Pool(one.id, one.default_expires_at, one.least_life_s, one.generator) for one in pools},
            {one.id: Distributor(one.id, one.name, one.active, one.limit) for one in distributors},
            {one.campaign.id: _ordered(one.campaign) for one in await register.all_campaigns(connection)},
        ),
        now,
    )
    if (writes := sum(1 + len(step.assigned) for step in made.to_do)) > WRITES_MAX:
        raise UnusableDeclaration(
            f"{writes} entries and assignments would be made or changed, at most {WRITES_MAX} at once: split the file"
        )
    return made


def _ordered(campaign: Campaign) -> Campaign:
    """Each store has an order of its own."""
    return replace(
        campaign,
        products=tuple(sorted(campaign.products)),
        caps=ordered(campaign.caps),
        assigned={distributor: ordered(caps) for distributor, caps in campaign.assigned.items()},
    )


async def _carry_out(connection: AsyncConnection, made: Plan, now: int) -> None:
    for _, steps in groupby(made.to_do, lambda step: step.kind):
        faults = []
        for step in steps:
            try:
                await _take(connection, step, now)
            except (Conflict, NotFound) as fault:
                faults.append(f"{step.path}: {fault}")
        if faults:  # campaigns on pools that could not be made would only add to them
            raise UnusableDeclaration(*faults)
    # Only now: in between more may compete than in the end, when two campaigns change places.
    await campaigns.check_candidates(connection, now)


async def _take(connection: AsyncConnection, step: Step, now: int) -> None:
    is_new = step.before is None
    match step.after:
        case Pool(id, expires_at, least_life_s, generator):
            if is_new:
                await control.create_pool(
                    connection, id, default_expires_at=expires_at, least_life_s=least_life_s, now=now,
                    generator=generator,
                )  # fmt: skip
            else:
                await control.change_pool(
                    connection, id, default_expires_at=expires_at, least_life_s=least_life_s, now=now
                )
        case Distributor(id, name, active, limit):
            if is_new:
                await control.create_distributor(connection, id, name, now)
            else:
                await control.rename(connection, id, name)
            await control.set_active(connection, id, active)
            await control.set_limit(connection, id, limit)
        case Campaign() as wanted:
            if is_new:
                await _create_campaign(connection, wanted, now)
            else:
                await campaigns.change(connection, wanted, now)
            for assignee, caps in step.assigned.items():
                await campaigns.place(connection, wanted.id, assignee, caps, now)


async def _create_campaign(connection: AsyncConnection, wanted: Campaign, now: int) -> None:
    await campaigns.create(
        connection, wanted.id, category=wanted.category, products=wanted.products, pool=wanted.pool,
        priority=wanted.priority, starts_at=wanted.starts_at, until=wanted.until, time_zone=wanted.time_zone,
        caps=wanted.caps, now=now,
    )  # fmt: skip
    if wanted.paused:
        await campaigns.set_paused(connection, wanted.id, True, now)
