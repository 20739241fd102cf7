"""One voucher as Client API v3 tells it: the same bytes whenever it is told of the same record."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import msgspec

from service.domain import Terms
from service.identity import Identity
from service.vouchers import expires_at, local_time, voucher_name

Render = Callable[[str, Identity, int, int], str]

RENDERERS_MAX: Final = 1_000  # products at a time, or face values of open-value ones; one is about 2 KB


@lru_cache(maxsize=RENDERERS_MAX)
def voucher_renderer(terms: str, product: str, face_value: int | None) -> Render:
    """What makes a voucher of these packed terms, just issued, into a JSON object.

    It takes the code, its identity, the second it was issued and the one its code expires (Unix).  Raises ValueError if
    ``terms`` are none.
    """
    return _renderer(Terms.unpack(terms), product, face_value, "active", None)


def told_now(
    terms: Terms, product: str, face_value: int | None, code: str, identity: Identity, issued_at: int,
    code_expires_at: int, *, status: str, remaining: int | None, now: int,
) -> str:  # fmt: skip
    """The voucher as it is ``now``: ``status`` and ``remaining`` are what somebody set (None: as it was issued).

    One that is over and was neither voided nor used is ``expired``.
    """
    if status not in ("voided", "used") and expires_at(terms, issued_at, code_expires_at) < now:
        status = "expired"
    return _renderer(terms, product, face_value, status, remaining)(code, identity, issued_at, code_expires_at)


def _renderer(terms: Terms, product: str, face_value: int | None, status: str, remaining: int | None) -> Render:
    if remaining is None:
        remaining = terms.amount if face_value is None or terms.amount is not None else face_value
    name, own_name = _json(voucher_name(terms, face_value)), _json(terms.name)
    url, short_url = _json(terms.url)[:-1], _json(terms.short_url)[:-1]
    flags = ",".join(
        f'"{field}":{str(getattr(terms, field)).lower()}'
        for field in ("is_value_based", "is_status_available", "is_multiple_use")
    )
    middle = f'","name":{name},"status":"{status}","expiration":"'
    rest = (
        f'","currency":{_json(terms.currency)},"remaining_amount":{remaining},"product_code":{_json(product)},'
        f'"product_name":{own_name},{flags},"url":{url}'
    )

    def render(code: str, identity: Identity, issued_at: int, code_expires_at: int) -> str:
        if '"' in code or "\\" in code:
            code = _json(code)[1:-1]
        voucher_id = identity.voucher_id
        expiration = local_time(expires_at(terms, issued_at, code_expires_at), terms.time_zone)
        short = f'"short_url":{short_url}{identity.short}","short_url_pin":{identity.pin}}}' if terms.short_url else ""
        return (
            f'{{"voucher_code":"{code}","voucher_id":"{voucher_id}{middle}{expiration}{rest}{voucher_id}"'
            f"{',' if short else '}'}{short}"
        )

    return render


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()
