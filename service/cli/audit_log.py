"""``voucherd audit-log``: who changed what."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from service import zones
from service.cli import options
from service.cli.connections import connected
from service.cli.console import instant, print_json, print_table
from service.errors import RedisUnreachable
from service.store.audit_log import Change, newest_first
from service.worker import forms


def audit_log(
    since: Annotated[
        str | None, typer.Option(metavar="T", help="A day (its start in UTC) or a time.", show_default="all")
    ] = None,
    actor: Annotated[
        str | None, typer.Option(metavar="USER", help="Who did it, by user or by VOUCHERD_ACTOR.", show_default=False)
    ] = None,
    action: Annotated[
        str | None, typer.Option(metavar="WHAT", help='What was done: "campaign pause".', show_default=False)
    ] = None,
    subject: Annotated[str | None, typer.Option(metavar="ID", help="On what.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Show at most so many, the latest ones.")] = 20,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Show who changed what: each change of the control plane and of stock, the latest first.

    A change that a rule refused is listed too. `voucherd work` writes the same into its log, a line each.
    """
    from_second = 0 if since is None else options.typed(forms.start_of, since, zones.zone("UTC"))

    async def run() -> tuple[list[Change], int | None]:
        async with connected(data_dir) as here:
            async with here.database.read() as conn:
                found = await newest_first(
                    conn, since=from_second, actor=actor, action=action, subject=subject, limit=limit
                )
            try:
                return found, (await here.scripts.generation()).fence
            except RedisUnreachable:
                return found, None

    found, fence = asyncio.run(run())
    if as_json:
        print_json([_fields(one, fence) for one in found])
        return
    print_table(
        ["made at", "by", "what", "on", "catalogue", "outcome", "detail"],
        [
            (instant(one.at), one.actor, one.action, one.subject, one.version, one.outcome(fence), one.detail)
            for one in found
        ],
        numbers=["catalogue"],
        whole=["made at"],
    )


def _fields(one: Change, fence: int | None) -> dict[str, object]:
    return {
        "entry": one.id,
        "made_at": instant(one.at),
        "actor": one.actor,
        "action": one.action,
        "subject": one.subject,
        "detail": one.detail,
        "catalogue": one.version,
        "outcome": one.outcome(fence),
    }
