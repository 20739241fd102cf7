"""The snapshot a process decides with, and who may issue what in which order.  Pure: no I/O, no clock.

A catalogue is never changed.  Publishing makes the next one, and the fence in Redis says which is the oldest that
may still be used; so nothing here needs to expire, and nothing decided from it alone is final (design P6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final, Literal
from zoneinfo import ZoneInfo

import msgspec

from service.domain import Considered, Rule, Stop, Unavailable
from service.scripts import Candidate, CountedCap, Counter, Plan
from service.tokens import digest

CapHolder = Literal["campaign", "distributor", "terminal"]
Period = Literal["total", "day", "hour"]

# Campaigns that one distributor may have for one product and that are not over; more are refused at publishing,
# because each is looked at in the script while everyone else waits.
CANDIDATES_MAX: Final = 16

# Routes remembered per catalogue: a distributor sends few combinations of products.  One is about 2 KB.
ROUTES_MAX: Final = 10_000

# Entries decoded before the event loop gets its turn: about 2 ms.
SLICE: Final = 500


class Cap(msgspec.Struct, frozen=True, array_like=True):
    """At most ``limit`` vouchers per ``period``, counted per ``holder`` within one campaign."""

    holder: CapHolder
    period: Period
    limit: int


class Campaign(msgspec.Struct, frozen=True, array_like=True):
    """A rule that turns a category sold by an assigned distributor into a voucher.  Times are Unix seconds;
    ``until`` is exclusive, 0 if open.  ``assigned`` holds, per distributor, the caps of that assignment."""

    id: str
    category: str
    products: tuple[str, ...]
    pool: str
    priority: int  # lower goes first
    starts_at: int
    until: int
    paused: bool
    time_zone: str
    caps: tuple[Cap, ...]
    assigned: dict[str, tuple[Cap, ...]]

    @property
    def rank(self) -> tuple[int, int, str]:
        """What campaigns for one product are sorted by: the lowest is tried first."""
        return self.priority, self.until or _NEVER, self.id


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """``least_life_s``: a code with less life left than this is set aside."""

    id: str
    least_life_s: int


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """Everything issuing needs to know of the control plane at one version.

    ``tokens``: SHA-256 of the token, hex -> distributor.  ``distributors``: id -> active?
    """

    version: int
    tokens: dict[str, str]
    distributors: dict[str, bool]
    pools: tuple[Pool, ...]
    campaigns: tuple[Campaign, ...]


class _Slices(msgspec.Struct, frozen=True, array_like=True):
    version: int
    slices: list[msgspec.Raw]


def encode(snapshot: Snapshot) -> bytes:
    """The snapshot as it is published: slices, so that a process can load a large one without standing still."""
    tokens, distributors = list(snapshot.tokens.items()), list(snapshot.distributors.items())
    longest = max(len(tokens), len(distributors), len(snapshot.pools), len(snapshot.campaigns), 1)
    slices = [
        Snapshot(
            snapshot.version,
            dict(tokens[i : i + SLICE]),
            dict(distributors[i : i + SLICE]),
            snapshot.pools[i : i + SLICE],
            snapshot.campaigns[i : i + SLICE],
        )
        for i in range(0, longest, SLICE)
    ]
    return msgspec.json.encode(_Slices(snapshot.version, [msgspec.Raw(msgspec.json.encode(s)) for s in slices]))


def load(blob: bytes) -> Iterator[Catalogue | None]:
    """Yields None after each slice of a published snapshot, and the whole catalogue last.

    Raises msgspec.DecodeError if ``blob`` is not a published snapshot (one of a later layout, say).
    """
    published = msgspec.json.decode(blob, type=_Slices)
    decoder = msgspec.json.Decoder(Snapshot)
    tokens: dict[str, str] = {}
    distributors: dict[str, bool] = {}
    pools: dict[str, Pool] = {}
    by_product: dict[str, list[Campaign]] = {}
    for raw in published.slices:
        part = decoder.decode(raw)
        tokens.update(part.tokens)
        distributors.update(part.distributors)
        pools.update((pool.id, pool) for pool in part.pools)
        for campaign in part.campaigns:
            for product in campaign.products:
                by_product.setdefault(product, []).append(campaign)
        yield None
    yield Catalogue(published.version, tokens, distributors, pools, by_product)


class Route(msgspec.Struct, frozen=True, eq=False):
    """What to try for one combination of distributor and products.

    ``looked_at`` lists every campaign in the order of the contract with the index of its candidate, or, with no
    candidate, the rule that stops it already here.
    """

    plan: Plan
    looked_at: tuple[tuple[str, str, int | Stop], ...]

    def unavailable(self, stops: str) -> Unavailable:
        """The answer when no candidate may issue.  ``stops``: the script's words, one a candidate."""
        words = stops.split(",") if stops else []
        considered = tuple(
            Considered(product, campaign, _STOPS[words[found]] if isinstance(found, int) else found)
            for product, campaign, found in self.looked_at
        )
        furthest = max((_FURTHEST.index(_CODES[one.stopped_by]) for one in considered), default=0)
        return Unavailable(_FURTHEST[furthest], considered)


_STOPS: Final[dict[str, Stop]] = {
    "before": "before", "after": "after", "capped": "cap_reached", "exhausted": "exhausted",
}  # fmt: skip
_FURTHEST: Final[tuple[Literal["no_campaign", "not_running", "cap_reached", "exhausted"], ...]] = (
    "no_campaign", "not_running", "cap_reached", "exhausted",
)  # fmt: skip
_CODES: Final[dict[Stop, str]] = {
    "paused": "not_running",
    "before": "not_running",
    "after": "not_running",
    "cap_reached": "cap_reached",
    "exhausted": "exhausted",
}


class Catalogue:
    """One published version, indexed.  Immutable but for its memos of routes and of tokens that were shown."""

    def __init__(
        self,
        version: int,
        tokens: dict[str, str],
        distributors: dict[str, bool],
        pools: dict[str, Pool],
        by_product: dict[str, list[Campaign]],
    ) -> None:
        self.version = version
        self._tokens = tokens
        self._distributors = distributors
        self._pools = pools
        self._by_product = {
            product: sorted(campaigns, key=lambda campaign: campaign.rank) for product, campaigns in by_product.items()
        }
        self._owners: dict[str, str] = {}
        self._routes: dict[tuple[str, tuple[str, ...]], Route] = {}

    def distributor(self, token: str) -> str | None:
        """Whose token it is, None if nobody's at this version."""
        distributor = self._owners.get(token)
        if distributor is None and (distributor := self._tokens.get(digest(token))) is not None:
            self._owners[token] = distributor  # known tokens only, so it never outgrows the credentials
        return distributor

    def active(self, distributor: str) -> bool:
        """Whether the distributor exists and is not suspended at this version."""
        return self._distributors.get(distributor, False)

    def known(self, distributor: str) -> bool:
        """Whether there is such a distributor at this version, suspended or not."""
        return distributor in self._distributors

    def has_token(self, distributor: str) -> bool:
        """Whether some token of the distributor is valid at this version."""
        return distributor in self._tokens.values()

    def serving(self, product: str) -> Sequence[Campaign]:
        """The campaigns for ``product``, whoever they are assigned to, in the order in which they are tried."""
        return self._by_product.get(product, ())

    def pools(self) -> list[str]:
        """Pools that some campaign issues from."""
        return sorted({campaign.pool for campaigns in self._by_product.values() for campaign in campaigns})

    def route(self, distributor: str, products: tuple[str, ...]) -> Route:
        """What to try, in the order of api-v1 "Choice of the campaign"; the same Route for the same question."""
        question = (distributor, products)
        route = self._routes.get(question)
        if route is None:
            if len(self._routes) >= ROUTES_MAX:
                self._routes.clear()
            route = self._routes[question] = self._make_route(distributor, products)
        return route

    def _make_route(self, distributor: str, products: tuple[str, ...]) -> Route:
        candidates: list[Candidate] = []
        looked_at: list[tuple[str, str, int | Stop]] = []
        index_of: dict[str, int] = {}
        for product in dict.fromkeys(products):
            for campaign in self._by_product.get(product, ()):
                if distributor not in campaign.assigned:
                    continue
                if campaign.paused:
                    looked_at.append((product, campaign.id, "paused"))
                    continue
                # A campaign that serves two of the products would be stopped by the same rule twice.
                if campaign.id not in index_of:
                    index_of[campaign.id] = len(candidates)
                    candidates.append(self._candidate(campaign, product, distributor))
                looked_at.append((product, campaign.id, index_of[campaign.id]))
        return Route(Plan(tuple(candidates)), tuple(looked_at))

    def _candidate(self, campaign: Campaign, product: str, distributor: str) -> Candidate:
        limits: dict[tuple[Counter, str], int] = {}
        for cap in (*campaign.caps, *campaign.assigned[distributor]):
            counted = (Counter(campaign.id, cap.period, campaign.time_zone), cap_field(cap.holder, distributor))
            limits[counted] = min(cap.limit, limits.get(counted, cap.limit))
        return Candidate(
            pool=campaign.pool,
            least_life_s=self._pools[campaign.pool].least_life_s,
            starts_at=campaign.starts_at,
            until=campaign.until,
            rule=Rule(campaign.id, campaign.pool, campaign.category, product, campaign.until).pack(),
            caps=tuple(CountedCap(counter, field, limit) for (counter, field), limit in limits.items()),
        )


_NEVER: Final = 1 << 62  # sorts an open end after every other


def cap_field(holder: CapHolder, distributor: str) -> str:
    """The field of a caps hash that counts for ``holder``; one that ends with ':' is completed by the terminal."""
    return {"campaign": "c", "distributor": f"d:{distributor}", "terminal": f"t:{distributor}:"}[holder]


@lru_cache(maxsize=10_000)
def _bounds_from(kind: Period, time_zone: str, start: int) -> tuple[int, int]:
    """The period after ``start``: its own end and the end of the next one."""
    middle = _next_start(kind, time_zone, start)
    return middle, _next_start(kind, time_zone, middle)


def period_bounds(kind: Period, time_zone: str, now: int) -> tuple[int, int, int]:
    """Start of the period that holds ``now``, its end, and the end of the next one; Unix seconds.

    Days begin at local midnight and hours at local full hours of ``time_zone``; where its clocks change by part of an
    hour, the change begins one too, so that periods never overlap.  A total has no start and no end.
    """
    if kind == "total":
        return 0, TOTAL_END, TOTAL_END
    start = period_start(kind, time_zone, now)
    return start, *_bounds_from(kind, time_zone, start)


TOTAL_END: Final = 1 << 52


def period_start(kind: Literal["day", "hour"], time_zone: str, at: int) -> int:
    """The Unix second at which the day or hour that holds ``at`` began in ``time_zone``."""
    zone = ZoneInfo(time_zone)
    local = datetime.fromtimestamp(at, zone)
    if kind == "hour":
        start = at - local.minute * 60 - local.second
        return _change_by_part_of_an_hour(zone, start, at) or start
    return int(datetime(local.year, local.month, local.day, tzinfo=zone).timestamp())


def _next_start(kind: Period, time_zone: str, start: int) -> int:
    zone = ZoneInfo(time_zone)
    if kind == "hour":
        local = datetime.fromtimestamp(start, zone)
        end = start + 3600 - local.minute * 60 - local.second
        return _change_by_part_of_an_hour(zone, start, end - 1) or end
    tomorrow = datetime.fromtimestamp(start, zone).date() + timedelta(days=1)
    return int(datetime(tomorrow.year, tomorrow.month, tomorrow.day, tzinfo=zone).timestamp())


def _change_by_part_of_an_hour(zone: ZoneInfo, after: int, until: int) -> int:
    """The second in ``(after, until]`` at which the zone's minutes jump (Lord Howe Island, twice a year); 0 if none."""

    def odd_seconds(at: int) -> int:
        local = datetime.fromtimestamp(at, zone)
        return (at - local.minute * 60 - local.second) % 3600

    before = odd_seconds(after)
    if odd_seconds(until) == before:
        return 0
    while until - after > 1:
        middle = (after + until) // 2
        if odd_seconds(middle) == before:
            after = middle
        else:
            until = middle
    return until
