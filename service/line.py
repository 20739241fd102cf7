"""How this process reaches Redis: redis-py, and past it one connection for script calls that costs less.

redis-py opens the connection (with TLS, if the URL says so), authenticates on it and selects the database, so every URL
that it takes works.  What it does for each command after that (timeouts made of tasks, checks of the connection,
arguments encoded and written one by one) costs more than the batch that it carries, so a script call goes out as one
piece, and what comes back is read by the same parser in the transport's own callback.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from hiredis import Reader, pack_command
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import Misconfigured

# Connections of one process: one is the line, one for what comes while it is taken, the rest for slow work.
CONNECTIONS_MAX: Final = 8
CONNECT_TIMEOUT_S: Final = 0.5

_EXAMPLE: Final = "redis://user:password@host:6379/0, or rediss:// for TLS"


def connect(url: str, *, timeout_ms: int) -> Redis:
    """A client that never retries by itself and never waits without a bound.

    ``timeout_ms`` bounds each wait for a reply.  Commands raise redis-py's errors.  Raises Misconfigured on an unusable
    URL.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=timeout_ms / 1000,
            socket_timeout=timeout_ms / 1000,
            socket_connect_timeout=min(CONNECT_TIMEOUT_S, timeout_ms / 1000),
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            decode_responses=True,
            encoding_errors="surrogateescape",  # a foreign entry that is not UTF-8 gets parked, it raises nowhere
            protocol=2,
            health_check_interval=0,
            driver_info=None,  # CLIENT SETINFO would be a right more, which Redis before 7.2 does not know
        )
    except ValueError:  # whose text may quote the password
        raise Misconfigured("VOUCHERD_REDIS_URL can't be read: it has to look like " + _EXAMPLE) from None
    return _Client.from_pool(pool)


class _Client(Redis):
    """redis-py's client whose script calls take the line while nobody else does."""

    _line: _Line | None = None

    async def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        packed = pack_command(("EVALSHA", sha, numkeys, *keys_and_args))
        line = self._line
        if line is None or line.lost:
            lost, self._line = line, _Line()
            line = self._line
            await line.open(self.connection_pool, lost)
        elif line.taken:
            return await self._beside(packed)
        return await line.call(packed)

    async def _beside(self, packed: bytes) -> Any:
        pool: Any = self.connection_pool
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command([packed], check_health=False)
            return await connection.read_response()
        except RedisError:
            raise  # the connection is in order, or redis-py has closed it
        except BaseException:
            await connection.disconnect(nowait=True)  # its reply must not be anyone else's
            raise
        finally:
            await pool.release(connection)


class _Line(asyncio.Protocol):
    """One connection on which one call at a time is under way.  ``taken`` from the beginning, until the first call has
    its reply; ``lost`` when no call can be made on it any more."""

    def __init__(self) -> None:
        self.taken = True
        self.lost = False
        self._timeout_s = 0.0
        self._connection: Any = None
        self._transport: Any = None
        self._streams: Any = None  # redis-py's protocol of this connection, which wants to know of its end
        self._reader: Any = None
        self._reply: asyncio.Future[Any] | None = None

    async def open(self, pool: Any, lost: _Line | None) -> None:
        """Takes a connection out of ``pool`` for as long as it lasts, and gives that of ``lost`` back.

        Raises what redis-py raises if there is none.
        """
        try:
            if lost is not None and lost._connection is not None:
                await lost._connection.disconnect(nowait=True)
                await pool.release(lost._connection)
            connection = self._connection = await pool.get_connection()
        except BaseException:
            self.lost = True
            raise
        encoder = connection.encoder
        self._timeout_s = connection.socket_timeout
        self._reader = Reader(
            protocolError=InvalidResponse, replyError=connection._parser.parse_error, encoding=encoder.encoding,
            errors=encoder.encoding_errors, notEnoughData=_INCOMPLETE,
        )  # fmt: skip
        self._transport = connection._writer.transport
        self._streams = self._transport.get_protocol()
        self._transport.set_protocol(self)

    async def call(self, packed: bytes) -> Any:
        """The reply to one command.  Raises redis-py's errors; after any but an error reply the line is lost, so a
        late reply is never the next call's."""
        loop = asyncio.get_running_loop()
        self.taken = True
        self._reply = reply = loop.create_future()
        late = loop.call_later(self._timeout_s, self._late)
        try:
            self._transport.write(packed)
            said = await reply
        except BaseException:
            self._abort()
            raise
        finally:
            late.cancel()
            self._reply = None
            self.taken = False
        if isinstance(said, Exception):
            raise said
        return said

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            said = self._reader.gets()
        except InvalidResponse as error:
            self._fail(error)
            return
        if said is _INCOMPLETE:
            return
        if self._reply is None or self._reply.done() or self._reader.has_data():
            self._abort()  # nobody has asked for it, so nobody may have it
            self._fail(RedisConnectionError("a reply to nothing"))
        else:
            self._reply.set_result(said)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._streams.connection_lost(exc)
        self._fail(RedisConnectionError("Connection closed by server."))

    def _late(self) -> None:
        self._fail(RedisTimeoutError("Timeout reading from socket"))

    def _fail(self, error: Exception) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)

    def _abort(self) -> None:
        self.lost = True
        self._transport.abort()


_INCOMPLETE: Final = object()
