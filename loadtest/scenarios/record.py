"""What the users of a load test write down: a line for every attempt, when it is over.

Codes and answers are kept as digests, so a record that is left lying around gives no voucher away.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from service.web.v3_errors import error_body

DIGEST_BYTES: Final = 12

# Kinds of attempts that the service itself does not name.
ISSUED: Final = "issued"
REPLAYED: Final = "replayed"
TIMED_OUT: Final = "timed out"  # the user stopped waiting; the service may have issued
CUT: Final = "cut"  # no connection, or one that ended before the answer
NO_ACCESS: Final = "no access token"  # for Client API v3; the sale itself was not asked for
EXHAUSTED: Final = frozenset({"exhausted", error_body("exhausted")["code"]})  # as each of the APIs says it
KINDS_OF_VOUCHERS: Final = frozenset({ISSUED, REPLAYED})


class Attempt(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One request and what became of it.  ``part``: which users; ``seller``: for whom they sell.  ``number`` counts the
    attempts of one sale from 1, the first of which was at ``sale_began`` (Unix seconds, as ``began``); ``wanted``
    vouchers.  ``status`` 0: there was no answer.  ``kind``: one of those above, or the code of the problem.  ``token``:
    the name of the one it was made with; ``answer`` and ``codes``: digests, of answers with vouchers alone.  ``final``:
    the sale is over."""

    part: str
    seller: str
    key: str
    wanted: int
    number: int
    sale_began: float
    began: float
    seconds: float
    status: int
    kind: str
    token: str
    answer: str
    codes: tuple[str, ...]
    final: bool

    @property
    def ended(self) -> float:
        return self.began + self.seconds


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Attempt).decode


class Reader:
    """Attempts of a file that is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0  # bytes

    def new(self) -> Iterator[Attempt]:
        """Those that were written since this was asked last."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                yield _decode(line)


def read(path: Path) -> list[Attempt]:
    """All of a file."""
    return list(Reader(path).new())
