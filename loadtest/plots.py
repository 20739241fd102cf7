"""Pictures of a benchmark: SVG files that the documents show."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from loadtest.load import P99_MS_MAX, Level

WIDTH, HEIGHT = 8.0, 4.5  # inches
OWN, OTHERS = "#1f5fa8", "#9aa5b1"


def missing() -> str:
    """Why no picture can be drawn here; '' if it can."""
    return "" if find_spec("matplotlib") else "matplotlib is not installed, no pictures: `make compare-install`"


def draw(folder: Path, totals: Mapping[str, Mapping[str, float]], levels: Sequence[Level]) -> list[Path]:
    """``totals``: CPU microseconds a voucher, by what was measured and group of processes.  Returns what it wrote."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "voucherd", "font.size": 10, "axes.spines.top": False,
                                "axes.spines.right": False})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _cpu(folder / "cpu.svg", totals),
        _latency(folder / "latency.svg", levels),
        _rate(folder / "rate.svg", levels),
        _cores(folder / "cores.svg", levels),
    ]


def _cpu(path: Path, totals: Mapping[str, Mapping[str, float]]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
    names = list(totals)[::-1]
    serve = [totals[name].get("serve", 0.0) for name in names]
    valkey = [totals[name].get("Valkey", 0.0) for name in names]
    axes.barh(names, serve, color=OWN, label="serving process")
    axes.barh(names, valkey, left=serve, color="#e0903a", label="Valkey")
    for place, total in enumerate(map(sum, zip(serve, valkey, strict=True))):
        axes.text(total, place, f" {total:.0f}", va="center")
    axes.set_xlabel("CPU per voucher, microseconds (lower is better)")
    axes.legend(frameon=False, loc="upper right")  # what takes most is at the bottom
    return _saved(figure, path)


def _latency(path: Path, levels: Sequence[Level]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
    shares = [100 * level.share for level in levels]
    for name, told, colour in (
        ("p999_ms", "99.9 %", "#b8c4d0"),
        ("p99_ms", "99 %", OWN),
        ("p50_ms", "50 %", "#63a375"),
    ):
        axes.plot(shares, [getattr(level, name) for level in levels], marker="o", color=colour, label=told)
    axes.axhline(P99_MS_MAX, color=OTHERS, linestyle=":")
    axes.axvline(100, color=OTHERS, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("load, % of the rate at which the service is saturated")
    axes.set_ylabel("milliseconds from when a request was due")
    axes.set_title("Latency of issued vouchers", loc="left")
    axes.legend(frameon=False, title="of answers within")
    return _saved(figure, path)


def _rate(path: Path, levels: Sequence[Level]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
    offered = [level.offered for level in levels]
    axes.plot(offered, [level.issued for level in levels], marker="o", color=OWN, label="issued")
    axes.plot(offered, [level.refused for level in levels], marker="o", color="#c0504d", label="refused with 503")
    axes.plot(offered, offered, color=OTHERS, linestyle=":", label="offered")
    axes.set_xlabel("requests offered a second")
    axes.set_ylabel("answers a second")
    axes.legend(frameon=False)
    return _saved(figure, path)


def _cores(path: Path, levels: Sequence[Level]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
    shares = [100 * level.share for level in levels]
    groups = [
        ("serve", "serving process", OWN),
        ("Valkey", "Valkey", "#e0903a"),
        ("work", "worker", "#63a375"),
        ("load", "load generator", "#d5dbe1"),
    ]
    axes.stackplot(
        shares,
        [[level.cores[name] for level in levels] for name, _, _ in groups],
        labels=[told for _, told, _ in groups],
        colors=[colour for _, _, colour in groups],
    )
    there = os.cpu_count() or 1
    axes.axhline(there, color=OTHERS, linestyle=":")
    axes.set_ylim(0, 1.3 * there)  # room for the legend
    axes.axvline(100, color=OTHERS, linestyle=":")
    axes.set_xlabel("load, % of the rate at which the service is saturated")
    axes.set_ylabel("cores")
    axes.set_title("CPU of everything that takes part; dotted: what there is", loc="left")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left", ncols=2)
    return _saved(figure, path)


def _saved(figure, path: Path) -> Path:  # type: ignore[no-untyped-def]
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
