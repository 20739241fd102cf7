"""``voucherd apply``: pools, distributors, campaigns, their caps and assignments as one file says."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import print_json, say, shown
from service.worker import applying
from service.worker.declaration import FILE_BYTES_MAX, declaration
from service.worker.plan import Plan, Step

# Of what a plan leaves alone, so many are named: a file for one campaign must not list a thousand others.
NAMED_MAX: Final = 10

# Most fields are shorter, and the values of an 80-column terminal stand below each other then.
FIELD_COLUMNS: Final = 24


def apply(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML or JSON; - reads it from standard input.", dir_okay=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; only at a terminal anybody is asked.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Make pools, distributors and campaigns as a file says: the plan is shown, then all is put in force at once.

    Applied again, it changes nothing. What the file does not name stays as it is, and is listed. If somebody else
    changes the same between the plan and its execution, nothing is applied.

    pools: id, expires, least_life, pattern, expires_after. distributors: id, name, active, rate, burst. campaigns: id,
    category, products, pool, priority, from, until, time_zone, paused, caps, assigned. Each of assigned: distributor,
    caps. Values are written as the options of `pool create` and `campaign create` are, caps as {total: 5000, terminal:
    {day: 1}}; null takes a cap, a rate, an end or an expiry away.
    """
    name = "standard input" if str(file) == "-" else file.name
    wanted = declaration(_read(file), name)

    async def run() -> None:
        async with connected(data_dir) as here:
            planned_at = int(time.time())
            plan = await applying.rehearse(here.database, wanted, planned_at)
            if not as_json:
                _show(plan)
            if dry_run or not plan.to_do:
                _end(plan, as_json, applied=False)
                return
            if not (yes or as_json) and _is_terminal():
                typer.confirm("Apply this?", abort=True, err=True)
            now = int(time.time())
            await put_in_force(
                here,
                lambda conn: applying.apply(conn, wanted, plan, planned_at, now),
                action="apply",
                subject=name,
                detail="; ".join(map(_line, plan.to_do)),
                told=lambda _: _end(plan, as_json, applied=True),
            )

    asyncio.run(run())


def _read(file: Path) -> bytes:
    """What is in it; one byte more than may be is enough."""
    if str(file) == "-":  # left open, for an answer; None if it was closed
        return sys.stdin.buffer.read(FILE_BYTES_MAX + 1) if sys.stdin is not None else b""
    with file.open("rb") as source:
        return source.read(FILE_BYTES_MAX + 1)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _show(plan: Plan) -> None:
    for step in plan.to_do:
        say(f"{step.action} {step.kind} {step.after.id}")
        for field, was, to_be in step.changes:
            change = _told(to_be) if step.action == "create" else f"{_told(was)} -> {_told(to_be)}"
            say(f"  {field:<{FIELD_COLUMNS}}  {change}")
    if kept := [f"{step.kind} {step.after.id}" for step in plan.steps if step.action == "keep"]:
        say(f"As the file says already: {_some(kept)}.")
    left = [f"{step.kind} {step.after.id}: {_some(step.left)}" for step in plan.steps if step.left]
    left += [f"{kind}: {_some(ids)}" for kind, ids in plan.left.items() if ids]
    for one in left:
        say(f"Not in the file and left alone: {one}.")


def _end(plan: Plan, as_json: bool, *, applied: bool) -> None:
    many = len(plan.to_do)
    if as_json:
        print_json({"applied": applied, "steps": [_fields(step) for step in plan.steps], "left_alone": plan.left})
    elif not many:
        say("Nothing is to be done: all is as the file says.")
    else:
        entries = f"{many} {'entry' if many == 1 else 'entries'}"
        say(f"{entries} applied, in one publication." if applied else f"{entries} to apply; nothing was changed.")


def _fields(step: Step) -> dict[str, object]:
    return {
        "action": step.action,
        "kind": step.kind,
        "id": step.after.id,
        "path": step.path,
        "changes": [{"field": field, "from": was, "to": to_be} for field, was, to_be in step.changes],
        "left_alone": step.left,
    }


def _line(step: Step) -> str:
    """A step for the audit log."""
    changes = ", ".join(f"{field} {_told(was)} -> {_told(to_be)}" for field, was, to_be in step.changes)
    return f"{step.action} {step.kind} {step.after.id}: {changes}"


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else shown(value)


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more
