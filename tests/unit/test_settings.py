"""Settings: every bound holds, and whatever is wrong names its variable in one line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from service.checks import CHECKS
from service.errors import Misconfigured
from service.settings import PREFIX, Settings, in_data_dir, load

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
    with pytest.raises(Misconfigured, match="VOUCHERD_OUTBOX_BYTES must be 0 or at least 3,072,000"):
        load(environment(outbox_bytes=1_024 * 50 * 60 - 1))


def test_windows_and_outbox_never_cover_less_than_the_promise() -> None:
    small, large = load(environment(planned_rate=1, store_outage_s=1)), load(environment(planned_rate=1_000))
    assert (small.low_water, small.outbox_max) == (20, 10_000)
    assert large.low_water == 60_000
    assert large.outbox_max >= 60_000


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
