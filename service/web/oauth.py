"""The token endpoint of Client API v3 and its public keys (RFC 6749 client credentials, RFC 7517).

A client's secret is compared by a catalogue that is in force after the request came, so a secret that was rotated and a
client that was suspended count at once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qsl, unquote_plus

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from service import metrics
from service.domain import Busy
from service.errors import Misconfigured
from service.messages import TokenAnswer, TokenRefused
from service.store.control import ID
from service.tokens import SECRET_PREFIX, digest, well_formed
from service.web.access import SCOPES, AccessTokens
from service.web.incoming import BODY_MAX, exceeds, repeated
from service.web.problems import RETRY_AFTER_S
from service.web.v1 import Issuing

log = structlog.get_logger(__name__)

# Wrong secrets of one client are answered late: the first after so many seconds, each further one twice as late.
DELAY_S_MIN: Final = 0.25
DELAY_S_MAX: Final = 4.0

# Answers of one client that are being held back; while there are so many, nobody's secret is compared for it.
DELAYED_MAX: Final = 8

# Failures are forgotten after so long without another one.
FORGOTTEN_S: Final = 60.0

# Clients whose failures are remembered in a process: names that don't exist count too, so somebody could make them up.
CLIENTS_MAX: Final = 10_000

_FORM_PAIRS_MAX: Final = 16


class TokenEndpoint:
    """Grants access tokens."""

    def __init__(
        self,
        issuer: Issuing,
        tokens: AccessTokens,
        *,
        lifetime_s: int,
        scope_prefix: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._issuer = issuer
        self._tokens = tokens
        self._lifetime_s = lifetime_s
        self._prefix = scope_prefix
        self._failures = _Failures(clock)
        self._sleep = sleep or asyncio.sleep

    def routes(self) -> list[BaseRoute]:
        """The token endpoint and the public keys."""
        return [
            Route("/oauth2/token", self.token, methods=["POST"]),
            Route("/.well-known/jwks.json", self.keys, methods=["GET"]),
        ]

    async def token(self, request: Request) -> Response:
        """One answer of the token endpoint."""
        if twice := repeated(request.headers.raw):
            return _refused(400, "invalid_request", f"The header {twice} was sent more than once.")
        asked = await _form(request)
        if isinstance(asked, str):
            return _refused(400, "invalid_request", asked)
        client = _credentials(request.headers.get("authorization"), asked)
        if isinstance(client, str):
            return _refused(400, "invalid_request", client)
        if client is None:
            return _refused(401, "invalid_client", "Send the client's id and secret by HTTP Basic or in the form.")
        if "grant_type" not in asked:
            return _refused(400, "invalid_request", "grant_type is missing.")
        if asked["grant_type"] != "client_credentials":
            return _refused(400, "unsupported_grant_type", "grant_type must be client_credentials.")
        return await self._grant(*client, asked.get("scope"))

    async def keys(self, _: Request) -> Response:
        """The public keys, those too whose tokens may still be in use."""
        catalogue = await self._issuer.confirm(lambda newest: newest)
        if isinstance(catalogue, Busy):
            return _busy()
        keys = [msgspec.Raw(key.public.encode()) for key in self._tokens.verifying(catalogue)]
        return Response(
            msgspec.json.encode({"keys": keys}), media_type="application/json",
            headers={"cache-control": "public, max-age=60"},
        )  # fmt: skip

    async def _grant(self, id: str, secret: str, scope: str | None) -> Response:
        if ID.fullmatch(id) is None:
            id = ""  # no client's, so what is remembered of it is short, and one for all such names
        if self._failures.waiting(id) >= DELAYED_MAX:
            return _slow_down()
        said = digest(secret) if well_formed(secret, SECRET_PREFIX) else ""
        catalogue = await self._issuer.confirm(lambda newest: newest)
        if isinstance(catalogue, Busy):
            return _busy()
        if self._failures.waiting(id) >= DELAYED_MAX:  # those that were confirmed together with this one
            return _slow_down()
        client = catalogue.client(id)
        # Compared also for a client that does not exist, so that time does not tell which do.
        right = hmac.compare_digest(said, client.secret_sha256 if client is not None else _NOBODY)
        if client is None or not right:
            with self._failures.one_more(id) as delay_s:
                await self._sleep(delay_s)  # type: ignore[misc]  # asyncio.sleep, or what a test puts in its place
            return _refused(401, "invalid_client", "The client or its secret is not in force.")
        if not client.active or not catalogue.active(client.distributor):
            return _refused(401, "invalid_client", "The client is suspended.")
        wanted = [self._prefix + one for one in client.scopes] if scope is None else scope.split(" ")
        granted = tuple(one.removeprefix(self._prefix) for one in wanted if one.startswith(self._prefix))
        if not wanted or len(granted) < len(wanted) or not set(granted) <= set(client.scopes) & set(SCOPES):
            return _refused(400, "invalid_scope", "The client may not have this scope.")
        try:
            token = self._tokens.sign(id, tuple(dict.fromkeys(granted)), catalogue)
        except Misconfigured as fault:  # this process has another secrets file than the one that sealed the key
            log.critical("no access token can be signed", fault=str(fault))
            return _refused(503, "temporarily_unavailable", "Access tokens can't be signed now.", _RETRY)
        if token is None:
            return _refused(503, "temporarily_unavailable", "There is no signing key yet.", _RETRY)
        metrics.requests.labels("oauth2", "200", "token").inc()
        return _json(200, TokenAnswer(token, self._lifetime_s, "Bearer"))


class _Failures:
    """Who sent wrong secrets lately, and how many of the answers to these wait."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._clients: dict[str, _Failing] = {}

    def waiting(self, client: str) -> int:
        failing = self._clients.get(client)
        return failing.waiting if failing is not None else 0

    def one_more(self, client: str) -> _Failing:
        """A context in which an answer is held back for as long as it says."""
        now = self._clock()
        failing = self._clients.get(client)
        if failing is None:
            if len(self._clients) >= CLIENTS_MAX:
                kept = {name: one for name, one in self._clients.items() if one.waiting}
                self._clients = kept if len(kept) < CLIENTS_MAX else {}
            failing = self._clients[client] = _Failing()
        if now - failing.last > FORGOTTEN_S:
            failing.delay_s = DELAY_S_MIN / 2
        failing.last = now
        failing.delay_s = min(2 * failing.delay_s, DELAY_S_MAX)
        return failing


class _Failing:
    """One client's failures: the next answer is held back for ``delay_s``."""

    def __init__(self) -> None:
        self.waiting = 0
        self.last = float("-inf")
        self.delay_s = 0.0

    def __enter__(self) -> float:
        self.waiting += 1
        return self.delay_s

    def __exit__(self, *_: object) -> None:
        self.waiting -= 1


_NOBODY: Final = "0" * 64


async def _form(request: Request) -> dict[str, str] | str:
    """The fields of the form, or what is wrong with it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/x-www-form-urlencoded":
        return "Content-Type must be application/x-www-form-urlencoded."
    length = request.headers.get("content-length")
    if length is not None and exceeds(length.encode()):
        return "The form is too large."
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_MAX:
                return "The form is too large."
    except ClientDisconnect:
        return "The form did not come whole."
    try:
        pairs = parse_qsl(
            body.decode("utf-8"), keep_blank_values=True, strict_parsing=bool(body), errors="strict",
            max_num_fields=_FORM_PAIRS_MAX,
        )  # fmt: skip
    except ValueError:
        return "The form is malformed."
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else "A field of the form is repeated."


def _credentials(authorization: str | None, form: dict[str, str]) -> tuple[str, str] | str | None:
    """Id and secret; what is wrong with how they were sent; None if they were not, or can't be."""
    in_form = "client_id" in form or "client_secret" in form
    if authorization is None:
        return (form.get("client_id", ""), form.get("client_secret", "")) if in_form else None
    if "client_secret" in form:
        return "Send the secret once: by HTTP Basic or in the form."
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return None
    if "client_id" in form and form["client_id"] != unquote_plus(id):
        return "client_id differs from that of HTTP Basic."
    return (unquote_plus(id), unquote_plus(secret)) if colon else None


_RETRY: Final = {"retry-after": str(RETRY_AFTER_S)}


def _refused(status: int, error: str, description: str, headers: dict[str, str] | None = None) -> Response:
    metrics.requests.labels("oauth2", str(status), error).inc()  # without tokens there is no Client API v3
    if status == 401:
        metrics.credentials_refused.labels("token", error).inc()
    answer = _json(status, TokenRefused(error, description))
    answer.headers.update(headers or {})
    if status == 401:
        answer.headers["www-authenticate"] = 'Basic realm="voucherd"'
    return answer


def _slow_down() -> Response:
    return _refused(429, "slow_down", "Too many wrong secrets for this client.", _RETRY)


def _busy() -> Response:
    return _refused(503, "temporarily_unavailable", "Send the same request again.", _RETRY)


def _json(status: int, content: object) -> Response:
    headers = {"cache-control": "no-store", "pragma": "no-cache"}
    return Response(msgspec.json.encode(content), status, headers=headers, media_type="application/json; charset=utf-8")
