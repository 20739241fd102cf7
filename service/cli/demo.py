"""What `voucherd up` puts into an empty store, so that the first curl gets a voucher: a distributor, two campaigns,
their pools with codes, and a token.  Made by the same functions as the commands, once."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.cli.embedded import write_private
from service.scripts import Scripts
from service.store import campaigns, control, schema
from service.store.database import Database
from service.store.stock import Row
from service.tokens import digest, new_token
from service.worker.publish import change
from service.worker.stocking import import_codes

ACTOR: Final = "voucherd up"
DISTRIBUTOR: Final = "DIST-001"
CODES: Final = 20_000  # a pool: enough to try a load test on, imported in about a second


class Demo(msgspec.Struct, frozen=True):
    """One campaign of the demo.  Its pool has the campaign's id."""

    campaign: str
    category: str
    prefix: str


DEMOS: Final = (Demo("CAMP-001", "PAY", "PSCF"), Demo("CAMP-002", "MOB", "MSCF"))


async def prepare(database: Database, partition: Scripts, token_file: Path, now: int) -> str:
    """The demo is in the store, whole; returns the token of its distributor.

    What was made at an earlier start is left as it is, also if an operator changed it since; what an interrupted
    start left out is added.
    """
    token = token_file.read_text().strip() if token_file.exists() else ""
    if not await _exists(database):
        token = token or new_token()
        write_private(token_file, token + "\n")  # before its digest is stored: a lost token can't be made again
        await change(
            database, partition, lambda connection: _create(connection, digest(token), now),
            actor=ACTOR, action="demo", subject=DISTRIBUTOR,
        )  # fmt: skip
    elif not token:
        token = new_token()
        await change(
            database, partition, lambda connection: control.add_credential(connection, DISTRIBUTOR, digest(token), now),
            actor=ACTOR, action="token issue", subject=DISTRIBUTOR,
        )  # fmt: skip
        write_private(token_file, token + "\n")
    for demo in DEMOS:
        await _import(database, partition, demo)
    return token


async def _exists(database: Database) -> bool:
    wanted = select(schema.distributors.c.id).where(schema.distributors.c.id == DISTRIBUTOR)
    async with database.read() as connection:
        return (await connection.execute(wanted)).first() is not None


async def _create(connection: AsyncConnection, token_sha256: str, now: int) -> None:
    midnight = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    expires_at = int((midnight + timedelta(days=366)).timestamp())
    await control.create_distributor(connection, DISTRIBUTOR, "Demo distributor", now)
    for demo in DEMOS:
        await control.create_pool(connection, demo.campaign, default_expires_at=expires_at, least_life_s=0, now=now)
        await campaigns.create(
            connection, demo.campaign, category=demo.category, products=[demo.category], pool=demo.campaign,
            priority=100, starts_at=now, until=0, time_zone="UTC", caps=(), now=now,
        )  # fmt: skip
        await campaigns.assign(connection, demo.campaign, DISTRIBUTOR, caps=(), now=now)
    await control.add_credential(connection, DISTRIBUTOR, token_sha256, now)


async def _import(database: Database, partition: Scripts, demo: Demo) -> None:
    import_id = f"demo-{demo.campaign}"
    wanted = select(schema.imports.c.finished_at).where(schema.imports.c.id == import_id)
    async with database.read() as connection:
        finished = (await connection.execute(wanted)).scalar_one_or_none() is not None
    if not finished:
        await import_codes(database, partition, demo.campaign, _rows(demo.prefix), import_id=import_id, actor=ACTOR)


def _rows(prefix: str) -> Iterator[Row]:
    source, drawn = random.SystemRandom(), set[str]()
    while len(drawn) < CODES:
        letters = "".join(source.choices(string.ascii_uppercase, k=3))
        code = f"{prefix}-{letters}-{source.randrange(10**6):06}"
        if code not in drawn:
            drawn.add(code)
            yield Row(line=len(drawn), code=code, serial=None, expires_at=None)
