"""The report of a load test: one page that needs nothing besides itself, and its figures as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

import msgspec

from loadtest.figures import verdict

VIOLATIONS_MAX: Final = 20  # that are told one by one

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #33404d; background: #fff; margin: 2rem auto; max-width: 66rem;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.about { margin: .2rem 0 1rem; }
.verdict { display: inline-block; padding: .3rem .9rem; border-radius: .3rem; color: #fff; font-weight: 600; }
.met { background: #3d8b57; } .missed { background: #c0392b; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e8ecf0; }
td.number, th.number { text-align: right; } td.bad { color: #c0392b; font-weight: 600; } td.good { color: #3d8b57; }
.side { display: grid; grid-template-columns: 1fr 1fr; gap: 3rem; }
svg { width: 100%; height: auto; } ul.bad { color: #c0392b; }
footer { color: #6b7684; margin: 2rem 0; font-size: .85rem; }
"""


class Judged(msgspec.Struct, frozen=True):
    """One bound of the objective, and what was seen (NaN: nothing was)."""

    what: str
    limit: str
    seen: float
    met: bool

    @property
    def shown(self) -> str:
        return "nothing" if math.isnan(self.seen) else number(self.seen)


class Report(msgspec.Struct, frozen=True):
    """``audited``: None if nobody was asked to, else whether the books balance.  ``kinds``: attempts by what became of
    them, and the milliseconds that half and 99 of 100 of them took.  ``cores``: what each group of processes took, on
    average; ``locust``: the load generator's among them."""

    scenario: str
    about: str
    load: str
    url: str
    machine: str
    began: str
    seconds: float
    sales: int
    vouchers: int
    objective: list[Judged]
    audited: bool | None
    violations: list[str]
    kinds: dict[str, tuple[int, float, float]]
    cores: dict[str, float]

    @property
    def met(self) -> bool:
        return all(one.met for one in self.objective) and not self.violations


def number(value: float) -> str:
    """For people: three digits at least, and no more than are worth reading."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.3g}"


def page(report: Report, picture: str) -> str:
    """The HTML; ``picture``: an SVG."""
    audited = {None: "not made", True: "The books balance.", False: "The books do not balance."}[report.audited]
    rows = [
        (escape(one.what), one.limit, one.shown, verdict(one.met), one.met)
        for one in (*report.objective, *_promises(report))
    ]
    objective = "".join(
        f'<tr><td>{what}</td><td class="number">{limit}</td><td class="number">{seen}</td>'
        f'<td class="{"good" if met else "bad"}">{told}</td></tr>'
        for what, limit, seen, told, met in rows
    )
    kinds = "".join(
        f'<tr><td>{escape(kind)}</td><td class="number">{count:,}</td><td class="number">{_ms(half)}</td>'
        f'<td class="number">{_ms(most)}</td></tr>'
        for kind, (count, half, most) in report.kinds.items()
    )
    cores = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{taken:.2f}</td></tr>' for name, taken in report.cores.items()
    )
    broken = "".join(f"<li>{escape(one)}</li>" for one in report.violations[:VIOLATIONS_MAX])
    more = len(report.violations) - VIOLATIONS_MAX
    told = "objective met" if report.met else "objective MISSED"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(report.scenario)}: {told}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{escape(report.scenario)} <span class="verdict {"met" if report.met else "missed"}">{told}</span></h1>
<p class="about">{escape(report.about[:1].upper() + report.about[1:])}.<br>{escape(report.load)}.
{report.sales:,} sales, {report.vouchers:,} vouchers in {report.seconds:,.0f} s.</p>
{picture}
<h2>Objective</h2>
<table><tr><th>figure</th><th class="number">wanted</th><th class="number">seen</th><th></th></tr>{objective}</table>
{f'<ul class="bad">{broken}{f"<li>and {more:,} more</li>" if more > 0 else ""}</ul>' if broken else ""}
<p>Audit: {audited}</p>
<div class="side"><div><h2>Attempts</h2>
<table><tr><th>what became of them</th><th class="number">attempts</th><th class="number">median, ms</th>
<th class="number">p99, ms</th></tr>{kinds}</table></div>
<div>{f"<h2>Cores taken</h2><table>{cores}</table>" if cores else ""}</div></div>
<footer>{escape(report.began)}, {escape(report.url)}, {escape(report.machine)}</footer>
</body></html>
"""


def _promises(report: Report) -> list[Judged]:
    broken = len(report.violations)
    return [Judged("broken promises: answers against the ledger, and the audit", "0", float(broken), not broken)]


def _ms(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def lines(report: Report) -> Sequence[str]:
    """The verdict for a terminal."""
    told = [
        f"{one.what}: {one.shown}, {one.limit}: {verdict(one.met)}" for one in (*report.objective, *_promises(report))
    ]
    told += report.violations[:VIOLATIONS_MAX]
    if report.audited is not None:
        told.append("The books balance." if report.audited else "The books do not balance.")
    return told
