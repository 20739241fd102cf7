"""Adopting: what a partner received from a window that was lost comes into the ledger, by its word.

The ledger has such a code for the distributor whose file it is, under the key that the file names: the request_id, and
of a product of Client API v3 the idempotency_key, whose answers have a request_id that nobody asks by.  A line without
one says too little.  Which campaign issued it, the operator says.  No replay is made of it: what the client was
told besides the code nobody knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from service.domain import Rule
from service.errors import Conflict
from service.scripts import Scripts
from service.store import adoption, control, register, unseen
from service.store.adoption import Received
from service.store.database import Database
from service.store.stock import digest
from service.worker.currency import refuse_older
from service.worker.partner_file import Line


class Adoption:
    """Adopts codes of the pool of ``campaign`` that the file of ``distributor`` names.

    ``rehearse``: nothing is changed, and what would be adopted is counted.
    """

    def __init__(
        self,
        database: Database,
        scripts: Scripts,
        campaign: str,
        distributor: str,
        *,
        reason: str,
        actor: str,
        rehearse: bool,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._campaign = campaign
        self._distributor = distributor
        self._reason = reason
        self._actor = actor
        self._rehearse = rehearse
        self._now = now
        self._rule: Rule | None = None
        self._keyed = False  # Client API v3 issues by it
        self.adopted = 0  # codes so far

    async def begin(self) -> None:
        """Raises NotFound if there is no such campaign, Conflict if the distributor can't have received a code of its
        pool; StoreIsOlder, RedisUnreachable and StoreUnreachable."""
        await refuse_older(self._database, self._scripts)
        async with self._database.read() as conn:
            campaign = (await register.rule(conn, self._campaign)).campaign
            could = await unseen.could_have_received(conn, campaign.pool)
            self._keyed = self._campaign in {product.code for product, _ in await register.all_products(conn)}
        if self._distributor not in could:
            raise Conflict(
                f"{self._distributor} is assigned to no campaign of pool {campaign.pool}, and never got a code of it: "
                "nothing was adopted"
            )
        self._rule = Rule(campaign.id, campaign.pool, campaign.category, "", 0)

    async def adopt(self, lines: Sequence[Line]) -> None:
        """Those of ``lines`` that name a code in quarantine with its request are in the ledger, and a line in the audit
        log says how many, whatever comes after.

        Raises StoreUnreachable: they may be, or none of them; doing it again goes on.
        """
        assert self._rule is not None
        named = {digest(line.code): Received(key, line.received_at) for line in lines if (key := self._key(line))}
        if not named:
            return
        given = (self._scripts.partition, self._rule, self._distributor, named)
        if self._rehearse:
            async with self._database.read() as conn:
                self.adopted += len(await adoption.find(conn, *given))
        else:
            async with self._database.write() as conn:
                adopted = await adoption.adopt(conn, *given, self._now())
                if adopted:
                    detail = f"{adopted} codes from quarantine that {self._distributor} received; {self._reason}"
                    await control.log(
                        conn, actor=self._actor, action="adopt", subject=self._campaign, detail=detail, now=self._now()
                    )
            self.adopted += adopted

    def _key(self, line: Line) -> str:
        """That of the request, as the service has it; '' if the line does not say."""
        if self._keyed:
            return line.idempotency_key.lower()  # a UUID, which is kept in small letters
        return line.request_id or line.idempotency_key
