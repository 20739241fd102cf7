"""The floor: an ASGI application that reads a body and answers with fixed bytes, on the same uvicorn as voucherd."""

from __future__ import annotations

import sys

import uvicorn

BODY = b'{"status":"success","campaign_id":"CAMP-001","category_id":"PAY","product_id":"PAY"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]


async def app(scope, receive, send):  # type: ignore[no-untyped-def]
    """Reads the request to its end and answers 200."""
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=int(sys.argv[1]), loop="uvloop", http="httptools", lifespan="off",
        access_log=False, log_level="error", server_header=False,
    )  # fmt: skip
