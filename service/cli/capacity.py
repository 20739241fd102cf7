"""``voucherd capacity``: what a load needs of memory, cores, connections and disks."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from service.cli import options
from service.cli.console import complain, print_json, print_table, say
from service.settings import Settings
from service.worker import forms
from service.worker.capacity import BUSY, NOOP_US, Figure, Load, Server, carried, factors, plan

_DEFAULT: Final = Settings()
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def capacity(
    rate: Annotated[int, typer.Option(min=1, max=1_000_000, help="Vouchers a second at the peak.")],
    mean: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Vouchers a second over a day; what is kept depends on it.", show_default="the peak"
        ),
    ] = None,
    retention: Annotated[
        str, typer.Option(metavar="TIME", help="How long a repeated request gets its first answer: 24h, 7d.")
    ] = forms.duration_told(_DEFAULT.replay_retention_s),
    outage: Annotated[
        str, typer.Option(metavar="TIME", help="How long issuing goes on without the store: 60s, 15m.")
    ] = forms.duration_told(_DEFAULT.store_outage_s),
    server: Annotated[Server, typer.Option(help="What serves as Redis.")] = "valkey",
    works: Annotated[int, typer.Option(min=1, max=64, help="Processes of `voucherd work`.")] = 2,
    noop: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=1_000.0,
            metavar="US",
            help="What `make bench` says that an answer of the no-op application takes on your machines.",
        ),
    ] = NOOP_US,
    as_json: options.AsJson = False,
) -> None:
    """Say what a load needs: memory of Redis, cores, connections and rows of PostgreSQL, disks, time of a restart.

    Reads nothing and changes nothing. It multiplies what was measured of one voucher, and says how: where each factor
    is from is in the JSON and in docs/runbook.md. Peaks that are planned for go into VOUCHERD_PLANNED_RATE,
    VOUCHERD_REPLAY_RETENTION_S and VOUCHERD_STORE_OUTAGE_S. A peak above what one Redis carries is said on standard
    error.
    """  # fmt: skip
    if mean is not None and mean > rate:
        raise typer.BadParameter("the mean of a day is not above its peak", param_hint="--mean")
    load = Load(
        rate, float(rate if mean is None else mean), options.typed(forms.seconds, retention),
        options.typed(forms.seconds, outage), server, works, noop,
    )  # fmt: skip
    found = plan(load)
    if rate > (most := carried(load)):
        complain(
            f"{rate:,} vouchers a second are more than one Redis carries here ({most:,}, {BUSY:.0%} busy), and there "
            "is one partition: an installation of its own for some distributors takes the rest"
        )
    if as_json:
        print_json({"load": load, "figures": found, "factors": factors()})
        return
    for group in dict.fromkeys(one.group for one in found):
        print_table(
            ["what", "how much", "how"],
            [(one.name, shown(one), one.how) for one in found if one.group == group],
            title=group, numbers=["how much"],
        )  # fmt: skip
    say("Factors and where they were measured: --json, and docs/runbook.md, Capacity.")


def shown(figure: Figure) -> str:
    """A figure for people: three digits, in a unit that fits."""
    value, unit = figure.value, figure.unit
    if unit == "bytes":
        power = 0
        while value >= 999.5 and power < len(_UNITS) - 1:
            value, power = value / 1_000, power + 1
        unit = _UNITS[power]
    if unit == "seconds":
        unit = "s"
    text = f"{value:,.0f}" if value >= 99.5 or value == int(value) else f"{value:.3g}"
    return f"{text} {unit}"
