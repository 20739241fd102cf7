"""An import killed at a random moment, by seed: run again, it gives exactly the file's codes, once.

A handful of times in each run of the tests, `--kills 50` on each store by `make chaos-import`.
"""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from service.store import schema
from tests.integration.stage import Stage
from tests.integration.test_import_command import COMMAND, stored
from tests.integration.typed import OnStage, ok

LINES = 30_000  # six transactions
REPEATED_EVERY = 1_000  # so many lines apart stands a code that is in an earlier line already

_seconds: dict[str, float] = {}  # per store, what a whole import takes from its beginning in the store to its end


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("kills")))


def _file(path: Path, rng: random.Random) -> list[str]:
    """Codes in no order; those that are in the file, in the order in which they stand there first."""
    lines = [f"CODE-{number:06}" for number in range(LINES)]
    rng.shuffle(lines)
    for at in range(REPEATED_EVERY, LINES, REPEATED_EVERY):
        lines[at] = lines[rng.randrange(at)]
    path.write_text("code\n" + "\n".join(lines))
    return list(dict.fromkeys(lines))


def _begin(on_stage: OnStage, pool: str, file: Path) -> subprocess.Popen[bytes]:
    """An import that the store knows of by now, or that is over."""
    process = subprocess.Popen([*COMMAND, "codes", "import", pool, str(file)], stdout=subprocess.DEVNULL)

    async def begun(stage: Stage) -> bool:
        async with stage.database.read() as conn:
            return (await conn.execute(select(schema.imports).where(schema.imports.c.pool == pool))).first() is not None

    while not on_stage(begun) and process.poll() is None:
        pass
    return process


def _whole_s(on_stage: OnStage, store_url: str, tmp_path: Path) -> float:
    name = store_url.partition(":")[0]
    if name not in _seconds:
        ok("pool", "create", "MEASURED", "--expires", "2040-01-01")
        file = tmp_path / "measured.csv"
        file.write_text("code\n" + "\n".join(f"MEASURED-{number:06}" for number in range(LINES)))
        process, began = _begin(on_stage, "MEASURED", file), time.monotonic()
        assert process.wait(60) == 0
        _seconds[name] = time.monotonic() - began
    return _seconds[name]


def test_import_killed_at_a_random_moment_gives_each_code_once(
    store: OnStage,
    store_url: str,
    tmp_path: Path,
    rng: random.Random,
    kill: int,
) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    file = tmp_path / "codes.csv"
    codes = _file(file, rng)
    after_s = rng.uniform(0, _whole_s(store, store_url, tmp_path))
    process = _begin(store, "P", file)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait(20) in (0, -9)
    there = stored(store)  # and the books balance
    assert there == codes[: len(there)]
    ok("codes", "import", "P", str(file))
    assert stored(store) == codes
    print(f"kill {kill}: after {after_s:.3f} s, {len(there)} of {len(codes)} codes in stock")
