"""``serve`` over an issuer without servers, as real processes: ``python -m tests.serving [name=value ...]``.

Its first line on standard output is where the ports are, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import msgspec

from service.domain import Outcome, Request
from service.errors import Misconfigured
from service.settings import Settings
from service.web import serving
from service.web.app import App
from service.web.serve import Addresses, serve
from tests.issuers import FakeIssuer

COMMAND = (sys.executable, "-m", "tests.serving", "worker")


class Odd(FakeIssuer):
    """Does what the terminal asks for."""

    async def issue(self, token: str, request: Request) -> Outcome:
        if request.terminal.startswith("wait "):
            await asyncio.sleep(float(request.terminal.removeprefix("wait ")))
        if request.terminal == "die":
            os._exit(7)
        return await super().issue(token, request)


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[App]:
    """The application of one process; odd Redis URLs make odd processes."""
    if settings.redis_url == "bad":
        raise Misconfigured("VOUCHERD_REDIS_URL: bad")
    if settings.redis_url == "crash":
        os._exit(9)
    issuer = Odd()
    if settings.redis_url == "unready":
        issuer.draining = True
    yield App(issuer)


def announce(addresses: Addresses) -> None:
    print(msgspec.json.encode(addresses).decode(), flush=True)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["worker"]:
        return serving.main(arguments[1:], build)
    given = {"port": "0", "ops_port": "0", **dict(argument.split("=", 1) for argument in arguments)}
    try:
        return asyncio.run(serve(msgspec.convert(given, Settings, strict=False), announce=announce, command=COMMAND))
    except Misconfigured as fault:
        print(f"misconfigured: {fault}", flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
