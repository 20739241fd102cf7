"""Much of everything, put into an installation at once: campaigns, distributors, replay records."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from itertools import product
from pathlib import Path

from sqlalchemy import Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from loadtest.contenders import CAMPAIGN, CAP, PRODUCT
from service import keys
from service.cli.connections import connected
from service.cli.demo import DISTRIBUTOR
from service.domain import Code, Record, Rule
from service.scripts import Scripts
from service.store import schema
from service.tokens import digest, new_token
from service.worker.publish import change

ASSIGNED = 20  # distributors of each campaign
ROWS = 10_000  # rows or keys at a time
NEVER_S = 86_400  # a life that no benchmark sees the end of
STATEMENT_S = 300.0  # one publication of a whole catalogue takes its time


def campaign(number: int) -> str:
    """The id of one of ``more_campaigns``, and of its product."""
    return f"SCALE-{number:05d}"


async def more_campaigns(data: Path, count: int) -> dict[str, str]:
    """So many campaigns more, each for a product of its own, with the caps of the first one and ASSIGNED distributors,
    and so many distributors with a token each, all of them assigned to the first campaign.  One publication.

    Returns tokens by distributor.
    """
    tokens = {f"SCALE-{number:05d}": new_token() for number in range(count)}
    distributors, campaigns, now = list(tokens), [campaign(number) for number in range(count)], int(time.time())
    same = {"category": PRODUCT, "pool": CAMPAIGN, "priority": 100, "starts_at": 0, "until": 0, "paused": False}
    caps = (("campaign", "total"), ("distributor", "day"), ("terminal", "day"))
    of_all = [(campaign, DISTRIBUTOR) for campaign in campaigns] + [(CAMPAIGN, one) for one in distributors]
    of_some = [
        (campaign, distributors[(number + other) % count])
        for number, campaign in enumerate(campaigns)
        for other in range(min(ASSIGNED, count))
    ]
    rows: tuple[tuple[Table, list[dict[str, object]]], ...] = (
        (schema.distributors, [{"id": id, "name": id, "active": True, "created_at": now} for id in distributors]),
        (schema.credentials, [
            {"distributor": id, "token_sha256": digest(token), "created_at": now} for id, token in tokens.items()
        ]),
        (schema.campaigns, [{**same, "id": id, "time_zone": "UTC", "created_at": now} for id in campaigns]),
        (schema.campaign_products, [{"campaign": id, "product": id} for id in campaigns]),
        (schema.caps, [
            {"campaign": id, "distributor": "", "holder": holder, "period": period, "limit": CAP, "counted_from": now,
             "limited_from": now} for id, (holder, period) in product(campaigns, caps)
        ]),
        (schema.assignments, [
            {"campaign": campaign, "distributor": distributor, "created_at": now}
            for campaign, distributor in of_all + of_some
        ]),
    )  # fmt: skip

    async def edit(conn: AsyncConnection) -> None:
        for table, made in rows:
            for start in range(0, len(made), ROWS):
                await conn.execute(insert(table), made[start : start + ROWS])

    async with connected(data, statement_s=STATEMENT_S) as here:
        await change(here.database, here.scripts, edit, actor="bench", action="grow", subject="campaigns")
    return tokens


async def more_records(
    scripts: Scripts, count: int, *, generation: int, life_s: Callable[[int], int] = lambda _: NEVER_S
) -> None:
    """So many replay records more, as ``lua/issue.lua`` leaves them, of requests that nobody sends again: UUIDs for
    keys, ids as in the contract's examples."""
    rule, now = Rule(CAMPAIGN, CAMPAIGN, "PAY", "PAY", 0), int(time.time())
    for start in range(0, count, ROWS):
        pipe = scripts.redis.pipeline(transaction=False)
        for number in range(start, min(start + ROWS, count)):
            code = Code(now + NEVER_S, 1, number, f"PSCF-XYZ-{number:06d}", f"SER-{number:06d}")
            record = Record(f"AT-{number % 1_000}\tPAY", "v1", DISTRIBUTOR, DISTRIBUTOR, "", now, rule, (code,))
            key = keys.replay(scripts.partition, generation, "v1", DISTRIBUTOR, str(uuid.uuid4()))
            pipe.set(key, record.pack(), ex=life_s(number))
        await pipe.execute()
