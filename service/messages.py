"""The bodies of the published APIs: what validates or describes them, what the documents are made of, and what the
Python client reads.  Field by field those of the contracts (api-v1, api-v3)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

# --- Voucher Request API

KEY: Final = r"[!-~]{1,128}"
NAME: Final = r"[A-Za-z0-9._-]{1,64}"
TERMINAL: Final = r"[ -~]{1,64}"
PRODUCTS_MAX: Final = 16

ProductId = Annotated[str, Meta(pattern=f"^{NAME}$")]


class VoucherRequest(msgspec.Struct):
    """One sale that is to be given a voucher."""

    request_id: Annotated[str, Meta(pattern=f"^{KEY}$", description="one for each sale; the same again for a retry")]
    distributor_id: Annotated[str, Meta(pattern=f"^{NAME}$")]
    terminal_id: Annotated[str, Meta(pattern=f"^{TERMINAL}$")]
    product_ids: Annotated[
        list[ProductId],
        Meta(min_length=1, max_length=PRODUCTS_MAX, description="what was sold; the first that has a voucher wins"),
    ]


class VoucherIssued(msgspec.Struct):
    """The voucher for one sale."""

    status: Literal["success"]
    campaign_id: str
    category_id: str
    product_id: str
    voucher_code: str
    serial_number: str
    expiry_date: Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
    request_id: str
    issued_at: Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class Stopped(msgspec.Struct):
    """A campaign of the distributor for one product, and the rule that stopped it."""

    campaign_id: str
    stopped_by: Literal["paused", "before", "after", "cap_reached", "exhausted"]


class Tried(msgspec.Struct):
    """One product that was asked for."""

    product_id: str
    campaigns: list[Stopped]


class Problem(msgspec.Struct, omit_defaults=True):
    """Why there is no voucher (RFC 9457).  ``retryable``: the same request may be sent again and may succeed."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    code: str
    retryable: bool
    request_id: str | msgspec.UnsetType = msgspec.UNSET
    field: str | msgspec.UnsetType = msgspec.UNSET
    considered: list[Tried] | msgspec.UnsetType = msgspec.UNSET


# --- Client API v3

QUANTITY_MAX: Final = 20
FACE_VALUE_SAID_MAX: Final = 2**53  # beyond, an integer is not the same in every language; none close is accepted

Uuid = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class IssueRequest(msgspec.Struct, gc=False):
    """How many vouchers of a product are wanted."""

    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX)]
    face_value: (
        Annotated[
            int, Meta(ge=-FACE_VALUE_SAID_MAX, le=FACE_VALUE_SAID_MAX, description="cents; open-value products only")
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    client_reference: (
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_/#:.\-]{1,50}$", description="kept with the vouchers")]
        | msgspec.UnsetType
    ) = msgspec.UNSET


class Voucher(msgspec.Struct, frozen=True, omit_defaults=True):
    """One voucher.  ``remaining_amount`` is cents, or items if not ``is_value_based``."""

    voucher_code: str
    voucher_id: Uuid
    name: str
    status: Literal["active", "inactive", "expired", "voided", "used"]
    expiration: Time
    currency: Annotated[str, Meta(pattern="^([A-Z]{3})?$")]
    remaining_amount: Annotated[int, Meta(ge=0)]
    product_code: str
    product_name: str
    is_value_based: bool
    is_status_available: bool
    is_multiple_use: bool
    url: str
    short_url: str | msgspec.UnsetType = msgspec.UNSET
    short_url_pin: int | msgspec.UnsetType = msgspec.UNSET


class Product(msgspec.Struct, frozen=True):
    """One product of the catalogue.  ``quantity`` is null if unlimited, ``amount`` (cents, or items) if open-value."""

    product_code: str
    name: str
    description: str
    is_value_based: bool
    is_open_value: bool
    is_status_available: bool
    is_multiple_use: bool
    currency: Annotated[str, Meta(pattern="^([A-Z]{3})?$")]
    amount: int | None
    quantity: int | None
    expiry_scheme: str
    valid_from: Time | None
    valid_until: Time | None
    image: str
    terms_and_conditions: str


class Error(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong, and what to do."""

    code: Annotated[str, Meta(pattern="^[0-9]{3}-[0-9A-F]{3}$")]
    message: str
    documentation: str
    details: str | msgspec.UnsetType = msgspec.UNSET


class Refused(msgspec.Struct, frozen=True):
    """Nothing was done."""

    request_id: Uuid
    error: Error


class VouchersAnswer(msgspec.Struct, frozen=True):
    """Vouchers that were issued, or that were asked for by their ids."""

    request_id: Uuid
    vouchers: tuple[Voucher, ...]


class PartAnswer(msgspec.Struct, frozen=True):
    """Fewer vouchers than were asked for: a cap left no more."""

    request_id: Uuid
    error: Error
    vouchers: tuple[Voucher, ...]


class VoucherAnswer(msgspec.Struct, frozen=True):
    """One voucher."""

    request_id: Uuid
    voucher: Voucher


class ProductsAnswer(msgspec.Struct, frozen=True):
    """The products that are assigned to the client."""

    request_id: Uuid
    products: tuple[Product, ...]


class ProductAnswer(msgspec.Struct, frozen=True):
    """One product."""

    request_id: Uuid
    product: Product


# --- tokens


class TokenAnswer(msgspec.Struct, frozen=True):
    """An access token for ``expires_in`` seconds (RFC 6749)."""

    access_token: str
    expires_in: int
    token_type: Literal["Bearer"]


class TokenRefused(msgspec.Struct, frozen=True):
    """Why there is no access token (RFC 6749)."""

    error: str
    error_description: str = ""
