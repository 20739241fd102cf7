"""What the ledger can answer in the place of Redis: requests that were issued, and never a new code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain import Record, Request
from service.store import control, ledger
from service.store.database import Database


class Answers:
    """The records of requests, out of the store alone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def known(self, requests: Iterable[Request]) -> Mapping[Request, Record]:
        """Those of ``requests`` whose keys the ledger holds.  Raises StoreUnreachable."""
        async with self._database.read() as connection:
            return await _known(connection, requests)

    async def replays(self, version: int, asked: Sequence[tuple[str, Request]]) -> Mapping[Request, Record]:
        """Those whose keys the ledger holds, each asked for with a credential (as ``Catalogue.distributor`` takes it).

        In the same snapshot of the store the credential is in force and belongs to the request's distributor, which is
        active.  Nothing, if that snapshot is older than the catalogue ``version``: what was revoked since it does not
        know.  Raises StoreUnreachable.
        """
        async with self._database.read() as connection:
            if await control.version(connection) < version:
                return {}
            owners = await control.owners(connection, {credential for credential, _ in asked})
            return await _known(
                connection, [request for credential, request in asked if owners.get(credential) == request.distributor]
            )


async def _known(connection: AsyncConnection, requests: Iterable[Request]) -> dict[Request, Record]:
    by_client: dict[tuple[str, str], dict[str, list[Request]]] = {}
    for request in requests:
        by_client.setdefault((request.api, request.client), {}).setdefault(request.key, []).append(request)
    found: dict[Request, Record] = {}
    for (api, client), wanted in by_client.items():
        for key, record in (await ledger.lookup(connection, api, client, list(wanted))).items():
            found.update(dict.fromkeys(wanted[key], record))
    return found
