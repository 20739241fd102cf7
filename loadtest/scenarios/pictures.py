"""The picture of a load test: one SVG, several graphs over the same seconds."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from loadtest.scenarios.outcome import Outcome, issued_kinds, percentile
from loadtest.scenarios.record import Attempt
from loadtest.scenarios.scenario import Scenario

WIDTH: Final = 11.0  # inches
HEIGHT: Final = 2.7  # of one graph
BUCKETS_MAX: Final = 75
BUCKETS_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
KINDS_MAX: Final = 7
INK: Final = "#33404d"
FAINT: Final = "#9aa5b1"
COLOURS: Final = {
    "issued": "#1f5fa8", "replayed": "#63a375", "exhausted": "#e0903a", "rate_limited": "#8e6bbf",
    "timed out": "#b8c4d0", "cut": "#6b7684", "overloaded": "#c0504d", "token_unknown": "#d4b13f",
}  # fmt: skip
OTHER_COLOURS: Final = ("#c0504d", "#a0522d", "#d98aa0", "#7a8f3c", "#4fa3a5", "#555555", "#999933")
PART_COLOURS: Final = ("#1f5fa8", "#e0903a", "#63a375", "#8e6bbf")


class Event(msgspec.Struct, frozen=True):
    """Something that was done at a Unix second."""

    at: float
    what: str


def draw(scenario: Scenario, outcome: Outcome, events: Sequence[Event]) -> str:
    """The SVG as text, to be put into a page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.hashsalt": "voucherd", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.grid": True, "grid.color": "#e8ecf0",
        "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip
    graphs = [_rate, _latency]
    if outcome.facts.stocked:
        graphs.append(_stock)
    if any(not math.isnan(one.outbox) for one in outcome.facts.samples):
        graphs.append(_service)
    width = next((one for one in BUCKETS_S if outcome.window[1] / one <= BUCKETS_MAX), BUCKETS_S[-1])
    with pyplot.rc_context(style):
        figure, rows = pyplot.subplots(
            len(graphs), 1, figsize=(WIDTH, HEIGHT * len(graphs)), sharex=True, squeeze=False
        )  # fmt: skip
        for graph, axes in zip(graphs, (row[0] for row in rows), strict=True):
            graph(axes, scenario, outcome, width)
            axes.set_xlim(0, outcome.window[1])
            for event in events:
                axes.axvline(event.at - outcome.began, color=INK, linestyle=":", linewidth=1)
        for event in events:
            rows[0][0].annotate(
                event.what, (event.at - outcome.began, 0.93), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", va="top", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            )  # fmt: skip
        rows[-1][0].set_xlabel("seconds since the beginning")
        figure.tight_layout(h_pad=1.5)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = written.getvalue()
    return text[text.index("<svg") :]


def _rate(axes: Any, scenario: Scenario, outcome: Outcome, width: float) -> None:
    at, buckets = _buckets(outcome, width)
    kinds = issued_kinds(outcome)
    shown, others = kinds[:KINDS_MAX], kinds[KINDS_MAX:]
    counts = [Counter(one.kind for one in some) for some in buckets]
    series = {kind: [count[kind] / width for count in counts] for kind in shown}
    if others:
        series["others"] = [sum(count[kind] for kind in others) / width for count in counts]
    spare = iter(OTHER_COLOURS)
    colours = [COLOURS.get(kind) or next(spare, FAINT) for kind in series]
    heights = [[*height, height[-1]] for height in series.values()]  # the last step has an end, too
    axes.stackplot([*at, at[-1] + width], *heights, labels=list(series), colors=colours, step="post", linewidth=0)
    begun, offered_at, offered = 0.0, list[float](), list[float]()
    for end, stage in zip(outcome.stages, scenario.stages, strict=True):
        offered_at += [begun, end]
        offered += [scenario.rate(stage.users)] * 2
        begun = end
    axes.plot(offered_at, offered, color=INK, linewidth=1, linestyle="--", label="sales offered")
    axes.set_title("Attempts a second, by what became of them", loc="left", fontweight="bold")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _latency(axes: Any, scenario: Scenario, outcome: Outcome, width: float) -> None:
    several = len(scenario.parts) > 1
    for part, colour in zip(scenario.parts, PART_COLOURS, strict=False):
        at, buckets = _buckets(outcome.of(part.name), width)
        seconds = [[one.seconds for one in some if one.status] for some in buckets]
        percents = ((50, "--"), (99, "-")) if several else ((50, "--"), (95, ":"), (99, "-"))
        for percent, line in percents:
            ms = [percentile(some, percent) * 1e3 for some in seconds]
            label = f"{part.name}, {percent} %" if several else f"{percent} %"
            axes.plot([one + width / 2 for one in at], ms, color=colour, linestyle=line, linewidth=1.3, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Milliseconds until an answer, of so many percent", loc="left", fontweight="bold")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _stock(axes: Any, scenario: Scenario, outcome: Outcome, width: float) -> None:
    at, buckets = _buckets(outcome, width, ended=True)
    stocked, told = sum((outcome.facts.stocked or {}).values()), set[str]()
    left = [stocked]
    for some in buckets:
        told |= {code for one in some for code in one.codes}
        left.append(stocked - len(told))
    axes.fill_between([*at, at[-1] + width], left, color="#1f5fa8", alpha=0.15, linewidth=0)
    axes.plot([*at, at[-1] + width], left, color="#1f5fa8", label="by what users were told")
    seen = [(one.at - outcome.began, one.left) for one in outcome.facts.samples if not math.isnan(one.left)]
    if seen:
        axes.plot(*zip(*seen, strict=True), color="#e0903a", linestyle="", marker=".", label="by the metrics")
    axes.set_ylim(bottom=0)
    axes.set_title("Codes left", loc="left", fontweight="bold")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _service(axes: Any, scenario: Scenario, outcome: Outcome, width: float) -> None:
    samples = outcome.facts.samples
    at = [one.at - outcome.began for one in samples]
    axes.plot(at, [one.outbox for one in samples], color="#63a375", label="codes in the outbox")
    axes.set_ylim(0, 1.1 * max(10.0, *(one.outbox for one in samples)))
    memory = axes.twinx()
    memory.plot(at, [one.serve_mb for one in samples], color="#8e6bbf", label="MB of the largest\nserving process")
    memory.set_ylim(0, 1.1 * max(10.0, *(one.serve_mb for one in samples)))
    memory.grid(visible=False)
    memory.spines["right"].set_visible(True)
    lines = [*axes.get_lines(), *memory.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], loc="center left", bbox_to_anchor=(1.05, 0.5))
    axes.set_title("What waits for the ledger (left), memory (right)", loc="left", fontweight="bold")


def _buckets(outcome: Outcome, width: float, *, ended: bool = False) -> tuple[list[float], list[list[Attempt]]]:
    """Where each stretch of so many seconds begins, and the attempts that were begun (or ended) in it."""
    count = max(1, math.ceil(outcome.window[1] / width))
    buckets: list[list[Attempt]] = [[] for _ in range(count)]
    for one in outcome.attempts:
        place = int(((one.ended if ended else one.began) - outcome.began) / width)
        buckets[min(count - 1, max(0, place))].append(one)
    return [number * width for number in range(count)], buckets
