"""What clients were told, out of the files that they wrote, by key."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.chaos.client import UNKNOWN, UNTOLD, Answer, Call, read

Key = tuple[str, str]  # distributor, request id


class Voucher(msgspec.Struct, frozen=True, gc=False):
    """One answer with vouchers: when its call ``began``, and ``at`` when it was there."""

    began: float
    at: float
    body: str
    codes: tuple[str, ...]
    serial: str
    campaign: str


class Asked(msgspec.Struct, gc=False):
    """One key.  ``began``: its first call; ``told``: its different answers with a voucher, the first one first;
    ``changed``: answers with a voucher to another body; ``refused``: when its own body was refused as another one."""

    began: float
    product: str
    terminal: str
    told: tuple[Voucher, ...] = ()
    changed: tuple[Voucher, ...] = ()
    refused: float = 0.0


class Refusal(msgspec.Struct, frozen=True):
    """Nothing is to be had.  ``began``: its call."""

    began: float
    at: float
    key: Key
    product: str
    terminal: str
    code: str


class Answers:
    """All of them.  ``kinds``: how many, by status and problem; ``odd``: answers that no fault excuses."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.calls = 0
        self.kinds = Counter[str]()
        self.keys: dict[Key, Asked] = {}
        self.unanswered: set[Key] = set()  # keys whose last word is not final
        self.refusals: list[Refusal] = []
        self.last_success: dict[str, float] = {}  # by token: when the last call began that got a voucher with it
        self.refused_tokens = Counter[str]()
        self.odd: list[str] = []
        self.waits: list[tuple[float, float]] = []  # of final answers: when they were there, and seconds since the call
        self.outage_s = 0.0  # longest time without a final answer although some were wanted
        self.outage_at = 0.0
        for file in files:
            self._read(file)

    @property
    def slowest_s(self) -> float:
        """The longest wait for a final answer."""
        return max((wait for _, wait in self.waits), default=0.0)

    @property
    def codes(self) -> dict[str, list[Key]]:
        """Every code with the keys under which it was told."""
        told = defaultdict[str, list[Key]](list)
        for key, asked in self.keys.items():
            for code in {code for one in (*asked.told, *asked.changed) for code in one.codes}:
                told[code].append(key)
        return told

    def _read(self, file: Path) -> None:
        final_at = 0.0
        for call, answer in read(file):
            self.calls += 1
            key = (call.distributor, call.key)
            if key not in self.keys:
                self.keys[key] = Asked(call.at, call.product, call.terminal)
            if answer is None or answer.status in UNKNOWN:
                self.unanswered.add(key)
                if answer is not None:
                    self._count(answer)
                    if answer.status == 500 or answer.code.endswith(UNTOLD):
                        self.odd.append(f"500 {answer.code} to {call.key} at {answer.at:.3f}")
                continue
            self._count(answer)
            self.unanswered.discard(key)
            self.waits.append((answer.at, answer.at - call.at))
            if final_at and answer.at - final_at > self.outage_s:
                self.outage_s, self.outage_at = answer.at - final_at, final_at
            final_at = answer.at
            self._final(key, call, answer)

    def _count(self, answer: Answer) -> None:
        self.kinds[f"{answer.status} {answer.code}".strip() if answer.status else answer.code] += 1

    def _final(self, key: Key, call: Call, answer: Answer) -> None:
        asked = self.keys[key]
        asked.began = min(asked.began, call.at)
        if answer.status == 200:
            codes = tuple(answer.voucher.split(","))
            voucher = Voucher(call.at, answer.at, answer.body, codes, answer.serial, answer.campaign)
            if call.changed:
                asked.changed = (*asked.changed, voucher)
            elif all(one.body != voucher.body for one in asked.told):
                asked.told = tuple(sorted((*asked.told, voucher), key=lambda one: one.at))
            self.last_success[call.token] = max(self.last_success.get(call.token, 0.0), call.at)
        elif answer.status == 422 and answer.code == "key_reused":
            if not call.changed:
                asked.refused = asked.refused or answer.at
        elif answer.status == 409 or answer.code == "exhausted":
            self.refusals.append(Refusal(call.at, answer.at, key, call.product, call.terminal, answer.code))
        elif answer.code == "token_unknown":
            self.refused_tokens[call.token] += 1
        else:
            self.odd.append(f"{answer.status} {answer.code} to {call.key} at {answer.at:.3f}")
