"""Every Redis key, spelled once.

A *partition* is named by its tag, ``{0}`` for partition 0, so that all keys of one partition share a
cluster slot.  Keys that hold a generation's data carry its number; a roll of the generation therefore
starts from keys that nothing old can reach (docs/architecture.md, "Generations").
"""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from typing import Final, NamedTuple
from uuid import UUID

# Keys that live as long as the data set; every other key has an expiry or goes with its generation.
PERMANENT: Final = re.compile(
    r"^\{\d+\}:("
    r"fence|generation|demand|catalogue:newest|catalogue:\d+|catalogue:processes"
    r"|\d+:(totals|outbox|window:.+|pool:.+|caps:.+:total)"
    r")$"
)


def tag(partition: int) -> str:
    """The hash tag of a partition (one partition until campaign-wide caps can be shared)."""
    return f"{{{partition}}}"


def fence(partition: int) -> str:
    """String: the lowest catalogue version that scripts accept.  Never expires."""
    return f"{tag(partition)}:fence"


def generation(partition: int) -> str:
    """Hash: ``open`` generation, the ``replid`` and ``run_id`` accepted for it, ``restoring``, ``synced``.  Never
    expires."""
    return f"{tag(partition)}:generation"


def demand(partition: int) -> str:
    """Sorted set: pools to refill, scored by the codes left in their window.  Drained by the worker."""
    return f"{tag(partition)}:demand"


def totals(partition: int, generation: int) -> str:
    """Hash of counts: ``seq``, ``codes`` and ``bytes`` (in the outbox), ``restocked``, ``popped``, ``set_aside``,
    ``taken_back``, ``withdrawn``; ``flushed``, the outbox sequences that went into the ledger last, and ``lost``, one
    that the store does not have any more."""
    return f"{tag(partition)}:{generation}:totals"


def outbox(partition: int, generation: int) -> str:
    """Stream: issuances, and codes that left a window otherwise, that are not yet in the ledger."""
    return f"{tag(partition)}:{generation}:outbox"


def window(partition: int, generation: int, pool: str) -> str:
    """List of packed codes (``domain.Code``), the next one to issue at its head."""
    return f"{tag(partition)}:{generation}:window:{pool}"


def pool(partition: int, generation: int, pool: str) -> str:
    """Hash: ``lease`` (last applied), ``stock`` (version), ``exhausted`` (at which version), ``low`` (water)."""
    return f"{tag(partition)}:{generation}:pool:{pool}"


def caps(partition: int, generation: int, campaign: str, period: str) -> str:
    """Hash of counters: ``period`` is ``total`` or ``<kind>:<UTC second at which it starts>``."""
    return f"{tag(partition)}:{generation}:caps:{campaign}:{period}"


def rate(partition: int, generation: int, distributor: str) -> str:
    """String: Unix microseconds from which on the distributor may have its whole burst again.  Expires then."""
    return f"{tag(partition)}:{generation}:rate:{distributor}"


def replay(partition: int, generation: int, api: str, client: str, key: str) -> str:
    """String: the record of one answered request.  Expires after the published retention."""
    return f"{replays(partition, generation)}{api}:{client}:{short(key)}"


def replays(partition: int, generation: int) -> str:
    """What the keys of all replay records of a generation begin with; ``api:client:`` and the short key follow."""
    return f"{tag(partition)}:{generation}:"


def short(key: str) -> str:
    """``key`` as it stands in the name of its replay record: a UUID, which most are, in 23 characters instead of 36,
    the first a blank, which no key has.  Different keys stay different."""
    if len(key) == 36 and _UUID(key):
        return " " + b2a_base64(bytes.fromhex(key.replace("-", "")), newline=False)[:22].decode()
    return key


def whole(short: str) -> str:
    """The key that ``short`` made this of."""
    if short.startswith(" "):
        return str(UUID(bytes=a2b_base64(short[1:] + "==")))
    return short


_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch


class ReplayName(NamedTuple):
    """What the name of a replay record's key says."""

    generation: int
    api: str
    client: str
    key: str


def replay_name(key: str) -> ReplayName | None:
    """What ``replay`` made this key of; None if it is no replay record's."""
    if (found := _REPLAY.fullmatch(key)) is None:
        return None
    try:
        return ReplayName(int(found[1]), found[2], found[3], whole(found[4]))
    except ValueError:
        return None


def generation_of(key: str) -> int:
    """The generation whose data this key holds, 0 if it holds none's."""
    found = _OF_GENERATION.match(key)
    return int(found[1]) if found is not None else 0


def catalogue_version(key: str) -> int:
    """The version whose snapshot this key holds, 0 if it holds none."""
    found = _CATALOGUE.fullmatch(key)
    return int(found[1]) if found is not None else 0


_REPLAY: Final = re.compile(r"\{\d+\}:(\d+):(v\d+):([^:]+):(.+)")
_OF_GENERATION: Final = re.compile(r"\{\d+\}:(\d+):")
_CATALOGUE: Final = re.compile(r"\{\d+\}:catalogue:(\d+)")


def of_partition(partition: int) -> str:
    """Match pattern of every key of a partition."""
    return f"{tag(partition)}:*"


def of_generation(partition: int, generation: int) -> str:
    """Match pattern of every key that carries this generation."""
    return f"{tag(partition)}:{generation}:*"


def catalogue(version: int) -> str:
    """String: the published snapshot.  Superseded ones expire after minutes."""
    return f"{tag(0)}:catalogue:{version}"


def catalogue_newest() -> str:
    """String: the version that processes should have loaded by now."""
    return f"{tag(0)}:catalogue:newest"


def catalogue_processes() -> str:
    """Hash: process id -> ``version:unix ms``, how publishing knows who has loaded what."""
    return f"{tag(0)}:catalogue:processes"
