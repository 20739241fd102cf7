"""The snapshot a process decides with, and who may issue what in which order.  Pure: no I/O, no clock.

A catalogue is never changed.  Publishing makes the next one, and the fence in Redis says which is the oldest that
may still be used; so nothing here needs to expire, and nothing decided from it alone is final (design P6).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence, Sized
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo

import msgspec

from service import zones
from service.domain import CapHolder, Considered, Nothing, RateLimit, Rule, Stop, Terms, Unavailable
from service.scripts import Candidate, CountedCap, Counter, Plan
from service.tokens import digest

Period = Literal["total", "day", "hour"]

# Campaigns that one distributor may have for one product and that are not over; more are refused at publishing,
# because each is looked at in the script while everyone else waits.
CANDIDATES_MAX: Final = 16

# Routes remembered per catalogue, and candidates that they share: a distributor sends few combinations of products.
# A route is 0.4 KB, 2 KB if it names as many products as may be; what several share another 0.8: 40 MB at most.
ROUTES_MAX: Final = 16_384

# Cents that a client may ask an open-value voucher to be worth (api-v3).
FACE_VALUE_MIN: Final = 100
FACE_VALUE_MAX: Final = 100_000

# Entries decoded before the event loop gets its turn: about 2 ms.
SLICE: Final = 500

# zlib's quickest: an eighth of the size in 25 ms for 10,000 campaigns; better ones take longer than they save.
COMPRESSION: Final = 1


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


def can_issue(campaign: Campaign, now: int) -> bool:
    """Whether anything can be issued by it now or later, as it stands: it is neither paused nor over."""
    return not campaign.paused and (not campaign.until or campaign.until > now)


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """``least_life_s``: a code with less life left than this is set aside."""

    id: str
    least_life_s: int


class Product(msgspec.Struct, frozen=True, array_like=True):
    """What Client API v3 sells.  The campaign with its code for an id, which serves nothing else, says from which pool,
    when, to whom and under which caps.  ``unlimited``: its pool is one that never runs dry."""

    code: str
    terms: Terms
    description: str
    expiry_scheme: str
    image: str
    terms_and_conditions: str
    unlimited: bool


class Client(msgspec.Struct, frozen=True, array_like=True):
    """Who may ask for access tokens: ``secret_sha256`` is hex; ``scopes`` are those it may have, without a prefix."""

    distributor: str
    secret_sha256: str
    scopes: tuple[str, ...]
    active: bool


class SigningKey(msgspec.Struct, frozen=True, array_like=True):
    """What access tokens are signed with.  ``public`` is its JWK, ``sealed`` the private half; ``verifies_until`` is
    Unix seconds from which on no token can be of it any more, 0: it is the one that signs."""

    kid: str
    public: str
    sealed: str
    verifies_until: int


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """Everything issuing needs to know of the control plane at one version.

    ``tokens``: SHA-256 of the token, hex -> distributor.  ``distributors``: id -> active?  ``clients``: by their ids.
    ``limits``: of the distributors that have one.
    """

    version: int
    tokens: dict[str, str]
    distributors: dict[str, bool]
    pools: tuple[Pool, ...]
    campaigns: tuple[Campaign, ...]
    products: tuple[Product, ...] = ()
    clients: dict[str, Client] = {}
    signing_keys: tuple[SigningKey, ...] = ()
    limits: dict[str, RateLimit] = {}


class _Slices(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot as it is published.  Each slice is compressed: Redis writes it to its log and sends it to each process
    while everyone else waits, and with 10,000 campaigns it would be 6 MB instead of 1."""

    version: int
    slices: list[bytes]

    @classmethod
    def read(cls, blob: bytes) -> tuple[int, Iterator[Snapshot]]:
        """The version, and its slices one after the other.  Both raise msgspec.DecodeError if it is none."""
        published = msgspec.json.decode(blob, type=cls)
        decoder = msgspec.json.Decoder(Snapshot)

        def slices() -> Iterator[Snapshot]:
            for packed in published.slices:
                try:
                    yield decoder.decode(zlib.decompress(packed))
                except zlib.error as error:
                    raise msgspec.DecodeError("a slice can't be unpacked") from error

        return published.version, slices()


def encode(snapshot: Snapshot) -> bytes:
    """The snapshot as it is published: slices, so that a process can load a large one without standing still."""
    tokens, distributors = list(snapshot.tokens.items()), list(snapshot.distributors.items())
    clients, limits = list(snapshot.clients.items()), list(snapshot.limits.items())
    parts: tuple[Sized, ...] = (
        tokens, distributors, snapshot.pools, snapshot.campaigns, snapshot.products, clients, snapshot.signing_keys,
        limits,
    )  # fmt: skip
    longest = max(1, *map(len, parts))
    slices = [
        Snapshot(
            snapshot.version,
            dict(tokens[i : i + SLICE]),
            dict(distributors[i : i + SLICE]),
            snapshot.pools[i : i + SLICE],
            snapshot.campaigns[i : i + SLICE],
            snapshot.products[i : i + SLICE],
            dict(clients[i : i + SLICE]),
            snapshot.signing_keys[i : i + SLICE],
            dict(limits[i : i + SLICE]),
        )
        for i in range(0, longest, SLICE)
    ]
    return msgspec.json.encode(
        _Slices(snapshot.version, [zlib.compress(msgspec.json.encode(s), COMPRESSION) for s in slices])
    )


def decode(blob: bytes) -> Snapshot:
    """The snapshot that ``encode`` made ``blob`` of.  Raises msgspec.DecodeError as ``load`` does."""
    version, slices = _Slices.read(blob)
    parts = list(slices)
    return Snapshot(
        version,
        {token: owner for part in parts for token, owner in part.tokens.items()},
        {id: active for part in parts for id, active in part.distributors.items()},
        tuple(pool for part in parts for pool in part.pools),
        tuple(campaign for part in parts for campaign in part.campaigns),
        tuple(product for part in parts for product in part.products),
        {id: client for part in parts for id, client in part.clients.items()},
        tuple(key for part in parts for key in part.signing_keys),
        {id: limit for part in parts for id, limit in part.limits.items()},
    )


def load(blob: bytes) -> Iterator[Catalogue | None]:
    """Yields None after each slice of a published snapshot, and the whole catalogue last.

    Raises msgspec.DecodeError if ``blob`` is not a published snapshot (one of a later layout, say).
    """
    version, slices = _Slices.read(blob)
    catalogue = Catalogue(version)
    for part in slices:
        catalogue._add(part)
        yield None
    catalogue._sort()
    yield catalogue


class Route(msgspec.Struct, frozen=True, eq=False):
    """What to try for one combination of distributor and products.

    ``looked_at`` lists every campaign in the order of the contract with the index of its candidate, or, with no
    candidate, the rule that stops it already here.
    """

    plan: Plan
    looked_at: tuple[tuple[str, str, int | Stop], ...]
    nothing: Nothing = "no_campaign"  # why, if there is nothing to look at

    def unavailable(self, stops: str) -> Unavailable:
        """The answer when no candidate may issue.  ``stops``: the script's words, one a candidate."""
        words = stops.split(",") if stops else []
        considered = tuple(
            Considered(product, campaign, _STOPS[words[found]] if isinstance(found, int) else found)
            for product, campaign, found in self.looked_at
        )
        if not considered:
            return Unavailable(self.nothing, ())
        return Unavailable(max((_CODES[one.stopped_by] for one in considered), key=_FURTHEST.index), considered)


_STOPS: Final[dict[str, Stop]] = {
    "before": "before", "after": "after", "capped": "cap_reached", "exhausted": "exhausted",
}  # fmt: skip
_Stopped = Literal["not_running", "cap_reached", "exhausted"]
_FURTHEST: Final[tuple[_Stopped, ...]] = get_args(_Stopped)
_CODES: Final[dict[Stop, _Stopped]] = {
    "paused": "not_running",
    "before": "not_running",
    "after": "not_running",
    "cap_reached": "cap_reached",
    "exhausted": "exhausted",
}


def credential_of(kid: str, client: str) -> str:
    """A client whose access token was verified with the signing key ``kid``, as it is authenticated by a catalogue.

    Both are looked up there, so neither a suspended client nor a revoked key lets anyone in (P6).
    """
    return f"{kid}:{client}"  # no token has a colon


class Catalogue:
    """One published version, indexed.  Immutable but for its memos of routes and of tokens that were shown."""

    def __init__(self, version: int) -> None:
        """Nothing is in it; ``load`` makes those that hold something."""
        self.version = version
        self.signing_keys: tuple[SigningKey, ...] = ()
        self.limits: dict[str, RateLimit] = {}  # of the distributors that have one
        self._tokens: dict[str, str] = {}
        self._distributors: dict[str, bool] = {}
        self._pools: dict[str, Pool] = {}
        self._campaigns: dict[str, Campaign] = {}
        self._by_product: dict[str, list[Campaign]] = {}
        self._products: dict[str, Product] = {}
        self._clients: dict[str, Client] = {}
        self._owners: dict[str, str] = {}
        self._routes: dict[tuple[str, str | tuple[str, ...], object], Route] = {}
        self._candidates: dict[tuple[str, str, str, tuple[Cap, ...]], Candidate] = {}
        self._plans: dict[tuple[Candidate, ...], Plan] = {}

    def _add(self, part: Snapshot) -> None:
        self._tokens.update(part.tokens)
        self._distributors.update(part.distributors)
        self._pools.update((pool.id, pool) for pool in part.pools)
        for campaign in part.campaigns:
            self._campaigns[campaign.id] = campaign
            for product in campaign.products:
                self._by_product.setdefault(product, []).append(campaign)
        self._products.update((product.code, product) for product in part.products)
        self._clients.update(part.clients)
        self.signing_keys += part.signing_keys
        self.limits.update(part.limits)

    def _sort(self) -> None:
        for campaigns in self._by_product.values():
            campaigns.sort(key=lambda campaign: campaign.rank)

    def distributor(self, credential: str) -> str | None:
        """Whose token or client it is: None if nobody's at this version, '' if the client is suspended.

        A token stands for itself; a client, whose access token was verified, as ``credential_of`` writes it.
        """
        distributor = self._owners.get(credential)
        if distributor is None and (distributor := self._owner(credential)):
            self._owners[credential] = distributor  # known ones only, so it never outgrows the credentials
        return distributor

    def _owner(self, credential: str) -> str | None:
        kid, colon, id = credential.partition(":")
        if not colon:
            return self._tokens.get(digest(credential))
        client = self._clients.get(id)
        if client is None or all(key.kid != kid for key in self.signing_keys):
            return None
        return client.distributor if client.active else ""

    def client(self, id: str) -> Client | None:
        """The client at this version, suspended or not."""
        return self._clients.get(id)

    def product(self, code: str) -> tuple[Product, Campaign] | None:
        """The product at this version, whoever it is assigned to, and the campaign that it is issued by."""
        product = self._products.get(code)
        return None if product is None else (product, self._campaigns[code])

    def products_of(self, distributor: str) -> list[tuple[Product, Campaign]]:
        """The products that are assigned to the distributor, by their codes."""
        assigned = ((product, self._campaigns[product.code]) for product in self._products.values())
        return sorted(
            ((product, campaign) for product, campaign in assigned if distributor in campaign.assigned),
            key=lambda pair: pair[0].code,
        )

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
        return sorted({campaign.pool for campaign in self._campaigns.values()})

    def route(self, distributor: str, products: tuple[str, ...]) -> Route:
        """What to try, in the order of api-v1 "Choice of the campaign"; the same Route for the same question."""
        question = (distributor, products, None)
        return self._routes.get(question) or self._remember(question, self._make_route(distributor, products))

    def product_route(self, distributor: str, code: str, face_value: int | None, id_key: str) -> Route:
        """What to try for a product of api-v3, asked for with this face value; ids are to be derived with ``id_key``.

        The same Route for the same question, and for all face values that are as good.
        """
        fits = face_value is None or FACE_VALUE_MIN <= face_value <= FACE_VALUE_MAX
        question = (distributor, code, (face_value is None, fits, id_key))
        return self._routes.get(question) or self._remember(
            question, self._make_product_route(distributor, code, face_value is None, fits, id_key)
        )

    def _remember(self, question: tuple[str, str | tuple[str, ...], object], route: Route) -> Route:
        _make_room(self._routes)
        self._routes[question] = route
        return route

    def _make_product_route(self, distributor: str, code: str, no_face: bool, fits: bool, id_key: str) -> Route:
        if (found := self.product(code)) is None:
            return Route(Plan(()), (), "no_product")
        product, campaign = found
        if distributor not in campaign.assigned:
            return Route(Plan(()), (), "not_assigned")
        if product.terms.is_open_value == no_face or not fits:
            return Route(Plan(()), (), "face_value")
        if campaign.paused:
            return Route(Plan(()), ((code, code, "paused"),))
        return Route(self._plan([self._candidate(campaign, code, id_key, distributor)]), ((code, code, 0),))

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
                    candidates.append(self._candidate(campaign, product, "", distributor))
                looked_at.append((product, campaign.id, index_of[campaign.id]))
        return Route(self._plan(candidates), tuple(looked_at))

    def _plan(self, candidates: Sequence[Candidate]) -> Plan:
        """The same Plan for the same candidates: what requests of a batch have in common is sent once."""
        key = tuple(candidates)
        plan = self._plans.get(key)
        if plan is None:
            _make_room(self._plans)
            plan = self._plans[key] = Plan(key)
        return plan

    def _candidate(self, campaign: Campaign, product: str, id_key: str, distributor: str) -> Candidate:
        """The same Candidate for all distributors whose assignments have the same caps."""
        question = (campaign.id, product, id_key, campaign.assigned[distributor])
        candidate = self._candidates.get(question)
        if candidate is None:
            _make_room(self._candidates)
            candidate = self._candidates[question] = self._make_candidate(campaign, *question[1:])
        return candidate

    def _make_candidate(self, campaign: Campaign, product: str, id_key: str, own: tuple[Cap, ...]) -> Candidate:
        if sold := self._products.get(campaign.id):
            rule = Rule(campaign.id, campaign.pool, "", product, campaign.until, id_key, sold.terms.pack())
        else:
            rule = Rule(campaign.id, campaign.pool, campaign.category, product, campaign.until)
        limits: dict[tuple[Counter, CapHolder], int] = {}
        for cap in (*campaign.caps, *own):
            counted = (Counter(campaign.id, cap.period, campaign.time_zone), cap.holder)
            limits[counted] = min(cap.limit, limits.get(counted, cap.limit))
        return Candidate(
            pool=campaign.pool,
            least_life_s=self._pools[campaign.pool].least_life_s,
            starts_at=campaign.starts_at,
            until=campaign.until,
            rule=rule.pack(),
            caps=tuple(CountedCap(counter, holder, limit) for (counter, holder), limit in limits.items()),
        )


def _make_room(memo: dict[Any, Any]) -> None:
    """There is room in it for one more: what it held is made anew when it is asked for."""
    if len(memo) >= ROUTES_MAX:
        memo.clear()


_NEVER: Final = 1 << 62  # sorts an open end after every other


def cap_field(holder: CapHolder, distributor: str, terminal: str = "") -> str:
    """The field of a caps hash that counts for ``holder``, as ``lua/issue.lua`` names it."""
    return {"campaign": "c", "distributor": f"d:{distributor}", "terminal": f"t:{distributor}:{terminal}"}[holder]


@lru_cache(maxsize=10_000)
def _bounds_from(kind: Period, time_zone: str, start: int) -> tuple[int, int]:
    """The period after ``start``: its own end and the end of the next one."""
    middle = _next_start(kind, time_zone, start)
    return middle, _next_start(kind, time_zone, middle)


@lru_cache(maxsize=1_024)  # a batch asks for the same few again and again
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


class Counted(NamedTuple):
    """A counter of a campaign's caps, over the period from ``start``.  ``expires_at``: when Redis may forget it, 0:
    never."""

    counter: Counter
    start: int
    expires_at: int


def counted_by(campaign: Campaign, at: int) -> list[Counted]:
    """Of every kind of period that a cap of the campaign or of an assignment is over, the one that holds ``at``."""
    found = []
    for period in sorted({cap.period for caps in (campaign.caps, *campaign.assigned.values()) for cap in caps}):
        start, middle, _ = period_bounds(period, campaign.time_zone, at)
        expires_at = 0 if period == "total" else 2 * middle - start
        found.append(Counted(Counter(campaign.id, period, campaign.time_zone), start, expires_at))
    return found


def period_start(kind: Literal["day", "hour"], time_zone: str, at: int) -> int:
    """The Unix second at which the day or hour that holds ``at`` began in ``time_zone``."""
    zone = zones.zone(time_zone)
    local = datetime.fromtimestamp(at, zone)
    if kind == "hour":
        start = at - local.minute * 60 - local.second
        return _change_by_part_of_an_hour(zone, start, at) or start
    return int(datetime(local.year, local.month, local.day, tzinfo=zone).timestamp())


def _next_start(kind: Period, time_zone: str, start: int) -> int:
    zone = zones.zone(time_zone)
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
