"""From what there is to what a declaration wants: the steps in between.  Pure: no I/O, no clock.

The same declaration and the same control plane give the same plan, so the one that is carried out can be compared with
the one that was shown.  What the file does not name is left alone; nothing is ever deleted but a cap that it sets to
null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from service import zones
from service.catalogue import Campaign, Cap
from service.domain import CapHolder, RateLimit, instant
from service.errors import Conflict
from service.store.campaigns import PRIORITY
from service.worker import forms
from service.worker.declaration import (
    Declaration,
    Limits,
    UnusableDeclaration,
    WantedCampaign,
    WantedDistributor,
    WantedPool,
)
from service.worker.generating import Generator, new_generator
from service.worker.pattern import Pattern

T = TypeVar("T")
Action = Literal["create", "change", "keep"]

# Without these there is no campaign; `campaign create` makes a pool where none is named, a file says which.
REQUIRED: Final = ("category", "products", "pool")


class Pool(msgspec.Struct, frozen=True):
    """A pool as far as a file says it; ``expires_at`` None: each code brings its own.  ``generator``: packed."""

    id: str
    expires_at: int | None = None
    least_life_s: int = 0
    generator: str | None = None


class Distributor(msgspec.Struct, frozen=True):
    """A distributor as far as a file says it."""

    id: str
    name: str
    active: bool = True
    limit: RateLimit | None = None


class Existing(msgspec.Struct, frozen=True):
    """What there is, by id; caps and products in their order."""

    pools: Mapping[str, Pool]
    distributors: Mapping[str, Distributor]
    campaigns: Mapping[str, Campaign]


class Step(msgspec.Struct, frozen=True):
    """One entry of the file, at ``path``: ``before`` becomes ``after``.

    ``left``: its caps and assignments that stay as they are although the file names others and not them.
    """

    path: str
    before: Pool | Distributor | Campaign | None
    after: Pool | Distributor | Campaign
    left: tuple[str, ...] = ()

    @property
    def action(self) -> Action:
        return "create" if self.before is None else "keep" if self.before == self.after else "change"

    @property
    def kind(self) -> str:
        return type(self.after).__name__.lower()

    @property
    def assigned(self) -> dict[str, tuple[Cap, ...]]:
        """The assignments that are made or get other caps, with the caps that they are to have."""
        if not isinstance(self.after, Campaign):
            return {}
        was = self.before.assigned if isinstance(self.before, Campaign) else {}
        return {distributor: caps for distributor, caps in self.after.assigned.items() if was.get(distributor) != caps}

    @property
    def changes(self) -> list[tuple[str, object, object]]:
        """Every field that becomes another, as the file writes it: its name, what it was, what it will be."""
        was, to_be = {} if self.before is None else _fields(self.before), _fields(self.after)
        return [(name, old, new) for name in {**to_be, **was} if (old := was.get(name)) != (new := to_be.get(name))]


class Plan(msgspec.Struct, frozen=True):
    """Pools and distributors come before the campaigns that name them.  ``left``: what the file does not name."""

    steps: tuple[Step, ...]
    left: Mapping[str, tuple[str, ...]]

    @property
    def to_do(self) -> list[Step]:
        return [step for step in self.steps if step.action != "keep"]


def plan(wanted: Declaration, there: Existing, now: int) -> Plan:
    """A campaign that is made without a beginning begins ``now``.

    Raises UnusableDeclaration for values that can't be read, campaigns that can't be made for want of something, and
    references to what is neither in the file nor in the store.
    """
    steps, left = list[Step](), dict[str, tuple[str, ...]]()
    faults = list(_dangling(wanted, there))
    make: Callable[[str, Any, Any, int], Step]
    for kind, make in (("pools", _pool), ("distributors", _distributor), ("campaigns", _campaign)):
        entries, known = getattr(wanted, kind), getattr(there, kind)
        for at, entry in enumerate(entries):
            try:
                steps.append(make(f"{kind}[{at}]", entry, known.get(entry.id), now))
            except UnusableDeclaration as fault:
                faults.append(str(fault))
        left[kind] = tuple(sorted(known.keys() - {entry.id for entry in entries}))
    if faults:
        raise UnusableDeclaration(*faults)
    return Plan(tuple(steps), left)


def ordered(caps: Iterable[Cap]) -> tuple[Cap, ...]:
    """Caps of one campaign or assignment, always in the same order."""
    return tuple(sorted(caps, key=lambda cap: (cap.holder, cap.period)))


def _dangling(wanted: Declaration, there: Existing) -> Iterator[str]:
    pools = there.pools.keys() | {pool.id for pool in wanted.pools}
    distributors = there.distributors.keys() | {distributor.id for distributor in wanted.distributors}
    for at, campaign in enumerate(wanted.campaigns):
        if campaign.pool is not UNSET and campaign.pool not in pools:
            yield f"campaigns[{at}].pool: there is no pool {campaign.pool}, neither in the file nor in the store"
        for number, one in enumerate(campaign.assigned):
            if one.distributor not in distributors:
                yield (
                    f"campaigns[{at}].assigned[{number}].distributor: there is no distributor {one.distributor}, "
                    "neither in the file nor in the store"
                )


def _pool(path: str, wanted: WantedPool, there: Pool | None, now: int) -> Step:
    after = there or Pool(wanted.id)
    if wanted.expires is not UNSET:
        after = replace(after, expires_at=_read(f"{path}.expires", forms.expiry_of, wanted.expires))
    if wanted.least_life is not UNSET:
        after = replace(after, least_life_s=_read(f"{path}.least_life", forms.seconds, str(wanted.least_life)))
    if wanted.pattern is not UNSET or wanted.expires_after is not UNSET:
        after = replace(after, generator=_generator(path, wanted, there, after))
    if after.generator is not None and after.expires_at is None and Generator.unpack(after.generator).days is None:
        raise UnusableDeclaration(f"{path}.expires: the codes of this pool have no other expiry")
    return Step(path, there, after)


def _generator(path: str, wanted: WantedPool, there: Pool | None, after: Pool) -> str:
    days = None if isinstance(wanted.expires_after, UnsetType) else wanted.expires_after
    if there is None:
        if isinstance(wanted.pattern, UnsetType):
            raise UnusableDeclaration(f"{path}.expires_after: goes with a pattern")
        try:
            return new_generator(Pattern(wanted.pattern), days, after.expires_at, after.least_life_s).pack()
        except Conflict as fault:
            raise UnusableDeclaration(f"{path}.pattern: {fault}") from None
    known = None if there.generator is None else Generator.unpack(there.generator)
    if (
        there.generator is None
        or known is None
        or wanted.pattern not in (UNSET, known.pattern.text)
        or wanted.expires_after not in (UNSET, known.days)
    ):
        raise UnusableDeclaration(f"{path}.pattern: what a pool is generated by is for good; create another pool")
    return there.generator


def _distributor(path: str, wanted: WantedDistributor, there: Distributor | None, now: int) -> Step:
    after = _given(there or Distributor(wanted.id, wanted.id), name=wanted.name, active=wanted.active)
    return Step(path, there, replace(after, limit=_limit(path, wanted, after.limit)))


def _limit(path: str, wanted: WantedDistributor, there: RateLimit | None) -> RateLimit | None:
    rate = (there.rate if there is not None else None) if wanted.rate is UNSET else wanted.rate
    if rate is None:
        if wanted.burst is not UNSET:
            raise UnusableDeclaration(f"{path}.burst: goes with a rate")
        return None
    given = there.burst if wanted.burst is UNSET and there is not None else wanted.burst
    return RateLimit.of(rate, None if given is UNSET else given)


def _campaign(path: str, wanted: WantedCampaign, there: Campaign | None, now: int) -> Step:
    if there is None and (missing := [name for name in REQUIRED if getattr(wanted, name) is UNSET]):
        raise UnusableDeclaration(
            f"{path}: there is no campaign {wanted.id}, and to create it the file has to say its {', '.join(missing)}"
        )
    after = _given(
        there or Campaign(wanted.id, "", (), "", PRIORITY, now, 0, False, "UTC", (), {}),
        category=wanted.category, pool=wanted.pool, priority=wanted.priority, paused=wanted.paused,
        time_zone=wanted.time_zone,
        products=UNSET if wanted.products is UNSET else tuple(sorted(set(wanted.products))),
    )  # fmt: skip
    zone = _read(f"{path}.time_zone", zones.zone, after.time_zone)
    until = _read(f"{path}.until", forms.end_of, wanted.until, zone)
    starts_at = _read(f"{path}.from", forms.start_of, wanted.starts, zone)
    after = _given(after, starts_at=starts_at, until=0 if until is None else until)
    caps, left = _caps(after.caps, wanted.caps, "campaign")
    assigned = dict(after.assigned)
    for one in wanted.assigned:
        assigned[one.distributor], others = _caps(assigned.get(one.distributor, ()), one.caps, "distributor")
        left += [f"assigned.{one.distributor}.{name}" for name in others]
    if wanted.assigned:
        named = {one.distributor for one in wanted.assigned}
        left += [f"assigned.{distributor}" for distributor in sorted(assigned.keys() - named)]
    return Step(path, there, replace(after, caps=caps, assigned=assigned), tuple(left))


def _caps(there: Iterable[Cap], wanted: Limits, holder: CapHolder) -> tuple[tuple[Cap, ...], list[str]]:
    """The caps that are to be, and the names of those that are only because they were."""
    were = {(cap.holder, cap.period): cap.limit for cap in there}
    said = wanted.by(holder)
    to_be = ordered(Cap(*counted, limit) for counted, limit in {**were, **said}.items() if limit is not None)
    left = [_cap_name(*counted, holder) for counted in sorted(were.keys() - said.keys())] if said else []
    return to_be, left


def _fields(thing: Pool | Distributor | Campaign) -> dict[str, object]:
    """By their paths in an entry of the file."""
    match thing:
        case Pool():
            expires = None if thing.expires_at is None else instant(thing.expires_at)
            said: dict[str, object] = {"expires": expires, "least_life": forms.duration_told(thing.least_life_s)}
            if thing.generator is not None:
                generator = Generator.unpack(thing.generator)
                said |= {"pattern": generator.pattern.text, "expires_after": generator.days}
            return said
        case Distributor():
            limit = thing.limit
            rate, burst = (None, None) if limit is None else (limit.rate, limit.burst)
            return {"name": thing.name, "active": thing.active, "rate": rate, "burst": burst}
    fields: dict[str, object] = {
        "category": thing.category, "products": list(thing.products), "pool": thing.pool, "priority": thing.priority,
        "from": instant(thing.starts_at), "until": instant(thing.until) if thing.until else None,
        "time_zone": thing.time_zone, "paused": thing.paused,
    }  # fmt: skip
    fields |= {_cap_name(cap.holder, cap.period, "campaign"): cap.limit for cap in thing.caps}
    for distributor, caps in sorted(thing.assigned.items()):
        here = f"assigned.{distributor}"
        fields[here] = True
        fields |= {f"{here}.{_cap_name(cap.holder, cap.period, 'distributor')}": cap.limit for cap in caps}
    return fields


def _cap_name(holder: str, period: str, own: CapHolder) -> str:
    return f"caps.{period}" if holder == own else f"caps.{holder}.{period}"


def _given(thing: T, **values: object) -> T:
    return replace(thing, **{name: value for name, value in values.items() if value is not UNSET})  # type: ignore[type-var]


def _read(path: str, form: Callable[..., T], text: str | UnsetType | None, *more: object) -> T | UnsetType | None:
    """What ``form`` makes of a text; what is no text stays as it is.  Raises UnusableDeclaration."""
    if not isinstance(text, str):
        return text
    try:
        return form(text, *more)
    except ValueError as error:
        raise UnusableDeclaration(f"{path}: {error}") from None
