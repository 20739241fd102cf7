"""Whether a Redis that was started again may go on with the data that it came back with.

A restored old copy whose missing part had not been flushed looks like a restart: nothing inside Redis or the store
tells them apart.  So somebody has to promise, by ``VOUCHERD_RESTART_IN_PLACE``, that this server is never started on a
copy of its data, has no replicas, and keeps its settings.  What is left to be shown then is that nothing it had
acknowledged can be missing.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from redis.exceptions import RedisError, ResponseError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import keys
from service.errors import RedisUnreachable
from service.scripts import NO_SECOND_REPLID, Books, Generation, Scripts
from service.store import control, generations, ledger, stock

# With these nothing is acknowledged before it is on the disk, during a rewrite of the file neither.
SYNCED: Final = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}


async def note_synced(scripts: Scripts) -> None:
    """The open generation says whether the server that it was opened on was seen to sync, and to have no replica.

    Raises RedisUnreachable.
    """
    seen = await scripts.generation()
    if not seen.agrees:
        return
    # What is said of a server is read from that server in one moment, so it is true of it wherever it is written: the
    # address may lead to another one by then.
    said = await _said(scripts)
    synced = said.run_id if said.alone and said.syncs and said.run_id == seen.run_id else ""
    if synced != seen.synced:
        try:
            await scripts.redis.hset(keys.generation(scripts.partition), "synced", synced)
        except RedisError as error:
            raise RedisUnreachable from error


async def why_not(conn: AsyncConnection, scripts: Scripts, seen: Generation, books: Books | None) -> str:
    """Why something may be missing of what was ``seen``, as of ``books``; '' if nothing can be.

    ``conn`` holds the partition's lock exclusively, so nobody rolls meanwhile.  Raises RedisUnreachable.
    """
    if not books or seen.fence < 0:
        return "no data in Redis"
    said = await _said(scripts)
    if said.run_id != seen.server_run_id:
        return "it has changed meanwhile, or its settings can't be read"
    if seen.server_replid2 != NO_SECOND_REPLID or not said.alone:
        return "it is or was a replica, or has one"
    if not seen.synced or seen.synced != seen.run_id or not said.syncs:
        return "it was not seen to sync before it answers, before and after"
    partition, generation = scripts.partition, seen.open
    if await generations.state(conn, partition, generation) != "open":
        return "the store has closed this generation"
    if seen.fence != await control.version(conn):
        return "another catalogue is in force than in the store"
    if books.seq < await ledger.last_seq(conn, partition, generation):
        return "the ledger has later outbox entries"
    ends = await stock.chain_ends(conn, partition, generation)
    if any(pool not in books.windows or books.windows[pool].lease != end.id for pool, end in ends.items()):
        return "a lease is missing in a window"
    return ""


class _Said(NamedTuple):
    """Of one server, whose ``run_id`` is '' if it does not let its settings be read.  ``alone``: it is a master without
    replicas."""

    run_id: str
    alone: bool
    syncs: bool


async def _said(scripts: Scripts) -> _Said:
    try:
        async with scripts.redis.pipeline(transaction=True) as pipe:
            pipe.info("server")
            pipe.info("replication")
            pipe.config_get(*SYNCED)
            server, replication, settings = await pipe.execute()
    except ResponseError:
        return _Said("", alone=False, syncs=False)
    except RedisError as error:
        raise RedisUnreachable from error
    alone = replication["role"] == "master" and int(replication["connected_slaves"]) == 0
    return _Said(str(server["run_id"]), alone, settings == SYNCED)
