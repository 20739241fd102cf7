"""Settlement: for one day a file per distributor, and a manifest by which a partner checks that it has them whole."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import select

from service.domain import instant
from service.errors import Conflict, NotFound
from service.store import ledger
from service.store.database import Database
from service.store.ledger import Found, Wanted
from service.store.schema import distributors
from service.worker.export import Format, head, lines, part_of, sync_folder, whole_file

# What a manifest of ours can have; a file that is larger is something else.
MANIFEST_BYTES_MAX: Final = 100_000_000


class SettlementFile(msgspec.Struct, frozen=True):
    """One file of the manifest.  ``since`` and ``until`` as RFC 3339, ``until`` exclusive; ``sha256`` in hex."""

    file: str
    distributor_id: str
    distributor_name: str
    since: str
    until: str
    vouchers: int
    bytes: int
    sha256: str


class Totals(msgspec.Struct, frozen=True):
    """Over all files."""

    files: int
    vouchers: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What was settled for one day of one time zone.  Nothing in it depends on when it was made."""

    day: str
    time_zone: str
    since: str
    until: str
    format: Format
    files: list[SettlementFile]
    totals: Totals


class Day(msgspec.Struct, frozen=True):
    """A day of a time zone, and its bounds in Unix seconds (``until`` exclusive)."""

    day: str
    time_zone: str
    since: int
    until: int


async def settle(
    database: Database, day: Day, folder: Path, *, distributor: str | None, file_format: Format, force: bool
) -> tuple[Manifest, Path]:
    """The files of the day are in ``folder``, and last the manifest; what it says and where it is.

    One snapshot, one pass.  The same ledger gives the same bytes, so settling again changes nothing.  A distributor
    that was given nothing has a file with nothing but the head.  A manifest is there only while it is true of the
    files, whenever a run was killed.  Raises NotFound for an unknown distributor, Conflict if a manifest of the day is
    there whose digests are others (unless ``force``): then no file was changed.
    """
    written: dict[str, _Growing] = {}
    manifest_at = folder / f"settlement-{day.day}{f'.{distributor}' if distributor else ''}.manifest.json"
    folder.mkdir(parents=True, exist_ok=True)

    def of(id: str) -> _Growing:
        if id not in written:
            written[id] = _Growing(folder / f"settlement-{day.day}.{id}.{file_format}")
            written[id].add(head(file_format), 0)
        return written[id]

    try:
        async with database.read() as conn:
            names = {row.id: row.name for row in await conn.execute(select(distributors.c.id, distributors.c.name))}
            if distributor is not None and distributor not in names:
                raise NotFound(f"there is no distributor {distributor}")
            for id in sorted(names) if distributor is None else [distributor]:
                of(id)
            async for page in ledger.earliest_first(conn, Wanted(day.since, day.until, distributor=distributor)):
                by_distributor = defaultdict[str, list[Found]](list)
                for one in page:
                    by_distributor[one.distributor].append(one)
                for id, some in by_distributor.items():
                    of(id).add(lines(some, file_format), len(some))
        files = [
            SettlementFile(
                file=one.path.name, distributor_id=id, distributor_name=names.get(id, ""),
                since=instant(day.since), until=instant(day.until),
                vouchers=one.vouchers, bytes=one.bytes, sha256=one.digest.hexdigest(),
            )
            for id, one in sorted(written.items())
        ]  # fmt: skip
        totals = Totals(len(files), sum(one.vouchers for one in files), sum(one.bytes for one in files))
        bounds = instant(day.since), instant(day.until)
        manifest = Manifest(day.day, day.time_zone, *bounds, file_format, files, totals)
        # A manifest that is there is true of its files, also if this run dies among them; and that of the whole day
        # also when one distributor is settled alone.
        untrue = [(path, why) for path in _of_day(folder, day) if (why := _otherwise(path, manifest, manifest_at))]
        if untrue and not force:
            raise Conflict(untrue[0][1])
        for path, _ in untrue:
            path.unlink()
        sync_folder(folder)
        for growing in written.values():
            growing.finish()
        sync_folder(folder)
        with whole_file(manifest_at) as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        return manifest, manifest_at
    finally:
        for growing in written.values():
            part_of(growing.path).unlink(missing_ok=True)


class _Growing:
    """One file that is being written, opened for each addition: there may be more of them than a process may open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vouchers = self.bytes = 0
        self.digest = hashlib.sha256()

    def add(self, content: bytes, vouchers: int) -> None:
        with part_of(self.path).open("ab") as file:
            file.write(content)
        self.digest.update(content)
        self.bytes += len(content)
        self.vouchers += vouchers

    def finish(self) -> None:
        with part_of(self.path).open("ab") as file:
            os.fsync(file.fileno())
        part_of(self.path).replace(self.path)


def _of_day(folder: Path, day: Day) -> list[Path]:
    """The manifests of the day, whomever they settle."""
    return sorted(folder.glob(f"settlement-{day.day}.*manifest.json"))


def _otherwise(path: Path, manifest: Manifest, own: Path) -> str:
    """What the manifest at ``path`` says otherwise than ``manifest``, which is to be at ``own``; '' if nothing."""
    try:
        before = msgspec.json.decode(path.read_bytes()[:MANIFEST_BYTES_MAX], type=Manifest)
    except msgspec.DecodeError:
        return f"{path} is there and is no manifest: move it away, or say --force"
    digests = {one.file: one.sha256 for one in manifest.files}
    named = [one for one in before.files if path == own or one.file in digests]
    changed = [one.file for one in named if digests.get(one.file) != one.sha256]
    if not changed and (path != own or (before.since, before.until) == (manifest.since, manifest.until)):
        return ""
    which = changed[0] if changed else "the period"
    return (
        f"{path} says otherwise than the ledger does now ({which}, {len(changed)} files in all): "
        "settle into another folder and compare, or say --force"
    )
