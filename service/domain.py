"""The words of the service as values: codes, records, requests, outcomes.

A **record** is one line-based text, made by ``lua/issue.lua`` and by nobody else on the hot path.  What a client is
told is built from the replay record, which is why a replay is byte-identical:

    2<payload>                            layout, and what the client asked for, canonical, after the terminal ('' on
                                          v3) and a tab; compared on a replay
    <issued_at>                           Unix seconds, hexadecimal, by the Redis server's clock
    <rule>                                campaign, pool, category, product, until (0: open), tab-separated; on v3
                                          two more: the id key, and the product's terms.  What follows from what
                                          stands before is left out (``Rule.pack``)
    <code> ...                            one line a code: expires_at (hexadecimal), lot, seq, code, serial,
                                          tab-separated

Whose it is, the key that it is kept under says, so the record does not: a million of them wait for a retention.  In
the outbox four lines stand in front of it: api (v1 or v3), distributor, client (whose keys these are; the distributor
itself on v1), and key (v1: request_id; v3: Idempotency-Key, a UUID in lower case).

The first character is the layout; a new layout gets a new one and keeps the old reader (1 was never released).
No field may hold a control character; what comes from outside is validated before it gets here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Literal

import msgspec

from service.messages import QUANTITY_MAX

LAYOUT: Final = "2"
RECORD_SEPARATOR: Final = "\x1e"  # between records (and between set-aside codes) in one outbox entry

Api = Literal["v1", "v3"]
CapHolder = Literal["campaign", "distributor", "terminal"]  # whose vouchers a cap counts


@lru_cache(maxsize=10_000)  # a busy second is written thousands of times, in answers and in exports
def instant(second: int) -> str:
    """A Unix second as every API and every file writes it: RFC 3339, UTC."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Code(msgspec.Struct, frozen=True):
    """One voucher code.  ``(lot, seq)`` is its position in stock; ``expires_at`` is Unix seconds."""

    expires_at: int
    lot: int
    seq: int
    code: str
    serial: str

    def pack(self) -> str:
        return f"{self.expires_at:x}\t{self.lot}\t{self.seq}\t{self.code}\t{self.serial}"

    @classmethod
    def unpack(cls, line: str) -> Code:
        """Raises ValueError if ``line`` is not a packed code."""
        expires_at, lot, seq, code, serial = line.split("\t")
        return cls(int(expires_at, 16), int(lot), int(seq), code, serial)


class Rule(msgspec.Struct, frozen=True):
    """Which campaign turned which of the products asked for into a code.  ``until`` is Unix seconds, 0 if open.

    On v3 ``id_key`` names what the vouchers' ids are derived with, and ``terms`` is what the product said of its
    vouchers then (``Terms``, packed); both are '' on v1.
    """

    campaign: str
    pool: str
    category: str
    product: str
    until: int
    id_key: str = ""
    terms: str = ""

    def pack(self) -> str:
        """Its fields, the empty ones at the end left out.  Empty is a pool named as the campaign, a product named as
        the category (or the campaign, without one), and no end."""
        fields = (
            self.campaign, "" if self.pool == self.campaign else self.pool, self.category,
            "" if self.product == (self.category or self.campaign) else self.product, str(self.until or ""),
            self.id_key, self.terms,
        )  # fmt: skip
        return "\t".join(fields).rstrip("\t")

    @classmethod
    @lru_cache(maxsize=4_096)  # few rules make all records of a day
    def unpack(cls, line: str) -> Rule:
        """Raises ValueError if ``line`` is not a packed rule."""
        fields = line.split("\t")
        if len(fields) > _RULE_FIELDS or not fields[0]:
            raise ValueError("not a rule")
        campaign, pool, category, product, until, id_key, terms = fields + [""] * (_RULE_FIELDS - len(fields))
        if terms and not id_key:
            raise ValueError("a rule with terms names its id key")
        return cls(
            campaign, pool or campaign, category, product or category or campaign, int(until or 0), id_key, terms
        )


_RULE_FIELDS: Final = 7


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """What a product says of each of its vouchers: it goes into the record, so a replay says the same when the product
    was changed since.

    ``name`` may hold ``${FV}`` if ``is_open_value``.  ``amount`` is cents, or items if not ``is_value_based``; None if
    the face value is the client's.  ``expiry``: '' (the code's own), ``until:<Unix seconds>``, or ``days:N``,
    ``months:N``, ``years:N`` from issuance to the end of the day in ``time_zone``.  ``url`` and ``short_url`` are what
    an id and a short link are appended to; '' for no short link.
    """

    name: str
    is_value_based: bool
    is_open_value: bool
    is_status_available: bool
    is_multiple_use: bool
    currency: str
    amount: int | None
    expiry: str
    time_zone: str
    url: str
    short_url: str

    def pack(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def unpack(cls, text: str) -> Terms:
        """Raises ValueError if ``text`` is not packed terms."""
        return msgspec.json.decode(text, type=cls)


class Record(msgspec.Struct, frozen=True):
    """One answered request, whole: every field of every answer can be told from it."""

    payload: str
    api: str
    distributor: str
    client: str
    key: str
    issued_at: int
    rule: Rule
    codes: tuple[Code, ...]

    @property
    def terminal(self) -> str:
        """The device that asked; '' on an API that knows no terminals."""
        return self.payload.partition("\t")[0]

    def pack(self) -> str:
        """What is kept under the request's key."""
        head = (LAYOUT + self.payload, f"{self.issued_at:x}", self.rule.pack())
        return "\n".join((*head, *(code.pack() for code in self.codes)))

    @classmethod
    def unpack(cls, text: str, *, api: str = "", distributor: str = "", client: str = "", key: str = "") -> Record:
        """``text`` does not say whose record it is.  Raises ValueError if it is none of a layout this version reads."""
        payload, issued_at, rule, *codes = text.split("\n")
        if payload[:1] != LAYOUT or not codes:
            raise ValueError(f"not a record of layout {LAYOUT}")
        return cls(
            payload[1:], api, distributor, client, key, int(issued_at, 16),
            Rule.unpack(rule), tuple([Code.unpack(line) for line in codes]),
        )  # fmt: skip

    def pack_entry(self) -> str:
        """What is in the outbox."""
        return "\n".join((self.api, self.distributor, self.client, self.key, self.pack()))

    @classmethod
    def unpack_entry(cls, text: str) -> Record:
        """Raises ValueError if ``text`` is not what ``pack_entry`` makes."""
        api, distributor, client, key, record = text.split("\n", 4)
        return cls.unpack(record, api=api, distributor=distributor, client=client, key=key)


def codes_in(record: str) -> int:
    """How many codes a record holds."""
    return record.count("\n") - _HEAD_LINES + 1


_HEAD_LINES: Final = 3  # of a record, before its codes


class Request(msgspec.Struct, frozen=True):
    """One request as the hot path sees it, whichever API it came by.  All fields are validated.

    ``payload`` is the canonical text compared on a replay and begins with the terminal and a tab, ``products`` what
    to look for in this order, ``quantity`` 1..20 codes under this one key, ``face_value`` cents if one was sent.
    ``trace`` is the traceparent of the call that asks, '' if it sent none; it decides nothing.
    """

    api: str
    client: str
    key: str
    distributor: str
    products: tuple[str, ...]
    payload: str
    quantity: int = 1
    face_value: int | None = None
    trace: str = ""

    @property
    def terminal(self) -> str:
        """The device that asks."""
        return self.payload.split("\t", 1)[0]


class Issued(msgspec.Struct, frozen=True):
    """The voucher is the client's, durably.  ``record`` is the text above; ``replayed`` if it was issued before."""

    record: str
    replayed: bool


class KeyReused(msgspec.Struct, frozen=True):
    """The key was used for another payload.  Nothing was issued."""


Stop = Literal["paused", "before", "after", "cap_reached", "exhausted"]


class Considered(msgspec.Struct, frozen=True):
    """One campaign that was looked at for one product, and the rule that stopped it."""

    product_id: str
    campaign_id: str
    stopped_by: Stop


# Why there is no campaign to look at.
Nothing = Literal["no_campaign", "no_product", "not_assigned", "face_value"]


class Unavailable(msgspec.Struct, frozen=True):
    """No campaign may issue.  ``code`` says how far the furthest candidate got; nothing was issued."""

    code: Nothing | Literal["not_running", "cap_reached", "exhausted"]
    considered: tuple[Considered, ...]


class Unauthorized(msgspec.Struct, frozen=True):
    """The credential does not hold, by a catalogue that is in force."""

    code: Literal["token_missing", "token_unknown", "distributor_mismatch"]


class Suspended(msgspec.Struct, frozen=True):
    """The distributor, or its client, is suspended, by a catalogue that is in force."""


class Busy(msgspec.Struct, frozen=True):
    """Not now.  Retrying with the same key is safe, whether or not something was issued."""

    code: Literal["overloaded", "store_unreachable", "refilling", "draining"]


class RateLimit(msgspec.Struct, frozen=True, array_like=True):
    """What a distributor may be issued: ``rate`` vouchers a second, and ``burst`` at once after a rest of
    ``burst / rate`` seconds."""

    rate: int
    burst: int

    @classmethod
    def of(cls, rate: int, burst: int | None) -> RateLimit:
        """``burst`` None: what the rate gives in a second, but no less than one request may ask for."""
        return cls(rate, max(rate, BURST_MIN) if burst is None else burst)

    @property
    def rest_s(self) -> int:
        """Seconds after which the whole burst is there again."""
        return -(-self.burst // self.rate)


RATE_MAX: Final = 1_000_000  # vouchers a second
BURST_MIN: Final = QUANTITY_MAX  # below, a request that is allowed could never be answered
BURST_S_MAX: Final = 3_600  # what is saved for longer is a cap; ``lua/issue.lua`` takes no more


class RateLimited(msgspec.Struct, frozen=True):
    """The distributor was issued as much as its limit lets it have.  Nothing was issued to this request.

    ``left`` vouchers may be issued to it now, as many as it asked for after ``wait_us`` microseconds.
    """

    limit: RateLimit
    left: int
    wait_us: int

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which the request is within the limit, if nothing else was issued meanwhile."""
        return -(-self.wait_us // 1_000_000)


class Authenticated(msgspec.Struct, frozen=True):
    """The token belongs to this active distributor, by a catalogue that is in force."""

    distributor: str


Outcome = Issued | KeyReused | Unavailable | Unauthorized | Suspended | RateLimited | Busy
