"""Generated codes: as many as were asked for and no more, whatever happens meanwhile; pools that never run dry."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import insert, select, update

from service.errors import StoreIsOlder
from service.scripts import Scripts
from service.store import schema, stock
from service.store.database import Database
from service.worker import generating
from service.worker.generating import AHEAD_CODES, CHUNK_ROWS_MAX, Fill, Generator, generate_codes
from service.worker.pattern import Pattern
from service.worker.refill import Refill
from tests.integration.stage import Stage
from tests.integration.test_control_commands import fits, shown
from tests.integration.typed import OnStage, ok, refused, run

COMMAND = (sys.executable, "-m", "service.cli.main")
PATTERN = "SUN-####-####*"


def codes_of(store: OnStage, pool: str) -> list[str]:
    """The codes in the pool; the books balance."""

    async def look(stage: Stage) -> list[str]:
        assert not (await stage.audit()).findings
        async with stage.database.read() as conn:
            there = select(schema.codes.c.code).where(schema.codes.c.pool == pool)
            return list(await conn.scalars(there.order_by(schema.codes.c.lot, schema.codes.c.seq)))

    found: list[str] = store(look)
    return found


# --- codes generate


def test_exactly_n_codes_of_the_pattern_are_in_stock_and_none_stands_twice(store: OnStage) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    printed = ok("codes", "generate", "P", "12345", "--pattern", PATTERN)
    assert "12,345 codes" in printed.stdout
    codes = codes_of(store, "P")
    assert len(set(codes)) == len(codes) == 12_345
    assert all(Pattern(PATTERN).verifies(code) for code in codes)


def test_the_same_id_makes_its_codes_once(store: OnStage) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    ok("codes", "generate", "P", "100", "--pattern", PATTERN, "--id", "first")
    again = ok("codes", "generate", "P", "100", "--pattern", PATTERN, "--id", "first")
    assert "nothing was done" in again.stdout
    assert len(codes_of(store, "P")) == 100
    ok("codes", "generate", "P", "100", "--pattern", PATTERN)
    assert len(codes_of(store, "P")) == 200


def test_codes_that_are_in_some_pool_already_are_replaced_by_others(store: OnStage, rng: random.Random) -> None:
    for pool in ("P", "OTHER"):
        ok("pool", "create", pool, "--expires", "2040-01-01")
    pattern, seed = Pattern("A###%%"), rng.randrange(2**32)

    async def generate(stage: Stage) -> list[int]:
        made = [
            await generate_codes(
                stage.database, stage.scripts, pool, 1_000, pattern, expires_at=None, import_id=pool,
                source=random.Random(seed),
            )
            for pool in ("OTHER", "P")
        ]  # fmt: skip
        return [one.refused for one in made]

    refusals = store(generate)
    assert refusals[1] >= 1_000  # each of the first thousand was taken
    assert len(codes_of(store, "P")) == len(codes_of(store, "OTHER")) == 1_000
    assert not set(codes_of(store, "P")) & set(codes_of(store, "OTHER"))


def test_two_who_generate_the_same_make_it_once(store: OnStage) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")

    async def both(stage: Stage) -> list[Any]:
        return await asyncio.gather(
            *(
                generate_codes(
                    stage.database, stage.scripts, "P", 12_000, Pattern(PATTERN), expires_at=None, import_id="same"
                )
                for _ in range(2)
            )
        )

    reports = store(both)
    assert len(codes_of(store, "P")) == 12_000
    assert sum(one.inserted for one in reports) == 12_000


@pytest.mark.parametrize("kill", range(3))
def test_killed_at_a_random_moment_and_run_again_it_is_exactly_n(store: OnStage, rng: random.Random, kill: int) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    typed = ("codes", "generate", "P", "25000", "--pattern", PATTERN, "--id", "killed")

    async def begun(stage: Stage) -> bool:
        async with stage.database.read() as conn:
            return (await conn.scalar(select(schema.imports.c.lines_done))) is not None

    process = subprocess.Popen([*COMMAND, *typed], stdout=subprocess.DEVNULL)
    while not store(begun) and process.poll() is None:
        pass
    try:
        process.wait(rng.uniform(0, 0.5))
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait(20) in (0, -signal.SIGKILL)
    before = len(codes_of(store, "P"))
    ok(*typed)
    print(f"kill {kill}: {before} codes were in stock")
    assert len(codes_of(store, "P")) == 25_000


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("P", "1000", "--pattern", "A###"), "1 in 1,000"),
        (("P", "10", "--pattern", "A"), "placeholders"),
        (("NONE", "10", "--pattern", PATTERN), "no pool NONE"),
        (("BARE", "10", "--pattern", PATTERN), "no expiry of its own"),
        (("P", "10", "--pattern", PATTERN, "--expires", "2020-01-01"), "expired already"),
        (("P", "10", "--pattern", PATTERN, "--no-words", "nowhere.txt"), "can't be read"),
        (("P", "10", "--pattern", PATTERN, "--id", "a b"), "an import's id"),
    ],
)
def test_what_can_t_be_generated_is_refused_in_one_line_and_leaves_nothing(
    store: OnStage, typed: tuple[str, ...], says: str
) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    ok("pool", "create", "BARE")
    refused("codes", "generate", *typed, says=says)
    assert codes_of(store, "P") == []

    async def imports(stage: Stage) -> int:
        async with stage.database.read() as conn:
            return len((await conn.execute(select(schema.imports))).all())

    assert store(imports) == 0


@pytest.mark.parametrize("count", ["0", "-1", "10000001", "x"])
def test_a_count_out_of_its_range_is_typed_wrong(store: OnStage, count: str) -> None:
    assert run("codes", "generate", "P", "--pattern", PATTERN, "--", count).exit_code == 2


def test_a_dry_run_shows_codes_and_writes_nothing(store: OnStage) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    printed = ok("codes", "generate", "P", "10", "--pattern", PATTERN, "--dry-run").stdout
    samples = printed.splitlines()[:5]
    assert all(Pattern(PATTERN).verifies(one) for one in samples)
    told = orjson.loads(ok("codes", "generate", "P", "10", "--pattern", PATTERN, "--dry-run", "--json").stdout)
    assert told["space"] == Pattern(PATTERN).space
    assert codes_of(store, "P") == []


def test_words_are_kept_out(store: OnStage, tmp_path: Path) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    (tmp_path / "words.txt").write_text("cat\nrat\n\n")
    ok("codes", "generate", "P", "300", "--pattern", "####-####", "--no-words", str(tmp_path / "words.txt"))
    codes = [code.replace("4", "A").replace("7", "T").replace("-", "") for code in codes_of(store, "P")]
    assert not [code for code in codes if "CAT" in code or "RAT" in code]


def test_interrupted_it_says_how_to_go_on(store: OnStage) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    process = subprocess.Popen(
        [*COMMAND, "codes", "generate", "P", "2000000", "--pattern", "######-######"], stderr=subprocess.PIPE, text=True
    )

    async def some(stage: Stage) -> bool:
        async with stage.database.read() as conn:
            return bool(await conn.scalar(select(schema.imports.c.inserted)))

    while not store(some):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--id generated-" in told
    assert told.count("\n") == 1


# --- codes count


def test_count_tells_where_each_code_is_and_adds_up(store: OnStage, tmp_path: Path) -> None:
    ok("distributor", "create", "DIST-001")
    ok("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY")
    ok("campaign", "assign", "CAMP-001", "DIST-001")
    ok("codes", "generate", "CAMP-001", "300", "--pattern", PATTERN)

    async def issue(stage: Stage) -> None:
        await stage.refill.run_once()
        await stage.issue("a", "b", "c")
        await stage.flush.run_once()
        await stage.issue("d")

    store(issue)
    [one] = shown("codes", "count")
    assert (one["pool"], one["imported"], one["issued"]) == ("CAMP-001", 300, 3)
    assert one["out"] == 40 - 3  # in the window, and one on its way to the ledger
    assert one["imported"] == sum(
        one[name] for name in ("stored", "out", "issued", "set_aside", "withdrawn", "quarantined")
    )
    (tmp_path / "leaked.csv").write_text("code\n" + "\n".join(codes_of(store, "CAMP-001")[-20:]))
    ok("pool", "withdraw", "CAMP-001", "--codes", str(tmp_path / "leaked.csv"), "--reason", "leaked", "--yes")

    async def lose(stage: Stage) -> None:
        await stage.flush.run_once()
        await stage.scripts.redis.flushall()
        await stage.open()

    store(lose)
    [lot] = shown("codes", "count", "CAMP-001", "--lots")
    assert (lot["withdrawn"], lot["issued"], lot["quarantined"]) == (20, 4, 40 - 4)
    assert lot["imported"] == sum(
        lot[name] for name in ("stored", "out", "issued", "set_aside", "withdrawn", "quarantined", "incidents")
    )
    for typed in ((), ("--lots",), ("CAMP-001", "--lots")):
        assert "300" in fits("codes", "count", *typed)
    refused("codes", "count", "NONE", says="no pool NONE")


# --- pools that never run dry


def endless(pattern: str = PATTERN, *options: str) -> None:
    """DIST-001 may issue from a pool of this pattern."""
    ok("pool", "create", "ENDLESS", "--pattern", pattern, *(options or ("--expires-after", "30")))
    ok("distributor", "create", "DIST-001")
    ok("campaign", "create", "CAMP-001", "--category", "PAY", "--product", "PAY", "--pool", "ENDLESS")
    ok("campaign", "assign", "CAMP-001", "DIST-001")


def filling(stage: Stage, **more: Any) -> tuple[Fill, Refill]:
    fill = Fill(stage.database, stage.scripts, **more)
    return fill, Refill(stage.database, stage.scripts, low_water=20, store_outage_s=1, fill=fill, clock=lambda: 0.0)


def test_it_issues_more_than_any_block_and_is_never_exhausted(store: OnStage) -> None:
    endless()

    async def issue(stage: Stage) -> None:
        _, refill = filling(stage)
        issued = 0
        while issued < CHUNK_ROWS_MAX + 500:
            await refill.run_once()
            keys = [f"req-{issued + number}" for number in range(40)]
            answers = await stage.issue(*keys)
            assert {one.status for one in answers} <= {"ISSUED", "REFILL"}
            issued += sum(one.status == "ISSUED" for one in answers)
            await stage.flush.run_once()

    store(issue)
    assert codes_of(store, "ENDLESS")


def test_it_is_filled_ahead_and_no_further(store: OnStage) -> None:
    endless()

    async def fill(stage: Stage) -> list[int]:
        step, _ = filling(stage)
        return [await step.run_once() for _ in range(4)]

    made = store(fill)
    assert sum(made) == AHEAD_CODES
    assert made[-1] == 0
    assert len(codes_of(store, "ENDLESS")) == AHEAD_CODES


def test_two_workers_at_once_double_no_block_without_bound(store: OnStage) -> None:
    endless()

    async def fill(stage: Stage) -> None:
        steps = [filling(stage)[0] for _ in range(3)]
        for _ in range(4):
            await asyncio.gather(*(step.run_once() for step in steps))

    store(fill)
    assert AHEAD_CODES <= len(codes_of(store, "ENDLESS")) < AHEAD_CODES + 3 * CHUNK_ROWS_MAX


def test_a_pattern_that_is_used_up_ends_in_exhausted(store: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.generating.GENERATED_MIN", 1)
    endless("%%%%%")  # room for 100

    async def issue(stage: Stage) -> list[str]:
        fill, refill = filling(stage)
        while await fill.run_once():
            pass
        words = []
        for number in range(150):
            await refill.run_once()
            words += [one.status for one in await stage.issue(f"req-{number}")]
        return words

    words = store(issue)
    assert words == ["ISSUED"] * 100 + ["NONE"] * 50
    assert "0 more" in ok("pool", "show", "ENDLESS").stdout


def test_codes_expire_so_many_days_after_they_were_made(store: OnStage) -> None:
    endless()
    now = [int(time.time())]

    async def fill(stage: Stage) -> list[int]:
        step, _ = filling(stage, now=lambda: now[0])
        await step.block("ENDLESS")
        await step.block("ENDLESS")
        now[0] += 86_400
        await step.block("ENDLESS")
        async with stage.database.read() as conn:
            return list(await conn.scalars(select(schema.lots.c.expires_at).order_by(schema.lots.c.expires_at)))

    first, second = store(fill)
    assert second - first == 86_400
    assert (first + 1) % 86_400 == 0
    assert 30 * 86_400 <= first - (now[0] - 86_400) < 31 * 86_400


def test_a_pool_whose_expiry_has_passed_makes_no_more(store: OnStage) -> None:
    endless(PATTERN, "--expires", "2040-01-01")

    async def fill(stage: Stage) -> int:
        async with stage.database.write() as conn:
            await conn.execute(update(schema.pools).values(default_expires_at=int(time.time()) - 1))
        return await filling(stage)[0].run_once()

    assert store(fill) == 0


def test_expired_codes_do_not_count_as_stock_that_is_ahead(store: OnStage) -> None:
    endless(PATTERN, "--expires-after", "1")
    now = [int(time.time())]

    async def fill(stage: Stage) -> int:
        step, _ = filling(stage, now=lambda: now[0])
        while await step.run_once():
            pass
        now[0] += 3 * 86_400
        return await step.run_once()

    assert store(fill) == CHUNK_ROWS_MAX


@pytest.mark.parametrize("options", [("--expires", "2040-01-01"), ("--expires-after", "30")])
def test_codes_that_no_lease_would_take_are_not_made(store: OnStage, options: tuple[str, ...]) -> None:
    """Each block would be as useless as the one before, and there would be no end to them."""
    endless(PATTERN, *options, "--least-life", "7d")

    async def fill(stage: Stage) -> tuple[int, list[str]]:
        late = int(time.time()) + 6 * 86_400
        async with stage.database.write() as conn:
            await conn.execute(update(schema.pools).values(default_expires_at=late))
            if options[0] == "--expires-after":  # as `apply` may change it later
                await conn.execute(update(schema.pools).values(least_life_s=40 * 86_400))
        step, refill = filling(stage)
        made = await step.run_once()
        await refill.run_once()
        return made, [one.status for one in await stage.issue("req-1")]

    assert store(fill) == (0, ["NONE"])
    assert codes_of(store, "ENDLESS") == []


def test_a_pool_that_can_t_be_filled_keeps_no_other_from_it(store: OnStage, tmp_path: Path) -> None:
    endless()
    ok("pool", "create", "A-FIRST", "--pattern", "CAT-########", "--expires-after", "30")
    ok("campaign", "create", "CAMP-002", "--category", "MOB", "--product", "MOB", "--pool", "A-FIRST")

    async def fill(stage: Stage) -> list[str]:
        text = Generator(Pattern("CAT-########", ("CAT",)), 30).pack()
        async with stage.database.write() as conn:
            await conn.execute(update(schema.pools).where(schema.pools.c.id == "A-FIRST").values(generator=text))
        step, refill = filling(stage)
        assert await step.run_once() == CHUNK_ROWS_MAX
        await refill.run_once()
        return [one.status for one in await stage.issue("req-1")]

    assert store(fill) == ["ISSUED"]
    (tmp_path / "words.txt").write_text("cat")
    bad = ("--pattern", "CAT-########", "--expires-after", "30", "--no-words", str(tmp_path / "words.txt"))
    refused("pool", "create", "NEVER", *bad, says="leave no code")


def test_a_store_that_comes_back_older_in_the_middle_is_not_written_to(
    store: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("pool", "create", "P", "--expires", "2040-01-01")
    monkeypatch.setattr(generating, "CURRENCY_S", 0.0)
    look, looks = generating.refuse_unchecked, 0

    async def generate(stage: Stage) -> None:
        async def older_at_the_third_look(database: Database, scripts: Scripts) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                async with database.write() as conn:
                    await conn.execute(update(schema.catalogue_head).values(version=0))
            await look(database, scripts)

        monkeypatch.setattr(generating, "refuse_unchecked", older_at_the_third_look)
        with pytest.raises(StoreIsOlder):
            await generate_codes(
                stage.database, stage.scripts, "P", 3 * CHUNK_ROWS_MAX, Pattern(PATTERN), expires_at=None,
                import_id="p",
            )  # fmt: skip
        async with stage.database.read() as conn:
            assert await conn.scalar(select(schema.lots.c.imported)) == CHUNK_ROWS_MAX

    store(generate)


def test_codes_may_be_imported_besides(store: OnStage, tmp_path: Path) -> None:
    endless(PATTERN, "--expires", "2040-01-01")
    (tmp_path / "codes.csv").write_text("code\nGIVEN-1\nGIVEN-2\n")
    ok("codes", "import", "ENDLESS", str(tmp_path / "codes.csv"))
    assert codes_of(store, "ENDLESS") == ["GIVEN-1", "GIVEN-2"]
    assert shown("pool", "show", "ENDLESS")["pattern"] == PATTERN


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--pattern", PATTERN), "need an expiry"),
        (("--pattern", "A###*", "--expires-after", "5"), "1,000,000 are wanted"),
        (("--pattern", PATTERN, "--expires-after", "0"), "1 to 36500 days"),
        (("--pattern", "A", "--expires-after", "5"), "placeholders"),
        (("--pattern", PATTERN, "--expires-after", "7", "--least-life", "7d"), "let them expire later"),
    ],
)
def test_a_pool_that_could_not_be_filled_is_not_made(store: OnStage, options: tuple[str, ...], says: str) -> None:
    refused("pool", "create", "P", *options, says=says)
    assert shown("pool", "list") == []


def test_options_that_go_with_a_pattern_are_typed_wrong_without_one(store: OnStage) -> None:
    assert run("pool", "create", "P", "--expires-after", "5").exit_code == 2
    assert run("pool", "create", "P", "--no-words", os.devnull).exit_code == 2


def test_a_definition_of_a_later_version_stops_this_pool_and_no_other(store: OnStage) -> None:
    endless()

    async def fill(stage: Stage) -> int:
        later = {"default_expires_at": 2**32, "least_life_s": 0, "stock_version": 0, "created_at": 0}
        async with stage.database.write() as conn:
            await conn.execute(insert(schema.pools), {"id": "LATER", **later, "generator": '{"pattern": 1}'})
        return await filling(stage)[0].run_once()

    assert store(fill) == CHUNK_ROWS_MAX


def test_the_definition_survives_its_packing() -> None:
    generator = Generator(Pattern(PATTERN, ("CAT",)), 30)
    assert Generator.unpack(generator.pack()) == generator
    assert stock.CHUNK_ROWS_MAX == CHUNK_ROWS_MAX
