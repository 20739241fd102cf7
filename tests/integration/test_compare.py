"""The services that voucherd is measured against do the job: what gives codes twice is nothing to compare with."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from loadtest.servers import free_port, until

pytestmark = pytest.mark.leaves_keys  # the compared services keep counters and an outbox of their own

ROOT = Path(__file__).parents[2]
FASTIFY = ROOT / "loadtest" / "compare" / "fastify"
PATH = "/api/v1/voucher/request"
TOKEN = "a-token-of-the-comparison"
STOP_S = 10.0
FIELDS = (
    "status", "campaign_id", "category_id", "product_id", "voucher_code", "serial_number", "expiry_date",
    "request_id", "issued_at",
)  # fmt: skip


@dataclass(frozen=True)
class Service:
    """One that runs, and the server that it stands on."""

    url: str
    redis: redis.Redis

    def stock(self, codes: int) -> None:
        self.redis.rpush("compare:codes:CAMP-1", *(f"CODE-{n}\tSER-{n}\t1893456000" for n in range(codes)))

    def post(self, request_id: str, token: str = TOKEN, **fields: object) -> httpx.Response:
        return httpx.post(self.url + PATH, json=body(request_id, **fields), headers=bearer(token))

    def issued(self) -> int:
        return int(self.redis.xlen("compare:outbox"))


def body(request_id: str, **fields: object) -> dict[str, object]:
    wanted = {"request_id": request_id, "distributor_id": "D-1", "terminal_id": "AT-1", "product_ids": ["PAY"]}
    return {**wanted, **fields}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def command(name: str) -> list[str]:
    if name == "fastapi":
        pytest.importorskip("fastapi", reason="fastapi is missing: make compare-install")
        return [sys.executable, "-m", "loadtest.compare.fastapi_app"]
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    if not (FASTIFY / "node_modules" / "fastify").exists():
        pytest.skip("loadtest/compare/fastify/node_modules is missing: make compare-install")
    return [node, str(FASTIFY / "server.mjs")]


@pytest.fixture(params=["fastapi", "fastify"])
def service(request: pytest.FixtureRequest, valkey_url: str, tmp_path: Path) -> Iterator[Service]:
    port = free_port()
    environment = {
        **os.environ, "NODE_ENV": "production", "PORT": str(port), "REDIS_URL": valkey_url, "COMPARE_TOKEN": TOKEN,
        "COMPARE_DISTRIBUTOR": "D-1", "COMPARE_PRODUCT": "PAY", "COMPARE_CAMPAIGN": "CAMP-1",
        "COMPARE_CATEGORY": "CAT-1",
    }  # fmt: skip
    arguments = command(request.param)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(url).status_code == 404
        except httpx.TransportError:
            return False

    try:
        until(answers, f"an answer of {request.param}")
        with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
            yield Service(url, client)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def test_same_request_twice_gets_one_code(service: Service) -> None:
    service.stock(2)
    first, second = service.post("r-1"), service.post("r-1")
    assert first.status_code == 200, first.text
    voucher = first.json()
    assert tuple(voucher) == FIELDS
    assert {name: voucher[name] for name in FIELDS[:-1]} == {
        "status": "success", "campaign_id": "CAMP-1", "category_id": "CAT-1", "product_id": "PAY",
        "voucher_code": "CODE-0", "serial_number": "SER-0", "expiry_date": "2030-01-01T00:00:00Z",
        "request_id": "r-1",
    }  # fmt: skip
    assert "Idempotent-Replayed" not in first.headers
    assert (second.status_code, second.content) == (200, first.content)
    assert second.headers["Idempotent-Replayed"] == "true"
    assert service.issued() == 1
    assert 0 < service.redis.ttl("compare:record:D-1:r-1") <= 86400


def test_no_code_for_another_payload_under_the_same_id(service: Service) -> None:
    service.stock(2)
    assert service.post("r-1").status_code == 200
    for other in ({"terminal_id": "AT-2"}, {"product_ids": ["PAY", "TV"]}):
        answer = service.post("r-1", **other)
        assert (answer.status_code, answer.json()["code"]) == (422, "key_reused")
    assert service.issued() == 1


def test_no_code_for_whoever_may_not_have_one(service: Service) -> None:
    service.stock(1)
    refused = {
        "token_unknown": service.post("r-1", token="another"),
        "distributor_mismatch": service.post("r-1", distributor_id="D-2"),
        "token_missing": httpx.post(service.url + PATH, json=body("r-1")),
    }
    assert {code: (answer.status_code, answer.json()["code"]) for code, answer in refused.items()} == {
        code: (401, code) for code in refused
    }
    assert service.issued() == 0


# Each against a rule of the contract.
BAD_FIELDS: tuple[dict[str, object], ...] = (
    {"request_id": "a b"}, {"request_id": ""}, {"request_id": "x" * 129}, {"request_id": "r\n"}, {"request_id": 7},
    {"terminal_id": "é"}, {"terminal_id": "x" * 65}, {"distributor_id": "D/1"}, {"product_ids": []},
    {"product_ids": "PAY"}, {"product_ids": ["PAY"] * 17}, {"product_ids": [1]}, {"product_ids": None},
)  # fmt: skip


def test_no_code_for_a_bad_field(service: Service) -> None:
    service.stock(1)
    for bad in BAD_FIELDS:
        answer = service.post(**{"request_id": "r-1", **bad})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_field"), bad
    assert service.issued() == 0


def test_nothing_is_written_when_no_code_is_left(service: Service) -> None:
    for fields, code in (({}, "exhausted"), ({"product_ids": ["TV"]}, "no_campaign")):
        answer = service.post("r-1", **fields)
        assert (answer.status_code, answer.json()["code"]) == (409, code)
    assert list(service.redis.scan_iter()) == []


def test_no_code_over_a_cap(service: Service) -> None:
    service.stock(2)
    assert service.post("r-1").status_code == 200
    for key in ("compare:used:campaign", "compare:used:distributor", "compare:used:terminal"):
        (field,) = service.redis.hkeys(key)
        service.redis.hset(key, field, 1_000_000_000)
        answer = service.post("r-2")
        assert (answer.status_code, answer.json()["code"]) == (409, "cap_reached"), key
        service.redis.hset(key, field, 1)
    assert service.issued() == 1


async def test_no_code_is_given_twice_to_many_at_once(service: Service) -> None:
    service.stock(200)
    service.redis.script_flush()  # and a server that forgot the script is told it again
    async with httpx.AsyncClient(base_url=service.url, headers=bearer(TOKEN), timeout=30.0) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=body(f"r-{n}")) for n in range(200)))
    assert {answer.status_code for answer in answers} == {200}
    codes = {answer.json()["voucher_code"] for answer in answers}
    assert codes == {f"CODE-{n}" for n in range(200)}
    outbox = [fields for _, fields in service.redis.xrange("compare:outbox")]
    assert len(outbox) == 200
    assert {row["voucher_code"] for row in outbox} == codes
    assert sum(map(int, service.redis.hvals("compare:used:terminal"))) == 200
    assert service.redis.exists("compare:codes:CAMP-1") == 0
