"""What really happened in a simulation, whoever got to know of it, and whether any promise was broken.

``Truth`` is told of every entry that reaches an outbox, of every code that reaches a window, of what each client was
told and of what operators did, so most promises are checked at the moment at which they would break.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final, Protocol

import msgspec

from service.catalogue import cap_field, period_bounds
from service.domain import (
    Busy,
    Code,
    Issued,
    KeyReused,
    Outcome,
    RateLimit,
    RateLimited,
    Record,
    Request,
    Unauthorized,
    Unavailable,
)
from service.scripts import parse_separated
from service.store.inspection import SETTLED
from service.store.schema import TAKEN_BACK, WITHDRAWN
from tests.simulation.memory import Data, Server, Stream

Position = tuple[int, int]  # lot, seq

MICRO: Final = 1_000_000  # of a voucher, and of a second: so a bucket is filled exactly

OUTBOX: Final = re.compile(r"\{0\}:(\d+):outbox")
WINDOW: Final = re.compile(r"\{0\}:(\d+):window:(.+)")


class Violation(Exception):
    """A promise was broken."""


class Peek(Protocol):
    """Reads what is committed in the store, besides everybody."""

    def __call__(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]: ...


class Limit(msgspec.Struct):
    """One limit of a cap: in force at the latest when the change to the next one has returned."""

    limit: int
    until: float = float("inf")


class Happened(msgspec.Struct):
    """One change by an operator.  ``returned``: when it said that it is in force everywhere, if it did."""

    what: str
    began: float
    returned: float = float("inf")


class Told(msgspec.Struct, frozen=True):
    """One success that a client got."""

    at: float
    record: str
    replayed: bool


class Truth:
    """All that the checks need to know.  Times are virtual Unix seconds."""

    def __init__(self, server: Server, peek: Peek, retention_s: int) -> None:
        self._server = server
        self._peek = peek
        self._retention_s = retention_s
        self.violations: list[str] = []
        self.codes: dict[Position, str] = {}  # that came to windows
        self.given: set[str] = set()  # the same, wherever they stood
        self.store_was_older = False
        self.pushed: dict[Position, int] = {}  # generation whose window it came to
        self.left: dict[Position, str] = {}  # record that it went with, '' if set aside
        self.issued: dict[tuple[str, str], list[Record]] = defaultdict(list)  # by client and key
        self.records: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)  # record -> whose it is
        self.destroyed: set[Position] = set()  # issued or set aside, and the only copy of that is gone
        self.told: dict[tuple[str, str], list[Told]] = defaultdict(list)
        self.limits: dict[tuple[str, str, str, str], list[Limit]] = {}  # campaign, holder, distributor, period
        self.zones: dict[str, str] = {}
        self.campaign_pools: dict[str, str] = {}
        self.least_life: dict[str, int] = {}
        self.used: Counter[tuple[str, str, int, str]] = Counter()
        self.rates: dict[str, RateLimit] = {}  # of the distributors that have one
        # By generation and distributor: the moment (in microseconds) of the last voucher, and how full its bucket was
        # then, in microvouchers.  A generation begins without memory of the one before.
        self.buckets: dict[tuple[int, str], tuple[int, int]] = {}
        self.changes: dict[str, list[Happened]] = defaultdict(list)  # of a campaign, or of a token
        self.known: dict[str, list[tuple[float, dict[int, int]]]] = defaultdict(list)  # pool: from when, codes a lot
        self.withdrawn: dict[Position, float] = {}  # from when on nobody may get the code
        self.outcomes: Counter[str] = Counter()
        self.stock_forgotten = False  # the store is older: what it calls stored may have been issued
        # An old primary answers again: until its generation is left, what happened since is unknown to it, so for
        # some moments only P1, P2, P4 and P5 can be kept.
        self.went_back = False
        server.on_add = self._added
        server.on_push = self._pushed

    def broken(self, promise: str, how: str) -> None:
        """Remembered and not raised: whoever is running now is not to blame, and might swallow it."""
        if self.went_back and promise in ("P3", "P6", "P8"):
            return
        self.violations.append(f"{promise}: {how}")

    # --- what Redis did ----------------------------------------------------------------------------------------

    def _added(self, key: str, fields: dict[str, str]) -> None:
        if OUTBOX.fullmatch(key) is None:
            return
        for text in parse_separated(fields["issued"]):
            record = Record.unpack_entry(text)
            self.records[record.pack()].add((record.client, record.key))
            self.issued[record.client, record.key].append(record)
            for code in record.codes:
                self._leaves(code, text)
            self._count(record)
            self._fill(record, int(fields["generation"]))
        for text in parse_separated(fields["asides"]):
            code = Code.unpack(text)
            self._leaves(code, "")
            if fields.get("why") == TAKEN_BACK:
                self.given.discard(code.code)  # it may come to a window again, from a new position

    def _leaves(self, code: Code, text: str) -> None:
        position = (code.lot, code.seq)
        if position in self.left:
            self.broken("P1", f"code {position} left a window a second time")
        if position not in self.pushed:
            self.broken("P1", f"code {position} left a window that it never came to")
        self.left[position] = text

    def _pushed(self, key: str, member: str) -> None:
        found = WINDOW.fullmatch(key)
        if found is None:
            return
        code = Code.unpack(member)
        position = (code.lot, code.seq)
        if self.store_was_older and self.codes.get(position, code.code) != code.code and not self.left.get(position):
            # Of the lot that had this number nothing was left but what was set aside, which nobody knows any more.
            self.pushed.pop(position)
            self.left.pop(position, None)
            self.destroyed.discard(position)
        if position in self.pushed:
            self.broken("P1", f"code {position} came to a second window")
        if code.code in self.given and not self._came_back(code.code):
            self.broken("P1", f"the code at {position} came to a second window, from another position")
        self.given.add(code.code)
        self.pushed[position] = int(found[1])
        self.codes[position] = code.code

    def _came_back(self, code: str) -> bool:
        """Wherever it stood before, it was returned to stock from there."""
        return {position for position, one in self.codes.items() if one == code} <= self._returned()

    def _returned(self) -> set[Position]:
        return self._positions("select lot, seq, seq + 1 from set_asides where why = ?", TAKEN_BACK)

    def _count(self, record: Record) -> None:
        campaign, distributor = record.rule.campaign, record.distributor
        terminal = record.payload.split("\t", 1)[0]
        now = self._server.clock()
        for period in ("total", "day", "hour"):
            start = period_bounds(period, self.zones[campaign], record.issued_at)[0]
            for holder in ("campaign", "distributor", "terminal"):
                field = cap_field(holder, distributor, terminal)
                counter = (campaign, period, start, field)
                self.used[counter] += len(record.codes)
                allowed = [
                    max(one.limit for one in self.limits[cap] if one.until > now)
                    for cap in {(campaign, holder, "", period), (campaign, holder, distributor, period)}
                    if cap in self.limits
                ]
                if not allowed:
                    continue
                spare = 0 if holder == "campaign" else len(self.destroyed)
                if self.used[counter] > min(allowed) + spare:
                    self.broken(
                        "P8", f"{field} of {campaign}, {period} from {start}: {self.used[counter]} of {min(allowed)}"
                    )

    def _fill(self, record: Record, generation: int) -> None:
        """A bucket that runs out at the rate never holds more than the burst: so in any stretch of time nobody gets
        more than the burst and what the rate gives in it."""
        if (limit := self.rates.get(record.distributor)) is None:
            return
        now = int(self._server.clock() * 1_000) * 1_000  # as the server tells it
        since, full = self.buckets.get((generation, record.distributor), (now, 0))
        full = max(0, full - (now - since) * limit.rate) + len(record.codes) * MICRO
        self.buckets[generation, record.distributor] = (now, full)
        if full > limit.burst * MICRO:
            self.broken("limit", f"{record.distributor} has {full / MICRO:.3f} of {limit} at {now}")

    def lose(self, old: Data, new: Data) -> None:
        """The server goes on with other data: what only the old one knew is destroyed, but for what the ledger has."""
        gone = codes_in_outboxes(old) - codes_in_outboxes(new)
        self.destroyed |= gone - self.in_ledger()

    def store_came_back(self, before: set[Position]) -> None:
        """The store is older; ``before``: what its ledger had.  What it had of codes set aside is known to nobody any
        more, even if the entry is still in the outbox: who wrote it there may be about to acknowledge it.  Nor is what
        was withdrawn from stock or imported since."""
        lost = before - self.in_ledger()
        self.destroyed |= {position for position in lost if not self.left.get(position)}
        kept = self._positions("select lot, seq_from, seq_to from withdrawn") | set(self.left)
        self.withdrawn = {position: at for position, at in self.withdrawn.items() if position in kept}
        self.known.clear()
        self.stock_forgotten = self.store_was_older = True

    def store_was_repaired(self, pools: Iterable[str]) -> None:
        """What is neither in the ledger now nor on its way had no replay record any more."""
        known = self.in_ledger() | codes_in_outboxes(self._server.data)
        for position, text in self.left.items():
            if text and position not in known:
                issued_at = Record.unpack_entry(text).issued_at
                if issued_at + self._retention_s <= self._server.clock():
                    self.destroyed.add(position)
                else:
                    self.broken("P2", f"code {position} has a replay record, and the repaired ledger does not have it")
        self.stock_forgotten = False
        for pool in pools:
            self.stock_known(pool)

    def in_ledger(self) -> set[Position]:
        """What the store knows of codes that left a window, but for what was withdrawn from quarantine: of that it does
        not know what had become of it."""
        known = "select lot, seq from issuances union select lot, seq from set_asides where generation > 0 or why <> ?"
        return {(lot, seq) for lot, seq in self._peek(known, WITHDRAWN)}

    # --- what operators did --------------------------------------------------------------------------------------

    def stock_known(self, pool: str) -> None:
        """An import has returned: what is in stock now is known everywhere."""
        lots = dict(self._peek("select id, imported from lots where pool = ?", pool))
        self.known[pool].append((self._server.clock(), lots))

    def certainly(self, subject: str, what: str, begun: float, now: float) -> bool:
        """The last change of ``subject`` was this one, in force before ``begun``, and no other began until ``now``."""
        began = [change for change in self.changes[subject] if change.began <= now]
        return bool(began) and began[-1].what == what and began[-1].returned <= begun

    # --- what clients were told ----------------------------------------------------------------------------------

    def answered(self, token: str, request: Request, outcome: Outcome, begun: float) -> None:
        """A client has got ``outcome`` for a request that it began to send at ``begun``."""
        now = self._server.clock()
        key = (request.client, request.key)
        self.outcomes[
            type(outcome).__name__ + (f" {outcome.code}" if isinstance(outcome, (Busy, Unavailable)) else "")
        ] += 1
        if isinstance(outcome, Issued):
            self._success(token, request, outcome, begun, now)
            self.told[key].append(Told(now, outcome.record, outcome.replayed))
        elif isinstance(outcome, RateLimited):
            if outcome.limit != self.rates.get(request.distributor):
                self.broken("limit", f"{request.distributor} was limited by {outcome.limit}")
        elif isinstance(outcome, KeyReused):
            if all(record.payload == request.payload for record in self.issued[key]):
                self.broken("P3", f"{key} was refused as reused although its payload never changed")
        elif isinstance(outcome, Unauthorized):
            if outcome.code == "token_unknown" and self.certainly(token, "made", begun, now):
                self.broken("P6", f"a token that was made is unknown at {now:.3f}")
        elif isinstance(outcome, Unavailable):
            for one in outcome.considered:
                if one.stopped_by == "exhausted":
                    self._check_exhausted(one.campaign_id, begun, now)
                elif one.stopped_by == "paused" and self.certainly(one.campaign_id, "resume", begun, now):
                    self.broken("P6", f"{one.campaign_id} was resumed and is still paused")

    def _success(self, token: str, request: Request, outcome: Issued, begun: float, now: float) -> None:
        key = (request.client, request.key)
        if outcome.record not in self.records:
            self.broken("P1", f"{key} was told a record that nobody issued")
            return
        record = Record.unpack(outcome.record)
        if key not in self.records[outcome.record] or record.payload != request.payload:
            self.broken("P3", f"{key} got the answer to another request")
        # From a ledger that came back older, while Redis can't be reached either, a replay may be told to who showed a
        # token that was revoked since: only Redis knows of it (docs/architecture.md, "Limits").
        if self.certainly(token, "revoked", begun, now) and not (outcome.replayed and self.stock_forgotten):
            self.broken("P6", f"a revoked token got a success for a request begun at {begun:.3f}")
        if not outcome.replayed and self.certainly(record.rule.campaign, "pause", begun, now):
            self.broken("P6", f"{record.rule.campaign} was paused, and a request begun at {begun:.3f} got a code")
        for code in record.codes:
            if not outcome.replayed and self.withdrawn.get((code.lot, code.seq), begun) < begun:
                self.broken("P6", f"code {(code.lot, code.seq)} was withdrawn, and issued to a later request")
            if not outcome.replayed and code.expires_at <= record.issued_at + self.least_life[record.rule.pool]:
                self.broken("P1", f"code {(code.lot, code.seq)} was issued although it expires")
        for earlier in self.told[key]:
            before = Record.unpack(earlier.record)
            if earlier.record == outcome.record or record.issued_at - before.issued_at >= self._retention_s:
                continue
            if {(code.lot, code.seq) for code in before.codes} <= self.destroyed:
                continue
            if {(code.lot, code.seq) for code in record.codes} <= self.destroyed:
                continue
            self.broken("P3", f"{key} was told two different vouchers")

    def _check_exhausted(self, campaign: str, begun: float, now: float) -> None:
        pool = self.campaign_pools[campaign]
        times = [at for at, _ in self.known[pool]]
        at = bisect_right(times, begun) - 1
        if at < 0 or self.stock_forgotten:
            return
        known = self.known[pool][at][1]
        expiry = dict(self._peek("select id, expires_at from lots where pool = ?", pool))
        leased_to = dict(self._peek("select id, leased_to from lots where pool = ?", pool))
        eligible = now + self.least_life[pool] + 1
        generation = open_generation(self._server.data)
        if self._peek("select 1 from generations where generation = ? and state = 'closed'", generation):
            generation = 0  # an old primary is back: what it has open is no longer eligible stock
        for lot, imported in known.items():
            if expiry.get(lot, 0) <= eligible:
                continue
            gone = self._positions("select lot, seq_from, seq_to from withdrawn where lot = ?", lot)
            stored = [seq for seq in range(leased_to[lot], imported) if (lot, seq) not in gone]
            if stored:
                self.broken("P4", f"{pool} was called exhausted with {len(stored)} codes of lot {lot} in stock")
                return
        for lot, first, end in self._peek(
            "select lot, seq_from, seq_to from leases where pool = ? and generation = ?", pool, generation
        ):
            if expiry.get(lot, 0) > eligible:
                gone = self._positions("select lot, seq_from, seq_to from withdrawn where lot = ?", lot)
                for seq in range(first, min(end, known.get(lot, 0))):
                    if (lot, seq) not in self.left and (lot, seq) not in gone:
                        self.broken("P4", f"{pool} was called exhausted with {(lot, seq)} leased and not issued")
                        return

    # --- when all is quiet -----------------------------------------------------------------------------------------

    def check_quiet(self) -> None:
        """Every code is in exactly one place, and every voucher that was ever given is accounted for (P1, P2, P5)."""
        data = self._server.data
        generation = open_generation(data)
        imported = self._positions("select id, 0, imported from lots")
        coded = self._positions("select lot, seq, seq + 1 from codes")
        withdrawn = self._positions("select lot, seq_from, seq_to from withdrawn")
        unleased = self._positions("select id, leased_to, imported from lots") - withdrawn
        leased = self._positions("select lot, seq_from, seq_to from leases") - withdrawn
        leased_open = (
            self._positions("select lot, seq_from, seq_to from leases where generation = ?", generation) - withdrawn
        )
        issued = self._positions("select lot, seq, seq + 1 from issuances")
        aside = self._positions("select lot, seq, seq + 1 from set_asides")
        window = codes_in_windows(data, generation)
        sealed = self._positions("select lot, seq, seq + 1 from set_asides where generation = 0 and why = ?", WITHDRAWN)
        quarantine = leased - leased_open - issued - (aside - sealed)
        self._same("P5", "imported", imported, "stored, leased and withdrawn", unleased | leased | withdrawn)
        self._same("P5", "known", coded | withdrawn | issued | aside, "imported", imported)
        self._apart("P5", "stored", unleased, "leased", leased)
        self._apart("P1", "withdrawn", withdrawn, "issued, set aside or in the live window", issued | aside | window)
        self._apart("P1", "issued", issued, "in the live window", window)
        self._apart("P1", "set aside", aside, "in the live window", window)
        self._apart("P1", "issued", issued, "set aside", aside)
        self._same(
            "P5", "leased to the open generation", leased_open & (window | issued | aside), "its leases", leased_open
        )
        returned, told = self._returned(), self.told_positions()
        for position, record in self.left.items():
            if position in (issued if record else aside):
                continue
            if position in returned:  # from quarantine, by the word of partners that nobody received it
                if position in told:
                    self.broken("P1", f"code {position} was told to somebody, and is in stock again")
            elif position not in self.destroyed:
                self.broken("P2", f"code {position} was given and is not in the ledger, and nothing destroyed it")
            elif position not in quarantine | withdrawn and (position in imported or not self.store_was_older):
                self.broken("P2", f"code {position} was given and lost, and is not in quarantine")
        for kind, subject, detail in self._peek("select kind, subject, detail from incidents"):
            if kind not in SETTLED:
                self.broken("P1", f"incident {kind}: {subject}: {detail}")
        for (reason,) in self._peek("select reason from parked"):
            self.broken("P2", f"an entry of ours was parked: {reason}")
        self._check_books(data, generation, window)
        self._check_keys()

    def told_positions(self) -> set[Position]:
        """Those of every voucher that any client was told of."""
        records = (Record.unpack(answer.record) for answers in self.told.values() for answer in answers)
        return {(code.lot, code.seq) for record in records for code in record.codes}

    def check_kept(self) -> int:
        """With an older store: every voucher that a client was told of is in the ledger or has its replay record.

        Returns how many are not in the ledger and not on their way there.
        """
        lost = 0
        ledger, on_the_way = self.in_ledger(), codes_in_outboxes(self._server.data)
        values = {value for value in self._server.data.keys.values() if isinstance(value, str)}
        for (client, key), answers in self.told.items():
            for answer in answers:
                if Record.unpack(answer.record).issued_at + self._retention_s <= self._server.clock():
                    continue
                positions = {(code.lot, code.seq) for code in Record.unpack(answer.record).codes}
                lost += not positions <= ledger | on_the_way
                if answer.record not in values and not positions <= ledger:
                    self.broken("P2", f"{(client, key)} was told a voucher that neither the ledger nor Redis knows")
        return lost

    def _check_books(self, data: Data, generation: int, window: set[Position]) -> None:
        totals: Any = data.keys.get(f"{{0}}:{generation}:totals", {})
        restocked, popped, codes, held = (
            int(totals.get(name, 0)) for name in ("restocked", "popped", "codes", "bytes")
        )
        aside, withdrawn, back = (int(totals.get(name, 0)) for name in ("set_aside", "withdrawn", "taken_back"))
        left = popped + aside + withdrawn + back
        if (written := bytes_in_outbox(data, generation)) != held:
            self.broken("P5", f"{held} bytes should be in the outbox, and {written} are")
        if restocked - left != len(window):
            self.broken(
                "P5",
                f"restocked {restocked}, popped {popped}, set aside {aside}, withdrawn {withdrawn}, taken back {back}, "
                f"but {len(window)} in windows",
            )
        ((here,),) = self._peek(
            "select (select count(*) from issuances where generation = :g)"
            " + (select count(*) from set_asides where generation = :g)",
            {"g": generation},
        )
        if left - here != codes or codes != len(codes_in_outboxes(data)):
            self.broken(
                "P5",
                f"{left} left the windows, {here} are in the store, {codes} should be in the outbox",
            )

    def _check_keys(self) -> None:
        """One key, one request in the ledger, but for what was destroyed in between or after the retention."""
        rows = self._peek("select client, key, generation, outbox_seq, issued_at from requests order by issued_at")
        times: dict[tuple[str, str], list[int]] = defaultdict(list)
        for client, key, _, _, issued_at in rows:
            times[client, key].append(issued_at)
        for name, at in times.items():
            close = any(later - earlier < self._retention_s for earlier, later in pairwise(at))
            lost = any(
                {(code.lot, code.seq) for code in record.codes} <= self.destroyed for record in self.issued[name]
            )
            if close and not lost:
                self.broken("P3", f"{name} has {len(at)} requests in the ledger")

    def _positions(self, sql: str, *parameters: object) -> set[Position]:
        return {(lot, seq) for lot, first, end in self._peek(sql, *parameters) for seq in range(first, end)}

    def _same(self, promise: str, one: str, some: set[Position], other: str, others: set[Position]) -> None:
        if some != others:
            self.broken(promise, f"{one} and {other} differ by {sorted(some ^ others)[:5]}")

    def _apart(self, promise: str, one: str, some: set[Position], other: str, others: set[Position]) -> None:
        if some & others:
            self.broken(promise, f"{sorted(some & others)[:5]} are {one} and {other}")


def open_generation(data: Data) -> int:
    """The generation that Redis has open, 0 if none."""
    value: Any = data.keys.get("{0}:generation", {})
    return int(value.get("open", 0))


def codes_in_outboxes(data: Data) -> set[Position]:
    """The codes of every entry of every outbox, of whatever generation."""
    found: set[Position] = set()
    for key, value in data.keys.items():
        if isinstance(value, Stream) and OUTBOX.fullmatch(key):
            for entry in value.entries.values():
                fields = dict(zip(entry[::2], entry[1::2], strict=True))
                for text in parse_separated(fields["issued"]):
                    found |= _positions_of(Record.unpack_entry(text).codes)
                found |= _positions_of(map(Code.unpack, parse_separated(fields["asides"])))
    return found


def bytes_in_outbox(data: Data, generation: int) -> int:
    """What the entries of one generation's outbox add to its bytes: each text and the character after it."""
    stream = data.keys.get(f"{{0}}:{generation}:outbox")
    entries = stream.entries.values() if isinstance(stream, Stream) else ()
    held = 0
    for entry in entries:
        fields = dict(zip(entry[::2], entry[1::2], strict=True))
        held += sum(len(fields[name]) + 1 for name in ("issued", "asides") if fields[name])
    return held


def codes_in_windows(data: Data, generation: int) -> set[Position]:
    """The codes of the windows of one generation."""
    found: set[Position] = set()
    for key, value in data.keys.items():
        if isinstance(value, list) and key.startswith(f"{{0}}:{generation}:window:"):
            found |= _positions_of(map(Code.unpack, value))
    return found


def _positions_of(codes: Iterable[Code]) -> set[Position]:
    return {(code.lot, code.seq) for code in codes}


def summed(parts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Counts of several schedules together."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total
