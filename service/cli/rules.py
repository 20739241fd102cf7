"""What ``voucherd campaign`` and ``voucherd product`` have in common: both are rules by which vouchers are issued, each
from a pool, to whom it is assigned, under caps, until it is paused or over."""

# No postponed annotations here: Typer reads them, and those of ``add_commands`` name what is local to it.

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli import options
from service.cli.connections import connected, put_in_force
from service.cli.console import instant, say
from service.errors import Conflict
from service.store import campaigns, control, stock
from service.store.campaigns import Noun
from service.worker import forms
from service.worker.publish import deciding_second

T = TypeVar("T")

# Expiry of codes that bring none, in a pool that was made along with its campaign or product.
POOL_LIFE: Final = timedelta(days=365)

CAP_HELP: Final = "At most so many vouchers: total=5000, day=100, hour=10; repeat it for several."


def add_commands(app: typer.Typer, noun: Noun, id_name: str) -> None:
    """``app`` has the commands that change who issues by a rule of this noun, under which caps, and whether it goes on.

    Each is about such a rule alone: one of the other noun is a NotFound that says so.
    """
    by = "by " if noun == "campaign" else ""  # whoever may issue by a campaign may issue a product
    Id = Annotated[str, options.id_of(noun, id_name)]  # noqa: N806 - a type
    IfVersion = Annotated[int | None, options.if_version(noun)]  # noqa: N806

    @app.command(
        "assign", help=f"Let a distributor issue {by}a {noun}, at once. Again: these caps replace those given before."
    )
    def assign(
        id: Id,
        distributor: Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help=f"Who may issue {by}it.")],
        cap: Annotated[
            list[str] | None,
            typer.Option(metavar="PERIOD=N", help=CAP_HELP + " Counted for this distributor.", show_default=False),
        ] = None,
        terminal_cap: Annotated[
            list[str] | None,
            typer.Option(
                metavar="PERIOD=N", help="The same, counted for each terminal of this distributor.", show_default=False
            ),
        ] = None,
        if_version: IfVersion = None,
        data_dir: options.DataDir = None,
    ) -> None:
        caps = [
            *options.typed(forms.caps, cap or (), "distributor"),
            *options.typed(forms.caps, terminal_cap or (), "terminal"),
        ]
        _change(
            data_dir,
            lambda conn, now: campaigns.assign(conn, id, distributor, caps, now, if_version, noun),
            action=f"{noun} assign",
            subject=id,
            detail=f"distributor {distributor}, caps {forms.caps_told(caps)}",
            told=lambda _: say(f"{distributor} may issue {by}{noun} {id}, caps: {forms.caps_told(caps)}"),
        )

    @app.command(
        "unassign",
        help=f"Take a {noun} from a distributor: when this returns, no request begun later gets a voucher of it.",
    )
    def unassign(
        id: Id,
        distributor: Annotated[str, typer.Argument(metavar="DISTRIBUTOR", help=f"Who may not issue {by}it any more.")],
        if_version: IfVersion = None,
        data_dir: options.DataDir = None,
    ) -> None:
        _change(
            data_dir,
            lambda conn, _: campaigns.unassign(conn, id, distributor, if_version, noun),
            action=f"{noun} unassign",
            subject=id,
            detail=f"distributor {distributor}",
            told=lambda _: say(f"{distributor} may not issue {by}{noun} {id} any more; its caps there are gone"),
        )

    @app.command(
        "cap",
        help="Set single caps, at once, and leave all others as they are. "
        "One that had a limit before goes on counting.",
    )
    def cap(
        id: Id,
        caps: Annotated[
            list[str],
            typer.Argument(
                metavar="[DISTRIBUTOR] [HOLDER:]PERIOD=N...",
                help=f"Whose assignment it is about, the {noun}'s own caps without; then caps as `{noun} create` takes "
                "them, day=100 or terminal:total=1 say; day=none takes one away.",
            ),
        ],
        if_version: IfVersion = None,
        data_dir: options.DataDir = None,
    ) -> None:
        distributor = "" if "=" in caps[0] else caps.pop(0)
        if not caps:
            raise typer.BadParameter("say a cap: day=100, total=5000, or day=none to take it away")
        changes = options.typed(forms.cap_changes, caps, "distributor" if distributor else "campaign")
        whose = f"{distributor} in {noun} {id}" if distributor else f"{noun} {id}"
        _change(
            data_dir,
            lambda conn, now: campaigns.set_caps(conn, id, distributor, changes, now, if_version, noun),
            action=f"{noun} cap",
            subject=id,
            detail=(f"distributor {distributor}, " if distributor else "") + " ".join(caps),
            told=lambda left: say(f"caps of {whose}: {forms.caps_told(left)}"),
        )

    def set_paused(id: str, paused: bool, if_version: int | None, data_dir: Path | None) -> None:
        _change(
            data_dir,
            lambda conn, now: campaigns.set_paused(conn, id, paused, now, if_version, noun),
            action=f"{noun} {'pause' if paused else 'resume'}",
            subject=id,
            told=lambda _: say(f"{noun} {id} {'is paused' if paused else 'goes on'}"),
        )

    @app.command("pause", help=f"Stop a {noun}: when this returns, no request begun later gets a voucher of it.")
    def pause(id: Id, if_version: IfVersion = None, data_dir: options.DataDir = None) -> None:
        set_paused(id, True, if_version, data_dir)

    @app.command("resume", help=f"Let a paused {noun} go on, at once. One that is over stays over.")
    def resume(id: Id, if_version: IfVersion = None, data_dir: options.DataDir = None) -> None:
        set_paused(id, False, if_version, data_dir)

    @app.command(
        "end",
        help=f"End a {noun} for good: when this returns, no request begun later gets a voucher of it.\n\n"
        f"Nothing brings it back; `{noun} pause` stops one for a while. Vouchers that were issued keep their expiry.",
    )
    def end(id: Id, if_version: IfVersion = None, data_dir: options.DataDir = None) -> None:
        async def run() -> None:
            async with connected(data_dir) as here:
                now = await deciding_second(here.scripts)
                await put_in_force(
                    here,
                    lambda conn: campaigns.end(conn, id, now, if_version, noun),
                    action=f"{noun} end",
                    subject=id,
                    told=lambda since: say(f"{noun} {id} is over since {instant(since)}, for good"),
                )

        asyncio.run(run())


async def make_pool(conn: AsyncConnection, noun: Noun, id: str, now: int) -> None:
    """A pool of the id that the rule is to have is there, for codes that expire in a year unless they say otherwise.

    Raises Conflict if there is one already, or if the id can't name such a rule.
    """
    control.check_id(noun, id)  # which is told of the rule, and not of its pool
    if id in await stock.stock_versions(conn):
        raise Conflict(f"pool {id} exists already: say --pool {id} if the {noun} is to draw from it")
    expires_at = forms.expiry_of(str(datetime.fromtimestamp(now, UTC).date() + POOL_LIFE))
    await control.create_pool(conn, id, default_expires_at=expires_at, least_life_s=0, now=now)


def _change(
    data_dir: Path | None,
    edit: Callable[[AsyncConnection, int], Awaitable[T]],
    *,
    action: str,
    subject: str,
    detail: str = "",
    told: Callable[[T], None],
) -> None:
    """``edit``, which is given the Unix second, is made and put in force."""

    async def run() -> None:
        async with connected(data_dir) as here:
            now = int(time.time())
            await put_in_force(
                here, lambda conn: edit(conn, now), action=action, subject=subject, detail=detail, told=told
            )

    asyncio.run(run())
