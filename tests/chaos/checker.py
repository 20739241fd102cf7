"""The promises, held against what clients were told and what the stores say.  Pure: sets in, violations out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from tests.chaos.answers import Answers, Key
from tests.chaos.evidence import Evidence
from tests.chaos.stage import Campaign, Paused, World

PROMISES: Final = ("P1", "P2", "P3", "P4", "P5", "P6", "P8")

# A Redis server and the client need not have the same clock to the microsecond.
CLOCK_S: Final = 0.01


class Loss(msgspec.Struct, frozen=True):
    """A fault that no copy of the outbox survived: what was told after ``since`` to a call that began before ``until``
    (Unix seconds) may be in quarantine.  Not what was told before ``until``: an answer may still be on its way then."""

    since: float
    until: float


class Allowances(msgspec.Struct, frozen=True):
    """What was done on purpose: tokens that may be refused (``revoking``), and those that must be since when
    (``revoked``); campaigns that were ``paused``; ``incidents`` and ``parked`` entries that were provoked, of which
    ``perhaps`` so many were lost again, with an outbox or with the store; ``forged``: codes that an outbox entry had
    given once more, by which the audit's books are off."""

    losses: Sequence[Loss] = ()
    revoking: Collection[str] = ()
    revoked: dict[str, float] = {}
    paused: Sequence[Paused] = ()
    incidents: Collection[str] = ()
    parked: int = 0
    perhaps: int = 0
    forged: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """``violations`` of each promise; ``lost``: vouchers that clients were told, now in quarantine; ``defects``: what
    must not be either; ``quarantine``: codes by pool."""

    violations: dict[str, list[str]]
    lost: int
    quarantine: dict[str, int]
    defects: list[str]

    @property
    def broken(self) -> bool:
        return bool(self.defects) or any(self.violations.values())


def check(answers: Answers, evidence: Evidence, world: World, allowed: Allowances) -> Verdict:
    violations: dict[str, list[str]] = {promise: [] for promise in PROMISES}
    codes = answers.codes
    _p1(violations["P1"], codes, evidence)
    lost = _p2(violations["P2"], answers, codes, evidence, allowed)
    _p3(violations["P3"], answers, evidence, lost)
    _p4(violations["P4"], answers, evidence, world, allowed)
    _p5(violations["P5"], evidence)
    _p6(violations["P6"], answers, allowed)
    _p8(violations["P8"], answers, evidence, world, lost)
    defects = list(answers.odd)
    defects += [f"no final answer to {key[1]} of {key[0]}" for key in sorted(answers.unanswered)]
    for promise, text in evidence.findings:
        # The audit does not know what may be lost, nor what was provoked: caps are looked at above, parked entries and
        # incidents below.
        provoked = allowed.forged and (": given twice: " in text or f"'too_many': {allowed.forged}" in text)
        if promise != "P8" and not text.startswith("parked ") and ": incident " not in text and not provoked:
            violations[promise].append(f"audit: {text}")
    for kind, subject, _ in evidence.incidents:
        if kind not in allowed.incidents:
            violations["P1" if kind == "double_issue" else "P2"].append(f"incident {kind} of {subject}")
    if not allowed.parked - allowed.perhaps <= evidence.parked <= allowed.parked:
        violations["P2"].append(
            f"{evidence.parked} entries are parked, {allowed.parked} were malformed, perhaps {allowed.perhaps} lost"
        )
    if evidence.outbox:
        violations["P2"].append(f"{evidence.outbox} entries are still in an outbox")
    quarantine = {pool: codes for pool, codes in sorted(evidence.quarantine.items()) if codes}
    return Verdict(violations, len(lost), quarantine, defects)


def _p1(found: list[str], codes: dict[str, list[Key]], evidence: Evidence) -> None:
    """A code is given to at most one request, ever."""
    found += [f"{code} was told to {len(keys)} keys: {keys[:3]}" for code, keys in codes.items() if len(keys) > 1]
    for code, keys in codes.items():
        row = evidence.issued.get(code)
        if row is not None and row.key not in keys:
            found.append(f"{code} was told to {keys}, and by the ledger it is of {row.key}")
        if code in evidence.windows:
            found.append(f"{code} was told to {keys}, and waits in a window to be issued")
        if evidence.places.get(code) in ("stock", "nowhere"):
            found.append(f"{code} was told to {keys}, and is in {evidence.places[code]}")
    found += [
        f"{code} is in the ledger, and waits in a window to be issued"
        for code in evidence.windows & evidence.issued.keys()
    ]
    found += [f"{code} is in the windows twice" for code in evidence.twice]
    found += evidence.doubled


def _p2(
    found: list[str], answers: Answers, codes: dict[str, list[Key]], evidence: Evidence, allowed: Allowances
) -> set[str]:
    """What was told is in the ledger, or was lost with every copy and is in quarantine: those codes."""
    lost = set()
    for code, place in evidence.places.items():
        for key in codes[code]:
            asked = answers.keys[key]
            told = next(one for one in (*asked.told, *asked.changed) if code in one.codes)
            if place == "quarantine" and any(
                told.at >= loss.since - CLOCK_S and told.began <= loss.until for loss in allowed.losses
            ):
                lost.add(code)
            else:
                found.append(f"{code}, told to {key} at {told.at:.3f}, is not in the ledger: {place}")
    return lost


def _p3(found: list[str], answers: Answers, evidence: Evidence, lost: set[str]) -> None:
    """The same key gets the same answer, and another body none."""
    requests = Counter(key for key, _ in {(row.key, row.request) for row in evidence.issued.values()})
    found += [f"{key} has {count} requests in the ledger" for key, count in requests.items() if count > 1]
    for key, asked in answers.keys.items():
        if not lost.isdisjoint(code for one in (*asked.told, *asked.changed) for code in one.codes):
            continue
        if len(asked.told) > 1:
            found.append(f"{key} was told {len(asked.told)} different answers, first at {asked.told[0].at:.3f}")
        if asked.changed:
            found.append(f"{key} was told a voucher for another body, at {asked.changed[0].at:.3f}")
        if asked.refused:
            found.append(f"{key} was refused as another body's, at {asked.refused:.3f}")


def _p4(found: list[str], answers: Answers, evidence: Evidence, world: World, allowed: Allowances) -> None:
    """Nobody is told "unavailable" while something is left.  Nothing is added to a pool while clients ask, so what is
    there at the end was there before."""
    used = Counter(row.campaign for row in evidence.issued.values())
    for one in answers.refusals:
        campaign = world.of_product(one.product)
        left = evidence.stored[campaign.id] + evidence.held[campaign.id]
        if one.code == "exhausted":
            if campaign.codes is None or left:
                found.append(
                    f"{one.key} was told at {one.at:.3f} that {campaign.id} is exhausted: {left} codes are left"
                )
        elif one.code == "cap_reached":
            if campaign.distributor_cap is None and campaign.terminal_cap is None and campaign.cap is None:
                found.append(f"{one.key} was told at {one.at:.3f} that a cap of {campaign.id} is reached: it has none")
            elif (
                campaign.terminal_cap is None
                and campaign.distributor_cap is None
                and used[campaign.id] + evidence.quarantine[campaign.id] < (campaign.cap or 0)
            ):
                found.append(f"{one.key} was told that the cap of {campaign.id} is reached: {used[campaign.id]} issued")
        elif one.code == "not_running" and any(
            pause.campaign == campaign.id and one.at >= pause.begun - CLOCK_S and one.began <= pause.ended + CLOCK_S
            for pause in allowed.paused
        ):
            continue
        else:
            found.append(f"{one.key} was told {one.code} at {one.at:.3f}")


def _p5(found: list[str], evidence: Evidence) -> None:
    """The books balance: every code is in one place."""
    for pool, imported in evidence.imported.items():
        stored, leased = evidence.stored[pool], evidence.leased[pool]
        if imported != stored + leased:
            found.append(f"{pool}: {imported} imported, {stored} stored and {leased} leased")
        if evidence.out[pool] != evidence.held[pool]:
            found.append(
                f"{pool}: {evidence.out[pool]} codes of the open generation are accounted for nowhere, "
                f"its window holds {evidence.held[pool]}"
            )
        if evidence.quarantine[pool] < 0:
            found.append(f"{pool}: {evidence.quarantine[pool]} codes in quarantine")


def _p6(found: list[str], answers: Answers, allowed: Allowances) -> None:
    """A revoked token, a paused campaign: no success for a request that began later.  One that is in force: no
    refusal."""
    found += [
        f"{token} was refused {times} times, and nobody had revoked it"
        for token, times in answers.refused_tokens.items()
        if token not in allowed.revoking
    ]
    for token, at in allowed.revoked.items():
        if (last := answers.last_success.get(token, 0.0)) > at:
            found.append(f"{token}, revoked at {at:.3f}, was good for a request that began at {last:.3f}")
    for pause in allowed.paused:
        # A request that was begun before may be a replay; one that was answered after may have been issued after.
        found += [
            f"{key} was issued at {one.at:.3f} by {pause.campaign}, paused at {pause.since:.3f}"
            for key, asked in answers.keys.items()
            for one in asked.told
            if one.campaign == pause.campaign and pause.since < asked.began and one.at < pause.until
        ]


def _p8(found: list[str], answers: Answers, evidence: Evidence, world: World, lost: set[str]) -> None:
    """No cap is exceeded; by a distributor or terminal not by more than it was told and lost, which no ledger counts
    when caps are counted anew."""
    campaigns = {one.id: one for one in world.campaigns}
    used: defaultdict[tuple[Campaign, str, str], set[str]] = defaultdict(set)  # by whom: '' for all
    forgotten: Counter[tuple[Campaign, str, str]] = Counter()

    def holders(campaign: str, distributor: str, terminal: str) -> set[tuple[Campaign, str, str]]:
        of = campaigns[campaign]
        return {(of, "", ""), (of, distributor, ""), (of, distributor, terminal)}

    for code, row in evidence.issued.items():
        for holder in holders(row.campaign, row.key[0], row.terminal):
            used[holder].add(code)
    for key, asked in answers.keys.items():
        for one in asked.told:
            for code in lost.intersection(one.codes):
                for holder in holders(one.campaign, key[0], asked.terminal):
                    used[holder].add(code)
                    forgotten[holder] += bool(holder[1])
    for holder, codes in used.items():
        campaign, distributor, terminal = holder
        cap = campaign.terminal_cap if terminal else campaign.distributor_cap if distributor else campaign.cap
        if cap is not None and len(codes) > cap + forgotten[holder]:
            found.append(f"{campaign.id}: {len(codes)} vouchers{_of(distributor, terminal)}, the cap is {cap}")


def _of(distributor: str, terminal: str) -> str:
    return f" of {distributor} {terminal}".rstrip() if distributor else ""
