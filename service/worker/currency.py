"""Whether the durable store is as recent as Redis remembers it (design 4, "If the store comes back older").

A restored backup or a promoted standby looks healthy.  Leasing from it would give codes a second time, importing
would reuse positions, publishing would reuse versions; so each of them asks here first.
"""

from __future__ import annotations

from service.errors import StoreIsOlder
from service.scripts import Books, Generation, Scripts
from service.store import control, generations, ledger, stock
from service.store.database import Database


async def refuse_older(database: Database, scripts: Scripts) -> tuple[Generation, Books | None]:
    """Returns what Redis knows, if the store knows it too; books are None while no generation is open.

    Redis is read first: the store only ever moves ahead, so nothing that happens in between looks like a step back.
    Raises StoreIsOlder saying what is missing; RedisUnreachable, StoreUnreachable if it can't be told.
    """
    seen = await scripts.generation()
    async with database.read() as conn:
        pools = list(await stock.stock_versions(conn))
    books = await scripts.books(pools, generation=seen.open) if seen.open else None
    async with database.read() as conn:
        version = await control.version(conn)
        newest = await generations.newest(conn, scripts.partition)
        flushed = await ledger.last_seq(conn, scripts.partition, seen.open)
        unknown = [
            pool
            for pool, window in (books.windows.items() if books else ())
            if window.lease and not await stock.lease_known(conn, window.lease)
        ]
    if seen.open > newest:
        raise StoreIsOlder(f"the store is older than Redis: it knows generation {newest}, Redis has {seen.open} open")
    if seen.fence > version:
        raise StoreIsOlder(
            f"the store is older than Redis: its catalogue is {version}, the fence stands at {seen.fence}"
        )
    if unknown:
        raise StoreIsOlder(
            f"the store is older than Redis: it does not know the last lease of {', '.join(unknown[:5])}"
        )
    if books and books.flushed > flushed:
        raise StoreIsOlder(
            f"the store is older than Redis: its ledger ends at outbox entry {flushed}, {books.flushed} were flushed"
        )
    return seen, books
