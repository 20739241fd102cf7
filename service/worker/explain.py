"""Explain: who would win a request now, and for every other campaign of its products the rule that stops it.

``decide`` is what ``lua/issue.lua`` decides for one request of one voucher, as a pure function; ``explain`` reads
what it needs.  Nothing is written, and what is said was true only at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import msgspec
from redis.exceptions import RedisError

from service import keys
from service.catalogue import Campaign, Catalogue, Route, cap_field, load, period_bounds
from service.domain import Code, RateLimit, Unavailable, instant
from service.errors import NotFound, RedisUnreachable, StoreUnreachable
from service.scripts import SET_ASIDE_MAX, Candidate, CountedCap, Generation, Scripts, counter_key
from service.settings import ENTRY_BYTES
from service.store import control
from service.store.database import Database
from service.worker.currency import catalogue_at

# A period may end between asking the server's clock and reading its counters; twice in a row it does not.
READS_MAX: Final = 3

Standing = Literal[
    "wins", "lower_priority", "refilling", "backlog", "paused", "before", "after", "cap_reached", "exhausted",
    "not_assigned",
]  # fmt: skip


class Looked(msgspec.Struct, frozen=True):
    """One campaign that serves one of the products.  ``why`` is a sentence with the figures."""

    product_id: str
    campaign_id: str
    pool: str
    priority: int
    standing: Standing
    why: str


class Explanation(msgspec.Struct, frozen=True):
    """``outcome``: ``issue`` (``winner`` says by which campaign), the code of the 409 or 403, ``rate_limited`` (429),
    ``refilling`` or ``backlog`` (503, to be tried again), or ``not_issuing`` (503).  ``notes``: what qualifies all
    this, a line each.
    """

    at: str
    catalogue: int
    generation: int
    distributor_id: str
    terminal_id: str
    product_ids: tuple[str, ...]
    outcome: str
    winner: str | None
    refused: Unavailable | None
    campaigns: tuple[Looked, ...]
    notes: tuple[str, ...]


class WindowSeen(msgspec.Struct, frozen=True):
    """One pool's window: how many codes it has, and the expiries of the first ``SET_ASIDE_MAX`` + 1 of them.
    ``exhausted``: nothing was left to lease at the stock version that Redis has."""

    length: int
    expiries: tuple[int, ...]
    exhausted: bool


class Seen(msgspec.Struct, frozen=True):
    """What Redis had at ``now`` (Unix seconds by its clock): windows by pool, what was used of each cap by counter key
    and field, and ``room``, the codes that the outbox could still take."""

    now: int
    windows: dict[str, WindowSeen]
    used: dict[tuple[str, str], int]
    room: int


class Verdict(msgspec.Struct, frozen=True):
    """What becomes of one candidate.  ``stop`` is the script's word for it, '' if no rule stops it."""

    standing: Standing
    why: str
    stop: str = ""


async def explain(
    database: Database, scripts: Scripts, distributor: str, products: tuple[str, ...], *, terminal: str,
    outbox_max: int, outbox_bytes_max: int,
) -> Explanation:  # fmt: skip
    """Why a request of this distributor would get what it would get.

    By the catalogue that is in force.  Raises RedisUnreachable; NotFound if no catalogue is in force, or neither Redis
    nor the store has it.
    """
    seen = await scripts.generation()
    notes = ["true at this moment; the next request, refill or change may make it otherwise"]
    catalogue = await _in_force(database, scripts, seen, notes)
    if not seen.agrees:
        notes.append("the partition is NOT ISSUING: no generation is open in this Redis; see that `voucherd work` runs")
    elif seen.restoring:
        notes.append("replay records are being restored: a key that is not there is looked up in the ledger first")
    route = catalogue.route(distributor, products)
    bounds = (outbox_max, outbox_bytes_max)
    state = await read(scripts, seen.open, route.plan.candidates, distributor, terminal, bounds)
    verdicts = decide(
        route.plan.candidates, state, lambda cap: _counted(scripts, seen.open, cap, distributor, terminal, state.now)
    )
    looked = tuple(_looked(catalogue, route, verdicts, distributor, products))
    if not terminal and any(cap.holder == "terminal" for one in route.plan.candidates for cap in one.caps):
        notes.append("caps per terminal are those of one that got nothing yet; --terminal names another")
    notes += [
        f"{product} is a product of Client API v3: see `voucherd product show {product}`"
        for product in dict.fromkeys(products)
        if catalogue.product(product) is not None and not catalogue.serving(product)
    ]
    first = next((one for one in looked if one.standing in ("wins", "refilling", "backlog")), None)
    refused = route.unavailable(",".join(one.stop for one in verdicts)) if first is None else None
    outcome: str = refused.code if refused is not None else "issue"
    if first is not None and first.standing != "wins":
        outcome = first.standing
    if (limit := catalogue.limits.get(distributor)) is not None:
        left = await _left(scripts, seen.open, distributor, limit)
        notes.append(
            f"limited to {limit.rate:,}/s, {limit.burst:,} at once: {left:,} may be issued now, replays besides"
        )
        outcome = outcome if left else "rate_limited"
    if not catalogue.known(distributor):
        outcome = "distributor_unknown"
        notes.append(f"there is no distributor {distributor}: whatever it sends is refused")
    elif not catalogue.active(distributor):
        outcome = "distributor_suspended"
        notes.append(f"distributor {distributor} is suspended: whatever it sends is refused")
    elif not catalogue.has_token(distributor):
        outcome = "token_unknown"
        notes.append(f"distributor {distributor} has no token that is valid: make one with `voucherd token`")
    if not seen.agrees:
        outcome = "not_issuing"
    winner = first.campaign_id if first is not None and outcome == "issue" else None
    return Explanation(
        at=instant(state.now), catalogue=catalogue.version, generation=seen.open, distributor_id=distributor,
        terminal_id=terminal, product_ids=products, outcome=outcome, winner=winner, refused=refused,
        campaigns=looked, notes=tuple(notes),
    )  # fmt: skip


# --- decide ------------------------------------------------------------------------------------------------------


def decide(
    candidates: Sequence[Candidate], seen: Seen, counted: Callable[[CountedCap], tuple[str, str]]
) -> list[Verdict]:
    """One verdict a candidate, in their order; ``counted`` gives the key and field that a cap is counted in.

    The first that no rule stops wins, or has the request wait for its window or for the outbox; those after it are
    looked at too, for why they would not be the next.
    """
    verdicts: list[Verdict] = []
    asides, room = SET_ASIDE_MAX, seen.room
    ahead: dict[str, _Ahead] = {}
    taken = False
    for candidate in candidates:
        verdict = _stopped_early(candidate, seen, counted)
        if verdict is None:
            if candidate.pool not in ahead:  # looked at once a call, whichever candidate asks first
                ahead[candidate.pool] = _look_ahead(candidate, seen, min(asides, room))
                asides -= ahead[candidate.pool].stepped_over
                room -= ahead[candidate.pool].stepped_over
            verdict = _from_pool(candidate, seen.windows[candidate.pool], ahead[candidate.pool], room)
        if not verdict.stop:
            if taken:
                verdict = Verdict("lower_priority", f"would be next: {verdict.why}")
            taken = True
        verdicts.append(verdict)
    return verdicts


class _Ahead(msgspec.Struct, frozen=True):
    """``blocked``: more codes with too little life are ahead than one call may set aside."""

    usable: bool
    blocked: bool
    stepped_over: int


def _stopped_early(
    candidate: Candidate, seen: Seen, counted: Callable[[CountedCap], tuple[str, str]]
) -> Verdict | None:
    if seen.now < candidate.starts_at:
        return Verdict("before", f"starts at {instant(candidate.starts_at)}", "before")
    if 0 < candidate.until <= seen.now:
        return Verdict("after", f"ended at {instant(candidate.until)}", "after")
    full = [
        f"{cap.holder} cap per {cap.counter.period}: {seen.used[counted(cap)]:,} of {cap.limit:,} used"
        for cap in candidate.caps
        if seen.used[counted(cap)] >= cap.limit
    ]
    return Verdict("cap_reached", "; ".join(full), "capped") if full else None


def _look_ahead(candidate: Candidate, seen: Seen, asides: int) -> _Ahead:
    over = 0
    for expires_at in seen.windows[candidate.pool].expiries:
        if expires_at > seen.now + candidate.least_life_s:
            return _Ahead(usable=True, blocked=False, stepped_over=over)
        if over >= asides:
            return _Ahead(usable=False, blocked=True, stepped_over=over)
        over += 1
    return _Ahead(usable=False, blocked=False, stepped_over=over)


def _from_pool(candidate: Candidate, window: WindowSeen, ahead: _Ahead, room: int) -> Verdict:
    pool = f"pool {candidate.pool}"
    over = f", after {ahead.stepped_over} with too little life left" if ahead.stepped_over else ""
    if ahead.usable:
        if room < 1:
            return Verdict("backlog", "the outbox is full: see that `voucherd work` and the store run")
        return Verdict("wins", f"{window.length:,} codes in the window of {pool}{over}")
    if ahead.blocked:
        if room < 1:
            return Verdict("backlog", "the outbox is full: see that `voucherd work` and the store run")
        return Verdict("refilling", f"codes at the head of {pool} have too little life left and are being set aside")
    if window.exhausted:
        had = "nothing that lives long enough" if ahead.stepped_over else "nothing"
        return Verdict("exhausted", f"{pool} has {had} left, neither in its window nor in the store", "exhausted")
    had = "holds only codes with too little life left" if ahead.stepped_over else "is empty"
    return Verdict("refilling", f"the window of {pool} {had}, a refill is under way")


# --- read --------------------------------------------------------------------------------------------------------


async def read(
    scripts: Scripts,
    generation: int,
    candidates: Sequence[Candidate],
    distributor: str,
    terminal: str,
    bounds: tuple[int, int],
) -> Seen:
    """All that ``decide`` needs, as Redis had it at one moment; ``bounds``: codes and bytes that the outbox may hold.
    Raises RedisUnreachable."""
    p = scripts.partition
    pools = sorted({candidate.pool for candidate in candidates})
    caps = [cap for candidate in candidates for cap in candidate.caps]
    try:
        now = int((await scripts.redis.time())[0])
        for _ in range(READS_MAX):
            counted = list(
                dict.fromkeys(_counted(scripts, generation, cap, distributor, terminal, now) for cap in caps)
            )
            async with scripts.redis.pipeline(transaction=True) as pipe:
                pipe.time()
                pipe.hmget(keys.totals(p, generation), "codes", "bytes")
                for pool in pools:
                    pipe.llen(keys.window(p, generation, pool))
                    pipe.lrange(keys.window(p, generation, pool), 0, SET_ASIDE_MAX)
                    pipe.hmget(keys.pool(p, generation, pool), "stock", "exhausted")
                for key, field in counted:
                    pipe.hget(key, field)
                found: list[Any] = await pipe.execute()
            before, now = now, int(found[0][0])
            if all(_start(cap, before) == _start(cap, now) for cap in caps):
                break
    except RedisError as error:
        raise RedisUnreachable from error
    windows = {
        pool: WindowSeen(length, tuple(Code.unpack(code).expires_at for code in ahead), at is not None and stock == at)
        for pool, length, ahead, (stock, at) in zip(
            pools, found[2::3], found[3::3], found[4::3], strict=False
        )
    }  # fmt: skip
    used = found[2 + 3 * len(pools) :]
    return Seen(
        now,
        windows,
        {one: int(count or 0) for one, count in zip(counted, used, strict=True)},
        _room(bounds, *(int(one or 0) for one in found[1])),
    )


def _room(bounds: tuple[int, int], codes: int, held: int) -> int:
    """Codes that the outbox may still take; none if it has no bytes for one of any length."""
    return bounds[0] - codes if not codes or bounds[1] - held >= ENTRY_BYTES else 0


async def _left(scripts: Scripts, generation: int, distributor: str, limit: RateLimit) -> int:
    """Vouchers that may be issued to the distributor now, counted as in ``lua/issue.lua``.  Raises RedisUnreachable."""
    try:
        async with scripts.redis.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.get(keys.rate(scripts.partition, generation, distributor))
            (second, microsecond), state = await pipe.execute()
    except RedisError as error:
        raise RedisUnreachable from error
    had: int = max(int(state or 0) - (second * 1_000_000 + microsecond), 0) * limit.rate
    return max(limit.burst * 1_000_000 - had, 0) // 1_000_000


def _start(cap: CountedCap, now: int) -> int:
    return period_bounds(cap.counter.period, cap.counter.time_zone, now)[0]


def _counted(
    scripts: Scripts, generation: int, cap: CountedCap, distributor: str, terminal: str, now: int
) -> tuple[str, str]:
    field = cap_field(cap.holder, distributor, terminal)
    return counter_key(scripts.partition, generation, cap.counter, _start(cap, now)), field


async def _in_force(database: Database, scripts: Scripts, seen: Generation, notes: list[str]) -> Catalogue:
    blob = await catalogue_at(scripts, seen.fence)
    try:
        async with database.read() as conn:
            version = await control.version(conn)
            if blob is None:
                blob = await control.saved_snapshot(conn, seen.fence)
        if version > seen.fence:
            notes.append(f"catalogue {version} is NOT YET IN FORCE, this is by {max(seen.fence, 0)}")
    except StoreUnreachable:
        notes.append("the store did not answer: whether a newer catalogue waits to be in force can't be told")
    if blob is None:
        raise NotFound("no catalogue is in force: nothing can be issued; see that `voucherd work` runs")
    return [part for part in load(blob) if part is not None][-1]


# --- say ---------------------------------------------------------------------------------------------------------


def _looked(
    catalogue: Catalogue, route: Route, verdicts: Sequence[Verdict], distributor: str, products: Sequence[str]
) -> Iterator[Looked]:
    found = {(product, campaign): at for product, campaign, at in route.looked_at}
    told: dict[int, str] = {}
    for product in dict.fromkeys(products):
        for campaign in catalogue.serving(product):
            at = found.get((product, campaign.id))
            if at is None:
                yield _one(product, campaign, Verdict("not_assigned", f"not assigned to {distributor}"))
            elif isinstance(at, int):
                if at in told and not verdicts[at].stop:
                    yield _one(product, campaign, Verdict("lower_priority", f"serves {told[at]} first"))
                else:
                    yield _one(product, campaign, verdicts[at])
                told.setdefault(at, product)
            else:
                yield _one(product, campaign, Verdict("paused", "paused: `voucherd campaign resume` lets it go on"))


def _one(product: str, campaign: Campaign, verdict: Verdict) -> Looked:
    return Looked(product, campaign.id, campaign.pool, campaign.priority, verdict.standing, verdict.why)
