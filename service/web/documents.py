"""What the service says of itself: /openapi.json, and /docs, which renders it with what ships in this package."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from service.web.openapi import document

ASSETS: Final = Path(__file__).parent / "assets"

# A browser keeps to it: whatever the page holds, no request leaves for another host.
_ONLY_HERE: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>voucherd: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/assets/swagger-ui.css">
<div id="docs"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script>
<script src="/docs/assets/start.js"></script>
</html>
"""


def documents(*, client_api: bool, scope_prefix: str) -> list[BaseRoute]:
    """The routes; ``client_api``: whether Client API v3 is served, ``scope_prefix``: what its scopes begin with."""
    described = orjson.dumps(document(client_api=client_api, scope_prefix=scope_prefix))

    async def openapi(_: Request) -> Response:
        return Response(described, media_type="application/json")

    async def docs(_: Request) -> Response:
        return Response(_PAGE, media_type="text/html", headers={"content-security-policy": _ONLY_HERE})

    return [
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        Mount("/docs/assets", StaticFiles(directory=ASSETS)),
    ]
