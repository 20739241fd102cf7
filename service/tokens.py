"""The form of a bearer token and of a client's secret, and the only thing of them that is ever stored: their digest.

Each is ``vch_`` or ``vcs_``, 43 characters that spell 256 random bits in base62, and 6 characters that spell the CRC-32
of all before them: 53 characters.  The prefix lets secret scanners find a leaked one; the checksum lets a
mistyped one be refused without a look-up.
"""

from __future__ import annotations

import hashlib
import secrets
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final
from zlib import crc32

PREFIX: Final = "vch_"  # of a distributor's token
SECRET_PREFIX: Final = "vcs_"  # of a client's secret; as long as the other
RANDOM_BITS: Final = 256
RANDOM_CHARACTERS: Final = 43  # 62 ** 43 > 2 ** 256
CHECKSUM_CHARACTERS: Final = 6  # 62 ** 6 > 2 ** 32
LENGTH: Final = len(PREFIX) + RANDOM_CHARACTERS + CHECKSUM_CHARACTERS

_ALPHABET: Final = digits + ascii_uppercase + ascii_lowercase
_PAIRS: Final = tuple(high + low for high in _ALPHABET for low in _ALPHABET)


def new_token(prefix: str = PREFIX) -> str:
    """A fresh token, or with SECRET_PREFIX a client's secret, from the system's secure random source."""
    number, characters = secrets.randbits(RANDOM_BITS), ""
    for _ in range(RANDOM_CHARACTERS):
        number, digit = divmod(number, len(_ALPHABET))
        characters = _ALPHABET[digit] + characters
    body = prefix + characters
    return body + _checksum(body)


def well_formed(token: str, prefix: str = PREFIX) -> bool:
    """Whether ``token`` could be one of ours.  Says nothing about whether it is in force."""
    return (
        len(token) == LENGTH
        and token.startswith(prefix)
        and token.isascii()
        and token[len(prefix) :].isalnum()
        and token.endswith(_checksum(token[:-CHECKSUM_CHARACTERS]))
    )


def digest(token: str) -> str:
    """SHA-256 of the token, hex: what the store and the catalogue know it by."""
    return hashlib.sha256(token.encode()).hexdigest()


def _checksum(text: str) -> str:
    high, low = divmod(crc32(text.encode("ascii")), len(_PAIRS))
    top, middle = divmod(high, len(_PAIRS))
    return _PAIRS[top] + _PAIRS[middle] + _PAIRS[low]
