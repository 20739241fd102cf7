"""Ids of vouchers that nobody can guess: derived from a voucher's position in stock with a secret key.

They cost no random source and no storage on the hot path, and every process derives the same.  Knowing codes,
positions or other ids tells nothing about one: all of it is the output of a keyed hash.  The id of the key goes into
the record, so that a record answers with the same ids after the present key was replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from string import ascii_lowercase, ascii_uppercase, digits
from struct import Struct
from typing import Final, NamedTuple

from service.errors import UnknownIdKey

KEY_BYTES_MIN: Final = 32
SHORT_CHARACTERS: Final = 11  # 62 ** 11 > 2 ** 64
PIN_MIN: Final = 1_000  # four digits, none of them a zero in front that a form would drop
PIN_MAX: Final = 9_999

_ALPHABET: Final = digits + ascii_uppercase + ascii_lowercase
_PAIRS: Final = tuple(high + low for high in _ALPHABET for low in _ALPHABET)
_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
_NUMBERS: Final = Struct(">16xQQ").unpack  # what comes behind a UUID
_VERSION: Final = ~(0xF << 76 | 0x3 << 62) & (1 << 128) - 1
_RANDOM: Final = 0x4 << 76 | 0x2 << 62  # a UUID of version 4: nothing about it can be told from it


class Identity(NamedTuple):
    """What one voucher is known by: its id (a UUID), the end of its short link, and that link's PIN."""

    voucher_id: str
    short: str
    pin: int


class IdKeys:
    """The keys that ids are derived with: ``current`` names the one for new vouchers, the others stay for old ones."""

    def __init__(self, current: str, keys: Mapping[str, bytes]) -> None:
        self.current = current
        self._vouchers = {name: blake2b(key=key, digest_size=32, person=b"voucher") for name, key in keys.items()}
        self._requests = {name: blake2b(key=key, digest_size=16, person=b"request") for name, key in keys.items()}

    def identity(self, key: str, lot: int, seq: int) -> Identity:
        """The ids of the voucher at this position of stock.  Raises UnknownIdKey."""
        keyed = self._vouchers.get(key)
        if keyed is None:
            raise UnknownIdKey(f"vouchers were issued with the id key {key}, which the secrets file does not hold")
        hashed = keyed.copy()
        hashed.update(b"%d:%d" % (lot, seq))
        digest = hashed.digest()
        text, (short, pin) = digest.hex(), _NUMBERS(digest)
        return Identity(  # its UUID is not made by way of a number, which costs twice as much
            f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}",
            _spelled(short),
            PIN_MIN + pin % (PIN_MAX - PIN_MIN + 1),
        )

    def request_id(self, key: str, client: str, idempotency_key: str, issued_at: int) -> str:
        """The id of an answered request, as a UUID: the same in each of its answers.  Raises UnknownIdKey."""
        return uuid_text(self.request_number(key, client, idempotency_key, issued_at))

    def request_number(self, key: str, client: str, idempotency_key: str, issued_at: int) -> int:
        """The same, as its 128 bits."""
        keyed = self._requests.get(key)
        if keyed is None:
            raise UnknownIdKey(f"requests were answered with the id key {key}, which the secrets file does not hold")
        hashed = keyed.copy()
        hashed.update(f"{client}\n{idempotency_key}\n{issued_at}".encode())
        return int.from_bytes(hashed.digest(), "big") & _VERSION | _RANDOM


NO_KEYS: Final = IdKeys("", {})  # of an installation without a secrets file: it has no vouchers with ids


def uuid_text(number: int) -> str:
    """A UUID's 128 bits as it is written."""
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def uuid_told(octets: bytes | None) -> str:
    """A UUID's 16 bytes as it is written; '' for none."""
    return "" if octets is None else uuid_text(int.from_bytes(octets, "big"))


def same_id(one: str, other: str) -> bool:
    """Whether both name the same: as texts, and where both are UUIDs whatever the case of their letters."""
    return one == other or (one.lower() == other.lower() and is_uuid(one))


def is_uuid(text: str) -> bool:
    """Whether it is one with its hyphens, in letters of either case."""
    return _UUID(text) is not None


_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}").fullmatch


def random_uuid(bits: int) -> str:
    """A UUID of version 4 from 128 random bits."""
    return uuid_text(bits & _VERSION | _RANDOM)


def _spelled(number: int) -> str:
    """64 bits in base 62: by halves, because small numbers are divided in half the time."""
    high, low = divmod(number, _PAIRS_3)
    low, sixth = low // _PAIRS_1, low % _PAIRS_1
    high, third = high // _PAIRS_1, high % _PAIRS_1
    return (
        f"{_ALPHABET[high // _PAIRS_1]}{_PAIRS[high % _PAIRS_1]}{_PAIRS[third]}"
        f"{_PAIRS[low // _PAIRS_1]}{_PAIRS[low % _PAIRS_1]}{_PAIRS[sixth]}"
    )


_PAIRS_1: Final = len(_PAIRS)
_PAIRS_3: Final = len(_PAIRS) ** 3
