"""What Prometheus reads: the instruments of all processes that write to one directory, added up.

prometheus_client's own collector builds an object for each sample of each process at each scrape, 0.3 s of CPU for
10,000 series of two processes; here the text of a series is made once and kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.utils import floatToGoString

from service.metrics import Build, Supervision

# How the values that processes have of one gauge become one, by the multiprocess mode that it was declared with;
# in the mode `liveall` each stays, under its process id.
_JOINED: Final[dict[str, Callable[[float, float], float]]] = {
    "livesum": lambda one, other: one + other,
    "livemin": min,
    "livemax": max,
    "max": max,
}


class _Series(NamedTuple):
    """One series of one process: the ``family`` that it is of, and its text up to the value.  ``labels`` are without
    braces, and without ``le``, the bound of a histogram's bucket (None: it is none)."""

    family: str
    sample: str
    labels: str
    le: float | None
    meaning: str


class Exposition:
    """The metrics of the processes that write to ``directory``, and of the parent that supervises them."""

    def __init__(self, directory: Path, supervision: Supervision) -> None:
        self._directory = directory
        self._own = CollectorRegistry()
        self._own.register(supervision)
        self._own.register(Build())
        self._parsed: dict[str, _Series] = {}  # of keys as they are in the files

    def text(self) -> bytes:
        """Everything summed over the processes, those too that have ended, then the parent's own."""
        families: dict[str, _Family] = {}
        for file in sorted(self._directory.glob("*.db")):
            try:
                entries = list(MmapedDict.read_all_values_from_file(str(file)))  # type: ignore[no-untyped-call]
            except FileNotFoundError:  # its process has ended just now
                continue
            kind, *mode, pid = file.stem.split("_")
            for key, value, _, _ in entries:
                series = self._parsed.get(key)
                if series is None:
                    series = self._parsed[key] = _parse(key)
                family = families.get(series.family)
                if family is None:
                    family = families[series.family] = _Family(kind, mode[0] if mode else "", series.meaning)
                family.add(series, value, pid)
        lines = [line for name in sorted(families) for line in families[name].lines(name)]
        return "".join(lines).encode() + generate_latest(self._own)


def of_this_process() -> bytes:
    """What this process alone counted."""
    own = CollectorRegistry()
    own.register(Build())
    return generate_latest(REGISTRY) + generate_latest(own)


class _Family:
    """The series of one instrument, joined over the processes."""

    def __init__(self, kind: str, mode: str, meaning: str) -> None:
        self._kind = kind
        self._mode = mode
        self._meaning = meaning
        self._values: dict[tuple[str, str], float] = {}
        self._buckets: dict[str, dict[float, float]] = {}  # by labels: how many in each, by its bound

    def add(self, series: _Series, value: float, pid: str) -> None:
        if series.le is not None:
            buckets = self._buckets.setdefault(series.labels, {})
            buckets[series.le] = buckets.get(series.le, 0.0) + value
            return
        labels = series.labels
        if self._mode == "liveall":
            labels = f'{labels},pid="{pid}"' if labels else f'pid="{pid}"'
        key = (series.sample, labels)
        before = self._values.get(key)
        if before is None:
            self._values[key] = value
        else:
            self._values[key] = _JOINED[self._mode](before, value) if self._mode else before + value

    def lines(self, name: str) -> Iterable[str]:
        shown = f"{name}_total" if self._kind == "counter" else name
        meaning = self._meaning.replace("\\", "\\\\").replace("\n", "\\n")
        yield f"# HELP {shown} {meaning}\n# TYPE {shown} {self._kind}\n"
        for (sample, labels), value in self._values.items():
            braces = f"{{{labels}}}" if labels else ""
            yield f"{sample}{braces} {_text(value)}\n"
        for labels, buckets in self._buckets.items():
            before, total = f"{labels}," if labels else "", 0.0
            for bound in sorted(buckets):
                total += buckets[bound]
                yield f'{name}_bucket{{{before}le="{_text(bound)}"}} {_text(total)}\n'
            braces = f"{{{labels}}}" if labels else ""
            yield f"{name}_count{braces} {_text(total)}\n"


def _parse(key: str) -> _Series:
    family, sample, labels, meaning = json.loads(key)
    bound = labels.pop("le", None)
    le = None if bound is None else math.inf if bound == "+Inf" else float(bound)
    text = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items()))
    return _Series(family, sample, text, le, meaning)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _text(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
