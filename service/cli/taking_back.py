"""``voucherd pool take-back``: what an ended campaign left in windows is stock again."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, print_facts, print_json, say
from service.worker import taking_back
from service.worker.generating import Fill
from service.worker.refill import Refill
from service.worker.taking_back import Plan, TakenBack


def take_back(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Whose codes they are.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit log.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it only what would be done is shown.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Bring the codes that are left in a pool's windows back to stock, each at a new position of its lot.

    For a campaign that is over: `codes count` and `pool show` have its unissued
    codes in stock afterwards, for another campaign or for `pool withdraw`.
    Refused while a campaign can issue from the pool. `voucherd work` has to run:
    it puts back what left the windows. Repeating the command changes nothing.
    Exit status 1 if something is not back yet: then repeat it.
    """
    if not reason.strip() or not reason.isprintable():
        raise typer.BadParameter("--reason needs some printable text")

    async def run() -> Plan | TakenBack:
        async with connected(data_dir) as here:
            if not yes:
                return await taking_back.plan(here.database, here.scripts, pool, lambda: int(time.time()))
            refill = Refill(
                here.database, here.scripts,
                low_water=here.settings.low_water, store_outage_s=here.settings.store_outage_s,
                fill=Fill(here.database, here.scripts),  # without it a generated pool might be called exhausted
            )  # fmt: skip
            return await taking_back.take_back(
                here.database, here.scripts, refill, pool,
                reason=reason, actor=here.actor, outbox_max=here.settings.outbox_max,
            )  # fmt: skip

    done = asyncio.run(run())
    if isinstance(done, Plan):
        _show(done, as_json)
        return
    fields = {"returned_to_stock": done.returned, "on_the_way_to_stock": done.on_the_way}
    if as_json:
        print_json({"pool": pool, **fields, "unfinished": done.unfinished})
    else:
        print_facts({name.replace("_", " "): value for name, value in fields.items()})
    if done.on_the_way:
        complain(f"{done.on_the_way} codes are not in stock yet: see that `voucherd work` runs, it puts them back")
    if done.unfinished:
        complain(
            "codes may still be in a window: Redis is being recovered, the outbox is full, or the catalogue was "
            "changed meanwhile; repeat the command"
        )
    if done.on_the_way or done.unfinished:
        raise typer.Exit(1)


def _show(planned: Plan, as_json: bool) -> None:
    if as_json:
        windows = planned.windows if planned.reached else None
        print_json({"pool": planned.pool, "in_windows": windows, "can_issue": planned.campaigns, "done": False})
    else:
        print_facts({
            "in windows": planned.windows if planned.reached else "not known, Redis is being recovered",
            "can issue from it": ", ".join(planned.campaigns) or "no campaign",
        })  # fmt: skip
    taking_back.refuse_live(planned)
    if not as_json:
        say("Nothing was changed. To bring these codes back to stock say --yes.")
