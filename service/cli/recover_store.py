"""``voucherd recover-store``: a store that came back older knows again what Redis does."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Annotated, Final

import typer

from service import keyring
from service.cli import options
from service.cli.connections import connected
from service.cli.console import complain, instant, print_facts, print_json, print_table, progress_bar, say, shown
from service.identity import NO_KEYS
from service.store.recreation import Moved
from service.store.reinstatement import Difference
from service.worker import repair as repairing
from service.worker.flush import Flush
from service.worker.recover import Recover
from service.worker.repair import Repair

# It reads the whole ledger once, and counts it under caps.
STATEMENT_S: Final = 3_600.0

# What the store may have lost and Redis does not have.
NOT_IN_REDIS: Final = (
    "codes that were imported and not leased: import their files again, what is known is passed over",
    "codes that were withdrawn from stock: withdraw them again",
    "default expiries and patterns of pools, names of distributors, states of vouchers that were changed",
    "vouchers older than the replay retention: their codes are in quarantine",
)


def recover_store(
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this nothing is changed.")] = False,
    as_json: options.AsJson = False,
    data_dir: options.DataDir = None,
) -> None:
    """Repair a store that is older than it was (a restored backup, a promoted standby) by what Redis knows.

    Shows what it would do, and does it with --yes: vouchers that only Redis knows come back into the ledger, what
    may have left stock leaves it, the control plane is again what is in force, and a new generation begins. Nothing
    that was revoked comes back. Killed in the middle, it is done again and ends the same.
    """

    async def run() -> Repair:
        async with connected(data_dir, statement_s=STATEMENT_S) as here:
            with progress_bar("replay records looked at") as told:
                if not yes:
                    return await repairing.rehearse(here.database, here.scripts, told=told)
                secrets = keyring.named(here.settings.secrets_file)
                ids = NO_KEYS if secrets is None else secrets.ids
                retention_s = here.settings.replay_retention_s
                flush = Flush(
                    here.database, here.scripts, consumer=f"{socket.gethostname()}-{os.getpid()}",
                    retention_s=retention_s, ids=ids,
                )  # fmt: skip
                recover = Recover(
                    here.database, here.scripts, flush, outbox_max=here.settings.outbox_max, retention_s=retention_s
                )
                return await repairing.repair(
                    here.database, here.scripts, flush, recover, ids=ids, actor=here.actor, told=told
                )

    done = asyncio.run(run())
    if as_json:
        print_json({"older": bool(done.older), "done": bool(done.rolled_to), **_fields(done)})
    elif not done.older:
        say("The store knows all that Redis does: nothing is to be done.")
    else:
        _show(done)
    if done.older and done.in_force is None:
        complain("Redis has no catalogue: tokens revoked and campaigns paused since are in force again, look at them")


def _fields(done: Repair) -> dict[str, object]:
    if not done.older:
        return {}
    return {
        "why": done.older, "store_knows_until": instant(done.knows_until), "generation_left": done.generation,
        "generation_opened": done.rolled_to or None, "catalogue_in_force": done.in_force,
        "catalogue_published": done.published if done.rolled_to else None, "vouchers_recreated": done.vouchers,
        "unreadable_records": done.unreadable, "stock": done.moved, "control_plane": done.differences,
        "tokens_revoked": [one.id for one in _revoked(done)], "not_in_redis": list(NOT_IN_REDIS),
    }  # fmt: skip


def _show(done: Repair) -> None:
    say(f"{done.older[0].upper()}{done.older[1:]}.")
    print_facts({
        "the store knows until": instant(done.knows_until),
        "vouchers only in Redis": done.vouchers,
        "records nobody can read": done.unreadable,
        "generation to leave": done.generation,
        "catalogue in Redis": done.in_force,
        "tokens revoked since": len(_revoked(done)),
    })  # fmt: skip
    if done.moved:
        print_table(
            ["pool", "lot", "from", "to", "codes", "unknown"],
            [_row(one) for one in done.moved],
            title="Leaves stock, because it may have been issued",
            numbers=["lot", "from", "to", "codes", "unknown"],
        )
    if done.differences:
        print_table(
            ["what", "which", "field", "the store says", "in force"],
            [(one.kind, one.id, one.field, _told(one.was), _told(one.now)) for one in done.differences],
            title="The control plane",
        )
    say(f"Redis does not have, and nobody can bring back, what happened after {instant(done.knows_until)} to")
    for one in NOT_IN_REDIS:
        say(f"  {one}")
    if done.rolled_to:
        say(f"Done: generation {done.rolled_to} is open, catalogue {done.published} is published.")
    else:
        say("Nothing was changed; `voucherd recover-store --yes` does it.")


def _row(one: Moved) -> tuple[object, ...]:
    return one.pool, str(one.lot), one.seq_from, one.seq_to, one.codes, one.unknown


def _revoked(done: Repair) -> list[Difference]:
    return [one for one in done.differences if one.kind == "token" and one.now == "revoked"]


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else shown(value)
