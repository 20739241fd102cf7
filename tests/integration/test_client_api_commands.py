"""The commands of Client API v3 through the real command line, on both stores: products, clients, keys."""

from __future__ import annotations

import json
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service import keyring
from service.catalogue import Cap
from service.settings import TOKEN_LIFETIME_S_MAX
from service.store import schema
from service.tokens import SECRET_PREFIX, digest, well_formed
from tests.integration.stage import Stage
from tests.integration.test_control_commands import fits, shown
from tests.integration.typed import OnStage, fence, ok, refused, run, snapshot

PLAIN = ("--name", "Gift", "--amount", "1000", "--currency", "SGD", "--url", "https://v.example/")


# --- products


def test_a_product_has_all_that_was_said_of_it_and_is_in_force_when_made(store: OnStage) -> None:
    ok("distributor", "create", "D")
    ok(
        "product", "create", "GIFT", *PLAIN, "--multiple-use", "--no-status", "--expires", "12 months", "--from",
        "2026-01-01", "--until", "2030-12-31", "--time-zone", "Asia/Singapore", "--cap", "day=100", "--short-url",
        "https://s.example/", "--description", "A gift", "--image", "https://i.example/x.png", "--terms", "None.",
    )  # fmt: skip
    ok("product", "assign", "GIFT", "D", "--cap", "total=5")
    told = shown("product", "show", "GIFT")
    assert told == {
        "product_code": "GIFT", "state": "running", "version": store(snapshot).version,
        "name": "Gift", "description": "A gift", "is_value_based": True,
        "is_open_value": False, "is_status_available": False, "is_multiple_use": True, "currency": "SGD",
        "amount": 1000, "expiry_scheme": "12 months from issuance", "valid_from": "2026-01-01T00:00:00+08:00",
        "valid_until": "2030-12-31T23:59:59+08:00", "time_zone": "Asia/Singapore", "url": "https://v.example/",
        "short_url": "https://s.example/", "image": "https://i.example/x.png", "terms_and_conditions": "None.",
        "pool": "GIFT", "unlimited": False, "paused": False, "caps": ["campaign:day=100"], "distributors": ["D"],
    }  # fmt: skip
    found = store(snapshot)
    (product,), (campaign,) = found.products, found.campaigns
    assert (product.code, product.terms.expiry, campaign.id, campaign.products) == ("GIFT", "months:12", "GIFT", ())
    assert campaign.assigned == {"D": (Cap("distributor", "total", 5),)}
    here, newest = store(fence)
    assert here == newest
    assert "GIFT" in fits("product", "list")
    assert "Gift" in fits("product", "show", "GIFT")
    assert shown("campaign", "list") == []  # it is no campaign that a terminal's sale could lead to
    refused(
        "campaign", "show", "GIFT", says="there is no campaign GIFT, but a product: see `voucherd product show GIFT`"
    )


def test_products_share_a_pool_with_each_other_and_with_campaigns(store: OnStage) -> None:
    ok("pool", "create", "SHARED", "--expires", "2040-01-01")
    ok("campaign", "create", "CAMP", "--category", "PAY", "--product", "PAY", "--pool", "SHARED")
    for code in ("ONE", "TWO"):
        ok("product", "create", code, *PLAIN, "--pool", "SHARED")
    assert {campaign.pool for campaign in store(snapshot).campaigns} == {"SHARED"}
    assert [one["pool"] for one in shown("pool", "list")] == ["SHARED"]


BAD: list[tuple[tuple[str, ...], str]] = [
    (("--name", "x", "--url", "https://v/", "--currency", "SGD"), "worth 1 to"),
    (("--name", "x", "--url", "https://v/", "--amount", "5", "--currency", "sgd"), "three capital letters"),
    (("--name", "x", "--url", "https://v/", "--open-value"), "needs a currency"),
    (("--name", "x", "--url", "https://v/", "--open-value", "--currency", "SGD", "--amount", "5"), "has no amount"),
    (("--name", "${FV}", "--url", "https://v/", "--amount", "5"), "only open-value products"),
    (("--name", "", "--url", "https://v/", "--amount", "5"), "1 to 200 printable"),
    (("--name", "a\tb", "--url", "https://v/", "--amount", "5"), "1 to 200 printable"),
    (("--name", "x" * 201, "--url", "https://v/", "--amount", "5"), "1 to 200 printable"),
    (("--name", "x", "--url", "ftp://v/", "--amount", "5"), "http or https"),
    (("--name", "x", "--url", "", "--amount", "5"), "http or https"),
    ((*PLAIN, "--image", "x"), "http or https"),
    ((*PLAIN, "--short-url", "x y"), "http or https"),
    ((*PLAIN, "--expires", "99999 days"), "up to 36500 days"),
    ((*PLAIN, "--expires", "0 days"), "up to 36500 days"),
    ((*PLAIN, "--expires", "2001-01-01"), "can't expire in the past: 2001-01-01T23:59:59Z is over"),
    ((*PLAIN, "--description", "x" * 10_001), "at most 10,000"),
    ((*PLAIN, "--description", "caf\udce9"), "description is not text: it has to be UTF-8"),
    ((*PLAIN, "--terms", "caf\udce9"), "terms and conditions is not text: it has to be UTF-8"),
    ((*PLAIN, "--expiry-scheme", "caf\udce9"), "expiry scheme is not text: it has to be UTF-8"),
    ((*PLAIN, "--terms", "a\0b"), "without NUL"),
    (("--name", "caf\udce9", "--url", "https://v/", "--amount", "5"), "1 to 200 printable"),
    ((*PLAIN, "--pool", "NONE"), "no pool NONE"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_a_product_that_breaks_a_rule_is_not_made(store: OnStage, options: tuple[str, ...], says: str) -> None:
    refused("product", "create", "GIFT", *options, says=says)
    found = store(snapshot)
    assert (found.products, found.campaigns, found.pools) == ((), (), ())


@pytest.mark.parametrize("code", ["a b", "", "x" * 65, "caf\udce9"])
def test_a_name_that_is_none_is_told_of_what_it_was_to_name(store: OnStage, code: str) -> None:
    for pool in ((), ("--pool", "POOL")):
        refused("product", "create", code, *PLAIN, *pool, says="can't name a product: 1 to 64")
        plain = ("--category", "C", "--product", "P")
        refused("campaign", "create", code, *plain, *pool, says="can't name a campaign: 1 to 64")


@pytest.mark.parametrize("expires", ["12", "soon", "1 week", "2029-02-30", "-1 days", "1.5 years"])
def test_an_expiry_that_is_none_is_typed_wrong(store: OnStage, expires: str) -> None:
    assert run("product", "create", "GIFT", *PLAIN, "--expires", expires).exit_code == 2


def test_a_product_and_a_campaign_can_t_have_one_name(store: OnStage) -> None:
    ok("campaign", "create", "TAKEN", "--category", "PAY", "--product", "PAY")
    refused("product", "create", "TAKEN", *PLAIN, "--pool", "TAKEN", says="exists already")
    ok("product", "create", "GIFT", *PLAIN)
    refused("product", "create", "GIFT", *PLAIN, "--pool", "GIFT", says="exists already")
    refused(
        "campaign", "create", "GIFT", "--category", "PAY", "--product", "PAY", "--pool", "GIFT", says="exists already"
    )


def test_a_change_changes_that_alone_and_nobody_s_change_is_lost(store: OnStage) -> None:
    ok("product", "create", "GIFT", *PLAIN, "--description", "old")
    told = " ".join(ok("product", "show", "GIFT").stdout.split())
    assert "Nobody may issue it: `voucherd product assign GIFT DISTRIBUTOR`." in told
    before = shown("product", "show", "GIFT")
    version = before["version"]
    ok("product", "change", "GIFT", "--name", "Other", "--expires", "2030-01-31", "--if-version", str(version))
    after = shown("product", "show", "GIFT")
    assert after == {
        **before, "version": version + 1, "name": "Other", "expiry_scheme": "until 2030-01-31",
    }  # fmt: skip
    refused(
        "product", "change", "GIFT", "--name", "Lost", "--if-version", str(version),
        says=f"product GIFT is at version {version + 1}, not at {version}: nothing was changed; "
        "look at it again with `voucherd product show GIFT`",
    )  # fmt: skip
    refused("product", "change", "GIFT", "--url", "nowhere", says="http or https")
    refused("product", "change", "GIFT", "--description", "caf\udce9", says="description is not text")
    refused("product", "change", "NONE", "--name", "x", says="no product NONE")
    refused("product", "change", "GIFT", "--expires", "2001-01-01", says="can't expire in the past")
    assert shown("product", "show", "GIFT") == after
    assert run("product", "change", "GIFT").exit_code == 2


def test_an_expiry_is_taken_in_the_words_in_which_it_is_shown(store: OnStage) -> None:
    ok("product", "create", "GIFT", *PLAIN)
    for typed, stored in (("2090-01-31", "until:3789590399"), ("1 year", "years:1"), ("as the code", "")):
        ok("product", "change", "GIFT", "--expires", typed)
        words = shown("product", "show", "GIFT")["expiry_scheme"]
        ok("product", "change", "GIFT", "--expires", words)
        assert store(snapshot).products[0].terms.expiry == stored
        assert shown("product", "show", "GIFT")["expiry_scheme"] == words


def test_a_product_that_is_over_is_not_changed(store: OnStage) -> None:
    ok("product", "create", "GIFT", *PLAIN)
    ok("product", "end", "GIFT")
    before = store(snapshot)
    refused("product", "change", "GIFT", "--name", "Late", says="product GIFT is over since ")
    assert store(snapshot) == before


def test_a_product_whose_vouchers_would_expire_at_once_still_says_other_things(store: OnStage) -> None:
    ok("product", "create", "GIFT", *PLAIN, "--expires", "2090-01-31")

    async def age(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(schema.products.update().values(expiry="until:5"))

    store(age)
    ok("product", "change", "GIFT", "--name", "Other")
    assert shown("product", "show", "GIFT")["name"] == "Other"


def test_the_version_is_that_of_the_product_whatever_of_it_was_changed_and_shown_as_it_is_typed(store: OnStage) -> None:
    ok("product", "create", "GIFT", *PLAIN)
    ok("product", "create", "OTHER", *PLAIN)

    async def age(stage: Stage) -> None:  # a thousand is where tables begin to separate digits
        async with stage.database.write() as conn:
            await conn.execute(schema.catalogue_head.update().values(version=1_233))

    store(age)
    for typed in (("change", "GIFT", "--name", "New"), ("pause", "GIFT"), ("cap", "GIFT", "day=7")):
        version = shown("product", "show", "GIFT")["version"]
        ok("product", *typed, "--if-version", str(version))
        assert shown("product", "show", "GIFT")["version"] == store(snapshot).version > version
    told = [line.split() for line in fits("product", "show", "GIFT").splitlines()]
    assert ["version", "1236"] in told
    assert ["state", "paused"] in told


def test_a_product_s_state_is_what_time_and_operators_say_of_it(store: OnStage) -> None:
    ok("product", "create", "LATER", *PLAIN, "--from", "2090-01-01")
    for code in ("OVER", "PAUSED", "RUNNING"):
        ok("product", "create", code, *PLAIN)
    ok("product", "end", "OVER")
    ok("product", "pause", "PAUSED")
    states = {"LATER": "not yet", "OVER": "over", "PAUSED": "paused", "RUNNING": "running"}
    assert {one["product_code"]: one["state"] for one in shown("product", "list")} == states
    assert {code: shown("product", "show", code)["state"] for code in states} == states
    listed = fits("product", "list").splitlines()
    for code, state in states.items():
        assert any(code in line and state in line for line in listed)


def test_pause_resume_cap_end_and_unassign_work_on_a_product(store: OnStage) -> None:
    ok("distributor", "create", "D")
    ok("product", "create", "GIFT", *PLAIN)
    ok("product", "assign", "GIFT", "D")
    ok("product", "cap", "GIFT", "day=7")
    ok("product", "pause", "GIFT")
    assert (shown("product", "show", "GIFT")["paused"], shown("product", "show", "GIFT")["caps"]) == (
        True, ["campaign:day=7"],
    )  # fmt: skip
    ok("product", "resume", "GIFT")
    ok("product", "unassign", "GIFT", "D")
    ok("product", "end", "GIFT")
    told = shown("product", "show", "GIFT")
    assert (told["paused"], told["distributors"], bool(told["valid_until"])) == (False, [], True)
    refused("product", "show", "NONE", says="no product NONE")


CHANGES = (("assign", "D"), ("unassign", "D"), ("cap", "day=1"), ("pause",), ("resume",), ("end",))


def test_no_command_of_one_noun_changes_what_is_of_the_other(store: OnStage) -> None:
    ok("distributor", "create", "D")
    ok("product", "create", "GIFT", *PLAIN)
    ok("product", "assign", "GIFT", "D")
    ok("campaign", "create", "CAMP", "--category", "PAY", "--product", "PAY")
    ok("campaign", "assign", "CAMP", "D")
    before = store(snapshot)
    for command, *more in CHANGES:
        refused(
            "campaign", command, "GIFT", *more,
            says="there is no campaign GIFT, but a product: see `voucherd product show GIFT`",
        )  # fmt: skip
        refused(
            "product", command, "CAMP", *more,
            says="there is no product CAMP, but a campaign: see `voucherd campaign show CAMP`",
        )  # fmt: skip
        refused("product", command, "NONE", *more, says="there is no product NONE: create it first")
    refused("product", "change", "CAMP", "--name", "x", says="there is no product CAMP, but a campaign")
    refused("product", "show", "CAMP", says="there is no product CAMP, but a campaign")
    assert store(snapshot) == before


def test_what_is_said_of_a_product_calls_it_one(store: OnStage) -> None:
    ok("distributor", "create", "D")
    ok("distributor", "create", "E")
    ok("product", "create", "GIFT", *PLAIN)
    said = {
        ("assign", "GIFT", "D", "--cap", "day=2"): "D may issue product GIFT, caps: distributor:day=2\n",
        ("cap", "GIFT", "D", "day=3"): "caps of D in product GIFT: distributor:day=3\n",
        ("cap", "GIFT", "day=9"): "caps of product GIFT: campaign:day=9\n",
        ("pause", "GIFT"): "product GIFT is paused\n",
        ("resume", "GIFT"): "product GIFT goes on\n",
        ("unassign", "GIFT", "D"): "D may not issue product GIFT any more; its caps there are gone\n",
    }
    for typed, says in said.items():
        assert ok("product", *typed).stdout == says
    refused("product", "unassign", "GIFT", "E", says="distributor E is not assigned to product GIFT")
    refused("product", "cap", "GIFT", "day=9999999999999999", says="a cap of product GIFT has to lie within")
    assert ok("product", "end", "GIFT").stdout.startswith("product GIFT is over since ")
    refused("product", "resume", "GIFT", says="product GIFT is over since ")

    async def logged(stage: Stage) -> list[str]:
        async with stage.database.read() as conn:
            made = select(schema.audit_log.c.action).where(schema.audit_log.c.refused.is_(False))
            return list(await conn.scalars(made.order_by(schema.audit_log.c.id)))

    assert store(logged)[-6:] == [f"product {one}" for one in ("cap", "cap", "pause", "resume", "unassign", "end")]


# --- clients


def test_a_client_s_secret_is_shown_once_and_kept_as_a_digest(store: OnStage) -> None:
    ok("distributor", "create", "D")
    made = ok("client", "create", "C", "--distributor", "D", "--scope", "read_vouchers", "--scope", "issue_vouchers")
    secret = made.stdout.strip()
    assert well_formed(secret, SECRET_PREFIX)
    client = store(snapshot).clients["C"]
    assert (client.distributor, client.secret_sha256, client.scopes, client.active) == (
        "D", digest(secret), ("issue_vouchers", "read_vouchers"), True,
    )  # fmt: skip
    rotated = json.loads(ok("client", "rotate-secret", "C", "--json").stdout)
    assert store(snapshot).clients["C"].secret_sha256 == digest(rotated["client_secret"]) != digest(secret)
    listed = ok("client", "list", "--json").stdout
    assert secret not in listed
    assert rotated["client_secret"] not in listed
    [one] = json.loads(listed)
    assert (one["client_id"], one["active"], bool(one["rotated_at"])) == ("C", True, True)
    assert "C" in fits("client", "list")


def test_a_suspended_client_is_out_of_force_when_the_command_returns(store: OnStage) -> None:
    ok("distributor", "create", "D")
    ok("client", "create", "C", "--distributor", "D")
    ok("client", "suspend", "C")
    assert not store(snapshot).clients["C"].active
    here, newest = store(fence)
    assert here == newest
    ok("client", "resume", "C")
    assert store(snapshot).clients["C"].active


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("create", "C", "--distributor", "NONE"), "no distributor NONE"),
        (("create", "a b", "--distributor", "D"), "can't name a client"),
        (("create", "C", "--distributor", "D", "--scope", "everything"), "is no scope"),
        (("create", "TWICE", "--distributor", "D"), "exists already"),
        (("rotate-secret", "NONE"), "no client NONE"),
        (("suspend", "NONE"), "no client NONE"),
        (("resume", "NONE"), "no client NONE"),
    ],
)
def test_what_can_t_be_done_to_a_client_is_refused_in_one_line(
    store: OnStage, typed: tuple[str, ...], says: str
) -> None:
    ok("distributor", "create", "D")
    ok("client", "create", "TWICE", "--distributor", "D")
    refused("client", *typed, says=says)
    assert list(store(snapshot).clients) == ["TWICE"]


# --- keys


@pytest.fixture
def secrets_file(store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "secrets.json"
    ok("keys", "create", str(file))
    monkeypatch.setenv("VOUCHERD_SECRETS_FILE", str(file))
    return file


def test_the_secrets_file_is_its_owner_s_alone_and_never_replaced(store: OnStage, secrets_file: Path) -> None:
    assert stat.S_IMODE(secrets_file.stat().st_mode) == 0o600
    before = secrets_file.read_bytes()
    refused("keys", "create", str(secrets_file), says="is there already")
    assert secrets_file.read_bytes() == before
    assert keyring.load(secrets_file).ids.current == "k1"


def test_rotated_keys_overlap_and_what_verifies_no_more_is_gone(store: OnStage, secrets_file: Path) -> None:
    ok("keys", "rotate")
    [first] = shown("keys", "list")
    assert first["verifies_until"] is None
    ok("keys", "rotate")
    second, old = shown("keys", "list")
    assert (second["verifies_until"], old["kid"]) == (None, first["kid"])
    # For as long as any setting lets a token last: this command's is not that of the processes that signed.
    until, made = (datetime.fromisoformat(at) for at in (old["verifies_until"], second["made_at"]))
    assert (until - made).total_seconds() >= TOKEN_LIFETIME_S_MAX
    signing = {key.kid: key for key in store(snapshot).signing_keys}
    ring = keyring.load(secrets_file)
    for key in signing.values():
        assert b"PRIVATE KEY" in ring.unseal(key.sealed, keyring.purpose_of(key.kid))
        assert set(json.loads(key.public)) == {"kty", "use", "alg", "kid", "n", "e"}
    refused("keys", "revoke", second["kid"], says="the key that signs")
    ok("keys", "revoke", old["kid"])
    assert [one["kid"] for one in shown("keys", "list")] == [second["kid"]]
    refused("keys", "revoke", old["kid"], says="no signing key")

    async def age(stage: Stage) -> None:
        async with stage.database.write() as conn:
            await conn.execute(schema.signing_keys.update().values(verifies_until=5))

    store(age)
    assert "1 that verify no more" in ok("keys", "rotate").stdout
    assert len(shown("keys", "list")) == 1
    assert "signs" in fits("keys", "list")


def test_no_private_key_is_in_the_store(store: OnStage, secrets_file: Path) -> None:
    ok("keys", "rotate")

    async def held(stage: Stage) -> str:
        async with stage.database.read() as conn:
            row = (await conn.execute(select(schema.signing_keys))).one()
            blobs = list(await conn.scalars(select(schema.catalogue_versions.c.snapshot)))
            log = list(await conn.scalars(select(schema.audit_log.c.detail)))
        return f"{row.public}{row.sealed}{blobs}{log}"

    assert "PRIVATE" not in store(held)
    assert '"d"' not in store(held)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read"),
        (b"", "is no secrets file"),
        (b"{}", "is no secrets file"),
        (b'{"id_key":"k2","id_keys":{"k1":"' + b"A" * 43 + b'="},"sealing_key":"' + b"A" * 43 + b'="}', "no id key k2"),
        (b'{"id_key":"k1","id_keys":{"k1":"AAAA"},"sealing_key":"' + b"A" * 43 + b'="}', "32 to 64 bytes"),
        (b'{"id_key":"k1","id_keys":{"k1":"' + b"A" * 43 + b'="},"sealing_key":"AAAA"}', "has 32 bytes"),
    ],
)
def test_a_secrets_file_that_can_t_be_used_is_told_without_what_it_holds(
    store: OnStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, says: str
) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("VOUCHERD_SECRETS_FILE", str(file))
    refused("keys", "rotate", says=says)
    assert "AAAA" not in run("keys", "rotate").output


def test_without_a_secrets_file_it_is_said_how_to_make_one(store: OnStage) -> None:
    refused("keys", "rotate", says="voucherd keys create FILE")


def test_keys_of_another_secrets_file_can_t_be_opened(store: OnStage, secrets_file: Path, tmp_path: Path) -> None:
    ok("keys", "rotate")
    other = tmp_path / "other.json"
    ok("keys", "create", str(other))
    key = store(snapshot).signing_keys[0]
    with pytest.raises(keyring.Misconfigured, match="another secrets file"):
        keyring.load(other).unseal(key.sealed, keyring.purpose_of(key.kid))
    found: Any = keyring.load(secrets_file)
    with pytest.raises(keyring.Misconfigured):
        found.unseal(key.sealed, "something else")
