"""Settings: every bound holds, and whatever is wrong names its variable in one line."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

import msgspec
import pytest
from redis.asyncio.connection import parse_url
from sqlalchemy.engine import make_url

from service import keyring
from service.checks import CHECKS
from service.errors import Misconfigured
from service.settings import PREFIX, SECRET_BYTES_MAX, SECRETS, Settings, in_data_dir, load
from service.store.database import Database
from service.web.ops import listening
from tests.tls import Authority

# field -> (least, most)
BOUNDS = {
    "port": (0, 65_535),
    "work_ops_port": (0, 65_535),
    "ops_port": (0, 65_535),
    "workers": (1, 64),
    "planned_rate": (1, 1_000_000),
    "store_outage_s": (1, 86_400),
    "outbox_bytes": (0, 1 << 40),
    "replay_retention_s": (60, 2_592_000),
    "queue_max": (40, 1_000_000),
    "deadline_ms": (50, 60_000),
    "redis_timeout_ms": (10, 10_000),
    "receive_timeout_ms": (100, 60_000),
    "drain_s": (1, 300),
    "token_lifetime_s": (60, 86_400),
}
# What else has to be set for a field's own bound to be the one that is met.
COMPANIONS = {
    ("deadline_ms", 50): {"redis_timeout_ms": "10"},
    ("replay_retention_s", 60): {"store_outage_s": "1"},
    ("redis_timeout_ms", 10_000): {"deadline_ms": "60000"},
    ("store_outage_s", 86_400): {"replay_retention_s": "2592000"},
}


def environment(**values: object) -> dict[str, str]:
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items()}


def test_every_number_has_a_bound() -> None:
    numbers = {field.name for field in msgspec.structs.fields(Settings) if type(field.default) is int}
    assert numbers == set(BOUNDS)


def test_exceptions_are_named_by_checks_alone() -> None:
    assert load({}).accepted == frozenset()
    assert load(environment(accept="version, appendfsync,")).accepted == {"version", "appendfsync"}
    with pytest.raises(Misconfigured) as refused:
        load(environment(accept="appendfsync,fsnyc"))
    assert "VOUCHERD_ACCEPT" in str(refused.value)
    assert "'fsnyc'" in str(refused.value)
    assert all(name in str(refused.value) for name in CHECKS), "the list of those that are"


@pytest.mark.parametrize(("said", "means"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_production_is_said_in_a_word(said: str, means: bool) -> None:
    assert load(environment(production=said)).production is means
    with pytest.raises(Misconfigured, match="VOUCHERD_PRODUCTION"):
        load(environment(production="perhaps"))


@pytest.mark.parametrize("said", ["two words", "a\nb", "a\x00", "ä", "a" * 65])
def test_who_types_is_one_word_of_a_log(said: str) -> None:
    assert load(environment(actor="alice@example.com")).actor == "alice@example.com"
    with pytest.raises(Misconfigured, match="VOUCHERD_ACTOR"):
        load(environment(actor=said))


def test_defaults_agree_with_each_other() -> None:
    assert load({}) == Settings().checked()


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items())
def test_the_bound_itself_is_accepted_and_one_past_it_is_not(name: str, bounds: tuple[int, int]) -> None:
    for value, past in zip(bounds, (bounds[0] - 1, bounds[1] + 1), strict=True):
        accepted = load(environment(**{name: value}, **COMPANIONS.get((name, value), {})))
        assert getattr(accepted, name) == value
        with pytest.raises(Misconfigured) as refused:
            load(environment(**{name: past}))
        assert f"{PREFIX}{name.upper()}" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "many", "1.5", "0x10", "١٢x", "1e3"])
def test_a_number_that_is_none_names_its_variable(text: str) -> None:
    with pytest.raises(Misconfigured, match="VOUCHERD_WORKERS"):
        load({"VOUCHERD_WORKERS": text})


def test_a_misspelt_variable_is_not_ignored() -> None:
    with pytest.raises(Misconfigured, match="VOUCHERD_WORKRES is not a setting"):
        load({"VOUCHERD_WORKRES": "2"})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("VOUCHERD_WORKRES", "VOUCHERD_WORKERS"), ("VOUCHERD_REDIS_URL_FIEL", "VOUCHERD_REDIS_URL_FILE"),
     ("VOUCHERD_STORE_PASWORD_FILE", "VOUCHERD_STORE_PASSWORD_FILE"), ("VOUCHERD_WORKERS_FILE", "VOUCHERD_WORKERS")],
)  # fmt: skip
def test_a_misspelt_variable_is_told_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(Misconfigured, match=f"^{typed} is not a setting of voucherd: is {meant} meant"):
        load({typed: "2"})


KNOWN = {f"{PREFIX}{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
# field -> what is refused because of it: its own text, or that of several
WRONG = {
    "redis_url": "http://elsewhere", "redis_password": {"redis_url": "redis://:a@h", "redis_password": "b"},
    "redis_ca_file": {"redis_url": "rediss://h", "redis_ca_file": "/nowhere.pem"},
    "store_url": "mysql://h/d", "store_password": "b",
    "store_ca_file": {"store_url": "postgresql+asyncpg://h/d", "store_ca_file": "/nowhere.pem"},
    "host": "192.0.2.1", "port": "tcp://10.0.0.1:8080", "tls_cert_file": "/nowhere.pem", "tls_key_file": "/nowhere.pem",
    "ops_host": "192.0.2.1", "ops_port": "65536", "work_ops_port": "-1", "secrets_file": "/nowhere.json",
    "issuer": "a b", "token_lifetime_s": "1", "scope_prefix": "a", "workers": "many", "planned_rate": "0",
    "store_outage_s": "0", "outbox_bytes": "1", "replay_retention_s": "100", "queue_max": "1", "deadline_ms": "1",
    "redis_timeout_ms": "2000", "receive_timeout_ms": "1", "drain_s": "0",
    "restart_in_place": {"restart_in_place": "true", "accept": "replicas"}, "production": "perhaps", "accept": "fsnyc",
    "log_format": "xml", "log_level": "loud", "actor": "two words", "otel": "perhaps",
}  # fmt: skip
# Refusals besides.
WRONG_TOO = (
    {"VOUCHERD_WORKRES": "2"}, {"VOUCHERD_NOTHING_LIKE_IT": "2"}, {"VOUCHERD_REDIS_PASWORD_FILE": "/run/secrets/x"},
    {"VOUCHERD_REDIS_URL": "redis://h", "VOUCHERD_REDIS_URL_FILE": "/run/secrets/x"},
    {"VOUCHERD_STORE_PASSWORD_FILE": "/nowhere"}, {"VOUCHERD_REDIS_URL": "redis://h", "VOUCHERD_REDIS_CA_FILE": "/x"},
    {"VOUCHERD_STORE_URL": "nonsense"}, {"VOUCHERD_STORE_URL": "postgresql+asyncpg://u:p@h:port/d"},
    {"VOUCHERD_STORE_URL": "sqlite+aiosqlite://"}, {"VOUCHERD_STORE_URL": "postgresql+asyncpg://h/d?sslrootcert=/x"},
    {"VOUCHERD_SECRETS_FILE": __file__},
)  # fmt: skip


def begin(given: dict[str, str]) -> None:
    """What a process makes of its settings before it speaks to anybody."""
    settings = load({"VOUCHERD_PORT": "0", "VOUCHERD_OPS_PORT": "0", **given})
    Database.connect(settings.store_url)
    keyring.named(settings.secrets_file)
    with listening(settings, "host", "port"), listening(settings, "ops_host", "ops_port"):
        pass


def test_every_setting_is_among_those_that_are_tried() -> None:
    assert list(WRONG) == [field.name for field in msgspec.structs.fields(Settings)]


@pytest.mark.parametrize(
    "given",
    [environment(**(wrong if isinstance(wrong, dict) else {name: wrong})) for name, wrong in WRONG.items()]
    + list(WRONG_TOO),
    ids=lambda given: ",".join(given),
)
def test_every_refusal_names_the_variable_the_problem_and_a_value_that_would_do(given: dict[str, str]) -> None:
    with pytest.raises(Misconfigured) as refused:
        begin(given)
    said = re.fullmatch(r"(VOUCHERD_\w+)\b.* .*; for example (VOUCHERD_\w+)=(.+)", str(refused.value))
    assert said is not None, refused.value
    _, named, example = said.groups()
    assert said[1] in given or said[1] == "VOUCHERD_TLS_CERT_FILE"  # it is what the key lacks
    corrected = {**given, named: example} if said[1] in KNOWN else {named: example}
    if not re.search(r"/x|/run/|/etc/", str(corrected)):  # files that are not there
        Database.connect(load(corrected).store_url)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.EADDRINUSE, "Address in use"), "VOUCHERD_OPS_PORT=8081: port 8081 of 127.0.0.1 is in use"),
        (OSError(errno.EACCES, "Permission denied"), "VOUCHERD_OPS_PORT=8081: port 8081 of 127.0.0.1 may not be"),
        (OSError(errno.EADDRNOTAVAIL, "Not available"), "VOUCHERD_OPS_HOST='127.0.0.1': this machine can't listen"),
        (socket.gaierror(socket.EAI_NONAME, "Not known"), "VOUCHERD_OPS_HOST='127.0.0.1': this machine can't listen"),
        (UnicodeError("label too long"), "VOUCHERD_OPS_HOST='127.0.0.1': is no name of a machine"),
    ],
)
def test_a_port_is_named_only_if_another_one_would_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, named: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("socket.create_server", fail)
    with pytest.raises(Misconfigured, match=re.escape(named)), listening(Settings(), "ops_host", "ops_port"):
        pass


def test_what_others_set_is_not_our_business() -> None:
    assert load({"PATH": "/bin", "REDIS_URL": "redis://elsewhere"}) == Settings()


def test_a_script_may_not_outlast_the_request() -> None:
    with pytest.raises(Misconfigured, match="VOUCHERD_REDIS_TIMEOUT_MS.*VOUCHERD_DEADLINE_MS"):
        load(environment(redis_timeout_ms=2_000, deadline_ms=2_000))


def test_a_replay_record_may_not_expire_before_its_outbox_entry() -> None:
    with pytest.raises(Misconfigured, match="VOUCHERD_REPLAY_RETENTION_S.*VOUCHERD_STORE_OUTAGE_S"):
        load(environment(replay_retention_s=119, store_outage_s=60))
    assert load(environment(replay_retention_s=120, store_outage_s=60)).replay_retention_s == 120


def test_an_argument_wins_over_the_environment_and_none_is_no_argument() -> None:
    assert load(environment(port=9_000), port=9_001).port == 9_001
    assert load(environment(port=9_000), port=None).port == 9_000


def test_an_argument_past_its_bound_is_refused_by_name() -> None:
    with pytest.raises(Misconfigured, match="workers"):
        load({}, workers=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("issuer", ""), ("issuer", "x" * 201), ("issuer", "a b"), ("issuer", "a\n"), ("scope_prefix", "a"),
     ("scope_prefix", "x" * 65 + "/"), ("scope_prefix", "a b/"), ("scope_prefix", "a/\n")],
)  # fmt: skip
def test_what_would_make_every_access_token_unusable_is_refused(name: str, value: str) -> None:
    with pytest.raises(Misconfigured, match=f"VOUCHERD_{name.upper()}"):
        load(environment(**{name: value}))


def test_outbox_bytes_are_never_the_first_bound_by_far() -> None:
    assert load({}).outbox_bytes_max == 1_024 * load({}).outbox_max
    assert load(environment(outbox_bytes=1_024 * 50 * 60)).outbox_bytes_max == 1_024 * 50 * 60
    with pytest.raises(Misconfigured, match="VOUCHERD_OUTBOX_BYTES=3071999: must be 0 or at least 3,072,000"):
        load(environment(outbox_bytes=1_024 * 50 * 60 - 1))


def test_windows_and_outbox_never_cover_less_than_the_promise() -> None:
    small, large = load(environment(planned_rate=1, store_outage_s=1)), load(environment(planned_rate=1_000))
    assert (small.low_water, small.outbox_max) == (20, 10_000)
    assert large.low_water == 60_000
    assert large.outbox_max >= 60_000


# --- secrets

ODD = "p@ss/w:o#r?d%41+ é"
HIDDEN = "s3cr3t"


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_secret_in_a_file_is_the_one_of_its_variable(tmp_path: Path, ending: str) -> None:
    for name in SECRETS:
        value = {"redis_url": "redis://:a%20b@h:1/2", "store_url": "postgresql+asyncpg://u:a@h/d"}.get(name, ODD)
        around = {"redis_password": {"redis_url": "redis://u@h:1/2"}, "store_password": STORE}.get(name, {})
        (tmp_path / name).write_bytes((value + ending).encode())
        by_file = load({**environment(**around), f"{PREFIX}{name.upper()}_FILE": str(tmp_path / name)})
        assert by_file == load(environment(**around, **{name: value})) != Settings()


STORE = {"store_url": "postgresql+asyncpg://voucherd@db.internal:5432/voucherd"}


def test_a_password_by_itself_gets_into_the_url_as_it_is() -> None:
    settings = load(environment(redis_url="rediss://u@h:1/2?db=3", redis_password=ODD, store_password=ODD, **STORE))
    assert parse_url(settings.redis_url)["password"] == ODD
    assert parse_url(settings.redis_url)["username"] == "u"
    assert parse_url(settings.redis_url)["host"] == "h"
    assert parse_url(settings.redis_url)["db"] == 3
    assert make_url(settings.store_url).password == ODD
    assert make_url(settings.store_url).host == "db.internal"
    assert (settings.redis_password, settings.store_password) == ("", ""), "one place to keep it out of logs"
    assert settings.checked() == settings


def test_a_file_of_a_secret_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    missing, empty, long, lines, binary = (tmp_path / name for name in ("missing", "empty", "long", "lines", "binary"))
    empty.write_text("\n")
    long.write_text("x" * (SECRET_BYTES_MAX + 1))
    lines.write_text(f"{HIDDEN}\n{HIDDEN}\n")
    binary.write_bytes(HIDDEN.encode() + b"\xff")
    for path in (missing, empty, long, lines, binary, tmp_path):
        with pytest.raises(Misconfigured, match=rf"^VOUCHERD_REDIS_PASSWORD_FILE='{path}'.*; for example") as refused:
            load({"VOUCHERD_REDIS_PASSWORD_FILE": str(path)})
        assert HIDDEN not in str(refused.value)


def test_a_secret_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://elsewhere")
    with pytest.raises(Misconfigured, match="VOUCHERD_REDIS_URL_FILE and VOUCHERD_REDIS_URL are both set"):
        load({**environment(redis_url="redis://h"), "VOUCHERD_REDIS_URL_FILE": str(tmp_path / "url")})
    with pytest.raises(Misconfigured, match="VOUCHERD_REDIS_URL has a password too"):
        load(environment(redis_url=f"redis://:{HIDDEN}@h", redis_password=HIDDEN))


@pytest.mark.parametrize(
    "url",
    [f"redis://:{HIDDEN}/x@host:6379/0", f"redis://:x/{HIDDEN}@host", f"redis://:x#{HIDDEN}@host", f"redis://:1/{HIDDEN}@h",
     f"redis://:x?{HIDDEN}@host", f"http://:{HIDDEN}@host", f"redis://:{HIDDEN}@host:port/0", f"redis://[{HIDDEN}",
     f"redis://:{HIDDEN}@host/zero", f"redis://:{HIDDEN}@", f"redis://:{HIDDEN}@h:0", f"{HIDDEN}", f"redis:{HIDDEN}"],
)  # fmt: skip
def test_a_url_that_can_not_be_read_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(
        Misconfigured, match=r"^VOUCHERD_REDIS_URL: .*; for example VOUCHERD_REDIS_URL=rediss://"
    ) as refused:
        load(environment(redis_url=url))
    assert HIDDEN not in str(refused.value)
    with pytest.raises(Misconfigured) as refused:
        load(environment(store_url=url, store_password="x"))
    assert HIDDEN not in str(refused.value)


def test_a_password_of_the_environment_is_not_that_of_another_server() -> None:
    given = environment(redis_url="redis://u@h", redis_password="a", **STORE, store_password="b")
    settings = load(given, redis_url="redis://:own@127.0.0.1:1/0", store_url="sqlite+aiosqlite:////d/voucherd.db")
    assert (settings.redis_url, settings.store_url) == (
        "redis://:own@127.0.0.1:1/0",
        "sqlite+aiosqlite:////d/voucherd.db",
    )
    with pytest.raises(Misconfigured, match="VOUCHERD_STORE_PASSWORD is set, and VOUCHERD_STORE_URL names no server"):
        load(environment(store_password="b"))


# --- certificates


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_an_authority_gets_into_the_url_and_only_with_tls(authority: Authority) -> None:
    path = str(authority.file)
    settings = load(environment(redis_url="rediss://h?db=1", redis_ca_file=path, store_ca_file=path, **STORE))
    assert parse_url(settings.redis_url)["ssl_ca_certs"] == path
    assert make_url(settings.store_url).query["sslrootcert"] == path
    with pytest.raises(Misconfigured, match="VOUCHERD_REDIS_CA_FILE is set.*for example VOUCHERD_REDIS_URL=rediss://"):
        load(environment(redis_url="redis://h", redis_ca_file=path))
    with pytest.raises(Misconfigured, match="VOUCHERD_STORE_CA_FILE is set, and VOUCHERD_STORE_URL names no server"):
        load(environment(store_ca_file=path))


def test_files_of_certificates_that_can_not_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.certificate("one")
    _, other = authority.certificate("another")
    locked = authority.locked(key)
    assert load(environment(tls_cert_file=certificate, tls_key_file=key)).tls_key_file == str(key)
    for cert_file, key_file, named in (
        (certificate, "", "TLS_KEY_FILE"), ("", key, "TLS_CERT_FILE"), (tmp_path / "no", key, "TLS_CERT_FILE"),
        (certificate, tmp_path / "no", "TLS_KEY_FILE"), (certificate, other, "TLS_KEY_FILE"),
        (key, certificate, "TLS_KEY_FILE"), (certificate, locked, "TLS_KEY_FILE"),
    ):  # fmt: skip
        with pytest.raises(Misconfigured, match=f"^VOUCHERD_{named}='.*; for example VOUCHERD_{named}=/"):
            load(environment(tls_cert_file=cert_file, tls_key_file=key_file))
    for path in (key, tmp_path / "no"):
        with pytest.raises(Misconfigured, match="^VOUCHERD_REDIS_CA_FILE='.*; for example"):
            load(environment(redis_url="rediss://h", redis_ca_file=path))


def test_a_data_directory_that_was_never_started_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="voucherd up --data-dir"):
        in_data_dir(tmp_path)


def test_a_data_directory_points_at_its_own_servers(tmp_path: Path) -> None:
    urls = {"redis_url": "redis://:secret@127.0.0.1:20001/0", "store_url": "sqlite+aiosqlite:////d/voucherd.db"}
    for planned, rate in (({}, 70), ({"planned_rate": 5}, 5)):
        (tmp_path / "connection.json").write_bytes(msgspec.json.encode({**urls, **planned}))
        settings = load(environment(redis_url="redis://elsewhere", planned_rate=70), **in_data_dir(tmp_path))
        assert (settings.redis_url, settings.store_url) == (urls["redis_url"], urls["store_url"])
        assert settings.planned_rate == rate
