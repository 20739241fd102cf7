"""Access tokens and the endpoint that grants them: every attack by name, and nobody refused who should not be."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.applications import Starlette

from service import keyring, metrics
from service.catalogue import Catalogue, Client, SigningKey, Snapshot, encode, load
from service.domain import Busy
from service.keyring import Keyring
from service.messages import TokenAnswer, TokenRefused
from service.tokens import SECRET_PREFIX, digest, new_token
from service.web import access as module
from service.web.access import AUTHORIZATION_MAX, BACKDATED_S, Access, AccessTokens
from service.web.oauth import DELAYED_MAX, TokenEndpoint
from tests.calling import Seen, answer
from tests.issuers import FakeIssuer

NOW = 1_800_000_000
SECRET = "vcs_0ForTheTests0ForTheTests0ForTheTests000000024iFzU"  # fixed, because names of tests show it
SCOPES = ("read_catalogue", "issue_vouchers", "read_vouchers")
PREFIX = "client_v3_demo/"


class Issuer(FakeIssuer):
    """Has one catalogue at hand and, perhaps, a newer one in force."""

    def __init__(self, at_hand: Catalogue | None, in_force: Catalogue | None = None) -> None:
        super().__init__()
        self.catalogue = at_hand
        self.in_force = in_force
        self.busy: Busy | None = None
        self.confirmed = 0

    async def confirm(self, judge: Callable[[Catalogue], Any]) -> Any:
        self.confirmed += 1
        await asyncio.sleep(0)  # as the real one, which never answers at once
        if self.busy is not None:
            return self.busy
        if self.in_force is not None:
            self.catalogue = self.in_force
        assert self.catalogue is not None
        return judge(self.catalogue)


class World:
    """A catalogue with one client, and tokens for it."""

    def __init__(self, secrets: Keyring, keys: list[SigningKey]) -> None:
        self.secrets = secrets
        self.keys = keys
        self.now = float(NOW)
        self.issuer = Issuer(self.catalogue(self.keys[:1]))
        self.tokens = self.access(self.issuer)

    def access(self, issuer: Issuer, prefix: str = PREFIX, name: str = "voucherd") -> AccessTokens:
        return AccessTokens(
            issuer, self.secrets, name=name, lifetime_s=3_600, scope_prefix=prefix, unix_clock=lambda: self.now
        )

    def catalogue(
        self, keys: list[SigningKey], *, active: bool = True, client: str = "CLIENT", distributor_active: bool = True
    ) -> Catalogue:
        clients = {client: Client("D", digest(SECRET), SCOPES, active)} if client else {}
        snapshot = Snapshot(1, {}, {"D": distributor_active}, (), (), (), clients, tuple(keys))
        *_, loaded = load(encode(snapshot))
        assert loaded is not None
        return loaded

    def private(self, key: SigningKey) -> Any:
        pem = self.secrets.unseal(key.sealed, keyring.purpose_of(key.kid))
        return serialization.load_pem_private_key(pem, None)

    def claims(self, **changed: Any) -> dict[str, Any]:
        claims = {
            "sub": "CLIENT", "client_id": "CLIENT", "scope": " ".join(PREFIX + scope for scope in SCOPES),
            "token_use": "access", "iss": "voucherd", "iat": NOW - 5, "exp": NOW + 3_600, "jti": "j",
        }  # fmt: skip
        return {name: value for name, value in {**claims, **changed}.items() if value is not None}

    def forged(self, key: Any = None, algorithm: str = "RS256", kid: Any = None, **changed: Any) -> str:
        key = self.private(self.keys[0]) if key is None else key
        headers = {"kid": self.keys[0].kid if kid is None else kid}
        return jwt.encode(self.claims(**changed), key, algorithm=algorithm, headers=headers)

    async def admit(self, token: str | bytes, scope: str = "issue_vouchers") -> Access | str:
        sent = token if isinstance(token, bytes) else f"Bearer {token}".encode()
        return await self.tokens.admit(sent, scope)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    file = tmp_path_factory.mktemp("secrets") / "secrets.json"
    file.write_text(keyring.new())
    return keyring.load(file)


@pytest.fixture(scope="module")
def signing_keys(secrets: Keyring) -> list[SigningKey]:
    made = [keyring.new_signing_key(secrets) for _ in range(2)]
    return [SigningKey(one.kid, one.public, one.sealed, 0) for one in made]


@pytest.fixture
def world(secrets: Keyring, signing_keys: list[SigningKey]) -> World:
    return World(secrets, signing_keys)


# --- verifying


async def test_a_token_of_ours_is_admitted_and_its_signature_paid_for_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = world.tokens.sign("CLIENT", SCOPES, world.catalogue(world.keys[:1]))
    assert token is not None
    first = await world.admit(token)
    assert isinstance(first, Access)
    assert (first.client, first.distributor, first.scopes) == ("CLIENT", "D", frozenset(SCOPES))
    assert world.issuer.catalogue is not None
    assert world.issuer.catalogue.distributor(first.credential) == "D"

    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("verified again")

    monkeypatch.setattr(module.jwt, "decode", decode)
    for scope in SCOPES:
        assert await world.admit(token, scope) == first
    assert world.issuer.confirmed == 0


async def test_claims_are_those_of_the_contract(world: World) -> None:
    token = world.tokens.sign("CLIENT", SCOPES, world.catalogue(world.keys[:1]))
    assert token is not None
    header, claims = jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})
    assert header == {"alg": "RS256", "kid": world.keys[0].kid, "typ": "JWT"}
    assert set(claims) == {"sub", "client_id", "scope", "token_use", "iss", "iat", "exp", "jti"}
    assert claims["scope"] == " ".join(PREFIX + scope for scope in SCOPES)
    assert (claims["iat"], claims["exp"]) == (NOW - BACKDATED_S, NOW + 3_600)


async def test_a_token_is_admitted_to_its_last_second_and_not_one_longer(world: World) -> None:
    token = world.forged(exp=NOW + 10)
    world.now = NOW + 9.9
    assert isinstance(await world.admit(token), Access)
    world.now = NOW + 10
    assert await world.admit(token) == "token_expired"  # though it is remembered
    world.tokens = world.access(world.issuer)
    assert await world.admit(token) == "token_expired"


ATTACKS: dict[str, Callable[[World], str]] = {
    "another key's signature": lambda w: w.forged(w.private(w.keys[1])),
    "expired by one second": lambda w: w.forged(exp=NOW - 1),
    "not yet valid": lambda w: w.forged(nbf=NOW + 1),
    "made in the future": lambda w: w.forged(iat=NOW + 60),
    "no exp": lambda w: w.forged(exp=None),
    "exp as text": lambda w: w.forged(exp="later"),
    "no iat": lambda w: w.forged(iat=None),
    "no sub": lambda w: w.forged(sub=None),
    "no client_id": lambda w: w.forged(client_id=None),
    "no scope": lambda w: w.forged(scope=None),
    "no jti": lambda w: w.forged(jti=None),
    "no token_use": lambda w: w.forged(token_use=None),
    "an id token": lambda w: w.forged(token_use="id"),
    "no issuer": lambda w: w.forged(iss=None),
    "another issuer": lambda w: w.forged(iss="https://evil.example"),
    "another's sub": lambda w: w.forged(sub="OTHER"),
    "an unknown client": lambda w: w.forged(client_id="OTHER", sub="OTHER"),
    "a client with SQL": lambda w: w.forged(client_id="' or 1=1 --", sub="' or 1=1 --"),
    "an unknown kid": lambda w: w.forged(kid="0123456789abcdef"),
    "a kid that is a path": lambda w: w.forged(kid="../../../dev/null"),
    "a kid with SQL": lambda w: w.forged(kid="' union select 'x"),
    "an empty kid": lambda w: w.forged(kid=""),
    "a colon in the kid": lambda w: w.forged(kid=f"{w.keys[0].kid}:CLIENT"),
    "HS256 with the public key": lambda w: _hmac(w, _public_pem(w)),
    "HS256 with the JWK": lambda w: _hmac(w, w.keys[0].public.encode()),
    "alg none": lambda w: _unsigned(w, "none"),
    "alg None": lambda w: _unsigned(w, "None"),
    "RS512": lambda w: w.forged(algorithm="RS512"),
    "PS256": lambda w: w.forged(algorithm="PS256"),
    "no kid": lambda w: jwt.encode(w.claims(), w.private(w.keys[0]), algorithm="RS256"),
    "a key in the header": lambda w: _own_key(w),
    "a claim changed after signing": lambda w: _tampered(w),
    "no signature": lambda w: ".".join(w.forged().split(".")[:2]) + ".",
    "two parts": lambda w: ".".join(w.forged().split(".")[:2]),
    "garbage": lambda w: "garbage",
    "dots": lambda w: "..",
    "not base64": lambda w: "é.é.é",
    "100 KB": lambda w: w.forged(padding="x" * 100_000),
}  # fmt: skip


def _public_pem(world: World) -> bytes:
    public = world.private(world.keys[0]).public_key()
    pem: bytes = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def _part(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _hmac(world: World, secret: bytes) -> str:
    signed = f"{_part({'alg': 'HS256', 'kid': world.keys[0].kid})}.{_part(world.claims())}"
    signature = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _unsigned(world: World, algorithm: str) -> str:
    return f"{_part({'alg': algorithm, 'kid': world.keys[0].kid})}.{_part(world.claims())}."


def _own_key(world: World) -> str:
    own = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    headers = {"kid": world.keys[0].kid, "jwk": RSAAlgorithm.to_jwk(own.public_key(), as_dict=True)}
    return jwt.encode(world.claims(), own, algorithm="RS256", headers=headers)


def _tampered(world: World) -> str:
    head, _, signature = world.forged().split(".")
    return f"{head}.{_part(world.claims(scope='everything'))}.{signature}"


@pytest.mark.parametrize("attack", ATTACKS)
async def test_no_forged_token_is_admitted(world: World, attack: str) -> None:
    assert isinstance(await world.admit(world.forged()), Access)
    for _ in range(2):  # a refusal is not remembered as anything else
        refused = await world.admit(b"Bearer " + ATTACKS[attack](world).encode("latin-1"))
        assert refused in ("token_malformed", "token_unknown", "token_expired"), attack


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Basic eDp5", b"Token x", b"bearer", b"x" * 100_000])
async def test_a_header_without_a_token_is_told_as_such(world: World, header: bytes) -> None:
    assert await world.admit(header) == "token_missing"


async def test_a_header_above_its_bound_is_refused_before_it_is_decoded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(module.jwt, "get_unverified_header", decode)
    assert await world.admit(b"Bearer " + b"x" * AUTHORIZATION_MAX) == "token_malformed"


async def test_a_scope_that_was_not_granted_is_missing(world: World) -> None:
    token = world.forged(scope=f"{PREFIX}read_catalogue")
    assert isinstance(await world.admit(token, "read_catalogue"), Access)
    assert await world.admit(token, "issue_vouchers") == "scope_missing"
    other = world.forged(scope="client_v3_production/issue_vouchers issue_vouchers")
    assert await world.admit(other, "issue_vouchers") == "scope_missing"


async def test_a_key_newer_than_the_catalogue_at_hand_refuses_nobody(world: World) -> None:
    world.issuer.in_force = world.catalogue(world.keys)
    token = world.forged(world.private(world.keys[1]), kid=world.keys[1].kid)
    assert isinstance(await world.admit(token), Access)
    assert world.issuer.confirmed == 1
    assert isinstance(await world.admit(token), Access)
    assert world.issuer.confirmed == 1


async def test_a_token_of_a_key_that_is_gone_is_not_remembered(world: World) -> None:
    token = world.forged()
    assert isinstance(await world.admit(token), Access)
    world.issuer.catalogue = world.catalogue(world.keys[1:])
    assert await world.admit(token) == "token_unknown"


async def test_a_key_whose_time_is_over_verifies_nothing(world: World) -> None:
    old = msgspec.structs.replace(world.keys[0], verifies_until=NOW + 100)
    world.issuer.catalogue = world.catalogue([old, world.keys[1]])
    token = world.forged()
    assert isinstance(await world.admit(token), Access)
    world.now = NOW + 101
    world.tokens = world.access(world.issuer)
    assert await world.admit(token) == "token_unknown"


async def test_a_key_whose_time_ends_verifies_nothing_more_though_no_catalogue_is_newer(world: World) -> None:
    old = msgspec.structs.replace(world.keys[0], verifies_until=NOW + 100)
    world.issuer.catalogue = world.catalogue([old, world.keys[1]])
    remembered = world.forged(exp=NOW + 10**8)
    assert isinstance(await world.admit(remembered), Access)
    world.now = NOW + 100
    assert await world.admit(remembered) == "token_expired"
    assert await world.admit(world.forged(exp=NOW + 10**8, jti="of a key that leaked")) == "token_unknown"


async def test_a_publication_that_changes_no_key_forgets_no_token(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = world.forged()
    assert isinstance(await world.admit(token), Access)
    world.issuer.catalogue = world.catalogue(world.keys[:1])
    monkeypatch.setattr(module.jwt, "decode", None)
    assert isinstance(await world.admit(token), Access)


@pytest.mark.parametrize("attack", ["another key's signature", "another issuer", "an id token", "made in the future"])
async def test_what_no_catalogue_would_change_is_refused_without_asking_for_one(world: World, attack: str) -> None:
    assert await world.admit(ATTACKS[attack](world)) == "token_unknown"
    assert world.issuer.confirmed == 0


async def test_while_no_catalogue_can_be_confirmed_it_is_not_said_that_a_token_is_unknown(world: World) -> None:
    world.issuer.busy = Busy("store_unreachable")
    assert await world.admit(world.forged(kid="0123456789abcdef")) == "store_unreachable"


async def test_what_is_remembered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_MAX", 5)
    for number in range(20):
        assert isinstance(await world.admit(world.forged(jti=str(number))), Access)
        assert len(world.tokens._remembered) <= 5


# --- the endpoint


class Endpoint:
    """The token endpoint over a catalogue, with time that only passes when somebody waits."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.slept: list[float] = []
        self.gate: asyncio.Event | None = None
        self.endpoint = TokenEndpoint(
            world.issuer, world.tokens, lifetime_s=3_600, scope_prefix=PREFIX, clock=lambda: world.now,
            sleep=self._sleep,
        )  # fmt: skip
        self.app = Starlette(routes=self.endpoint.routes())

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.gate is not None:
            await self.gate.wait()

    async def __call__(
        self, form: Any = None, *, basic: str | None = None, media_type: str = "application/x-www-form-urlencoded"
    ) -> Seen:
        body = form if isinstance(form, bytes) else urlencode(form or {}).encode()
        headers = [(b"content-type", media_type.encode())]
        if basic is not None:
            headers.append((b"authorization", b"Basic " + base64.b64encode(basic.encode())))
        return await answer(self.app, "POST", "/oauth2/token", headers=headers, body=body)


GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
def endpoint(world: World) -> Endpoint:
    return Endpoint(world)


def assert_no_token(seen: Seen, status: int, error: str) -> None:
    assert seen.status == status, seen
    assert msgspec.json.decode(seen.body, type=TokenRefused).error == error
    assert seen.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in seen.headers) == (status == 401)
    assert SECRET.encode() not in seen.body


@pytest.mark.parametrize("in_form", [True, False])
async def test_a_client_gets_a_token_that_is_admitted(endpoint: Endpoint, world: World, in_form: bool) -> None:
    if in_form:
        seen = await endpoint({**GRANT, "client_id": "CLIENT", "client_secret": SECRET})
    else:
        seen = await endpoint(GRANT, basic=f"CLIENT:{SECRET}")
    assert seen.status == 200
    assert seen.headers["cache-control"] == "no-store"
    granted = msgspec.json.decode(seen.body, type=TokenAnswer)
    assert list(seen.problem) == ["access_token", "expires_in", "token_type"]
    assert (granted.expires_in, granted.token_type) == (3_600, "Bearer")
    for scope in SCOPES:
        assert isinstance(await world.admit(granted.access_token, scope), Access)


async def test_only_the_scopes_that_were_asked_for_are_granted(endpoint: Endpoint, world: World) -> None:
    seen = await endpoint({**GRANT, "scope": f"{PREFIX}read_vouchers"}, basic=f"CLIENT:{SECRET}")
    token = seen.problem["access_token"]
    assert isinstance(await world.admit(token, "read_vouchers"), Access)
    assert await world.admit(token, "issue_vouchers") == "scope_missing"


@pytest.mark.parametrize(
    "scope", ["", "issue_vouchers", f"{PREFIX}everything", f"{PREFIX}read_vouchers nothing", " ", "x/issue_vouchers"]
)
async def test_a_scope_that_the_client_may_not_have_is_refused(endpoint: Endpoint, scope: str) -> None:
    assert_no_token(await endpoint({**GRANT, "scope": scope}, basic=f"CLIENT:{SECRET}"), 400, "invalid_scope")


@pytest.mark.parametrize(
    ("form", "basic", "status", "error"),
    [
        ({}, f"CLIENT:{SECRET}", 400, "invalid_request"),
        ({"grant_type": "password"}, f"CLIENT:{SECRET}", 400, "unsupported_grant_type"),
        (GRANT, None, 401, "invalid_client"),
        (GRANT, "CLIENT", 401, "invalid_client"),
        (GRANT, f"CLIENT:{SECRET}x", 401, "invalid_client"),
        (GRANT, f"OTHER:{SECRET}", 401, "invalid_client"),
        (GRANT, f":{SECRET}", 401, "invalid_client"),
        (GRANT, "CLIENT:", 401, "invalid_client"),
        ({**GRANT, "client_secret": SECRET}, f"CLIENT:{SECRET}", 400, "invalid_request"),
        ({**GRANT, "client_id": "OTHER"}, f"CLIENT:{SECRET}", 400, "invalid_request"),
        (b"grant_type=client_credentials&grant_type=x", f"CLIENT:{SECRET}", 400, "invalid_request"),
        (b"%ff%fe=1", f"CLIENT:{SECRET}", 400, "invalid_request"),
        (b"no form at all", f"CLIENT:{SECRET}", 400, "invalid_request"),
        (b"a=" + b"x" * 20_000, f"CLIENT:{SECRET}", 400, "invalid_request"),
        (b"&".join(b"a%d=1" % number for number in range(50)), f"CLIENT:{SECRET}", 400, "invalid_request"),
    ],
)
async def test_what_is_no_request_for_a_token_gets_none(
    endpoint: Endpoint, form: Any, basic: str | None, status: int, error: str
) -> None:
    assert_no_token(await endpoint(form, basic=basic), status, error)


async def test_another_media_type_is_refused(endpoint: Endpoint) -> None:
    seen = await endpoint(b"{}", basic=f"CLIENT:{SECRET}", media_type="application/json")
    assert_no_token(seen, 400, "invalid_request")


@pytest.mark.parametrize("what", ["active", "distributor_active"])
async def test_who_is_suspended_gets_no_token(endpoint: Endpoint, world: World, what: str) -> None:
    world.issuer.in_force = world.catalogue(world.keys[:1], **{what: False})  # type: ignore[arg-type]
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 401, "invalid_client")


async def test_a_secret_is_compared_by_the_catalogue_in_force_and_not_by_the_one_at_hand(
    endpoint: Endpoint, world: World
) -> None:
    world.issuer.in_force = world.catalogue(world.keys[:1], client="")
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 401, "invalid_client")


async def test_without_a_signing_key_or_a_catalogue_the_client_is_told_to_come_back(
    endpoint: Endpoint, world: World
) -> None:
    world.issuer.catalogue = world.catalogue([])
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 503, "temporarily_unavailable")
    world.issuer.busy = Busy("store_unreachable")
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 503, "temporarily_unavailable")


async def test_what_the_endpoint_answers_burns_the_error_budget(endpoint: Endpoint, world: World) -> None:
    def told(status: str, code: str) -> float:
        return metrics.requests.labels("oauth2", status, code)._value.get()

    before = (told("200", "token"), told("503", "temporarily_unavailable"))
    await endpoint(GRANT, basic=f"CLIENT:{SECRET}")
    world.issuer.busy = Busy("overloaded")
    await endpoint(GRANT, basic=f"CLIENT:{SECRET}")
    assert (told("200", "token"), told("503", "temporarily_unavailable")) == (before[0] + 1, before[1] + 1)


async def test_wrong_secrets_are_answered_later_and_later_and_a_right_one_at_once(endpoint: Endpoint) -> None:
    for _ in range(8):
        await endpoint(GRANT, basic=f"CLIENT:{new_token(SECRET_PREFIX)}")
    assert endpoint.slept == sorted(endpoint.slept)
    assert endpoint.slept[0] == pytest.approx(0.25)
    assert endpoint.slept[-1] == pytest.approx(4.0)
    assert (await endpoint(GRANT, basic=f"CLIENT:{SECRET}")).status == 200
    assert len(endpoint.slept) == 8
    await endpoint(GRANT, basic=f"OTHER:{SECRET}")
    assert endpoint.slept[-1] == pytest.approx(0.25)  # per client


async def test_many_wrong_secrets_at_once_are_not_even_compared(endpoint: Endpoint, world: World) -> None:
    endpoint.gate = asyncio.Event()
    wrong = [asyncio.create_task(endpoint(GRANT, basic=f"CLIENT:{new_token(SECRET_PREFIX)}")) for _ in range(50)]
    for _ in range(1_000):  # turns of the loop, many more than it takes
        await asyncio.sleep(0)
    assert sum(task.done() for task in wrong) == 50 - DELAYED_MAX
    assert len(endpoint.slept) == DELAYED_MAX
    asked = world.issuer.confirmed
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 429, "slow_down")
    assert world.issuer.confirmed == asked
    endpoint.gate.set()
    statuses = [(await task).status for task in wrong]
    assert sorted(set(statuses)) == [401, 429]
    assert statuses.count(401) == DELAYED_MAX
    assert (await endpoint(GRANT, basic=f"CLIENT:{SECRET}")).status == 200


async def test_many_right_secrets_at_once_are_all_served(endpoint: Endpoint) -> None:
    right = await asyncio.gather(*(endpoint(GRANT, basic=f"CLIENT:{SECRET}") for _ in range(50)))
    assert {seen.status for seen in right} == {200}
    assert endpoint.slept == []


async def test_names_that_are_no_client_s_are_not_remembered_one_by_one(endpoint: Endpoint) -> None:
    for number in range(DELAYED_MAX):
        form = {**GRANT, "client_id": f"{number}" + "x" * 10_000, "client_secret": SECRET}
        assert_no_token(await endpoint(form), 401, "invalid_client")
    assert list(endpoint.endpoint._failures._clients) == [""]
    assert endpoint.slept[-1] > endpoint.slept[0]


async def test_two_authorizations_get_no_token(endpoint: Endpoint) -> None:
    headers = [(b"content-type", b"application/x-www-form-urlencoded")]
    headers += [
        (b"authorization", b"Basic " + base64.b64encode(who)) for who in (f"CLIENT:{SECRET}".encode(), b"OTHER:x")
    ]
    seen = await answer(endpoint.app, "POST", "/oauth2/token", headers=headers, body=urlencode(GRANT).encode())
    assert_no_token(seen, 400, "invalid_request")


async def test_a_client_that_goes_away_while_it_sends_is_no_defect(endpoint: Endpoint) -> None:
    headers = [(b"content-type", b"application/x-www-form-urlencoded")]
    seen = await answer(
        endpoint.app, "POST", "/oauth2/token", headers=headers, body=b"grant_type=", disconnects=True
    )  # fmt: skip
    assert_no_token(seen, 400, "invalid_request")


async def test_a_key_that_verifies_no_more_is_not_told(endpoint: Endpoint, world: World) -> None:
    over = msgspec.structs.replace(world.keys[0], verifies_until=NOW)
    world.issuer.catalogue = world.catalogue([over, world.keys[1]])
    seen = await answer(endpoint.app, "GET", "/.well-known/jwks.json")
    assert [key["kid"] for key in seen.problem["keys"]] == [world.keys[1].kid]


async def test_the_public_keys_are_told_and_nothing_private(endpoint: Endpoint, world: World) -> None:
    world.issuer.catalogue = world.catalogue(world.keys)
    seen = await answer(endpoint.app, "GET", "/.well-known/jwks.json")
    keys = seen.problem["keys"]
    assert [key["kid"] for key in keys] == [key.kid for key in world.keys]
    assert all(set(key) == {"kty", "use", "alg", "kid", "n", "e"} for key in keys)
    token = world.forged()
    claims = jwt.decode(
        token, jwt.PyJWK(keys[0]), algorithms=["RS256"], options={"verify_exp": False, "verify_iat": False}
    )
    assert claims["client_id"] == "CLIENT"


async def test_a_key_sealed_with_another_secrets_file_is_no_defect_of_the_client(
    endpoint: Endpoint, world: World, tmp_path: Any
) -> None:
    file = tmp_path / "other.json"
    file.write_text(keyring.new())
    made = keyring.new_signing_key(keyring.load(file))
    world.issuer.catalogue = world.catalogue([SigningKey(made.kid, made.public, made.sealed, 0)])
    assert_no_token(await endpoint(GRANT, basic=f"CLIENT:{SECRET}"), 503, "temporarily_unavailable")
