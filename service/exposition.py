"""What Prometheus reads: the instruments of all processes that write to one directory, added up.

prometheus_client's own collector builds an object for each sample of each process at each scrape, 0.3 s of CPU for
10,000 series of two processes; here the text of a series is made once and kept.

Each process has a file for each kind of instrument.  Those of a process that ended are folded into one that all ended
ones share, so a process that fails again and again does not fill the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.utils import floatToGoString

from service.metrics import NAMED, Build, Supervision, bounded

log = structlog.get_logger(__name__)

# How the values that processes have of one gauge become one, by the multiprocess mode that it was declared with;
# in the mode `liveall` each stays, under its process id.
_JOINED: Final[dict[str, Callable[[float, float], float]]] = {
    "livesum": lambda one, other: one + other,
    "livemin": min,
    "livemax": max,
    "max": max,
}

ENDED: Final = "ended"  # where a file's name has the process, of those that ended


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
        with _held(self._directory, fcntl.LOCK_SH):
            files = [(file, _values(file)) for file in sorted(self._directory.glob("*.db"))]
        for file, values in files:
            kind, mode, pid = _named(file)
            for key, value in values:
                series = self._parsed.get(key)
                if series is None:
                    series = self._parsed[key] = _parse(key)
                family = families.get(series.family)
                if family is None:
                    family = families[series.family] = _Family(kind, mode, series.meaning)
                family.add(series, value, pid)
        lines = [line for name in sorted(families) for line in families[name].lines(name)]
        return "".join(lines).encode() + generate_latest(self._own)


def of_this_process() -> bytes:
    """What this process alone counted."""
    own = CollectorRegistry()
    own.register(Build())
    return generate_latest(REGISTRY) + generate_latest(own)


def forget(directory: Path, process: int) -> None:
    """What a dead process had open (its ``live`` gauges) no longer counts; what it counted does, in no file of its own.

    A scrape sees it either in the one file or in the other.  What can't be folded stays as it is, and the log says so:
    nothing ends for the sake of its metrics.
    """
    try:
        with _held(directory, fcntl.LOCK_EX):
            mark_process_dead(process, path=str(directory))  # type: ignore[no-untyped-call]
            for file in sorted(directory.glob(f"*_{process}.db")):
                _fold(file)
    except (OSError, RuntimeError, struct.error) as fault:  # no room, or what a process that was killed left half done
        log.warning("metrics of a process that ended were not folded", process=process, fault=repr(fault))


def forget_ended(directory: Path) -> None:
    """As ``forget``, for each process of this directory that there is no more on this machine, whoever started it."""
    for process in {pid for file in directory.glob("*.db") if (pid := _named(file)[2]) != ENDED}:
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            forget(directory, int(process))
        except PermissionError:  # it is another user's, and lives
            continue


def _fold(file: Path) -> None:
    """The values of this file are in that of the ended, and it is gone.  Only what is killed between the last two lines
    leaves them in both."""
    kind, mode, _ = _named(file)
    ended = file.with_name("_".join([kind, *([mode] if mode else []), f"{ENDED}.db"]))
    new = ended.with_suffix(".new")
    new.unlink(missing_ok=True)
    if ended.exists():
        shutil.copyfile(ended, new)
    sums = MmapedDict(str(new))  # type: ignore[no-untyped-call]
    known = {key for key, _, _ in sums.read_all_values()}  # type: ignore[no-untyped-call]
    names = _Names(known)
    for own_key, value in _values(file):
        key = names.bounded(own_key)
        before = sums.read_value(key)[0] if key in known else None  # type: ignore[no-untyped-call]
        joined = value if before is None else _join(mode, before, value)
        sums.write_value(key, joined, 0.0)  # type: ignore[no-untyped-call]
        known.add(key)
    sums.close()  # type: ignore[no-untyped-call]
    new.replace(ended)
    file.unlink()


class _Names:
    """The names that all ended processes have series of, NAMES_MAX of each kind as in a process that lives."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._known: dict[str, set[str]] = {label: set() for label in NAMED}
        for key in keys:
            self.bounded(key)

    def bounded(self, key: str) -> str:
        """The key with OTHERS in the place of a name beyond the bound."""
        family, sample, labels, meaning = _KEY.decode(key)
        for label in self._known.keys() & labels.keys():
            labels[label] = bounded(self._known[label], labels[label])
        return str(mmap_key(family, sample, list(labels), list(labels.values()), meaning))


@contextlib.contextmanager
def _held(directory: Path, how: int) -> Iterator[None]:
    """The directory's own lock: what is folded is out of one file and not yet in the other for a moment."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(opened, how)
        yield
    finally:
        os.close(opened)


def _named(file: Path) -> tuple[str, str, str]:
    """The kind of instrument, how a gauge's values become one ('' if it is none), and the process."""
    kind, *mode, process = file.stem.split("_")
    return kind, mode[0] if mode else "", process


def _values(file: Path) -> list[tuple[str, float]]:
    """By key as in the file; nothing of one that was just made or has just gone."""
    try:
        if not file.stat().st_size:
            return []
        values = MmapedDict.read_all_values_from_file(str(file))  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        return []
    return [(key, value) for key, value, _, _ in values]


def _join(mode: str, one: float, other: float) -> float:
    """What two processes say of one series; ``mode`` is '' where both are counted."""
    return _JOINED[mode](one, other) if mode else one + other


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
            self._values[key] = _join(self._mode, before, value)

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


_KEY: Final = msgspec.json.Decoder(tuple[str, str, dict[str, str], str])


def _parse(key: str) -> _Series:
    family, sample, labels, meaning = _KEY.decode(key)
    bound = labels.pop("le", None)
    le = None if bound is None else math.inf if bound == "+Inf" else float(bound)
    text = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items()))
    return _Series(family, sample, text, le, meaning)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _text(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
