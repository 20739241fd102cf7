"""``python -m service.web.process LISTENING_FD CONTROL_FD``: one serving process, started by ``service.web.serve``.

Here its parts are put together: the store, Redis, the catalogue that is loaded ahead, the issuer.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

import structlog

from service.domain import Record, Request
from service.errors import StoreUnreachable
from service.issuance import Issuer
from service.logs import where
from service.scripts import Scripts, connect
from service.settings import Settings
from service.store import ledger
from service.store.database import Database, check_migrated
from service.web.preload import Preload
from service.web.serving import main
from service.web.v1 import Issuing


@contextlib.asynccontextmanager
async def build_issuer(settings: Settings) -> AsyncIterator[Issuing]:
    """The issuer over real servers, neither of which has to answer now; connections are closed at the end.

    Raises Misconfigured if a URL is unusable or the store's schema is not one for this version.
    """
    async with contextlib.AsyncExitStack() as closing:
        database = Database.connect(settings.store_url)
        closing.push_async_callback(database.close)
        redis = connect(settings.redis_url, timeout_ms=settings.redis_timeout_ms)
        closing.push_async_callback(redis.aclose)
        try:
            await check_migrated(database)
        except StoreUnreachable as fault:
            structlog.get_logger(__name__).warning("store_unreachable", **where(fault))

        async def lookup(requests: Sequence[Request]) -> dict[Request, Record]:
            keys: dict[tuple[str, str], list[str]] = {}
            for request in requests:
                keys.setdefault((request.api, request.client), []).append(request.key)
            async with database.read() as connection:
                known = {
                    (api, client): await ledger.lookup(connection, api, client, wanted)
                    for (api, client), wanted in keys.items()
                }
            found = ((request, known[request.api, request.client].get(request.key)) for request in requests)
            return {request: record for request, record in found if record is not None}

        def in_use() -> int:
            return -1 if issuer.catalogue is None else issuer.catalogue.version

        preload = Preload(database, Scripts(redis), lambda catalogue: issuer.adopt(catalogue), in_use)
        issuer = Issuer(
            Scripts(redis),
            preload.load,
            lookup,
            outbox_max=settings.outbox_max,
            retention_s=settings.replay_retention_s,
            queue_max=settings.queue_max,
            deadline_s=settings.deadline_ms / 1000,
            distributor_rate_max=settings.distributor_rate_max,
        )
        preloading = asyncio.create_task(preload.run())
        try:
            yield issuer
        finally:
            preload.stop()
            preloading.cancel()
            await asyncio.gather(preloading, return_exceptions=True)
            await preload.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], build_issuer))
