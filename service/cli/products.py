"""``voucherd product``: what Client API v3 sells.

A product is issued by a campaign of its own name; who may issue it, under which caps, and whether it is paused, is
changed by the commands of ``rules``, which campaigns have too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Final

import typer
from sqlalchemy.ext.asyncio import AsyncConnection

from service import zones
from service.catalogue import Product
from service.cli import options, rules
from service.cli.connections import connected, put_in_force
from service.cli.console import print_facts, print_json, print_table, say
from service.store import products, register
from service.store.products import Details
from service.store.register import Registered
from service.vouchers import local_time
from service.worker import forms

app = typer.Typer(help="Products: what Client API v3 sells.", no_args_is_help=True)

Code = Annotated[str, options.id_of("product", "CODE")]
IfVersion = Annotated[int | None, options.if_version("product")]
_Text = str | None


def _option(says: str, metavar: str = "TEXT", **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=says, show_default=False, **more)


Name = Annotated[_Text, _option("What it is called; ${FV} stands for the face value if it is open-value.")]
Amount = Annotated[int | None, _option("What each voucher is worth: cents, or items without a currency.", "N", min=1)]
Url = Annotated[_Text, _option("What a voucher's id is appended to, for its url.", "URL")]
ShortUrl = Annotated[_Text, _option("The same for its short link; without it there is none.", "URL")]
Expires = Annotated[
    _Text,
    _option("`90 days`, `12 months` or `1 year` from issuance, a day, or `as the code`, the default.", "RULE"),
]
Description = Annotated[_Text, _option("What it is, for whoever chooses.")]
Image = Annotated[_Text, _option("Where its picture is.", "URL")]


DEFAULT_ZONE: Final = "UTC"


@app.command("create")
def create(
    code: Code,
    name: Annotated[str, _option("What it is called; ${FV} stands for the face value if it is open-value.")],
    url: Annotated[str, _option("What a voucher's id is appended to, for its url.", "URL")],
    amount: Amount = None,
    currency: Annotated[str, _option("Three letters; without it the product is worth items.", "XXX")] = "",
    open_value: Annotated[bool, typer.Option("--open-value", help="Clients say what each voucher is worth.")] = False,
    multiple_use: Annotated[bool, typer.Option("--multiple-use", help="A voucher may be used in parts.")] = False,
    no_status: Annotated[
        bool, typer.Option("--no-status", help="Whether a voucher was used is not known here.")
    ] = False,
    expires: Expires = None,
    expiry_scheme: Annotated[_Text, _option("The rule of expiry in words; without it they are made.")] = None,
    pool: Annotated[
        _Text,
        _option(
            "Where its codes come from; it may be shared. Without it a pool of the product's code is made, whose codes "
            "expire in a year unless they bring an expiry.",
            "POOL",
        ),
    ] = None,
    starts: Annotated[
        _Text, typer.Option("--from", metavar="T", help="On sale from then on: a day or a time.", show_default="now")
    ] = None,
    until: Annotated[
        _Text, typer.Option(metavar="T", help="A day (the whole of it) or a time (exclusive).", show_default="open")
    ] = None,
    time_zone: Annotated[
        str, typer.Option(metavar="ZONE", help="Whose days count, for expiries and caps.")
    ] = DEFAULT_ZONE,
    cap: Annotated[
        list[str] | None, _option("At most so many: total=5000, day=100; repeat it.", "[HOLDER:]PERIOD=N")
    ] = None,
    short_url: ShortUrl = None,
    description: Description = None,
    image: Image = None,
    terms: Annotated[_Text, _option("Terms and conditions.")] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Make a product, and its pool if none is named. Nobody issues it before `product assign`."""
    now, zone = int(time.time()), options.typed(zones.zone, time_zone)
    starts_at = now if starts is None else options.typed(forms.start_of, starts, zone)
    ends_at = 0 if until is None else options.typed(forms.end_of, until, zone)
    caps = options.typed(forms.caps, cap or (), "campaign")
    expiry, words = options.typed(forms.product_expiry, forms.AS_THE_CODE if expires is None else expires, zone)
    details = Details(
        name=name, url=url, description=description or "", is_open_value=open_value, is_status_available=not no_status,
        is_multiple_use=multiple_use, currency=currency, amount=amount, expiry=expiry,
        expiry_scheme=expiry_scheme or words, short_url=short_url or "", image=image or "",
        terms_and_conditions=terms or "",
    )  # fmt: skip

    async def edit(conn: AsyncConnection) -> None:
        if pool is None:
            await rules.make_pool(conn, "product", code, now)
        await products.create(
            conn, code, details, pool=pool or code, starts_at=starts_at, until=ends_at, time_zone=time_zone,
            caps=caps, now=now,
        )  # fmt: skip

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here, edit, action="product create", subject=code, detail=f"pool {pool or code}",
                told=lambda _: say(
                    f"product {code} is there; next: `voucherd codes import {pool or code} FILE` and "
                    f"`voucherd product assign {code} DISTRIBUTOR`"
                ),
            )  # fmt: skip

    asyncio.run(run())


@app.command("change")
def change(
    code: Code,
    name: Name = None,
    amount: Amount = None,
    url: Url = None,
    short_url: ShortUrl = None,
    expires: Expires = None,
    expiry_scheme: Annotated[_Text, _option("The rule of expiry in words.")] = None,
    description: Description = None,
    image: Image = None,
    terms: Annotated[_Text, _option("Terms and conditions.")] = None,
    if_version: IfVersion = None,
    data_dir: options.DataDir = None,
) -> None:
    """Change what a product says, at once. Vouchers that were issued keep what they were issued with."""
    given: dict[str, object] = {
        "name": name, "amount": amount, "url": url, "short_url": short_url, "expiry_scheme": expiry_scheme,
        "description": description, "image": image, "terms_and_conditions": terms,
    }  # fmt: skip
    now, changes = int(time.time()), {field: value for field, value in given.items() if value is not None}
    if not changes and expires is None:
        raise typer.BadParameter("say what is to change")

    async def edit(conn: AsyncConnection) -> Details:
        if expires is not None:
            _, rule = await register.product(conn, code)
            expiry, words = options.typed(forms.product_expiry, expires, zones.zone(rule.campaign.time_zone))
            changes.update({"expiry": expiry, "expiry_scheme": expiry_scheme or words})
        return await products.change(conn, code, changes, now, if_version)

    async def run() -> None:
        async with connected(data_dir) as here:
            await put_in_force(
                here, edit, action="product change", subject=code, detail=", ".join(sorted(changes)),
                told=lambda _: say(f"product {code} is changed; vouchers that were issued are as they were"),
            )  # fmt: skip

    asyncio.run(run())


@app.command("list")
def list_(as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """List the products, by their codes."""

    async def run() -> list[tuple[Product, Registered]]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.all_products(conn)

    found, now = asyncio.run(run()), int(time.time())
    if as_json:
        print_json([_fields(*one, now) for one in found])
        return
    print_table(
        ["product", "name", "worth", "pool", "state", "assigned to"],
        [
            (
                product.code, product.terms.name, _worth(product), rule.campaign.pool, rule.state(now),
                len(rule.campaign.assigned),
            )
            for product, rule in found
        ],
        numbers=["assigned to"],
        whole=["state"],
    )  # fmt: skip


@app.command("show")
def show(code: Code, as_json: options.AsJson = False, data_dir: options.DataDir = None) -> None:
    """Show a product: what it says, its pool, who may issue it under which caps, and the version for --if-version."""

    async def run() -> tuple[Product, Registered]:
        async with connected(data_dir) as here, here.database.read() as conn:
            return await register.product(conn, code)

    product, rule = asyncio.run(run())
    fields, campaign = _fields(product, rule, int(time.time())), rule.campaign
    if as_json:
        print_json(fields)
        return
    told = {**fields, "version": str(rule.version)}  # as it is typed
    print_facts({key.replace("_", " "): value for key, value in told.items() if key not in ("caps", "distributors")})
    print_facts({"caps": forms.caps_told(campaign.caps)})
    if campaign.assigned:
        print_table(
            ["distributor", "caps"],
            [(one, forms.caps_told(caps)) for one, caps in sorted(campaign.assigned.items())],
        )
    else:
        say(f"Nobody may issue it: `voucherd product assign {code} DISTRIBUTOR`.")


rules.add_commands(app, "product", "CODE")


def _worth(product: Product) -> str:
    terms = product.terms
    if terms.amount is None:
        return f"{terms.currency}, open"
    return f"{terms.currency} {terms.amount / 100:.2f}" if terms.is_value_based else f"{terms.amount} items"


def _fields(product: Product, rule: Registered, now: int) -> dict[str, object]:
    terms, campaign = product.terms, rule.campaign
    return {
        "product_code": product.code,
        "state": rule.state(now),
        "version": rule.version,
        "name": terms.name,
        "description": product.description,
        "is_value_based": terms.is_value_based,
        "is_open_value": terms.is_open_value,
        "is_status_available": terms.is_status_available,
        "is_multiple_use": terms.is_multiple_use,
        "currency": terms.currency,
        "amount": terms.amount,
        "expiry_scheme": product.expiry_scheme,
        "valid_from": local_time(campaign.starts_at, campaign.time_zone),
        "valid_until": local_time(campaign.until - 1, campaign.time_zone) if campaign.until else None,
        "time_zone": campaign.time_zone,
        "url": terms.url,
        "short_url": terms.short_url,
        "image": product.image,
        "terms_and_conditions": product.terms_and_conditions,
        "pool": campaign.pool,
        "unlimited": product.unlimited,
        "paused": campaign.paused,
        "caps": [forms.cap_told(cap) for cap in campaign.caps],
        "distributors": sorted(campaign.assigned),
    }
