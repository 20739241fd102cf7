"""Settings: the only reader of the environment.

Every setting is a field below; its variable is ``VOUCHERD_<FIELD>``.  One that holds a secret may be in a file instead,
which ``VOUCHERD_<FIELD>_FILE`` names.  All of them are checked at boot: what is wrong is one line that names the
variable, what is the matter with its value, and one that would do; a secret is never in it.  The README's table is
compared with this file by a test.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, get_args
from urllib.parse import quote, urlsplit

import msgspec

from service.checks import CHECKS, unknown_names
from service.errors import Misconfigured
from service.messages import QUANTITY_MAX

PREFIX = "VOUCHERD_"

# Seconds.  A signing key that was rotated away verifies for so long, whatever a process that signed with it was told.
TOKEN_LIFETIME_S_MAX = 86_400

# One replay record in memory, key and overhead included: what is planned with, twice what usual ones take
# (`make bench-memory`: 205 in Valkey 9, 241 in Redis 7), for keys and ids may be longer.
RECORD_BYTES = 512

# Of one voucher in the outbox: some 250 on v1; on v3, with what a product says of its vouchers, about 700 if it comes
# alone.
ENTRY_BYTES = 1_024

# What a password is in.
SECRETS: Final = ("redis_url", "redis_password", "store_url", "store_password")
SECRET_BYTES_MAX: Final = 4_096  # of a file with one; more is another file than was meant

# The servers that have a URL, and what it calls the file with the authorities that their certificates are checked by.
_AUTHORITY_IN_URL: Final = {"redis": "ssl_ca_certs", "store": "sslrootcert"}
# One of each without a password, which is given apart from it.
_URL_APART: Final = {
    "redis": "rediss://voucherd@host:6379/0", "store": "postgresql+asyncpg://voucherd@host:5432/voucherd",
}  # fmt: skip

Positive = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
# What a refusal shows is the default, or else such an example.
Password = Annotated[str, msgspec.Meta(examples=["password-of-that-user"])]
Authorities = Annotated[str, msgspec.Meta(examples=["/etc/voucherd/ca.pem"])]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set.  Units are in the names; a docstring line per field is in the README."""

    redis_url: Annotated[str, msgspec.Meta(examples=["rediss://voucherd:password@host:6379/0"])] = (
        "redis://127.0.0.1:6379/0"
    )
    """Redis >= 7.0 or Valkey >= 8, `rediss://` for TLS"""
    redis_password: Password = ""
    """password that belongs into that URL"""
    redis_ca_file: Authorities = ""
    """certificates (PEM) of who may sign for Redis, for `rediss://`; without it the system's"""
    store_url: Annotated[str, msgspec.Meta(examples=["postgresql+asyncpg://voucherd:password@host:5432/voucherd"])] = (
        "sqlite+aiosqlite:///var/voucherd.db"
    )
    """durable store: `sqlite+aiosqlite:///file` or `postgresql+asyncpg://…`"""
    store_password: Password = ""
    """password that belongs into that URL"""
    store_ca_file: Authorities = ""
    """certificates (PEM) of who may sign for PostgreSQL; with it there is no connection without TLS"""
    host: str = "127.0.0.1"
    """address of the public API"""
    port: Port = 8080
    """port of the public API, 0 picks a free one"""
    tls_cert_file: Annotated[str, msgspec.Meta(examples=["/etc/voucherd/tls_cert.pem"])] = ""
    """certificate chain (PEM) of the public API, which is HTTPS then; without it a proxy in front has to do that"""
    tls_key_file: Annotated[str, msgspec.Meta(examples=["/etc/voucherd/tls_key.pem"])] = ""
    """private key (PEM, without a passphrase) of that certificate"""
    ops_host: str = "127.0.0.1"
    """address of metrics and health"""
    ops_port: Port = 8081
    """port of metrics and health, 0 picks a free one"""
    work_ops_port: Port = 0
    """port of the background worker's own metrics and health, at the same address; 0 for none"""
    secrets_file: Annotated[str, msgspec.Meta(examples=["/etc/voucherd/secrets.json"])] = ""
    """file with the keys of voucher ids and of sealing, `voucherd keys create` makes it; without it no Client API v3"""
    issuer: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,200}\Z")] = "voucherd"
    """`iss` of access tokens; the same for all processes"""
    token_lifetime_s: Annotated[int, msgspec.Meta(ge=60, le=TOKEN_LIFETIME_S_MAX)] = 3_600
    """seconds that an access token of Client API v3 is good for"""
    scope_prefix: Annotated[
        str, msgspec.Meta(pattern=r"\A([A-Za-z0-9._-]{1,64}/)?\Z", examples=["client_v3_demo/"])
    ] = ""
    """what scopes begin with, such as `client_v3_demo/`"""
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """processes that serve the public API"""
    planned_rate: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 50
    """vouchers per second to be ready for; sizes windows and outbox"""
    store_outage_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 60
    """seconds that issuing goes on without the store"""
    outbox_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 0
    """bytes that may wait in the outbox for the store, past it 503 `overloaded`; 0: 1,024 for each code that may"""
    replay_retention_s: Annotated[int, msgspec.Meta(ge=60, le=30 * 86_400)] = 86_400
    """seconds that a repeated request gets its first answer"""
    queue_max: Annotated[int, msgspec.Meta(ge=2 * QUANTITY_MAX, le=1_000_000)] = 4_096
    """vouchers that may wait for a batch in one process, half of them of one distributor; past it 503 `overloaded`"""
    deadline_ms: Annotated[int, msgspec.Meta(ge=50, le=60_000)] = 2_000
    """longest wait of a request before 503"""
    redis_timeout_ms: Annotated[int, msgspec.Meta(ge=10, le=10_000)] = 1_000
    """longest wait for one script; below the deadline"""
    receive_timeout_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 5_000
    """longest time a client may take to send one whole request"""
    drain_s: Annotated[int, msgspec.Meta(ge=1, le=300)] = 10
    """longest wait for requests in flight when stopping"""
    restart_in_place: bool = False
    """`true`: a restarted Redis goes on; promises no replicas, and never to run on a copy (docs/reliability.md)"""
    production: bool = False
    """`true`: do not start on dangerous settings of Redis or the store (docs/operations.md)"""
    accept: Annotated[str, msgspec.Meta(examples=["version,replicas"])] = ""
    """checks that need not be passed, by name with commas between them, such as `version,replicas`"""
    log_format: Literal["json", "console"] = "json"
    """log lines: `json`, one object each, or `console`, for people"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """lowest level of log lines that are written: `debug`, `info`, `warning` or `error`"""
    actor: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,64}\Z", examples=["alice"])] = ""
    """who types a command, where all have one user of the system; the audit log names both"""
    otel: bool = False
    """`true`: spans by OpenTelemetry, set up by its own OTEL_… variables (docs/logs.md); needs `voucherd[otel]`"""

    @property
    def accepted(self) -> frozenset[str]:
        """The names in ``accept``."""
        return frozenset(name.strip() for name in self.accept.split(",") if name.strip())

    @property
    def outbox_max(self) -> int:
        """Codes that may wait in the outbox of a partition: twice what P7 needs, so that the bound is not the
        first thing to be met when a store comes back slowly; at least 10,000."""
        return max(10_000, 2 * self.planned_rate * self.store_outage_s)

    @property
    def outbox_bytes_max(self) -> int:
        """Bytes that may wait in the outbox of a partition, so that what was issued is refused before Redis' memory
        is full."""
        return self.outbox_bytes or ENTRY_BYTES * self.outbox_max

    @property
    def records_bytes(self) -> int:
        """Bytes of Redis' memory that replay records of the planned rate may take over the retention."""
        return self.planned_rate * self.replay_retention_s * RECORD_BYTES

    @property
    def low_water(self) -> int:
        """Codes a window must hold to cover P7 at the planned rate; at least 20."""
        return max(20, self.planned_rate * self.store_outage_s)

    def checked(self) -> Settings:
        """These settings, if they agree with each other and the files that they name can be used; passwords and
        authorities are in the URLs then, and nowhere else.  Raises Misconfigured."""
        _check_redis_url(self.redis_url)
        if self.redis_timeout_ms >= self.deadline_ms:
            raise refused(
                "redis_timeout_ms", self.redis_timeout_ms,
                f"must be below {PREFIX}DEADLINE_MS ({self.deadline_ms})", self.deadline_ms // 2,
            )  # fmt: skip
        if 0 < self.outbox_bytes < (needed := ENTRY_BYTES * self.planned_rate * self.store_outage_s):
            raise refused(
                "outbox_bytes", self.outbox_bytes,
                f"must be 0 or at least {needed:,}: {ENTRY_BYTES:,} for each voucher of "
                f"{PREFIX}STORE_OUTAGE_S ({self.store_outage_s}) at {PREFIX}PLANNED_RATE ({self.planned_rate})", needed,
            )  # fmt: skip
        if unknown := unknown_names(self.accepted):
            raise refused(
                "accept", self.accept,
                f"no check is called {', '.join(map(repr, unknown))}: they are {', '.join(CHECKS)}",
            )  # fmt: skip
        if self.restart_in_place and (weaker := self.accepted & _NOT_IN_PLACE):
            raise refused(
                "restart_in_place", "true",
                f"can't be promised where {PREFIX}ACCEPT names {', '.join(sorted(weaker))}", False,
            )  # fmt: skip
        if self.replay_retention_s < 2 * self.store_outage_s:
            raise refused(
                "replay_retention_s", self.replay_retention_s,
                f"must be at least twice {PREFIX}STORE_OUTAGE_S ({self.store_outage_s}): "
                "a replay record has to outlive its outbox entry", 2 * self.store_outage_s,
            )  # fmt: skip
        _check_certificate(self.tls_cert_file, self.tls_key_file)
        return msgspec.structs.replace(
            self,
            redis_url=_whole_url("redis", self.redis_url, self.redis_password, self.redis_ca_file),
            redis_password="",
            redis_ca_file="",
            store_url=_whole_url("store", self.store_url, self.store_password, self.store_ca_file),
            store_password="",
            store_ca_file="",
        )


# Checks without which a restarted Redis may lack what it had acknowledged.
_NOT_IN_PLACE: Final = frozenset({"appendonly", "appendfsync", "no-appendfsync-on-rewrite", "replicas"})

_FIELDS: Final = {field.name: field for field in msgspec.structs.fields(Settings)}


def load(environment: Mapping[str, str] | None = None, **overrides: object) -> Settings:
    """Settings from ``environment`` (the process's own if None), with ``overrides`` (None: not given) on top.

    An override of a URL says all about that server: a password or an authority of the environment belongs to another
    one.  Raises Misconfigured with one line that names the variable: unknown ``VOUCHERD_…`` names are refused too,
    so that a misspelt one is not silently ignored.
    """
    values = _read(os.environ if environment is None else environment)
    given = {name: value for name, value in overrides.items() if value is not None}
    for server in _AUTHORITY_IN_URL:
        if f"{server}_url" in given:
            values.pop(f"{server}_password", None)
            values.pop(f"{server}_ca_file", None)
    try:
        return msgspec.convert({**values, **given}, Settings).checked()
    except msgspec.ValidationError as error:
        raise Misconfigured(str(error)) from None


def _read(environment: Mapping[str, str]) -> dict[str, object]:
    """What the variables say, each by itself."""
    values: dict[str, object] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if (held := name.removesuffix("_file")) in SECRETS and held != name:
            name = held
            if _variable(name) in environment:
                raise Misconfigured(
                    f"{variable} and {_variable(name)} are both set: keep one of them; {_say(variable)}"
                )
            text = _secret_in(variable, text)
        if name not in _FIELDS:
            raise Misconfigured(f"{variable} is not a setting of voucherd{_meant(name)}")
        try:
            values[name] = msgspec.convert(text, _FIELDS[name].type, strict=False)
        except msgspec.ValidationError as error:
            raise refused(name, text, str(error)) from None
    return values


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _meant(name: str) -> str:
    """What somebody who typed ``name`` may have meant, in words."""
    from difflib import get_close_matches  # of no use to who types well

    close = get_close_matches(name, [*_FIELDS, *(f"{secret}_file" for secret in SECRETS)], n=1)
    if close:
        return f": is {_variable(close[0])} meant? The README lists them; {_say(_variable(close[0]))}"
    return f": the README lists them; {_say(_variable('planned_rate'))}"


def _say(variable: str, example: object = None) -> str:
    """The end of a refusal: what would do (None: what usually does)."""
    name = variable.removeprefix(PREFIX).lower()
    if example is None and name.removesuffix("_file") in SECRETS and name not in _FIELDS:
        example = f"/run/secrets/{name.removesuffix('_file')}"
    elif example is None:
        named = [one for meta in get_args(_FIELDS[name].type) for one in getattr(meta, "examples", None) or ()]
        example = named[0] if named else _FIELDS[name].default
    return f"for example {variable}={str(example).lower() if isinstance(example, bool) else example}"


def refused(name: str, value: object, problem: str, example: object = None) -> Misconfigured:
    """The setting ``name`` can't have this ``value``, which is not told if it is a secret, and one that would do."""
    said = "" if name in SECRETS else f"={value!r}"
    return Misconfigured(f"{_variable(name)}{said}: {problem}; {_say(_variable(name), example)}")


def _secret_in(variable: str, path: str) -> str:
    """The secret in the file at ``path``, without the end of its line.  Raises Misconfigured."""
    example = _say(variable)
    try:
        with Path(path).open("rb") as file:
            held = file.read(SECRET_BYTES_MAX + 1)
        text = held.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise Misconfigured(f"{variable}={path!r} can't be read: {error.strerror}; {example}") from None
    except UnicodeDecodeError:
        raise Misconfigured(f"{variable}={path!r} holds no text in UTF-8; {example}") from None
    if len(held) > SECRET_BYTES_MAX or not text or not text.isprintable():
        raise Misconfigured(f"{variable}={path!r} does not hold one line with a secret; {example}")
    return text


# --- the two servers

_ENCODED: Final = "in a password write %40 for @, %3A for :, %2F for /, %23 for #, %3F for ?, %25 for %"


def _check_redis_url(url: str) -> None:
    """Raises Misconfigured for what redis-py would take for another server, or for the same one's database 0."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme == "unix" or (
            parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
            and (parts.path in ("", "/") or parts.path[1:].isdecimal())
        )  # fmt: skip
    except ValueError:
        fits = False
    if not fits:
        raise refused("redis_url", url, f"is no URL of a Redis ({_ENCODED})")


def _whole_url(server: str, url: str, password: str, authority: str) -> str:
    """``url`` with the password and the authority that were given apart from it.  Raises Misconfigured."""
    if not password and not authority:
        return url
    try:
        parts = urlsplit(url)
        reached = bool(parts.hostname)
    except ValueError:
        reached = False
    of = _variable(f"{server}_url")
    apart = _say(of, _URL_APART[server])
    if not reached:
        name = f"{server}_password" if password else f"{server}_ca_file"
        raise Misconfigured(f"{_variable(name)} is set, and {of} names no server that it could be for; {apart}")
    if password:
        who, _, where = parts.netloc.rpartition("@")
        if parts.password is not None:
            raise Misconfigured(
                f"{_variable(f'{server}_password')} is set, and {of} has a password too: keep one of them; {apart}"
            )
        parts = parts._replace(netloc=f"{who}:{quote(password, safe='')}@{where}")
    if authority:
        name = f"{server}_ca_file"
        if parts.scheme == "redis":
            raise Misconfigured(f"{_variable(name)} is set, and {of} asks for no TLS; {apart}")
        _check_authority(name, authority)
        query = f"{_AUTHORITY_IN_URL[server]}={quote(authority)}"
        parts = parts._replace(query=f"{parts.query}&{query}" if parts.query else query)
    return parts.geturl()


# --- files of certificates


def _check_authority(name: str, path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise refused(name, path, "holds no certificate in PEM") from None
    except OSError as error:
        raise refused(name, path, f"can't be read: {error.strerror}") from None


def _check_certificate(certificate: str, key: str) -> None:
    """Raises Misconfigured unless there is neither, or a certificate and its key."""
    if not certificate and not key:
        return
    for name, path in (("tls_cert_file", certificate), ("tls_key_file", key)):
        if not path:
            raise refused(name, path, "a certificate and its key are needed, or neither")
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise refused(name, path, f"can't be read: {error.strerror}") from None
    try:
        # Without a word for the passphrase OpenSSL would ask whoever started this process.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "-")
    except ssl.SSLError as error:
        what = f"is not the key of {_variable('tls_cert_file')}, or one of them is no PEM ({error.reason})"
        raise refused("tls_key_file", key, what) from None


_WRITTEN = ("redis_url", "store_url", "planned_rate", "secrets_file")


def in_data_dir(data_dir: Path) -> dict[str, object]:
    """Overrides that point at the embedded servers of ``voucherd up`` in ``data_dir``, at the rate that it plans with.

    Raises Misconfigured if nothing was ever started there.
    """
    connection = data_dir / "connection.json"
    if not connection.exists():
        raise Misconfigured(f"{data_dir} holds no data: start `voucherd up --data-dir {data_dir}` first")
    written = msgspec.json.decode(connection.read_bytes(), type=dict[str, object])
    return {name: written[name] for name in _WRITTEN if name in written}
