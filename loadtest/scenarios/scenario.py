"""The scenarios: who asks how often and how, and what has to come of it.

Objectives are for what locust reaches on two cores that it shares with the service, its servers and its worker: a part
of what the service itself does, for which there is `make bench`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Final, Literal

import msgspec

from loadtest.scenarios.outcome import Outcome
from loadtest.scenarios.record import TIMED_OUT

PARTNER: Final = "partner"  # the seller that every scenario has
NOISY: Final = "noisy"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Users that behave alike.  ``share`` of all users as far as others have theirs, each of which makes ``rate`` sales
    a second for ``seller``; of 100 sales, ``repeats`` are asked for once more when they have got their answer.
    ``quantities`` of one sale on Client API v3, the least and the most.  ``hasty_s``: the first HASTY_TRIES attempts
    are given up after so many seconds, and made again at once (0: never).  ``insists``: a 429 is asked again.
    ``late``: they go on with an old token until it is refused."""

    name: str
    share: int = 1
    rate: float
    api: Literal["v1", "v3"] = "v1"
    seller: str = PARTNER
    quantities: tuple[int, int] = (1, 1)
    repeats: float = 0.0
    hasty_s: float = 0.0
    insists: bool = True
    late: bool = False

    @property
    def vouchers(self) -> float:
        """That one sale asks for, on average."""
        return sum(self.quantities) / 2


class Stage(msgspec.Struct, frozen=True):
    """``users`` for ``seconds``."""

    seconds: float
    users: int


class Bound(msgspec.Struct, frozen=True):
    """One figure that has to be within limits; ``what`` says its unit.  ``of_machine``: how much can be
    asked for depends on the machine."""

    what: str
    figure: Callable[[Outcome], float]
    least: float = -math.inf
    most: float = math.inf
    of_machine: bool = False

    def eased(self, slack: float) -> Bound:
        """The same for a machine on which everything may take so many times as long."""
        if not self.of_machine:
            return self
        return msgspec.structs.replace(self, least=self.least / slack, most=self.most * slack)

    @property
    def limit(self) -> str:
        if self.least == self.most:
            return f"{self.least:,g}"
        if self.least == -math.inf:
            return f"at most {self.most:,g}"
        return f"at least {self.least:,g}" if self.most == math.inf else f"{self.least:,g} to {self.most:,g}"

    def met(self, seen: float) -> bool:
        return self.least <= seen <= self.most


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """``stock``: codes put into the partner's pool, over the vouchers that all sales ask for.  ``limits``: vouchers a
    second that a seller may be issued.  ``rotates``: in the middle of its peak the partner's token is replaced.
    ``by_metrics``: its objective is about what the service says of itself, too."""

    name: str
    about: str
    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]
    objective: tuple[Bound, ...]
    stock: float = 1.3
    limits: dict[str, int] = {}
    rotates: bool = False
    by_metrics: bool = False

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def sellers(self) -> list[str]:
        return list(dict.fromkeys(part.seller for part in self.parts))

    @property
    def plain(self) -> bool:
        """Whether a token of any distributor is all that it takes."""
        return self.sellers == [PARTNER] and self.stock > 1 and not self.rotates and not self.uses("v3")

    @property
    def peak(self) -> float:
        """Vouchers a second at the most."""
        shares = sum(part.share for part in self.parts)
        users = max(stage.users for stage in self.stages)
        return sum(users * part.share / shares * part.rate * part.vouchers for part in self.parts)

    def ends(self, seconds: float) -> list[float]:
        """When each stage ends, if all of them take so many seconds."""
        return list(accumulate(stage.seconds * seconds / self.seconds for stage in self.stages))

    def rotation(self, seconds: float) -> float:
        """Seconds after which the partner's token is replaced: the middle of the stage with the most users."""
        ends = self.ends(seconds)
        peak = max(range(len(ends)), key=lambda number: self.stages[number].users)
        return ((ends[peak - 1] if peak else 0.0) + ends[peak]) / 2

    def uses(self, api: str) -> bool:
        return any(part.api == api for part in self.parts)

    def rate(self, users: int) -> float:
        """Sales a second that so many users make."""
        shares = sum(part.share for part in self.parts)
        return sum(users * part.share / shares * part.rate for part in self.parts)

    def codes(self, seconds: float, api: str, seller: str) -> int:
        """To be put in stock for this seller's sales on this API in a run of so many seconds."""
        shares = sum(part.share for part in self.parts)
        user_s = sum(stage.users * stage.seconds for stage in self.stages) * seconds / self.seconds
        asked = sum(
            part.share / shares * part.rate * part.vouchers
            for part in self.parts
            if part.api == api and part.seller == seller
        )
        return math.ceil(self.stock * user_s * asked)

    def load(self, seconds: float = 0.0) -> str:
        """Its stages in words, if all together take so many seconds (0: as they are)."""
        scale = seconds / self.seconds if seconds else 1.0
        return ", then ".join(
            f"{scale * stage.seconds:.3g} s of {stage.users} users, {self.rate(stage.users):g} sales a second"
            for stage in self.stages
        )


def _ms(what: str, figure: Callable[[Outcome], float], most: float) -> Bound:
    return Bound(what, figure, most=most, of_machine=True)


def _rate(what: str, figure: Callable[[Outcome], float], least: float) -> Bound:
    return Bound(what, figure, least=least, of_machine=True)


def _errors(most: float) -> Bound:
    return Bound("server errors, %", Outcome.server_errors, most=most, of_machine=True)


_ANSWERED: Final = Bound("sales with a final answer, %", Outcome.answered, least=100)

_SCENARIOS: Final = (
    Scenario(
        name="steady",
        about="as many sales in each second as in any other, one in fifty asked for twice",
        parts=(Part(name="terminals", rate=5, repeats=2),),
        stages=(Stage(60, 80),),
        objective=(
            _rate("vouchers a second", Outcome.vouchers_a_second, 360),
            _ANSWERED,
            _ms("p99 of answers, ms", lambda seen: seen.p_ms(99), 250),
            _errors(0.1),
        ),
    ),
    Scenario(
        name="spike",
        about="ten times as many users from one second to the next, and back",
        parts=(Part(name="terminals", rate=2),),
        stages=(Stage(20, 30), Stage(20, 300), Stage(20, 30)),
        objective=(
            _rate("vouchers a second in the spike", lambda seen: seen.stage(1).vouchers_a_second(), 500),
            _ANSWERED,
            _ms("p99 of answers, ms", lambda seen: seen.p_ms(99), 1_000),
            _ms("p99 of answers after it, ms", lambda seen: seen.stage(2).p_ms(99), 500),
            _errors(1),
        ),
    ),
    Scenario(
        name="soak",
        about="a moderate load for long: nothing grows, nothing slows down (longer: `ARGS='--seconds 14400'`)",
        parts=(Part(name="terminals", rate=4, repeats=2),),
        stages=(Stage(600, 50),),
        by_metrics=True,
        objective=(
            _rate("vouchers a second", Outcome.vouchers_a_second, 180),
            _ANSWERED,
            _ms("p99 of answers, ms", lambda seen: seen.p_ms(99), 250),
            Bound(
                "median of the last third over that of the middle third",
                lambda seen: seen.share_of_time(2 / 3, 1).p_ms(50) / seen.share_of_time(1 / 3, 2 / 3).p_ms(50),
                most=1.5,
            ),
            Bound(
                "memory of serving: the last third over the middle third",
                lambda seen: seen.share_of_time(2 / 3, 1).serve_mb() / seen.share_of_time(1 / 3, 2 / 3).serve_mb(),
                most=1.05,
            ),
            Bound(
                "codes waiting for the ledger, in the last third",
                lambda seen: seen.share_of_time(2 / 3, 1).outbox(), most=2_000,
            ),
            _errors(0.1),
        ),
    ),
    Scenario(
        name="retry-storm",
        about="a third of the users wait a fifth of a millisecond, give up and ask again at once with the same key, "
        "three times, before they wait like the others",
        parts=(
            Part(name="patient", share=2, rate=3),
            Part(name="hasty", share=1, rate=3, hasty_s=0.0002),
        ),
        stages=(Stage(60, 90),),
        objective=(
            _rate("vouchers a second", Outcome.vouchers_a_second, 240),
            Bound("hasty attempts that timed out, %", lambda seen: seen.of("hasty").share(TIMED_OUT), least=25),
            _ANSWERED,
            _ms("p99 of patient users' answers, ms", lambda seen: seen.of("patient").p_ms(99), 250),
            _ms("p99 of hasty users' sales, ms", lambda seen: seen.of("hasty").p99_of_sales_ms(), 500),
            _errors(1),
        ),
    ),
    Scenario(
        name="depletion",
        about="the pool runs out in the middle of the peak: from then on every sale is refused with 409",
        parts=(Part(name="terminals", rate=2),),
        stages=(Stage(15, 75), Stage(30, 250), Stage(15, 75)),
        stock=0.5,
        objective=(
            Bound("codes of the pool that users were told of, %", Outcome.taken, least=100, most=100),
            Bound("codes left", Outcome.left, least=0, most=0),
            _ANSWERED,
            Bound("attempts told that it is exhausted, %", lambda seen: seen.share("exhausted"), least=30),
            _ms("p99 of vouchers, ms", lambda seen: seen.p_ms(99, "issued"), 500),
            _ms("p99 of refusals, ms", lambda seen: seen.p_ms(99, "exhausted"), 500),
            _errors(1),
        ),
    ),
    Scenario(
        name="mixed",
        about="two thirds of the users on the Voucher Request API, one third on Client API v3 for 1 to 20 vouchers a "
        "sale; one sale in twenty asked for twice",
        parts=(
            Part(name="v1", share=2, rate=2, repeats=5),
            Part(name="v3", share=1, rate=1, api="v3", quantities=(1, 20), repeats=5),
        ),
        stages=(Stage(60, 90),),
        objective=(
            _rate("vouchers a second", Outcome.vouchers_a_second, 390),
            _ANSWERED,
            _ms("p99 of answers, ms", lambda seen: seen.p_ms(99), 250),
            _errors(0.1),
        ),
    ),
    Scenario(
        name="noisy-neighbour",
        about="a distributor with a limit of 50 vouchers a second asks for six times that and does not wait when it is "
        "told to; another one must not feel it",
        parts=(
            Part(name="polite", share=1, rate=3),
            Part(name="noisy", share=2, rate=6, seller=NOISY, insists=False),
        ),
        stages=(Stage(60, 75),),
        limits={NOISY: 50},
        objective=(
            Bound("polite sales that got their voucher, %", lambda seen: seen.of("polite").sold(), least=100),
            _ms("p99 of polite users' answers, ms", lambda seen: seen.of("polite").p_ms(99), 250),
            Bound("noisy vouchers a second", lambda seen: seen.of("noisy").vouchers_a_second(), least=45, most=55),
            Bound("noisy attempts told to wait, %", lambda seen: seen.of("noisy").share("rate_limited"), least=50),
        ),
    ),
    Scenario(
        name="token-rotation",
        about="in the middle of the peak the partner gets another token and the old one is revoked; a third of the "
        "users go on with the old one until it is refused",
        parts=(
            Part(name="prompt", share=2, rate=4),
            Part(name="late", share=1, rate=4, late=True),
        ),
        stages=(Stage(10, 25), Stage(20, 75), Stage(10, 25)),
        rotates=True,
        objective=(
            _rate("vouchers a second in the peak", lambda seen: seen.stage(1).vouchers_a_second(), 270),
            Bound("sales that got their voucher, %", Outcome.sold, least=100),
            Bound(
                "attempts of prompt users refused for their token",
                lambda seen: seen.of("prompt").kinds["token_unknown"], most=0,
            ),
            Bound(
                "attempts of late users refused for their token",
                lambda seen: seen.of("late").kinds["token_unknown"], least=1,
            ),
            _ms("p99 of answers, ms", lambda seen: seen.p_ms(99), 250),
        ),
    ),
)  # fmt: skip

SCENARIOS: Final = {one.name: one for one in _SCENARIOS}
