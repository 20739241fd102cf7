"""``python -m service.web.process LISTENING_FD CONTROL_FD``: one serving process, started by ``service.web.serve``.

Here its parts are put together: the store, Redis, the catalogue that is loaded ahead, the issuer.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial

import structlog
from redis.asyncio import Redis

from service import keyring
from service.errors import StoreUnreachable
from service.issuance import Issuer
from service.keyring import Keyring
from service.line import connect
from service.logs import where
from service.scripts import Scripts
from service.settings import Settings
from service.store.answers import Answers
from service.store.database import Database, check_migrated
from service.web.access import AccessTokens
from service.web.app import App
from service.web.documents import documents
from service.web.oauth import TokenEndpoint
from service.web.preload import Preload
from service.web.serving import main
from service.web.v3 import ClientApi
from service.web.v3_catalogue import ProductCatalogue, Stock
from service.web.v3_reading import LedgerReading
from service.web.v3_retrieval import OwnVouchers


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[App]:
    """The application over real servers, neither of which has to answer now; connections are closed at the end.

    Raises Misconfigured if a URL is unusable, the store's schema is not one for this version, the secrets file that
    the settings name can't be used, or they ask for OpenTelemetry and it is not installed.
    """
    secrets = keyring.named(settings.secrets_file)
    async with contextlib.AsyncExitStack() as closing:
        make_app: Callable[..., App] = App
        make_scripts: Callable[[Redis], Scripts] = Scripts
        if settings.otel:
            from service.tracing import Tracing  # an extra, which costs a second of imports besides
            from service.web.traced import TracedApp, TracedScripts

            tracing = Tracing.configured("serve")
            closing.push_async_callback(tracing.close)
            make_app, make_scripts = partial(TracedApp, tracing), partial(TracedScripts, tracing)
        database = Database.connect(settings.store_url)
        closing.push_async_callback(database.close)
        redis = connect(settings.redis_url, timeout_ms=settings.redis_timeout_ms)
        closing.push_async_callback(redis.aclose)
        try:
            await check_migrated(database)
        except StoreUnreachable as fault:
            structlog.get_logger(__name__).warning("store_unreachable", **where(fault))

        def in_use() -> int:
            return -1 if issuer.catalogue is None else issuer.catalogue.version

        answers = Answers(database)
        preload = Preload(database, Scripts(redis), lambda catalogue: issuer.adopt(catalogue), in_use)
        issuer = Issuer(
            make_scripts(redis),
            preload.load,
            answers.known,
            answers.replays,
            outbox_max=settings.outbox_max,
            outbox_bytes_max=settings.outbox_bytes_max,
            retention_s=settings.replay_retention_s,
            queue_max=settings.queue_max,
            deadline_s=settings.deadline_ms / 1000,
            id_key="" if secrets is None else secrets.ids.current,
        )
        preloading = asyncio.create_task(preload.run())
        try:
            if secrets is None:
                yield make_app(issuer, routes=documents(client_api=False, scope_prefix=""))
            else:
                yield _with_client_api(make_app, settings, secrets, issuer, database, Scripts(redis))
        finally:
            preload.stop()
            preloading.cancel()
            await asyncio.gather(preloading, return_exceptions=True)
            await preload.close()


def _with_client_api(
    make_app: Callable[..., App],
    settings: Settings,
    secrets: Keyring,
    issuer: Issuer,
    database: Database,
    scripts: Scripts,
) -> App:
    tokens = AccessTokens(
        issuer, secrets, name=settings.issuer, lifetime_s=settings.token_lifetime_s, scope_prefix=settings.scope_prefix
    )
    endpoint = TokenEndpoint(issuer, tokens, lifetime_s=settings.token_lifetime_s, scope_prefix=settings.scope_prefix)
    catalogue = ProductCatalogue(issuer, Stock(database, scripts, deadline_s=settings.deadline_ms / 1000).left)
    own = OwnVouchers(LedgerReading(database, scripts, deadline_s=settings.deadline_ms / 1000))
    return make_app(
        issuer,
        ClientApi(issuer, tokens, catalogue, own, secrets.ids),
        [*endpoint.routes(), *documents(client_api=True, scope_prefix=settings.scope_prefix)],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], build))
