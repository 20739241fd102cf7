"""Settings: the only reader of the environment.

Every setting is a field below; its variable is ``VOUCHERD_<FIELD>``.  Bounds are checked at boot, and the
variable that is wrong is named.  The README's table is compared with this file by a test.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from service.checks import CHECKS, unknown_names
from service.errors import Misconfigured
from service.messages import QUANTITY_MAX

PREFIX = "VOUCHERD_"

# Seconds.  A signing key that was rotated away verifies for so long, whatever a process that signed with it was told.
TOKEN_LIFETIME_S_MAX = 86_400

# Of one voucher in the outbox: some 250 on v1; on v3, with what a product says of its vouchers, about 700 if it comes
# alone.
ENTRY_BYTES = 1_024

Positive = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may set.  Units are in the names; a docstring line per field is in the README."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    """Redis >= 7.0 or Valkey >= 8, `rediss://` for TLS"""
    store_url: str = "sqlite+aiosqlite:///var/voucherd.db"
    """durable store: `sqlite+aiosqlite:///file` or `postgresql+asyncpg://…`"""
    host: str = "127.0.0.1"
    """address of the public API"""
    port: Port = 8080
    """port of the public API, 0 picks a free one"""
    ops_host: str = "127.0.0.1"
    """address of metrics and health"""
    ops_port: Port = 8081
    """port of metrics and health, 0 picks a free one"""
    work_ops_port: Port = 0
    """port of the background worker's own metrics and health, at the same address; 0 for none"""
    secrets_file: str = ""
    """file with the keys of voucher ids and of sealing, `voucherd keys create` makes it; without it no Client API v3"""
    issuer: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,200}\Z")] = "voucherd"
    """`iss` of access tokens; the same for all processes"""
    token_lifetime_s: Annotated[int, msgspec.Meta(ge=60, le=TOKEN_LIFETIME_S_MAX)] = 3_600
    """seconds that an access token of Client API v3 is good for"""
    scope_prefix: Annotated[str, msgspec.Meta(pattern=r"\A([A-Za-z0-9._-]{1,64}/)?\Z")] = ""
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
    production: bool = False
    """`true`: do not start on dangerous settings of Redis or the store (docs/operations.md)"""
    accept: str = ""
    """checks that need not be passed, by name with commas between them, such as `version,replicas`"""
    log_format: Literal["json", "console"] = "json"
    """log lines: `json`, one object each, or `console`, for people"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """lowest level of log lines that are written: `debug`, `info`, `warning` or `error`"""
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
    def low_water(self) -> int:
        """Codes a window must hold to cover P7 at the planned rate; at least 20."""
        return max(20, self.planned_rate * self.store_outage_s)

    def checked(self) -> Settings:
        """These settings, if they agree with each other.  Raises Misconfigured, naming the variable."""
        if self.redis_timeout_ms >= self.deadline_ms:
            raise Misconfigured(f"{PREFIX}REDIS_TIMEOUT_MS must be below {PREFIX}DEADLINE_MS ({self.deadline_ms})")
        if 0 < self.outbox_bytes < (needed := ENTRY_BYTES * self.planned_rate * self.store_outage_s):
            raise Misconfigured(
                f"{PREFIX}OUTBOX_BYTES must be 0 or at least {needed:,}: {ENTRY_BYTES:,} for each voucher of "
                f"{PREFIX}STORE_OUTAGE_S ({self.store_outage_s}) at {PREFIX}PLANNED_RATE ({self.planned_rate})"
            )
        if unknown := unknown_names(self.accepted):
            raise Misconfigured(
                f"{PREFIX}ACCEPT names no check by {', '.join(map(repr, unknown))}: they are {', '.join(CHECKS)}"
            )
        if self.replay_retention_s < 2 * self.store_outage_s:
            raise Misconfigured(
                f"{PREFIX}REPLAY_RETENTION_S must be at least twice {PREFIX}STORE_OUTAGE_S ({self.store_outage_s}): "
                "a replay record has to outlive its outbox entry"
            )
        return self


def load(environment: Mapping[str, str] | None = None, **overrides: object) -> Settings:
    """Settings from ``environment`` (the process's own if None), with ``overrides`` (None: not given) on top.

    Raises Misconfigured with one line that names the variable: unknown ``VOUCHERD_…`` names are refused too,
    so that a misspelt one is not silently ignored.
    """
    environment = os.environ if environment is None else environment
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    values: dict[str, object] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in fields:
            raise Misconfigured(f"{variable} is not a setting of voucherd; see `voucherd --help` and the README")
        try:
            values[name] = msgspec.convert(text, fields[name].type, strict=False)
        except msgspec.ValidationError as error:
            raise Misconfigured(f"{variable}={text!r}: {error}") from None
    values.update({name: value for name, value in overrides.items() if value is not None})
    try:
        return msgspec.convert(values, Settings).checked()
    except msgspec.ValidationError as error:
        raise Misconfigured(str(error)) from None


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
