"""Access tokens of Client API v3: RS256 JWTs, signed and verified by the signing keys of the catalogue.

A verified token is remembered until it expires, so its signature is paid for once.  What is remembered says only what
the token says; whether its client and its key are still in force is asked of the catalogue at each use (P6).
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import jwt
import msgspec
from jwt import PyJWK

from service import keyring
from service.catalogue import Catalogue, SigningKey, credential_of
from service.domain import Busy
from service.keyring import Keyring
from service.store.clients import SCOPES as SCOPES
from service.web.v1 import Issuing

ALGORITHM: Final = "RS256"

# Bytes of an Authorization header.  Ours are below 900 with the longest client, issuer and prefix; a proxy may have a
# longer issuer.  What is longer is refused before anything of it is decoded.
AUTHORIZATION_MAX: Final = 4_096

# Verified tokens remembered in one process, some 2 KB each.  A client has one an hour.
REMEMBERED_MAX: Final = 4_096

# Seconds that a token's `iat` lies before it was made: clocks of two machines may differ by as much.
BACKDATED_S: Final = 5

_Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]


class Access(msgspec.Struct, frozen=True):
    """A verified access token: whose it is, and ``credential``, for a catalogue in force to say if that still holds.

    ``scopes`` are without the prefix; ``until`` is Unix seconds from which on it is expired, or its key
    verifies no more.
    """

    client: str
    distributor: str
    credential: str
    scopes: frozenset[str]
    until: float = 0


class _Verifying(msgspec.Struct, frozen=True):
    """A public key, and Unix seconds from which on it verifies nothing."""

    key: Any
    until: float


class _Header(msgspec.Struct):
    alg: Literal["RS256"]
    kid: _Name


class _Claims(msgspec.Struct):
    sub: str
    client_id: _Name
    scope: str
    token_use: Literal["access"]
    iss: str
    iat: int
    exp: int
    jti: str
    nbf: int = 0


class AccessTokens:
    """Signs and verifies, by the keys of whatever catalogue is at hand; ``secrets`` opens the private ones."""

    def __init__(
        self,
        issuer: Issuing,
        secrets_file: Keyring,
        *,
        name: str,
        lifetime_s: int,
        scope_prefix: str,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuer = issuer
        self._secrets = secrets_file
        self._name = name
        self._lifetime_s = lifetime_s
        self._prefix = scope_prefix
        self._unix_clock = unix_clock
        self._keys: tuple[SigningKey, ...] = ()
        self._public: dict[str, _Verifying] = {}
        self._private: dict[str, Any] = {}
        self._remembered: dict[bytes, Access] = {}

    def remembered(self, authorization: bytes, scope: str) -> Access | None:
        """Whom ``admit`` admits without waiting; None if it has more to look at, or refuses."""
        if (catalogue := self._issuer.catalogue) is not None:
            self._use_keys_of(catalogue)
        access = self._remembered.get(authorization)
        if access is None or access.until <= self._unix_clock() or scope not in access.scopes:
            return None
        return access

    async def admit(self, authorization: bytes, scope: str) -> Access | str:
        """Who sends this Authorization header, if its token grants ``scope``; else the name of the refusal.

        The signature and what the token says were verified, by a catalogue that may be superseded by now: whoever
        goes on asks a catalogue in force about ``credential``.
        """
        catalogue = self._issuer.catalogue
        if catalogue is not None:
            self._use_keys_of(catalogue)
        access = self._remembered.get(authorization)
        if access is None:
            found = self._verified(authorization, catalogue)
            if found is None:  # perhaps the key, or the client, is newer than the catalogue at hand
                in_force = await self._issuer.confirm(lambda newest: newest)
                if isinstance(in_force, Busy):
                    return in_force.code
                found = self._verified(authorization, in_force) or "token_unknown"
            if isinstance(found, str):
                return found
            access = found
        if access.until <= self._unix_clock():
            return "token_expired"
        return access if scope in access.scopes else "scope_missing"

    def sign(self, client: str, scopes: tuple[str, ...], catalogue: Catalogue) -> str | None:
        """An access token for the client, None if the catalogue has no key that signs.

        Raises Misconfigured if the key was sealed with another secrets file.
        """
        signing = next((key for key in catalogue.signing_keys if not key.verifies_until), None)
        if signing is None:
            return None
        private = self._private.get(signing.kid)
        if private is None:
            pem = self._secrets.unseal(signing.sealed, keyring.purpose_of(signing.kid))
            private = self._private[signing.kid] = jwt.get_algorithm_by_name(ALGORITHM).prepare_key(pem)
        now = int(self._unix_clock())
        claims = {
            "sub": client, "client_id": client, "scope": " ".join(self._prefix + scope for scope in scopes),
            "token_use": "access", "iss": self._name, "iat": now - BACKDATED_S, "exp": now + self._lifetime_s,
            "jti": secrets.token_hex(16),
        }  # fmt: skip
        return jwt.encode(claims, private, algorithm=ALGORITHM, headers={"kid": signing.kid})

    def verifying(self, catalogue: Catalogue) -> list[SigningKey]:
        """The keys of which there may be tokens that are not over."""
        now = self._unix_clock()
        return [key for key in catalogue.signing_keys if not key.verifies_until or key.verifies_until > now]

    def _verified(self, authorization: bytes, catalogue: Catalogue | None) -> Access | str | None:
        """None: the catalogue does not have the key or the client; every other refusal is the same by any catalogue."""
        scheme, _, token = authorization[: AUTHORIZATION_MAX + 1].partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            return "token_missing"
        if len(authorization) > AUTHORIZATION_MAX:
            return "token_malformed"
        text = token.strip().decode("latin-1")
        try:
            header = msgspec.convert(jwt.get_unverified_header(text), _Header)
        except (jwt.InvalidTokenError, msgspec.ValidationError, ValueError):
            return "token_malformed"
        if catalogue is None:
            return None
        self._use_keys_of(catalogue)
        now = self._unix_clock()
        verifying = self._public.get(header.kid)
        if verifying is None or verifying.until <= now:
            return None
        try:
            # Times are looked at here, by the clock that is a parameter; the library is told what else must hold.
            said = jwt.decode(
                text, verifying.key, algorithms=[ALGORITHM], issuer=self._name,
                options={"verify_exp": False, "verify_iat": False, "verify_nbf": False, "verify_aud": False},
            )  # fmt: skip
            claims = msgspec.convert(said, _Claims)
        except jwt.DecodeError as error:
            return "token_unknown" if isinstance(error, jwt.InvalidSignatureError) else "token_malformed"
        except (jwt.InvalidTokenError, msgspec.ValidationError):
            return "token_unknown"
        if claims.exp <= now:
            return "token_expired"
        if claims.sub != claims.client_id or max(claims.iat, claims.nbf) > now:
            return "token_unknown"
        client = catalogue.client(claims.client_id)
        if client is None:
            return None
        granted = frozenset(
            scope.removeprefix(self._prefix) for scope in claims.scope.split() if scope.startswith(self._prefix)
        )
        access = Access(
            claims.client_id, client.distributor, credential_of(header.kid, claims.client_id), granted,
            min(claims.exp, verifying.until),
        )  # fmt: skip
        if len(self._remembered) >= REMEMBERED_MAX:
            self._remembered.clear()
        self._remembered[authorization] = access
        return access

    def _use_keys_of(self, catalogue: Catalogue) -> None:
        """Verifies by these keys; nothing that was verified by others is remembered."""
        if catalogue.signing_keys is self._keys:
            return
        before, self._keys = self._keys, catalogue.signing_keys
        if self._keys == before:  # another version, which changed something else
            return
        self._remembered.clear()
        self._public = {
            key.kid: _Verifying(PyJWK.from_json(key.public).key, key.verifies_until or math.inf)
            for key in self.verifying(catalogue)
        }
        self._private = {kid: private for kid, private in self._private.items() if kid in self._public}
