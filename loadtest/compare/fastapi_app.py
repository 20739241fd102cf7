"""POST /api/v1/voucher/request on FastAPI and redis-py, one script call a request.

``python -m loadtest.compare.fastapi_app --port N``; everything else comes from the environment, as for
fastify/server.mjs: REDIS_URL, COMPARE_TOKEN, COMPARE_DISTRIBUTOR, COMPARE_PRODUCT, COMPARE_CAMPAIGN, COMPARE_CATEGORY.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import redis.asyncio
import uvicorn
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

SCRIPT = Path(__file__).with_name("issue.lua")
CONNECTIONS_MAX = 64  # as many as the benchmark's client has: no request waits for a connection
WAIT_S_MAX = 5.0  # for a connection
LIMITS = (1_000_000_000, 1_000_000_000, 1_000_000_000)  # looked at for every request, never reached by a benchmark

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class VoucherRequest(BaseModel):
    """The body of a request."""

    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
    distributor_id: Name
    terminal_id: Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]
    product_ids: Annotated[list[Name], Field(min_length=1, max_length=16)]


class Voucher(BaseModel):
    """The body of an answer."""

    status: Literal["success"] = "success"
    campaign_id: str
    category_id: str
    product_id: str
    voucher_code: str
    serial_number: str
    expiry_date: str
    request_id: str
    issued_at: str


class Campaign(NamedTuple):
    """What a product leads to."""

    id: str
    category: str


class Problem(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, error: str, code: str, detail: str, request_id: str | None = None) -> None:
        self.status = status
        self.body: dict[str, Any] = {
            "type": "about:blank", "title": error, "status": status, "detail": detail, "error": error, "code": code,
            "retryable": False,
        }  # fmt: skip
        if request_id is not None:
            self.body["request_id"] = request_id


async def known_distributor(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    """The distributor whose token came with the request."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Problem(401, "unauthorized", "token_missing", "a bearer token is required")
    distributors: dict[str, str] = request.app.state.distributors
    distributor = distributors.get(hashlib.sha256(token.encode()).hexdigest())
    if distributor is None:
        raise Problem(401, "unauthorized", "token_unknown", "the token is not known")
    return distributor


async def issue_voucher(
    wanted: VoucherRequest,
    request: Request,
    response: Response,
    distributor: Annotated[str, Depends(known_distributor)],
) -> Voucher:
    """Issues a voucher of the first campaign that has one."""
    if wanted.distributor_id != distributor:
        raise Problem(401, "unauthorized", "distributor_mismatch", "the token is another distributor's")
    state = request.app.state
    status = "no_campaign"
    for product in wanted.product_ids:
        for campaign in state.campaigns.get(product, ()):
            status, *voucher = await state.issue(
                keys=(
                    f"compare:record:{distributor}:{wanted.request_id}",
                    f"compare:codes:{campaign.id}",
                    "compare:used:campaign",
                    "compare:used:distributor",
                    "compare:used:terminal",
                    "compare:outbox",
                ),
                args=(
                    wanted.request_id, distributor, wanted.terminal_id, ",".join(wanted.product_ids),
                    campaign.id, campaign.category, product, *LIMITS,
                ),
            )  # fmt: skip
            if status in ("ISSUED", "REPLAY"):
                if status == "REPLAY":
                    response.headers["Idempotent-Replayed"] = "true"
                campaign_id, category_id, product_id, code, serial, expires_at, issued_at = voucher
                return Voucher(
                    campaign_id=campaign_id,
                    category_id=category_id,
                    product_id=product_id,
                    voucher_code=code,
                    serial_number=serial,
                    expiry_date=_rfc3339(expires_at),
                    request_id=wanted.request_id,
                    issued_at=_rfc3339(issued_at),
                )
            if status == "REUSED":
                detail = "the same request_id came with another terminal_id or product_ids"
                raise Problem(422, "idempotency key reused", "key_reused", detail, wanted.request_id)
    code = {"CAPPED": "cap_reached", "EXHAUSTED": "exhausted"}.get(status, status)
    raise Problem(409, "voucher unavailable", code, "no campaign has a voucher", wanted.request_id)


def _rfc3339(seconds: str) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(seconds)))


async def _problem(_: Request, problem: Problem) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else None
    return JSONResponse(problem.body, problem.status, headers, "application/problem+json")


async def _invalid(request: Request, fault: RequestValidationError) -> Response:
    first = fault.errors()[0]
    code = "invalid_json" if first["type"] == "json_invalid" else "invalid_field"
    detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return await _problem(request, Problem(400, "invalid request", code, detail))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    token = hashlib.sha256(os.environ["COMPARE_TOKEN"].encode()).hexdigest()
    app.state.distributors = {token: os.environ["COMPARE_DISTRIBUTOR"]}
    campaign = Campaign(os.environ["COMPARE_CAMPAIGN"], os.environ["COMPARE_CATEGORY"])
    app.state.campaigns = {os.environ["COMPARE_PRODUCT"]: [campaign]}
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"),
        max_connections=CONNECTIONS_MAX,
        timeout=WAIT_S_MAX,
        decode_responses=True,
    )
    async with redis.asyncio.Redis.from_pool(pool) as client:
        app.state.issue = client.register_script(SCRIPT.read_text())
        yield


app = FastAPI(
    lifespan=_lifespan,
    openapi_url=None,
    exception_handlers={Problem: _problem, RequestValidationError: _invalid},
)
app.add_api_route("/api/v1/voucher/request", issue_voucher, methods=["POST"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="voucherd's hot path on FastAPI")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    uvicorn.run(
        app, host="127.0.0.1", port=parser.parse_args().port, loop="uvloop", http="httptools", workers=1,
        access_log=False, log_level="warning",
    )  # fmt: skip
