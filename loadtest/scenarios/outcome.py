"""What came of a load test: figures of what its users wrote down, and whether ledger and promises agree with it.

Pure: attempts in, numbers and violations out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final

import msgspec

from loadtest.scenarios.record import EXHAUSTED, ISSUED, KINDS_OF_VOUCHERS, Attempt

# The service's clock, which revokes, and the users' need not agree to the microsecond.
CLOCK_S: Final = 0.01

Sale = tuple[str, str]  # seller, key


class Issued(msgspec.Struct, frozen=True, gc=False):
    """A voucher in the ledger, its code as a digest.  ``double``: somebody else had it before."""

    seller: str
    key: str
    code: str
    double: bool


class Sample(msgspec.Struct, frozen=True):
    """What the metrics said at a Unix second: codes in stock and in windows of the test's pools, codes that wait for
    the ledger, megabytes of the largest serving process.  NaN: they did not say."""

    at: float
    left: float
    outbox: float
    serve_mb: float


class Facts(msgspec.Struct, frozen=True):
    """What is known besides the record.  ``stocked``: codes that were put into the pools for this test, by pool;
    ``left``: those that nobody has at its end (both None: they are not this test's own).  ``revoked``: when the command
    that revoked a token had returned, by the token's name.  ``findings``: the audit's, None if none was made."""

    stocked: dict[str, int] | None = None
    left: dict[str, int] | None = None
    revoked: dict[str, float] = {}
    findings: list[str] | None = None
    samples: Sequence[Sample] = ()


class Outcome:
    """Some of a test's attempts and the seconds since its beginning in which they were begun.  Figures of nothing are
    NaN, which meets no objective."""

    def __init__(
        self, attempts: Sequence[Attempt], began: float, window: tuple[float, float], stages: Sequence[float],
        facts: Facts,
    ) -> None:  # fmt: skip
        """``began``: Unix seconds; ``window`` in seconds since then; ``stages``: when each of them ends."""
        self.attempts = attempts
        self.began = began
        self.window = window
        self.stages = stages
        self.facts = facts

    # --- parts of it -----------------------------------------------------------------------------------------------

    def of(self, part: str) -> Outcome:
        """What these users did."""
        return self._some([one for one in self.attempts if one.part == part], self.window)

    def stage(self, number: int) -> Outcome:
        """The sales that were begun in a stage, counted from 0."""
        window = (self.stages[number - 1] if number else 0.0, self.stages[number])
        begun = [one for one in self.attempts if window[0] <= one.sale_began - self.began < window[1]]
        return self._some(begun, window)

    def share_of_time(self, since: float, until: float) -> Outcome:
        """The sales that were begun between these shares (0 to 1) of the time."""
        first, last = self.window
        window = (first + since * (last - first), first + until * (last - first))
        begun = [one for one in self.attempts if window[0] <= one.sale_began - self.began < window[1]]
        return self._some(begun, window)

    def _some(self, attempts: Sequence[Attempt], window: tuple[float, float]) -> Outcome:
        return Outcome(attempts, self.began, window, self.stages, self.facts)

    # --- figures ---------------------------------------------------------------------------------------------------

    @cached_property
    def sales(self) -> dict[Sale, list[Attempt]]:
        """The attempts of each sale, in the order of their answers."""
        found = defaultdict[Sale, list[Attempt]](list)
        for one in self.attempts:
            found[one.seller, one.key].append(one)
        return dict(found)

    @property
    def seconds(self) -> float:
        return self.window[1] - self.window[0]

    @property
    def kinds(self) -> Counter[str]:
        """How many attempts ended how."""
        return Counter(one.kind for one in self.attempts)

    @property
    def vouchers(self) -> int:
        """Different ones that users were told of."""
        return len({code for one in self.attempts for code in one.codes})

    def vouchers_a_second(self) -> float:
        return self.vouchers / self.seconds if self.seconds else math.nan

    def sales_a_second(self) -> float:
        return len(self.sales) / self.seconds if self.seconds else math.nan

    def answered(self) -> float:
        """Of 100 sales, those that came to a final answer."""
        return _percent(sum(any(one.final for one in some) for some in self.sales.values()), len(self.sales))

    def sold(self) -> float:
        """Of 100 sales, those that got their vouchers."""
        return _percent(sum(any(one.codes for one in some) for some in self.sales.values()), len(self.sales))

    def share(self, *kinds: str) -> float:
        """Of 100 attempts, those that ended in one of these ways."""
        return _percent(sum(one.kind in kinds for one in self.attempts), len(self.attempts))

    def server_errors(self) -> float:
        """Of 100 attempts, those that were answered with a server error."""
        return _percent(sum(one.status >= 500 for one in self.attempts), len(self.attempts))

    def p_ms(self, percent: float, *kinds: str) -> float:
        """The milliseconds that so many percent of the answers (of these kinds, or of any) did not pass."""
        return percentile([one.seconds for one in self.attempts if one.status and (not kinds or one.kind in kinds)],
                          percent) * 1e3  # fmt: skip

    def p99_of_sales_ms(self) -> float:
        """The milliseconds that 99 of 100 sales did not pass, from the first attempt to the final answer."""
        return percentile([one.ended - one.sale_began for one in self.attempts if one.final], 99) * 1e3

    def taken(self) -> float:
        """Of 100 codes that were put in stock for this test, those that users were told of."""
        return _percent(self.vouchers, sum((self.facts.stocked or {}).values()))

    def samples(self) -> list[Sample]:
        """Those of its time."""
        return [one for one in self.facts.samples if self.window[0] <= one.at - self.began < self.window[1]]

    def outbox(self) -> float:
        """The most codes that were seen waiting for the ledger."""
        return max((one.outbox for one in self.samples()), default=math.nan)

    def serve_mb(self) -> float:
        """Megabytes of the largest serving process, the median."""
        return percentile([one.serve_mb for one in self.samples()], 50)

    def left(self) -> float:
        """Codes that nobody has at the end."""
        return math.nan if self.facts.left is None else float(sum(self.facts.left.values()))


def percentile(values: Sequence[float], percent: float) -> float:
    """NaN without any."""
    seen = sorted(values)
    return seen[min(len(seen) - 1, int(percent / 100 * len(seen)))] if seen else math.nan


def _percent(some: int, of: int) -> float:
    return 100 * some / of if of else math.nan


# --- promises ------------------------------------------------------------------------------------------------------


def violations(outcome: Outcome, ledger: Sequence[Issued] | None) -> list[str]:
    """What must not be, a line each.  ``ledger``: all that it has of the sellers and the time of the test (and perhaps
    of others); None: nobody has looked."""
    found = [*_told(outcome), *_revoked(outcome), *_exhausted(outcome)]
    if ledger is not None:
        found += _ledger(outcome, ledger)
    return found + [f"audit: {one}" for one in outcome.facts.findings or ()]


def _told(outcome: Outcome) -> list[str]:
    """P1 and P3, by what users were told alone."""
    found, owners = [], dict[str, Sale]()
    for sale, attempts in outcome.sales.items():
        told = [one for one in attempts if one.codes]
        if len({(one.answer, one.codes) for one in told}) > 1:
            found.append(f"P3: sale {sale[1]} was told different answers")
        for one in told:
            if one.kind in KINDS_OF_VOUCHERS and len(one.codes) != one.wanted:
                found.append(f"P3: sale {sale[1]} got {len(one.codes)} vouchers for {one.wanted}")
            found += [
                f"P1: sales {owners[code][1]} and {sale[1]} were told the same code"
                for code in one.codes
                if owners.setdefault(code, sale) != sale
            ]
    return found


def _revoked(outcome: Outcome) -> list[str]:
    """P6: a token is good for nothing that was begun after the command that revoked it had returned."""
    return [
        f"P6: token {one.token} was good for sale {one.key}, {one.began - since:.3f} s after it was revoked"
        for one in outcome.attempts
        if (since := outcome.facts.revoked.get(one.token)) and one.codes and one.began > since + CLOCK_S
    ]


def _exhausted(outcome: Outcome) -> list[str]:
    """P4: nobody is told that a pool has fewer than were asked for while it has not.  Nothing is added meanwhile."""
    refused = [one.wanted for one in outcome.attempts if one.kind in EXHAUSTED]
    left = outcome.facts.left
    if refused and left and min(left.values()) >= min(refused):
        return [f"P4: {len(refused)} attempts were told that a pool is exhausted, and {left} are left"]
    return []


def _ledger(outcome: Outcome, ledger: Sequence[Issued]) -> list[str]:
    """P1 and P2: what users were told is in the ledger, as theirs, and nothing else is there for them."""
    found = [
        f"P1: sale {one.key} has a code in the ledger that somebody else had before" for one in ledger if one.double
    ]
    in_ledger: Mapping[str, Sale] = {one.code: (one.seller, one.key) for one in ledger}
    of_sale = defaultdict[Sale, set[str]](set)
    for one in ledger:
        of_sale[one.seller, one.key].add(one.code)
    for sale, attempts in outcome.sales.items():
        told = {code for one in attempts for code in one.codes}
        for code in told:
            if code not in in_ledger:
                found.append(f"P2: a code that sale {sale[1]} was told of is not in the ledger")
            elif in_ledger[code] != sale:
                found.append(
                    f"P1: a code that sale {sale[1]} was told of is that of sale {in_ledger[code][1]} in the ledger"
                )
        if told and of_sale[sale] - told:
            found.append(
                f"P3: sale {sale[1]} has {len(of_sale[sale])} codes in the ledger, and was told of {len(told)}"
            )
        if not told and of_sale[sale] and all(one.final for one in attempts):
            found.append(f"P2: sale {sale[1]} was refused, and has {len(of_sale[sale])} codes in the ledger")
    return found


def issued_kinds(outcome: Outcome) -> list[str]:
    """The kinds of attempts that there were, vouchers first, then by how many there were."""
    kinds = outcome.kinds
    return sorted(kinds, key=lambda kind: (kind != ISSUED, kind not in KINDS_OF_VOUCHERS, -kinds[kind]))
