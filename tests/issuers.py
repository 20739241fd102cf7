"""An issuer without servers, for what is about HTTP alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from service.catalogue import Catalogue
from service.domain import (
    Authenticated,
    Busy,
    Code,
    Issued,
    KeyReused,
    Outcome,
    Record,
    Request,
    Rule,
    Suspended,
    Unauthorized,
)

DISTRIBUTOR = "DIST-001"
# Fixed, because names of tests show it; processes that a test starts are told theirs.
TOKEN = os.environ.get("TEST_TOKEN", "vch_000000000ForTheTestsForTheTestsForTheTestsF4CwG9E")

ISSUED_AT = 1_760_875_200  # 2025-10-19T12:00:00Z
EXPIRES_AT = 1_767_139_200  # 2025-12-31T00:00:00Z


def record(
    request: Request,
    *,
    code: str = "PSCF-XYZ-987654",
    serial: str = "SER-000001",
    expires_at: int = EXPIRES_AT,
    until: int = 0,
) -> str:
    """The record of a voucher for the first product asked for."""
    product = request.products[0]
    return Record(
        request.payload, request.api, request.distributor, request.client, request.key, ISSUED_AT,
        Rule("CAMP-001", "pool-1", product, product, until),
        (Code(expires_at, 1, 7, code, serial),),
    ).pack()  # fmt: skip


class FakeIssuer:
    """Issues to TOKEN whatever it asks for, remembers keys, and answers ``outcome`` instead if that is set.

    ``gate``, if set, holds every request until it is released.
    """

    def __init__(self) -> None:
        self.catalogue: Catalogue | None = None
        self.queued = 0
        self.outcome: Outcome | Callable[[Request], Outcome] | None = None
        self.authentication: Authenticated | Unauthorized | Suspended | Busy | None = None
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.asked: list[Request] = []
        self.authenticated = 0
        self.started = False
        self.draining = False
        self._records: dict[str, str] = {}
        self._payloads: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Outcome]] = set()

    @property
    def ready(self) -> bool:
        return self.started and not self.draining

    def start(self) -> None:
        self.started = True

    async def drain(self) -> None:
        self.draining = True

    async def authenticate(self, credential: str) -> Authenticated | Unauthorized | Suspended | Busy:
        self.authenticated += 1
        if self.authentication is not None:
            return self.authentication
        return Authenticated(DISTRIBUTOR) if credential == TOKEN else Unauthorized("token_unknown")

    async def confirm(self, judge: Callable[[Catalogue], Any]) -> Any:
        assert self.catalogue is not None
        return judge(self.catalogue)

    def submit(self, credential: str, request: Request, answered: Callable[[Outcome], None]) -> None:
        if self.fault is not None:
            raise self.fault
        task = asyncio.ensure_future(self.issue(credential, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: answered(done.result()))

    def forget(self) -> None:
        """The retention of every key is over."""
        self._records.clear()
        self._payloads.clear()

    async def issue(self, credential: str, request: Request) -> Outcome:
        self.asked.append(request)
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        if self.outcome is not None:
            return self.outcome(request) if callable(self.outcome) else self.outcome
        if credential != TOKEN:
            return Unauthorized("token_unknown")
        if request.distributor != DISTRIBUTOR:
            return Unauthorized("distributor_mismatch")
        known = self._records.get(request.key)
        if known is None:
            self._records[request.key] = record(request)
            self._payloads[request.key] = request.payload
            return Issued(self._records[request.key], replayed=False)
        if self._payloads[request.key] != request.payload:
            return KeyReused()
        return Issued(known, replayed=True)
