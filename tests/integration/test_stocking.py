"""Imports: a bad line costs that line, an interrupted one goes on, and nothing of a file is held in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import select, update

from loadtest.servers import free_port
from service import keys
from service.errors import Conflict, NotFound, RedisUnreachable, StoreIsOlder
from service.line import connect
from service.scripts import Scripts
from service.store import books, schema
from service.store.database import Database
from service.store.stock import Refused
from service.worker import patience, stocking
from service.worker.codes_file import CodesFile, expiry
from service.worker.content import UnusableFile
from service.worker.stocking import ImportReport, Listener, Progress, import_codes
from tests.integration.stage import Stage, staged

POOL = "CAMP-001"


@pytest.fixture
async def stage(database: Database, valkey_url: str) -> AsyncIterator[Stage]:
    async with staged(database, valkey_url) as stage:
        await stage.campaign(POOL)
        yield stage


def _file(path: Path, content: str | bytes) -> CodesFile:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return CodesFile(path)


async def _import(stage: Stage, file: CodesFile, pool: str = POOL, import_id: str = "") -> ImportReport:
    return await import_codes(stage.database, stage.scripts, pool, file.rows(), import_id=import_id or file.id)


async def _stored(stage: Stage) -> list[tuple[str, str, int]]:
    async with stage.database.read() as conn:
        rows = await conn.execute(
            select(schema.codes.c.code, schema.codes.c.serial, schema.lots.c.expires_at)
            .join(schema.lots, schema.lots.c.id == schema.codes.c.lot)
            .order_by(schema.codes.c.code)
        )
        return [(code, serial, expires_at) for code, serial, expires_at in rows]


async def _balanced(stage: Stage) -> bool:
    async with stage.database.read() as conn:
        return all(one.balanced for one in await books.stock_balance(conn))


async def test_codes_can_be_issued_when_the_import_returned(stage: Stage, tmp_path: Path) -> None:
    await stage.refill.run_once()
    assert (await stage.issue("early"))[0].status == "NONE"  # exhausted: there has never been a code
    report = await _import(stage, _file(tmp_path / "codes.csv", "code\nA-1\n"))
    assert report.unreached == []
    assert (await stage.issue("late"))[0].status == "REFILL"  # no longer: somebody has only to refill it
    await stage.refill.run_once()
    assert (await stage.issue("late"))[0].status == "ISSUED"


async def test_columns_are_found_by_their_names(stage: Stage, tmp_path: Path) -> None:
    content = (
        "\ufeffExpires_At, code ,serial_number\r\n"
        "2030-01-31,A-1,S-1\r\n"
        "2030-01-31T12:00:00+02:00,A-2,S-2\r\n"
        '"2030-01-31T12:00:00.5Z","A-3,""x""",S-3\r\n'
        "\r\n"
        "2030-01-31t12:00:00z,\tA-4 , S-4"
    )
    report = await _import(stage, _file(tmp_path / "codes.csv", content))
    assert (report.inserted, report.refused) == (4, 0)
    end_of_day, noon = 1_896_134_399, 1_896_091_200
    assert await _stored(stage) == [
        ("A-1", "S-1", end_of_day),
        ("A-2", "S-2", noon - 7_200),
        ('A-3,"x"', "S-3", noon),
        ("A-4", "S-4", noon),
    ]


BAD = [
    (b"", "", "fields"),  # replaced below: an empty line is no line
    (b"two words,S-2,2030-01-01", "two words", "printable ASCII"),
    (b"caf\xc3\xa9,S-3,2030-01-01", "caf", "printable ASCII"),
    (b"\xff\xfe,S-4,2030-01-01", "", "UTF-8"),
    (b"nul\x00,S-5,2030-01-01", "nul", "printable ASCII"),
    (b",S-6,2030-01-01", "", "printable ASCII"),
    (b"SECRET-7" * 20 + b",S-7,2030-01-01", "SECRET-7", "1 to 128"),
    (b"SECRET-8,two words,2030-01-01", "SECRET-8", "serial number"),
    (b"SECRET-9," + b"s" * 65 + b",2030-01-01", "SECRET-9", "serial"),
    (b"SECRET-10,S-10,tomorrow", "SECRET-10", "expires_at"),
    (b"SECRET-11,S-11,2030-02-30", "SECRET-11", "expires_at"),
    (b"SECRET-12,S-12,2030-01-01T12:00:00", "SECRET-12", "expires_at"),
    (b"SECRET-13,S-13,2020-01-01", "SECRET-13", "expired"),
    (b"S-14,2030-01-01,SECRET-14", "SECRET-14", "expires_at"),
    (b"SECRET-15,S-15", "SECRET-15", "2 fields"),
    (b"SECRET-16,S-16,2030-01-01,more", "SECRET-16", "4 fields"),
    (b'"SECRET-17,S-17,2030-01-01', "SECRET-17", "quote"),
    (b'"SECRET"-18,S-18,2030-01-01', "SECRET", "quote"),
    (b"GOOD-1,S-19,2030-01-01", "GOOD-1", "line 2 already"),
    (b"SECRET-20,S-GOOD-1,2030-01-01", "SECRET-20", "line 2 already"),
    (b"STORED-1,S-21,2030-01-01", "STORED-1", "this pool already"),
    (b"SECRET-22,S-STORED,2030-01-01", "SECRET-22", "serial number is in this pool"),
    (b"OTHER-1,S-23,2030-01-01", "OTHER-1", "pool OTHER already"),
    (b"x" * 5_000, "xxxx", "longer than"),
]
BAD[0] = (b"one field", "one field", "1 field")


async def test_bad_line_costs_that_line_and_its_code_is_not_told(stage: Stage, tmp_path: Path) -> None:
    await stage.campaign("OTHER", "MOB")
    await _import(stage, _file(tmp_path / "other.csv", "code\nOTHER-1\n"), "OTHER")
    await _import(stage, _file(tmp_path / "before.csv", "code,serial_number\nSTORED-1,S-STORED\n"))
    content = b"code,serial_number,expires_at\nGOOD-1,S-GOOD-1,2030-01-01\n"
    content += b"".join(line + b"\nGOOD-%d,,\n" % (number + 2) for number, (line, _, _) in enumerate(BAD))
    told: list[Refused] = []

    class Heard(Listener):
        def refused(self, lines: Sequence[Refused]) -> None:
            told.extend(lines)

    file = _file(tmp_path / "codes.csv", content)
    report = await import_codes(stage.database, stage.scripts, POOL, file.rows(), import_id=file.id, listener=Heard())
    assert (report.lines, report.inserted, report.refused) == (2 * len(BAD) + 1, len(BAD) + 1, len(BAD))
    assert told == report.reasons
    for (line, code, reason), refused in zip(BAD, report.reasons, strict=True):
        assert reason in refused.reason, line
        assert not code or code not in refused.reason
    assert [one.line for one in report.reasons] == [3 + 2 * number for number in range(len(BAD))]
    assert await _balanced(stage)


async def test_no_expiry_anywhere_is_refused(stage: Stage, tmp_path: Path) -> None:
    async with stage.database.write() as conn:
        await conn.execute(update(schema.pools).values(default_expires_at=None))
    report = await _import(stage, _file(tmp_path / "codes.csv", "code,expires_at\nA-1,\nA-2,2030-01-01\n"))
    assert report.inserted == 1
    assert [(one.line, one.reason) for one in report.reasons] == [
        (2, "no expiry: neither the line nor the pool has one")
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"A-1\nA-2\n",  # no header
        b"code;serial_number\nA-1;S-1\n",
        b"serial_number,expires_at\nS-1,2030-01-01\n",
        b"code,code\nA-1,A-2\n",
        b"code,pin\nA-1,1234\n",
        "code\nA-1\n".encode("utf-16"),
        b"x" * 100_000,
    ],
)
async def test_file_without_a_usable_header_is_refused_whole(
    migrated_sqlite_url: str, valkey_url: str, tmp_path: Path, content: bytes
) -> None:
    database = Database.connect(migrated_sqlite_url)
    try:
        async with staged(database, valkey_url) as stage:
            await stage.campaign(POOL)
            with pytest.raises(UnusableFile) as told:
                await _import(stage, _file(tmp_path / "codes.csv", content))
            assert "A-1" not in str(told.value)
            async with database.read() as conn:
                assert (await conn.execute(select(schema.imports))).all() == []
    finally:
        await database.close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(UnusableFile):
            CodesFile(path)


@pytest.mark.parametrize(
    "text", ["2030-1-1", "20300101", "2030-01-01T00:00:60Z", "2030-01-01 00:00", "٢٠٣٠-01-01", "now"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expires_at has to be"):
        expiry(text)


async def test_same_file_twice_is_recognised(stage: Stage, tmp_path: Path) -> None:
    content = "code\n" + "".join(f"A-{number}\n" for number in range(10))
    first = await _import(stage, _file(tmp_path / "codes.csv", content))
    again = await _import(stage, _file(tmp_path / "copy.csv", content))
    assert (first.known, first.inserted) == (False, 10)
    assert (again.known, again.inserted, again.refused) == (True, 0, 0)
    await stage.campaign("OTHER", "MOB")
    with pytest.raises(Conflict, match="another id"):
        await _import(stage, _file(tmp_path / "codes.csv", content), "OTHER")
    assert len(await _stored(stage)) == 10


async def test_interrupted_import_goes_on(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of its transactions: every code is there once, and each bad line was reported once."""
    monkeypatch.setattr(stocking, "CHUNK_ROWS_MAX", 10)
    lines = [f"A-{number}" if number % 7 else "a bad one" for number in range(1, 96)]
    file = _file(tmp_path / "codes.csv", "code\n" + "\n".join(lines))
    told: list[int] = []
    runs = 0

    class Dies(Listener):
        def refused(self, lines: Sequence[Refused]) -> None:
            told.extend(one.line for one in lines)

        def progress(self, so_far: Progress) -> None:
            raise KeyboardInterrupt

    while True:
        runs += 1
        try:
            report = await import_codes(
                stage.database, stage.scripts, POOL, file.rows(), import_id=file.id, listener=Dies()
            )
            break
        except KeyboardInterrupt:
            assert await _balanced(stage)
    assert runs == 11
    assert report.resumed_after == 96
    assert (report.inserted, report.inserted_before) == (0, 82)
    assert told == [line for line, text in enumerate(lines, start=2) if text == "a bad one"]
    assert sorted(code for code, _, _ in await _stored(stage)) == sorted(set(lines) - {"a bad one"})
    assert (await _import(stage, file)).known


async def test_commit_in_doubt_is_not_repeated(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction was committed and its answer lost; Redis was never told. The next run tells it."""
    file = _file(tmp_path / "codes.csv", "code\nA-1\nA-2\n")
    await stage.refill.run_once()
    assert (await stage.issue("early"))[0].status == "NONE"

    async def lost(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stocking, "tell_stock", lost)
        with pytest.raises(KeyboardInterrupt):
            await _import(stage, file)
    assert (await stage.issue("early"))[0].status == "NONE"
    report = await _import(stage, file)
    assert (report.inserted, report.inserted_before, report.resumed_after) == (0, 2, 3)
    assert (await stage.issue("late"))[0].status == "REFILL"


async def test_changed_file_is_noticed(stage: Stage, tmp_path: Path) -> None:
    file = _file(tmp_path / "codes.csv", "code\nA-1\n")
    with (tmp_path / "codes.csv").open("a") as more:
        more.write("A-2\n")
    with pytest.raises(UnusableFile, match="changed"):
        await _import(stage, file)


async def test_many_lines_are_not_held_in_memory(migrated_sqlite_url: str, valkey_url: str, tmp_path: Path) -> None:
    path = tmp_path / "codes.csv"
    with path.open("w") as file:
        file.write("code,serial_number,expires_at\n")
        for number in range(50_000):
            file.write(f"CODE-{number:08},SERIAL-{number:08},2030-01-31T12:00:00Z\n")
    codes, seen = CodesFile(path), list[int]()

    class Heard(Listener):
        def progress(self, so_far: Progress) -> None:
            seen.append(so_far.lines)

    database = Database.connect(migrated_sqlite_url)
    try:
        async with staged(database, valkey_url) as stage:
            await stage.campaign(POOL)
            tracemalloc.start()
            try:
                report = await import_codes(
                    database, stage.scripts, POOL, codes.rows(), import_id=codes.id,
                    listener=Heard(),
                )  # fmt: skip
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert (report.inserted, report.refused) == (50_000, 0)
            assert seen == list(range(5_000, 50_001, 5_000))
            # One chunk, its rows and its statement's parameters; the whole file's would be some 100 MB.
            assert peak < 30_000_000
            assert await _balanced(stage)
    finally:
        await database.close()


async def test_unknown_pool_is_refused(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no pool NONE"):
        await _import(stage, _file(tmp_path / "codes.csv", "code\nA-1\n"), "NONE")


async def test_older_store_is_not_imported_into(stage: Stage, tmp_path: Path) -> None:
    async with stage.database.write() as conn:
        await conn.execute(update(schema.catalogue_head).values(version=0))
    with pytest.raises(StoreIsOlder):
        await _import(stage, _file(tmp_path / "codes.csv", "code\nA-1\n"))
    assert await _stored(stage) == []


async def test_nothing_is_imported_while_redis_is_away(stage: Stage, tmp_path: Path) -> None:
    redis = connect(f"redis://127.0.0.1:{free_port()}/0", timeout_ms=200)
    try:
        with pytest.raises(RedisUnreachable, match="nothing more is imported"):
            await import_codes(
                stage.database, Scripts(redis), POOL, _file(tmp_path / "codes.csv", "code\nA-1\n").rows(), import_id="x"
            )
    finally:
        await redis.aclose()
    assert await _stored(stage) == []


async def test_partition_that_could_not_be_told_is_named(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a generation, but is being recovered: what it took for exhausted, it still may."""
    monkeypatch.setattr(patience, "UNREACHED_S", 0.1)
    await stage.scripts.redis.hset(keys.generation(0), "replid", "0" * 40)
    report = await _import(stage, _file(tmp_path / "codes.csv", "code\nA-1\n"))
    assert report.inserted == 1
    assert report.unreached == ["{0}: it is being recovered"]
