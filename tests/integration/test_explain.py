"""What `explain` says is what `issue` does next, whatever state the partition is in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import orjson
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.catalogue import Cap, Catalogue, encode, load, period_bounds
from service.domain import RateLimit, Record, Request
from service.scripts import Answer, Routed
from service.store import campaigns, control, schema
from service.store.database import Database
from service.store.stock import Row, begin_import, import_rows
from service.tokens import digest
from service.worker.explain import Explanation, explain
from service.worker.publish import change
from tests.integration.stage import DISTRIBUTOR, OUTBOX_BYTES_MAX, OUTBOX_MAX, RETENTION_S, Stage, staged
from tests.integration.typed import ok, refused, run

OnStage = Callable[[Callable[[Stage], Any]], Any]

STATES = 24  # catalogues a seed; each is asked STEPS times, while codes and caps run out
STEPS = 12
PRODUCTS = ("PAY", "MOB", "GAME")


async def _make(stage: Stage, rng: random.Random, number: int) -> None:
    """Some campaigns, one of each kind of obstacle by chance, with few codes."""
    now = int(time.time())

    async def edit(conn: AsyncConnection) -> None:
        if DISTRIBUTOR not in (await control.snapshot(conn, 0)).distributors:
            await control.create_distributor(conn, DISTRIBUTOR, "A partner", now)
            await control.add_credential(conn, DISTRIBUTOR, digest("token"), now)
        for index in range(rng.randint(1, 6)):
            id = f"C{number}-{index}"
            starts_at, until = rng.choice(((now - 500, 0),) * 4 + ((now + 500, 0), (now - 500, now - 400)))
            await control.create_pool(conn, id, default_expires_at=None, least_life_s=0, now=now)
            await campaigns.create(
                conn, id, category="CAT", pool=id, priority=rng.randint(1, 3), time_zone="Europe/Berlin", now=now,
                products=[f"{product}-{number}" for product in rng.sample(PRODUCTS, rng.randint(1, 3))],
                starts_at=starts_at, until=until,
                caps=[Cap(holder, period, rng.randint(0, 4)) for holder, period in _some_caps(rng)],
            )  # fmt: skip
            if rng.random() < 0.85:
                caps = [Cap("distributor", "day", rng.randint(0, 6))] if rng.random() < 0.3 else []
                await campaigns.assign(conn, id, DISTRIBUTOR, caps, now)
            if rng.random() < 0.15:
                await campaigns.set_paused(conn, id, True, now)
            codes = rng.choice((0, 2, 5, 60))
            rows = [
                Row(line, f"{id}-{line}", None, now + (rng.choice((500, 600)) if line <= codes * 3 // 4 else 10**5))
                for line in range(1, codes + 1)
            ]
            await begin_import(conn, id, id, now)
            await import_rows(conn, id, id, rows, now)

    published = await change(stage.database, stage.scripts, edit, actor="test", action="test", subject="test")
    assert not published.unreached


async def _want_more_life(stage: Stage) -> None:
    """Codes that are in windows already, dozens of some pools, have too little life left from now on."""

    async def edit(conn: AsyncConnection) -> None:
        await conn.execute(update(schema.pools).values(least_life_s=1_000))

    await change(stage.database, stage.scripts, edit, actor="test", action="test", subject="test")


def _some_caps(rng: random.Random) -> list[tuple[Any, Any]]:
    every = [(holder, period) for holder in ("campaign", "distributor", "terminal") for period in ("total", "day")]
    return rng.sample(every, rng.choice((0, 0, 1, 2)))


async def _catalogue(stage: Stage) -> Catalogue:
    async with stage.database.read() as conn:
        blob = encode(await control.snapshot(conn, await control.version(conn)))
    return [part for part in load(blob) if part is not None][-1]


async def _ask(
    stage: Stage, catalogue: Catalogue, key: str, products: tuple[str, ...], terminal: str, outbox_max: int
) -> tuple[Answer, Any]:
    route = catalogue.route(DISTRIBUTOR, products)
    now = int((await stage.scripts.redis.time())[0])
    reply = await stage.scripts.issue(
        [Routed(Request("v1", DISTRIBUTOR, key, DISTRIBUTOR, products, f"{terminal}\t{key}"), route.plan)],
        generation=(await stage.scripts.generation()).open,
        version=catalogue.version,
        outbox_max=outbox_max,
        outbox_bytes_max=OUTBOX_BYTES_MAX,
        retention_s=RETENTION_S,
        bounds={
            cap.counter: period_bounds(cap.counter.period, cap.counter.time_zone, now)
            for candidate in route.plan.candidates
            for cap in candidate.caps
        },
    )
    assert reply.status == "OK"
    return reply.answers[0], route


def _same(said: Explanation, answer: Answer, route: Any) -> None:
    if answer.status == "ISSUED":
        assert (said.outcome, said.winner) == ("issue", Record.unpack(answer.detail).rule.campaign)
    elif answer.status == "NONE":
        assert said.refused == route.unavailable(answer.detail)
        assert (said.outcome, said.winner) == (said.refused.code, None)
        stopped = {(one.product_id, one.campaign_id): one.standing for one in said.campaigns}
        assert all(stopped[one.product_id, one.campaign_id] == one.stopped_by for one in said.refused.considered)
    else:
        assert (said.outcome, said.winner) == ({"REFILL": "refilling", "BACKLOG": "backlog"}[answer.status], None)


async def test_winner_and_reasons_are_what_issue_does_next(store_url: str, valkey_url: str, rng: random.Random) -> None:
    database = Database.connect(store_url)
    statuses = set()
    try:
        async with staged(database, valkey_url) as stage:
            for number in range(STATES):
                await _make(stage, rng, number)
                if number % 3:  # else the windows are empty at first
                    await stage.refill.run_once()
                if rng.random() < 0.5:
                    await _want_more_life(stage)
                catalogue = await _catalogue(stage)
                for step in range(STEPS):
                    if step >= STEPS // 2 and rng.random() < 0.5:
                        await stage.refill.run_once()
                    outbox_max = rng.choice((OUTBOX_MAX, OUTBOX_MAX, OUTBOX_MAX, 5))
                    wanted = rng.sample(PRODUCTS, rng.randint(1, 3))
                    products = tuple(f"{product}-{number}" for product in wanted)
                    terminal = rng.choice(("T1", "T2"))
                    said = await explain(
                        database, stage.scripts, DISTRIBUTOR, products, terminal=terminal, outbox_max=outbox_max,
                        outbox_bytes_max=OUTBOX_BYTES_MAX,
                    )  # fmt: skip
                    answer, route = await _ask(stage, catalogue, f"r-{number}-{step}", products, terminal, outbox_max)
                    _same(said, answer, route)
                    statuses.add(answer.status)
    finally:
        await database.close()
    assert {"ISSUED", "NONE", "REFILL", "BACKLOG"} <= statuses


def _explained(*arguments: str) -> dict[str, Any]:
    result = run("explain", *arguments, "--json")
    found: dict[str, Any] = orjson.loads(result.stdout)
    assert result.exit_code == (0 if found["winner"] else 1)
    return found


def _standings(found: dict[str, Any]) -> dict[str, str]:
    return {one["campaign_id"]: one["standing"] for one in found["campaigns"]}


def test_every_campaign_has_its_rule(store: OnStage) -> None:
    async def make(stage: Stage) -> None:
        now = int(time.time())
        await stage.campaign("WINS")
        await stage.campaign("CAPPED", caps=(Cap("terminal", "total", 0),))
        await stage.campaign("OFF")

        async def edit(conn: AsyncConnection) -> None:
            await campaigns.set_paused(conn, "OFF", True, now)
            await control.add_credential(conn, DISTRIBUTOR, digest("token"), now)
            for id, starts_at, until in (("OTHERS", 1, 0), ("EARLY", now + 900, 0), ("LATE", 1, now - 5)):
                await campaigns.create(
                    conn, id, category="C", products=["PAY"], pool="WINS", priority=200, starts_at=starts_at,
                    until=until, time_zone="UTC", caps=[], now=now,
                )  # fmt: skip
                if id != "OTHERS":
                    await campaigns.assign(conn, id, DISTRIBUTOR, [], now)
            await begin_import(conn, "i", "WINS", now)
            await import_rows(conn, "i", "WINS", [Row(1, "CODE-1", None, None)], now)

        await change(stage.database, stage.scripts, edit, actor="test", action="test", subject="test")

    store(make)
    found = _explained(DISTRIBUTOR, "PAY", "--terminal", "T1")
    assert (found["outcome"], _standings(found)["WINS"]) == ("refilling", "refilling")
    store(lambda stage: stage.refill.run_once())
    found = _explained(DISTRIBUTOR, "NONE,PAY", "--terminal", "T1")
    assert (found["outcome"], found["winner"]) == ("issue", "WINS")
    assert _standings(found) == {
        "CAPPED": "cap_reached", "OFF": "paused", "WINS": "wins", "OTHERS": "not_assigned", "EARLY": "before",
        "LATE": "after",
    }  # fmt: skip
    assert "terminal cap per total: 0 of 0 used" in {one["why"] for one in found["campaigns"]}
    assert not any("per terminal" in note for note in found["notes"])
    shown = ok("explain", DISTRIBUTOR, "PAY").stdout
    assert "--terminal names another" in " ".join(shown.split())
    assert "a voucher of WINS" in shown
    assert "true at this moment" in shown
    assert max(map(len, shown.splitlines())) <= 90
    assert _explained(DISTRIBUTOR, "NONE")["outcome"] == "no_campaign"


def test_it_says_when_nobody_could_get_anything(store: OnStage) -> None:
    refused("explain", DISTRIBUTOR, "PAY", says="no catalogue is in force")
    store(lambda stage: stage.campaign())
    found = _explained(DISTRIBUTOR, "PAY")
    assert (found["outcome"], found["winner"]) == ("token_unknown", None)
    assert _explained("DIST-404", "PAY")["outcome"] == "distributor_unknown"

    async def suspend(stage: Stage) -> None:
        async def edit(conn: AsyncConnection) -> None:
            await control.set_active(conn, DISTRIBUTOR, False)

        await change(stage.database, stage.scripts, edit, actor="test", action="test", subject=DISTRIBUTOR)

    store(suspend)
    assert _explained(DISTRIBUTOR, "PAY")["outcome"] == "distributor_suspended"

    async def behind(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await control.raise_version(conn)

    store(behind)
    assert any("catalogue 3 is NOT YET IN FORCE" in note for note in _explained(DISTRIBUTOR, "PAY")["notes"])

    async def lose(stage: Stage) -> None:
        await stage.scripts.redis.hset(keys.generation(0), "replid", "another")

    store(lose)
    found = _explained(DISTRIBUTOR, "PAY")
    assert found["outcome"] == "not_issuing"
    assert any("NOT ISSUING" in note for note in found["notes"])


def test_it_says_that_a_distributor_is_over_its_limit(store: OnStage) -> None:
    limit = RateLimit(1, 20)

    async def make(stage: Stage) -> None:
        await stage.campaign()
        now = int(time.time())

        async def edit(conn: AsyncConnection) -> None:
            await control.add_credential(conn, DISTRIBUTOR, digest("token"), now)
            await control.set_limit(conn, DISTRIBUTOR, limit)
            await begin_import(conn, "i", "CAMP-001", now)
            await import_rows(conn, "i", "CAMP-001", [Row(1, "CODE-1", None, None)], now)

        await change(stage.database, stage.scripts, edit, actor="test", action="test", subject="test")
        await stage.refill.run_once()

    async def use_up(stage: Stage) -> None:
        """As if the server's clock had gone back by an hour: nothing is left for as long as this test may take."""
        generation = (await stage.scripts.generation()).open
        await stage.scripts.redis.set(
            keys.rate(0, generation, DISTRIBUTOR), (int(time.time()) + 3_600) * 10**6, ex=3_600
        )

    async def ask(stage: Stage) -> None:
        route = (await _catalogue(stage)).route(DISTRIBUTOR, ("PAY",))
        asked = Request("v1", DISTRIBUTOR, "k", DISTRIBUTOR, ("PAY",), "T1\tPAY")
        seen = await stage.scripts.generation()
        reply = await stage.scripts.issue(
            [Routed(asked, route.plan, limit=limit)], generation=seen.open, version=seen.fence, outbox_max=OUTBOX_MAX,
            outbox_bytes_max=OUTBOX_BYTES_MAX, retention_s=RETENTION_S, bounds={},
        )  # fmt: skip
        assert [answer.status for answer in reply.answers] == ["LIMITED"]

    store(make)
    found = _explained(DISTRIBUTOR, "PAY")
    assert found["outcome"] == "issue"
    assert "limited to 1/s, 20 at once: 20 may be issued now, replays besides" in found["notes"]
    store(use_up)
    found = _explained(DISTRIBUTOR, "PAY")
    assert (found["outcome"], found["winner"]) == ("rate_limited", None)
    store(ask)


def test_a_product_of_the_other_api_is_said_to_be_one(store: OnStage) -> None:
    plain = ("--name", "Gift", "--amount", "1000", "--currency", "SGD", "--url", "https://v.example/")
    store(lambda stage: stage.campaign())
    for code in ("GIFT", "PAY"):  # the second is what a campaign serves besides
        ok("product", "create", code, *plain)
    [note] = [one for one in _explained(DISTRIBUTOR, "GIFT,PAY,GIFT,NONE")["notes"] if "Client API v3" in one]
    assert note == "GIFT is a product of Client API v3: see `voucherd product show GIFT`"


def test_what_is_no_product_is_typed_wrong(store: OnStage) -> None:
    for products in ("", "PAY,", "PAY, MOB", "\x1b[31m"):
        assert run("explain", DISTRIBUTOR, products).exit_code == 2
