"""Ids as clients write them, and what is answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest

from service.domain import Terms
from service.store.vouchers import Held
from service.web.v3_reading import LedgerReading
from service.web.v3_retrieval import OwnVouchers, ids_of, uuid_of

ONE = "6F9619FF-8B86-4D01-B42D-00CF4FC964FF"
OTHER = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
MANY = [f"00000000-0000-4000-8000-{number:012}" for number in range(21)]
REQUEST_ID = "5f0c0f4e-3a5c-4f57-9d1a-0d5f0ad35a4c"
NOW = 1_800_000_000
TERMS = Terms("Ten", True, False, True, False, "EUR", 1_000, "", "UTC", "https://v.example/", "")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("-", ""))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (f"id={ONE}", [_bytes(ONE)]),
        (f"id={OTHER},{ONE}", [_bytes(OTHER), _bytes(ONE)]),
        (f"page=2&id={OTHER}%2C{ONE}", [_bytes(OTHER), _bytes(ONE)]),
        ("id=" + ",".join(MANY[:20]), [_bytes(one) for one in MANY[:20]]),
        ("id=" + ",".join(MANY), "ids_too_many"),
        ("id=" + ",".join(["x"] * 21), "ids_too_many"),
        ("id=" + ",".join([ONE] * 21), "ids_too_many"),
        (f"id={ONE},{ONE}", "ids_repeated"),
        (f"id={ONE},{ONE.lower()}", "ids_repeated"),
        (f"id={ONE},x,{ONE}", "ids_malformed"),
        ("", "ids_malformed"),
        ("id", "ids_malformed"),
        ("id=", "ids_malformed"),
        ("ID=" + ONE, "ids_malformed"),
        (f"id={ONE},", "ids_malformed"),
        (f"id={ONE}&id={OTHER}", "ids_malformed"),
        (f"id={ONE}, {OTHER}", "ids_malformed"),
        (f"id={ONE}%0A", "ids_malformed"),
        (f"id={ONE.replace('-', '')}", "ids_malformed"),
        (f"id={{{ONE}}}", "ids_malformed"),
        (f"id=urn:uuid:{ONE}", "ids_malformed"),
        (f"id={ONE[:-1]}g", "ids_malformed"),
        (f"id={ONE[:-1]}%D9%A3", "ids_malformed"),
        (f"id={ONE[:-1]}%FF", "ids_malformed"),
        ("id=' or 1=1 --", "ids_malformed"),
    ],
)
def test_ids_that_are_not_as_the_contract_has_them_are_refused(query: str, said: object) -> None:
    assert ids_of(query.encode()) == said


def test_query_that_is_not_ascii_is_no_failure() -> None:
    assert ids_of(b"id=\xff\x00") == "ids_malformed"


class _Known:
    """A ledger that answers with what it was given, and remembers what it was asked for."""

    def __init__(self, answer: dict[bytes, Held] | str) -> None:
        self.answer = answer
        self.asked: list[tuple[str, list[bytes]]] = []

    async def read(self, client: str, ids: Sequence[bytes]) -> Any:
        self.asked.append((client, list(ids)))
        return self.answer


def _own(known: _Known) -> OwnVouchers:
    return OwnVouchers(cast(LedgerReading, known), unix_clock=lambda: NOW)


def _held(text: str, **changed: Any) -> Held:
    held = Held(
        _bytes(text), "", 1_000, "CODE", NOW, "CL", "D", "P", "\tP\t1\t\t", TERMS.pack(), NOW - 9, "active", None, None
    )
    return msgspec.structs.replace(held, **changed)


async def test_vouchers_come_in_the_order_asked_and_unknown_ones_are_left_out() -> None:
    known = _Known({_bytes(ONE): _held(ONE), _bytes(OTHER): _held(OTHER, status="used", remaining=0)})
    answer = await _own(known).vouchers("CL", f"id={OTHER},{MANY[0]},{ONE}".encode(), REQUEST_ID)
    assert answer.status == 200
    body = msgspec.json.decode(answer.body)
    assert list(body) == ["request_id", "vouchers"]
    assert body["request_id"] == REQUEST_ID
    told = [(one["voucher_id"], one["status"], one["remaining_amount"]) for one in body["vouchers"]]
    assert told == [(OTHER, "used", 0), (ONE.lower(), "active", 1_000)]
    assert known.asked == [("CL", [_bytes(OTHER), _bytes(MANY[0]), _bytes(ONE)])]


@pytest.mark.parametrize(
    ("status", "expires_at", "told"),
    [
        ("active", NOW, "active"),
        ("active", NOW - 1, "expired"),
        ("inactive", NOW, "inactive"),
        ("inactive", NOW - 1, "expired"),
        ("used", NOW - 1, "used"),
        ("voided", NOW - 1, "voided"),
    ],
)
async def test_what_is_over_is_expired_unless_it_was_used_or_voided(status: str, expires_at: int, told: str) -> None:
    known = _Known({_bytes(ONE): _held(ONE, status=status, code_expires_at=expires_at)})
    answer = await _own(known).voucher("CL", ONE, REQUEST_ID)
    body = msgspec.json.decode(answer.body)
    assert (list(body), body["voucher"]["status"]) == (["request_id", "voucher"], told)


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        ({}, 404, "404-D4E"),
        ("not_yet", 503, "503-B0A"),
        ("overloaded", 503, "503-B06"),
        ("store_unreachable", 503, "503-B07"),
    ],
)
async def test_refusals_are_those_of_the_contract(said: Any, status: int, code: str) -> None:
    own = _own(_Known(said))
    for answer in (
        await own.voucher("CL", ONE, REQUEST_ID),
        await own.vouchers("CL", f"id={ONE}".encode(), REQUEST_ID),
    ):
        body = msgspec.json.decode(answer.body)
        assert (answer.status, body["error"]["code"], body["request_id"]) == (status, code, REQUEST_ID)


async def test_path_that_is_no_uuid_is_not_looked_up() -> None:
    known = _Known({})
    assert uuid_of(ONE.replace("-", "")) is None
    for text in ("x", ONE.replace("-", ""), f"{ONE}\n", "' or 1=1 --"):
        answer = await _own(known).voucher("CL", text, REQUEST_ID)
        assert (answer.status, msgspec.json.decode(answer.body)["error"]["code"]) == (404, "404-D4E")
    assert known.asked == []
