"""What the users of one load test are told: one file, which may be replaced while they run."""

from __future__ import annotations

from pathlib import Path

import msgspec

FILE_VARIABLE = "LOADTEST_PLAN"  # names the file to locust's processes


class Seller(msgspec.Struct, frozen=True):
    """A distributor, and what its users ask with.  ``token_name`` is what records call ``token``; the last three are of
    its client on Client API v3, '' if it has none."""

    distributor: str
    product: str
    token_name: str
    token: str
    client_id: str = ""
    client_secret: str = ""
    product_code: str = ""


class Plan(msgspec.Struct, frozen=True):
    """``seconds``: how long the scenario takes altogether; ``record``: the file that attempts are written to."""

    scenario: str
    seconds: float
    url: str
    record: str
    sellers: dict[str, Seller]


def load(path: Path) -> Plan:
    return decode(path.read_bytes())


decode = msgspec.json.Decoder(Plan).decode
