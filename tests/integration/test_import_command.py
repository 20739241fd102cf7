"""``codes import`` through the real command line, on both stores: each bad input is a clear report, nothing is lost."""

from __future__ import annotations

import asyncio
import csv
import fcntl
import gzip
import os
import pty
import re
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from service.cli import imports
from service.store import books, schema
from service.store.database import Database
from service.worker import rehearsal, stocking
from tests.integration.stage import Stage, staged
from tests.integration.typed import OnStage, ok, refused, run

COMMAND = [sys.executable, "-m", "service.cli.main"]


@pytest.fixture
def pool(store: OnStage) -> OnStage:
    """A pool P whose codes expire in a year unless they say otherwise, and Q, which holds OTHER-1."""
    ok("pool", "create", "P", "--expires", "2040-01-01")
    ok("pool", "create", "Q", "--expires", "2040-01-01")
    ok("codes", "import", "Q", "-", typed="code\nOTHER-1\n")
    return store


async def _codes(stage: Stage) -> list[tuple[str, str]]:
    """Codes and serial numbers of P, in the order in which they will be issued; the books balance."""
    async with stage.database.read() as conn:
        assert all(one.balanced for one in await books.stock_balance(conn))
        rows = await conn.execute(
            select(schema.codes.c.code, schema.codes.c.serial)
            .where(schema.codes.c.pool == "P")
            .order_by(schema.codes.c.lot, schema.codes.c.seq)
        )
        return [(code, serial) for code, serial in rows]


def stored(on_stage: OnStage) -> list[str]:
    return [code for code, _ in on_stage(_codes)]


def numbered(count: int, prefix: str = "CODE") -> list[str]:
    return [f"{prefix}-{number:06}" for number in range(count)]


PLAIN = b"code,serial_number,expires_at\nA-1,S-1,2030-01-31\nA-2,,\nA-3,S-3,2030-01-31T12:00:00Z\n"
WELL_FORMED = {
    "as it should be": PLAIN,
    "BOM and CRLF": b"\xef\xbb\xbf" + PLAIN.replace(b"\n", b"\r\n"),
    "quotes": b'"code","serial_number","expires_at"\n"A-1","S-1","2030-01-31"\n"A-2","",""\n"A-3",S-3,"2030-01-31"\n',
    "another order": b"Expires_At, code ,serial_number\n2030-01-31,A-1,S-1\n,A-2,\n2030-01-31, A-3,S-3\n",
    "empty lines": b"\n\r\n" + PLAIN.replace(b"\n", b"\n\n  \n"),
    "no newline at the end": PLAIN[:-1],
    "NDJSON": b'{"code":"A-1","serial_number":"S-1","expires_at":"2030-01-31"}\n{"code":"A-2"}\n'
    b'{"expires_at":null,"serial_number":"S-3","code":"A-3"}\n',
    "NDJSON with BOM, CRLF and empty lines": b'\xef\xbb\xbf\r\n {"code" : "A\\u002d1","serial_number":"S-1"}\r\n\r\n'
    b'{"code":"A-2","serial_number":""}\r\n{"code":"A-3","serial_number":"S-3"}',
}


@pytest.mark.parametrize("name", WELL_FORMED)
def test_same_codes_come_from_every_form(pool: OnStage, tmp_path: Path, name: str) -> None:
    content = WELL_FORMED[name]
    (tmp_path / "codes").write_bytes(gzip.compress(content))
    report = orjson.loads(ok("codes", "import", "P", str(tmp_path / "codes"), "--json").stdout)
    assert (report["inserted"], report["refused"]) == (3, 0)
    codes = pool(_codes)
    assert {code for code, _ in codes} == {"A-1", "A-2", "A-3"}
    assert {("A-1", "S-1"), ("A-3", "S-3")} <= set(codes)
    # The same content is the same import, however it comes.
    assert "before" in run("codes", "import", "P", "-", typed=content).stdout  # type: ignore[arg-type]


BAD_LINES = {  # by the line's kind and a part of the reason; nothing of the line is told
    b"SECRET TWO,,": ("invalid", "printable ASCII"),
    b"SECRET\x07,,": ("invalid", "printable ASCII"),
    b"SECRET\x00,,": ("invalid", "printable ASCII"),
    "SECRET\u00e9,,".encode(): ("invalid", "printable ASCII"),
    b"SECRET\xff\xfe,,": ("invalid", "UTF-8"),
    b"SECRET" * 1_700 + b",,": ("invalid", "longer than 1000 bytes"),
    b"SECRET" * 30 + b",,": ("invalid", "1 to 128"),
    b'"SECRET,,': ("invalid", "quote"),
    b'="00SECRET",,': ("invalid", "formula"),
    b'"SECRET"0,,': ("invalid", "quote"),
    b'"=""00SECRET""",,': ("invalid", "formula"),
    b"SECRET-1,=1+1,": ("invalid", "formula"),
    b"SECRET-2": ("invalid", "1 fields, where the header names 3"),
    b"SECRET-3,S,2030-01-01,more": ("invalid", "4 fields"),
    b"SECRET-4,,2020-01-01": ("invalid", "expired already"),
    b"SECRET-5,,31.12.2030": ("invalid", "expires_at has to be"),
    b"SECRET-6,,2030-02-30": ("invalid", "expires_at has to be"),
    b"SECRET-7," + b"S" * 65 + b",": ("invalid", "serial number needs"),
    b"TWICE,,": ("duplicate_in_file", "the code stands in line 2 already"),
    b"SECRET-8,S-TWICE,": ("duplicate_in_file", "the serial number stands in line 2 already"),
    b"STORED,,": ("duplicate_in_pool", "the code is in this pool already"),
    b"SECRET-9,S-STORED,": ("duplicate_in_pool", "the serial number is in this pool already"),
    b"OTHER-1,,": ("duplicate_elsewhere", "the code is in pool Q already"),
}


def _as_json(text: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in text.splitlines()]


def test_each_bad_line_is_reported_and_a_dry_run_says_the_same(pool: OnStage, tmp_path: Path) -> None:
    ok("codes", "import", "P", "-", typed="code,serial_number\nSTORED,S-STORED\n")
    file, foretold, told = tmp_path / "codes.csv", tmp_path / "foretold.csv", tmp_path / "told.ndjson"
    file.write_bytes(b"\n".join([b"code,serial_number,expires_at", b"TWICE,S-TWICE,", *BAD_LINES, b"GOOD,,", b""]))
    dry = ok("codes", "import", "P", str(file), "--dry-run", "--report", str(foretold), "--json")
    assert stored(pool) == ["STORED"]
    assert "nothing was written" in ok("codes", "import", "P", str(file), "--dry-run").stdout
    real = ok("codes", "import", "P", str(file), "--report", str(told), "--json")
    assert stored(pool) == ["STORED", "TWICE", "GOOD"]
    expected, report = orjson.loads(dry.stdout), orjson.loads(real.stdout)
    assert (expected.pop("dry_run"), report.pop("dry_run")) == (True, False)
    assert expected == report
    lines = _as_json(told.read_text())
    assert lines == report["reasons"]
    assert [one["line"] for one in lines] == list(range(3, 3 + len(BAD_LINES)))
    for one, (line, (kind, reason)) in zip(lines, BAD_LINES.items(), strict=True):
        assert one["kind"] == kind, line
        assert reason in one["reason"], line
        assert "SECRET" not in one["reason"]
    with foretold.open(newline="") as table:
        assert list(csv.DictReader(table)) == [{**one, "line": str(one["line"])} for one in lines]
    assert report["kinds"] == {
        kind: sum(one["kind"] == kind for one in lines)
        for kind in ("invalid", "duplicate_in_file", "duplicate_in_pool", "duplicate_elsewhere")
    }


BAD_OBJECTS = {
    b"[]": "no object",
    b"{}": "no object",
    b'"SECRET"': "no object",
    b'{"code": 7}': "no object",
    b'{"code": "SECRET", "pin": "SECRET"}': "no object",
    b'{"code": "SECRET", "expires_at": 1900000000}': "no object",
    b'{"code": "SECRET"': "no JSON",
    b'{"code": "SECRET"} {"code": "SECRET"}': "no JSON",
    b"SECRET,,": "no JSON",
    b'{"code": "SECRET\xff"}': "UTF-8",
    b'{"code": "SECRET\\u0007"}': "printable ASCII",
    b'{"code": "SECRET\\ud800"}': "",
    b'{"code": "SECRET", "expires_at": "soon"}': "expires_at has to be",
    b'{"code": "' + b"SECRET" * 1_700 + b'"}': "longer than",
}


def test_each_bad_object_is_reported(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.ndjson"
    file.write_bytes(b"\n".join([b'{"code": "GOOD-1"}', *BAD_OBJECTS, b'{"code": "GOOD-2"}']))
    report = orjson.loads(ok("codes", "import", "P", str(file), "--json").stdout)
    assert stored(pool) == ["GOOD-1", "GOOD-2"]
    assert [one["line"] for one in report["reasons"]] == list(range(2, 2 + len(BAD_OBJECTS)))
    for one, (line, reason) in zip(report["reasons"], BAD_OBJECTS.items(), strict=True):
        assert one["kind"] == "invalid"
        assert reason in one["reason"], line
        assert "SECRET" not in one["reason"]


def test_report_for_people_fits_the_terminal_and_shows_no_code(pool: OnStage, tmp_path: Path) -> None:
    file, report = tmp_path / "codes.csv", tmp_path / "refused.csv"
    file.write_text("code\nSECRET-1\n" + "SECRET 2\n" * 30)
    result = ok("codes", "import", "P", str(file))
    assert "10 more lines; with --report FILE" in " ".join(result.stdout.split())
    assert "SECRET" not in result.output
    assert max(map(len, result.stdout.splitlines())) <= 90
    assert "was imported into pool P before" in " ".join(ok("codes", "import", "P", str(file)).stdout.split())
    again = run("codes", "import", "P", str(file), "--id", "again", "--report", str(report))
    assert again.exit_code == 1  # nothing of it could be imported
    assert len(report.read_text().splitlines()) == 32
    assert "11 more lines; all are in" in " ".join(again.stdout.split())


WHOLE = {
    b"": "is empty",
    b"\n \n": "is empty",
    b"A-1\nA-2\n": "has to name its columns",
    b"code;serial_number\nA-1;S-1\n": "separated by commas",
    b"code,code\nA-1,A-2\n": "has to name its columns",
    b'"code\nA-1\n': "has to name its columns",
    "code\nA-1\n".encode("utf-16"): "is not text in UTF-8",
    b"code\rA-1\r": "has to name its columns",
    gzip.compress(PLAIN)[:-1]: "is truncated",
    gzip.compress(PLAIN)[:-9]: "is truncated",
    gzip.compress(PLAIN)[:12]: "is truncated",
    gzip.compress(PLAIN)[:-8] + b"\0" * 8: "is damaged",
    gzip.compress(PLAIN)[:20] + b"\xff" * 20 + gzip.compress(PLAIN)[40:]: "is damaged",
    gzip.compress(PLAIN) + b"more": "is damaged",
    b"\x1f\x8bno gzip at all": "is damaged",
}


@pytest.mark.parametrize("content", WHOLE, ids=range(len(WHOLE)))
def test_what_can_not_be_read_as_a_whole_costs_nothing(pool: OnStage, tmp_path: Path, content: bytes) -> None:
    file, report = tmp_path / "codes.csv", tmp_path / "report.csv"
    file.write_bytes(content)
    report.write_text("of another import")
    refused("codes", "import", "P", str(file), "--report", str(report), says=WHOLE[content])
    refused("codes", "import", "P", str(file), "--id", "named", "--dry-run", says=WHOLE[content])
    assert report.read_text() == "of another import"
    result = run("codes", "import", "P", "-", typed=content)  # type: ignore[arg-type]
    assert (result.exit_code, result.stdout) == (1, "")
    assert WHOLE[content] in result.stderr and "standard input" in result.stderr

    async def begun(stage: Stage) -> list[str]:
        async with stage.database.read() as conn:
            return list(await conn.scalars(select(schema.imports.c.pool)))

    assert pool(begun) == ["Q"]


def test_truncated_gzip_is_imported_once_it_is_whole(pool: OnStage, tmp_path: Path) -> None:
    file, whole = tmp_path / "codes.csv.gz", gzip.compress(b"code\n" + "\n".join(numbered(1_000)).encode())
    file.write_bytes(whole[: len(whole) // 2])
    refused("codes", "import", "P", str(file), "--id", "delivery", says="get the whole of it")
    file.write_bytes(whole)
    ok("codes", "import", "P", str(file), "--id", "delivery")
    assert stored(pool) == numbered(1_000)


def test_format_can_be_forced(pool: OnStage) -> None:
    refused_whole = run("codes", "import", "P", "-", "--format", "csv", typed='{"code":"A"}\n')
    assert refused_whole.exit_code == 1 and "has to name its columns" in refused_whole.stderr
    every = run("codes", "import", "P", "-", "--format", "ndjson", "--json", typed="code\nA\n")
    assert every.exit_code == 1
    assert [one["reason"] for one in orjson.loads(every.stdout)["reasons"]] == ["no JSON", "no JSON"]
    assert run("codes", "import", "P", "-", "--format", "xls", typed="").exit_code == 2
    assert stored(pool) == []


def test_other_faults_are_one_line(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("code\nA\n")
    for options in ([], ["--dry-run"]):
        refused("codes", "import", "NONE", str(file), *options, says="there is no pool NONE")
        refused("codes", "import", "P", str(tmp_path / "missing.csv"), *options, says="there is no file")
        refused("codes", "import", "P", str(tmp_path), *options, says="is not a file")
        nowhere = str(tmp_path / "missing" / "report")
        refused("codes", "import", "P", str(file), "--report", nowhere, *options, says="report")
        same = run("codes", "import", "P", str(file), "--report", str(file), *options)
        assert (same.exit_code, file.read_text()) == (2, "code\nA\n")
    refused("codes", "import", "P", str(file), "--id", "not good", says="an import's id has")
    ok("codes", "import", "P", str(file), "--id", "one")
    for options in ([], ["--dry-run"]):
        refused("codes", "import", "Q", str(file), "--id", "one", *options, says="filled pool P")
        assert "before" in ok("codes", "import", "P", str(file), "--id", "one", *options).stdout


def test_duplicate_is_told_its_line_however_far_back(
    pool: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stocking, "CHUNK_ROWS_MAX", 10)
    lines = numbered(100)
    lines[40] = lines[3]  # line 42 repeats line 5, several transactions before
    lines[75] = "not good"
    lines[90] = lines[78]
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join(lines))
    foretold = orjson.loads(ok("codes", "import", "P", str(file), "--dry-run", "--json").stdout)
    report = orjson.loads(ok("codes", "import", "P", str(file), "--json").stdout)
    assert [(one["line"], one["reason"]) for one in report["reasons"] if one["kind"] != "invalid"] == [
        (42, "the code stands in line 5 already"),
        (92, "the code stands in one of lines 72 to 81 already"),
    ]
    assert [(one["line"], one["reason"]) for one in foretold["reasons"] if one["kind"] != "invalid"] == [
        (42, "the code stands in line 5 already"),
        (92, "the code stands in line 80 already"),
    ]
    assert report["kinds"] == foretold["kinds"]
    assert report["inserted"] == foretold["inserted"] == 97


def test_full_disk_of_the_report_does_not_cost_the_import(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join(["not good", *numbered(20), "not good"]))
    result = run("codes", "import", "P", str(file), "--report", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "No space left on device" in result.stderr and "the import itself is whole" in result.stderr
    assert stored(pool) == numbered(20)


def test_full_disk_or_too_much_of_what_is_piped_in_is_one_line(pool: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, Path("/dev/full").open("wb", buffering=0) as full:
        patched.setattr("tempfile.TemporaryFile", lambda: full)
        result = run("codes", "import", "P", "-", typed="code\nA\n")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "No space left on device" in result.stderr and "TMPDIR" in result.stderr
    monkeypatch.setattr("service.worker.content.PIPED_BYTES_MAX", 1_000)
    result = run("codes", "import", "P", "-", typed="code\n" + "\n".join(numbered(200)))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "write them to a file" in result.stderr
    assert stored(pool) == []


def test_full_disk_of_a_dry_run_is_one_line(pool: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(rehearsal._Seen, "add", full)
    file = tmp_path / "codes.csv"
    file.write_text("code\nA\n")
    refused("codes", "import", "P", str(file), "--dry-run", says="disk is full; name another directory")
    assert stored(pool) == []


def test_full_disk_of_the_store_is_one_line_and_the_import_goes_on_later(
    migrated_sqlite_url: str, valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of a file stands for the disk; PostgreSQL says the same by SQLSTATE 53100."""
    monkeypatch.setenv("VOUCHERD_STORE_URL", migrated_sqlite_url)
    monkeypatch.setenv("VOUCHERD_REDIS_URL", valkey_url)

    async def on_stage() -> list[tuple[str, str]]:
        database = Database.connect(migrated_sqlite_url)
        try:
            async with staged(database, valkey_url) as stage:
                return await _codes(stage)
        finally:
            await database.close()

    asyncio.run(on_stage())
    ok("pool", "create", "P", "--expires", "2040-01-01")
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join(numbered(30_000)))
    size = Path(migrated_sqlite_url.partition("///")[2]).stat().st_size + 2_000_000
    full = subprocess.run(
        [*COMMAND, "codes", "import", "P", str(file)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert (full.returncode, full.stdout, full.stderr.count("\n")) == (1, "", 1)
    assert full.stderr.startswith("voucherd: the store's file can't be used (SQLITE_")
    assert 0 < len(asyncio.run(on_stage())) < 30_000
    ok("codes", "import", "P", str(file))
    assert [code for code, _ in asyncio.run(on_stage())] == numbered(30_000)


def test_resumed_import_appends_to_its_report(pool: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stocking, "CHUNK_ROWS_MAX", 10)
    file, report = tmp_path / "codes.csv", tmp_path / "report.csv"
    lines = [f"CODE-{number}" if number % 10 else "not good" for number in range(1, 41)]
    file.write_text("code\n" + "\n".join([*lines, "CODE-1"]))
    report.write_text("of another import")

    def interrupted(self: Any, so_far: Any) -> None:
        if so_far.lines == 20:
            with report.open("a") as torn:  # what was told of the next transaction, which was not committed then
                torn.write("31,invalid,told too early\n31,inv")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(imports._Terminal, "progress", interrupted)
        result = run("codes", "import", "P", str(file), "--report", str(report))
    assert result.exit_code == 130
    assert "the same command goes on there" in result.stderr
    result = ok("codes", "import", "P", str(file), "--report", str(report))
    assert "Went on after line 21" in result.stdout
    reported = report.read_text().splitlines()
    assert reported[0] == "line,kind,reason"
    assert [line.split(",")[0] for line in reported[1:]] == ["11", "21", "31", "41", "42"]
    assert "told too early" not in report.read_text()
    assert "perhaps from an earlier line of this file" in reported[-1]
    assert len(stored(pool)) == 36


def test_ctrl_c_in_the_middle_loses_and_doubles_nothing(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join(numbered(60_000)))
    process = subprocess.Popen([*COMMAND, "codes", "import", "P", str(file)], stderr=subprocess.PIPE, text=True)

    async def lines_done(stage: Stage) -> int:
        async with stage.database.read() as conn:
            done = select(schema.imports.c.lines_done).where(schema.imports.c.pool == "P")
            return int(await conn.scalar(done) or 0)

    while pool(lines_done) == 0:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "voucherd: interrupted: what was imported is in stock, and the same command goes on there\n"
    assert 0 < len(stored(pool)) < 60_000
    assert "Went on after line" in ok("codes", "import", "P", str(file)).stdout
    assert stored(pool) == numbered(60_000)


def test_same_file_twice_at_the_same_time_is_imported_once(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join([*numbered(40_000), "not good"]))
    runs = [
        subprocess.Popen([*COMMAND, "codes", "import", "P", str(file), "--json"], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    reports = [orjson.loads(process.communicate(timeout=60)[0]) for process in runs]
    assert [process.returncode for process in runs] == [0, 0]
    assert sum(report["inserted"] for report in reports) == 40_000
    assert sum(report["refused"] for report in reports) == 1
    assert stored(pool) == numbered(40_000)


def test_progress_fits_a_terminal_of_80_columns(pool: OnStage, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("code\n" + "\n".join([*numbered(50_000), *["not good"] * 10_000]))
    seen = _on_a_terminal([*COMMAND, "codes", "import", "P", str(file)])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if "codes ·" in line]
    assert any(
        re.search(r"%\s+[1-9][\d,]* codes · [\d,]+ refused · [1-9][\d,]*/s\s+[\d:-]+ left$", line) for line in bars
    )
    assert any("50,000" in line for line in lines)


def _on_a_terminal(command: list[str]) -> str:
    """All that the command writes to a terminal of 80 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 65_536)
        except OSError:  # Linux says so when the other side is gone
            break
        seen += part
    os.close(parent)
    assert process.wait(20) == 0
    return seen.decode()


@pytest.mark.parametrize("suffix", ["csv", "ndjson"])
def test_a_report_misses_no_line_when_the_import_is_killed_right_after_a_commit(
    pool: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(stocking, "CHUNK_ROWS_MAX", 10)
    file, report = tmp_path / "codes.csv", tmp_path / f"report.{suffix}"
    file.write_text("code\n" + "\n".join("not good" if number % 5 == 0 else f"CODE-{number}" for number in range(60)))

    def killed(self: Any, lines: int, inserted: int, refused: Any) -> None:
        raise SystemExit(9)  # between a commit and whatever comes after it

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(stocking.Tally, "add", killed)
            assert run("codes", "import", "P", str(file), "--report", str(report)).exit_code == 9
    ok("codes", "import", "P", str(file), "--report", str(report))
    told = [int(number) for number in re.findall(r'^(?:\{"line":)?(\d+),', report.read_text(), re.MULTILINE)]
    assert told == [2 + number for number in range(60) if number % 5 == 0]


def test_the_same_id_never_goes_on_with_other_content(
    pool: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text("code\n" + "\n".join(numbered(30)))
    other.write_text("code\n" + "\n".join(f"OTHER-{number}" for number in range(30)))
    monkeypatch.setattr(stocking, "CHUNK_ROWS_MAX", 10)

    def interrupted(self: Any, so_far: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(imports._Terminal, "progress", interrupted)
        assert run("codes", "import", "P", str(one), "--id", "same").exit_code == 130
    before = stored(pool)
    for dry in ((), ("--dry-run",)):
        refused("codes", "import", "P", str(other), "--id", "same", *dry, says="begun with other content")
    assert stored(pool) == before
    ok("codes", "import", "P", str(one), "--id", "same")
    refused("codes", "import", "P", str(other), "--id", "same", says="begun with other content")
    assert len(stored(pool)) == 30
