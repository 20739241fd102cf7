"""What `voucherd up` puts into an empty store, so that the first curl gets a voucher: a distributor, two campaigns and
a product, their pools with codes, a token, a client and a signing key.  Made by the same functions as the commands,
once."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import Column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import zones
from service.cli.embedded import write_private
from service.keyring import Keyring, new_signing_key
from service.scripts import Scripts
from service.store import campaigns, clients, control, products, schema
from service.store.database import Database
from service.store.stock import Row
from service.tokens import SECRET_PREFIX, digest, new_token
from service.worker.pattern import Pattern
from service.worker.publish import change
from service.worker.stocking import import_codes

ACTOR: Final = "voucherd up"
DISTRIBUTOR: Final = "DIST-001"
CLIENT: Final = "client-001"
PRODUCT: Final = "MAMVDDMMYY01"
PRODUCT_ZONE: Final = "Asia/Singapore"
CODES: Final = 20_000  # a pool: enough to try a load test on, imported in about a second


class Demo(msgspec.Struct, frozen=True):
    """One campaign of the demo.  Its pool has the campaign's id."""

    campaign: str
    category: str
    prefix: str


class Prepared(msgspec.Struct, frozen=True):
    """What the demo's distributor and its client prove themselves with."""

    token: str
    client_secret: str


DEMOS: Final = (Demo("CAMP-001", "PAY", "PSCF"), Demo("CAMP-002", "MOB", "MSCF"))


async def prepare(
    database: Database, partition: Scripts, data_dir: Path, secrets: Keyring, now: int, token_lifetime_s: int
) -> Prepared:
    """The demo is in the store, whole.

    What was made at an earlier start is left as it is, also if an operator changed it since; what an interrupted
    start left out is added.
    """
    token = await _prepare_distributor(database, partition, data_dir / "demo.token", now)
    for demo in DEMOS:
        await _import(database, partition, demo.campaign, _rows(demo.prefix))
    client_secret = await _prepare_client(database, partition, data_dir / "demo.secret", now)
    if not await _signs(database):
        key = new_signing_key(secrets)
        for action, edit in (
            ("keys add", partial(clients.add_key, public=key.public, sealed=key.sealed)),
            ("keys rotate", clients.sign_with),
        ):
            put = partial(edit, kid=key.kid, now=now, lifetime_s=token_lifetime_s)
            await change(database, partition, put, actor=ACTOR, action=action, subject=key.kid)
    await _prepare_product(database, partition, now)
    await _import(database, partition, PRODUCT, _product_rows())
    return Prepared(token, client_secret)


async def _prepare_distributor(database: Database, partition: Scripts, token_file: Path, now: int) -> str:
    token = token_file.read_text().strip() if token_file.exists() else ""
    if not await _exists(database, schema.distributors.c.id, DISTRIBUTOR):
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
    return token


async def _prepare_client(database: Database, partition: Scripts, secret_file: Path, now: int) -> str:
    secret = secret_file.read_text().strip() if secret_file.exists() else ""
    is_there = await _exists(database, schema.clients.c.id, CLIENT)
    if secret and is_there:
        return secret
    secret = secret or new_token(SECRET_PREFIX)
    write_private(secret_file, secret + "\n")  # before its digest is stored: a lost secret can't be made again

    async def edit(connection: AsyncConnection) -> None:
        if is_there:
            await clients.rotate_secret(connection, CLIENT, digest(secret), now)
        else:
            await clients.create(connection, CLIENT, DISTRIBUTOR, digest(secret), clients.SCOPES, now)

    await change(database, partition, edit, actor=ACTOR, action="client create", subject=CLIENT)
    return secret


async def _prepare_product(database: Database, partition: Scripts, now: int) -> None:
    """The product of the published example."""
    if await _exists(database, schema.products.c.code, PRODUCT):
        return
    ends_at = int(datetime(2029, 10, 31, 23, 59, 59, tzinfo=zones.zone(PRODUCT_ZONE)).timestamp())
    name = "$10 UNIQGIFT Value Based Test Voucher"
    details = products.Details(
        name=name, url="https://vouchers.example/", short_url="https://v.example/v/", currency="SGD", amount=1000,
        is_multiple_use=True, expiry=f"until:{ends_at}", expiry_scheme="until 2029-10-31",
        description="The product of the published example.",
    )  # fmt: skip

    async def edit(connection: AsyncConnection) -> None:
        await control.create_pool(connection, PRODUCT, default_expires_at=ends_at, least_life_s=0, now=now)
        await products.create(
            connection, PRODUCT, details, pool=PRODUCT, starts_at=now, until=0, time_zone=PRODUCT_ZONE, caps=(),
            now=now,
        )  # fmt: skip
        await campaigns.assign(connection, PRODUCT, DISTRIBUTOR, caps=(), now=now, noun="product")

    await change(database, partition, edit, actor=ACTOR, action="demo", subject=PRODUCT)


async def _signs(database: Database) -> bool:
    async with database.read() as connection:
        return any(key.verifies_until is None for key in await clients.keys(connection))


async def _exists(database: Database, column: Column[str], value: str) -> bool:
    async with database.read() as connection:
        return (await connection.execute(select(column).where(column == value))).first() is not None


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


async def _import(database: Database, partition: Scripts, pool: str, rows: Iterator[Row]) -> None:
    import_id = f"demo-{pool}"
    wanted = select(schema.imports.c.finished_at).where(schema.imports.c.id == import_id)
    async with database.read() as connection:
        finished = (await connection.execute(wanted)).scalar_one_or_none() is not None
    if not finished:
        await import_codes(database, partition, pool, rows, import_id=import_id, actor=ACTOR)


def _rows(prefix: str) -> Iterator[Row]:
    source, drawn = random.SystemRandom(), set[str]()
    while len(drawn) < CODES:
        letters = "".join(source.choices(string.ascii_uppercase, k=3))
        code = f"{prefix}-{letters}-{source.randrange(10**6):06}"
        if code not in drawn:
            drawn.add(code)
            yield Row(line=len(drawn), code=code, serial=None, expires_at=None)


def _product_rows() -> Iterator[Row]:
    pattern = Pattern(f"UG1{'%' * 9}").draw(random.SystemRandom())
    drawn = set[str]()
    for code in pattern:
        if code not in drawn:
            drawn.add(code)
            yield Row(line=len(drawn), code=code, serial=None, expires_at=None)
        if len(drawn) == CODES:
            return
