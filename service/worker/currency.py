"""Whether the durable store is as recent as Redis remembers it (design 4, "If the store comes back older").

A restored backup or a promoted standby looks healthy.  Leasing from it would give codes a second time, importing
would reuse positions, publishing would reuse versions; so each of them asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.errors import RedisUnreachable, StoreIsOlder
from service.scripts import Books, Generation, Scripts
from service.store import control, generations, ledger, recreation, stock
from service.store.database import Database


async def refuse_older(
    database: Database, scripts: Scripts, pools: Sequence[str] | None = None
) -> tuple[Generation, Books | None]:
    """Returns what Redis knows, if the store knows it too; books are None while no generation is open.

    With ``pools``: whoever leases from these alone asks, several times a second.  Nothing is said of other pools then,
    nor whether the catalogues are the same where they have the same number.

    Redis is read first: the store only ever moves ahead, so nothing that happens in between looks like a step back.
    Raises StoreIsOlder saying what is missing; RedisUnreachable, StoreUnreachable if it can't be told.
    """
    seen = await scripts.generation()
    whole = pools is None
    if pools is None:
        async with database.read() as conn:
            pools = list(await stock.stock_versions(conn))
    books = await scripts.books(pools, generation=seen.open) if seen.open else None
    catalogue = await catalogue_at(scripts, seen.fence) if whole else None
    shown = await shown_catalogue(scripts, seen.fence) if whole else (0, None)
    async with database.read() as conn:
        if older := await older_catalogue(conn, seen.fence, catalogue) or await lacks_shown(conn, shown):
            raise StoreIsOlder(older)
        newest = await generations.newest(conn, scripts.partition)
        # What Redis has of a generation that was left to repair the store says nothing of the store any more.
        if books and await recreation.was_repaired(conn, scripts.partition, seen.open):
            return seen, books
        lost = await ledger.lacking(conn, scripts.partition, seen.open, books.flushed) if books else []
        unknown = await unknown_leases(conn, books) if books else []
        versions = await stock.stock_versions(conn, pools)
    if seen.open > newest:
        raise StoreIsOlder(f"the store is older than Redis: it knows generation {newest}, Redis has {seen.open} open")
    if unknown:
        raise StoreIsOlder(
            f"the store is older than Redis: it does not know the last lease of {', '.join(unknown[:5])}"
        )
    behind = [pool for pool, window in books.windows.items() if window.stock > versions.get(pool, 0)] if books else []
    if behind:
        raise StoreIsOlder(f"the store is older than Redis: it lacks what was imported into {', '.join(behind[:5])}")
    if books and books.lost:
        lost = [books.lost]
    if lost:
        raise StoreIsOlder(f"the store is older than Redis: its ledger lacks outbox entry {lost[0]}, which was flushed")
    return seen, books


async def unknown_leases(conn: AsyncConnection, books: Books) -> list[str]:
    """Pools of whose last lease in Redis the store knows nothing."""
    last = {pool: window.lease for pool, window in books.windows.items() if window.lease}
    known = await stock.leases_known(conn, list(last.values()))
    return [pool for pool, lease in last.items() if lease not in known]


async def catalogue_at(scripts: Scripts, version: int) -> bytes | None:
    """What Redis has of catalogue ``version``; None if it has none of it.  Raises RedisUnreachable."""
    if version < 1:
        return None
    try:
        text = await scripts.redis.get(keys.catalogue(version))
    except RedisError as error:
        raise RedisUnreachable from error
    return text.encode("utf-8", "surrogateescape") if text is not None else None


async def shown_catalogue(scripts: Scripts, fence: int) -> tuple[int, bytes | None]:
    """The version that processes were shown last, and what Redis has of it if it is not the one at the ``fence``, which
    whoever asks has read already.

    Raises RedisUnreachable.
    """
    try:
        version = int(await scripts.redis.get(keys.catalogue_newest()) or 0)
    except RedisError as error:
        raise RedisUnreachable from error
    return version, None if version == fence else await catalogue_at(scripts, version)


async def lacks_shown(conn: AsyncConnection, shown: tuple[int, bytes | None]) -> str:
    """Why the store is older than what processes were ``shown``, '' if it is not: whoever has loaded that never loads
    another one of its number."""
    version, catalogue = shown
    if catalogue is not None and catalogue != await control.saved_snapshot(conn, version):
        return f"the store is older than Redis, which has shown another catalogue {version}"
    return ""


async def older_catalogue(conn: AsyncConnection, fence: int, catalogue: bytes | None) -> str:
    """Why the store is older than the ``fence`` and what Redis has of the catalogue there, '' if it is not.

    A store that came back older and was edited while Redis was away has made that version a second time; later ones
    would hide it, so it is the version at the fence that is compared and not the newest.
    """
    version = await control.version(conn)
    if fence > version:
        return f"the store is older than Redis: its catalogue is {version}, the fence stands at {fence}"
    if catalogue is not None and catalogue != await control.saved_snapshot(conn, fence):
        return f"the store is older than Redis, which has another catalogue {fence}"
    return ""
