"""Products of Client API v3 in the control plane.

What a product issues from, when, to whom and under which caps is a campaign with its code for an id: it is made along
with the product, and the functions of ``campaigns`` change it.  What was issued keeps the terms that it was issued
under.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Cap
from service.domain import instant
from service.errors import Conflict
from service.store import campaigns
from service.store.control import TIME_MAX, check_id, check_text
from service.store.schema import products

AMOUNT_MAX: Final = 10**12  # cents, ten milliards; far below what JSON numbers hold exactly
TEXT_MAX: Final = 10_000  # characters of a description or of terms and conditions

# How long after issuance a voucher may end: a hundred years.
COUNT_MAX: Final = {"days": 36_500, "months": 1_200, "years": 100}

_URL: Final = re.compile(r"https?://[!-~]{1,180}")


class Details(msgspec.Struct, frozen=True):
    """What a product says of itself (api-v3 "Product").  ``amount`` is cents, or items if ``currency`` is '', None if
    ``is_open_value``; ``expiry`` as in ``domain.Terms``; ``url`` and ``short_url`` are what a voucher's id and short
    link are appended to, '' for no short link."""

    name: str
    url: str
    description: str = ""
    is_open_value: bool = False
    is_status_available: bool = True
    is_multiple_use: bool = False
    currency: str = ""
    amount: int | None = None
    expiry: str = ""
    expiry_scheme: str = ""
    short_url: str = ""
    image: str = ""
    terms_and_conditions: str = ""

    @property
    def is_value_based(self) -> bool:
        """Whether it is worth money: then it has a currency."""
        return bool(self.currency)


async def create(
    connection: AsyncConnection,
    code: str,
    details: Details,
    *,
    pool: str,
    starts_at: int,
    until: int,
    time_zone: str,
    caps: Sequence[Cap],
    now: int,
) -> None:
    """The product exists, is not paused, and nobody is assigned to it.

    Raises NotFound for an unknown pool, Conflict if a product or campaign of this name exists or a value breaks a rule.
    """
    check_id("product", code)
    _check(details)
    _refuse_past(details.expiry, now)
    await campaigns.create_for_product(
        connection, code, pool=pool, starts_at=starts_at, until=until, time_zone=time_zone, caps=caps, now=now
    )
    await connection.execute(insert(products), {"code": code, **_row(details)})


async def change(
    connection: AsyncConnection, code: str, changes: dict[str, object], now: int, if_version: int | None = None
) -> Details:
    """These fields of ``Details`` have other values, the rest is as it was; what it says now.

    Raises NotFound; Conflict if a value breaks a rule, if it is over, or if it is not at ``if_version`` any more.
    """
    await campaigns.touch_product(connection, code, now, if_version)
    row = (await connection.execute(select(products).where(products.c.code == code))).one()
    before = Details(**{name: row._mapping[name] for name in Details.__struct_fields__})
    details = msgspec.structs.replace(before, **changes)
    _check(details)
    if details.expiry != before.expiry:
        _refuse_past(details.expiry, now)
    await connection.execute(update(products).where(products.c.code == code).values(_row(details)))
    return details


def _row(details: Details) -> dict[str, Any]:
    return {**msgspec.structs.asdict(details), "is_value_based": details.is_value_based}


def _check(details: Details) -> None:
    if not 1 <= len(details.name) <= 200 or not details.name.isprintable():
        raise Conflict("a product's name has 1 to 200 printable characters")
    if re.fullmatch(r"([A-Z]{3})?", details.currency) is None:
        raise Conflict("a currency has three capital letters, SGD say")
    if details.is_open_value:
        if details.amount is not None:
            raise Conflict("an open-value product has no amount: its clients say what each voucher is worth")
        if not details.currency:
            raise Conflict("an open-value product needs a currency")
    elif details.amount is None or not 1 <= details.amount <= AMOUNT_MAX:
        raise Conflict(f"a product that is not open-value is worth 1 to {AMOUNT_MAX:,} cents, or as many items")
    if "${FV}" in details.name and not details.is_open_value:
        raise Conflict("${FV} in a name stands for the face value, which only open-value products have")
    _check_expiry(details.expiry)
    for name, most in (("expiry_scheme", 200), ("description", TEXT_MAX), ("terms_and_conditions", TEXT_MAX)):
        check_text(name.replace("_", " "), getattr(details, name), most)
    for name in ("url", "short_url", "image"):
        value = getattr(details, name)
        if (value or name == "url") and _URL.fullmatch(value) is None:
            raise Conflict(f"{name.replace('_', ' ')} has to be an http or https address of at most 188 characters")


def _check_expiry(expiry: str) -> None:
    if not expiry:
        return
    unit, _, number = expiry.partition(":")
    most = TIME_MAX if unit == "until" else COUNT_MAX.get(unit, 0)
    if not number.isdigit() or not 1 <= int(number) <= most:
        raise Conflict("a voucher expires on a day, or up to 36500 days, 1200 months or 100 years after it was issued")


def _refuse_past(expiry: str, now: int) -> None:
    unit, _, number = expiry.partition(":")
    if unit == "until" and int(number) <= now:
        raise Conflict(f"a voucher can't expire in the past: {instant(int(number))} is over")
