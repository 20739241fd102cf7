"""The service does what /openapi.json says: schemathesis over both APIs, with real tokens; and /docs in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from tests.acceptance.test_client_api import Shop, secrets_file, shop
from tests.acceptance.test_up import environment

__all__ = ["secrets_file", "shop"]

pytestmark = pytest.mark.parametrize("running", ["sqlite"], indirect=True)  # what is said is the same on both stores

EXAMPLES = 30  # for each operation
TOKEN_EXAMPLES = 10  # the answer to a client that fails again and again waits up to four seconds
SECONDS_MAX = 300

# Bodies that fit the schema may still be refused: a fixed product takes no face value, a key is used once.
CHECKS = ("--exclude-checks", "positive_data_acceptance")


def schemathesis(shop: Shop, tmp_path: Path, paths: str, seed: int, *headers: str, examples: int = EXAMPLES) -> str:
    """What a run over these paths printed; the test fails unless it found nothing."""
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{shop.base_url}/openapi.json", "--url", shop.base_url,
            "--include-path-regex", paths, "--max-examples", str(examples), "--seed", str(seed), "--no-color",
            *CHECKS, *(part for header in headers for part in ("-H", header)),
        ],
        cwd=tmp_path, env=environment(checkout=True), capture_output=True, text=True, timeout=SECONDS_MAX,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_client_api_v3_does_what_its_document_says(shop: Shop, tmp_path: Path, seed: int) -> None:
    code = shop.product("MADE", 5_000)
    token = await shop.token()
    assert (await shop.post(code, str(uuid.uuid4()), token, quantity=1)).status_code == 200
    printed = schemathesis(shop, tmp_path, "^/v3/", seed, f"Authorization: Bearer {token}")
    assert "Operations:       5 selected" in printed
    await shop.service.audit()


def test_the_token_endpoint_does_what_its_document_says(shop: Shop, tmp_path: Path, seed: int) -> None:
    printed = schemathesis(shop, tmp_path, "^/(oauth2|.well-known)/", seed, examples=TOKEN_EXAMPLES)
    assert "Operations:       2 selected" in printed


async def test_the_voucher_request_api_does_what_its_document_says(shop: Shop, tmp_path: Path, seed: int) -> None:
    await shop.service.furnish(500)
    printed = schemathesis(shop, tmp_path, "^/api/", seed, f"Authorization: Bearer {shop.service.token}")
    assert "Operations:       1 selected" in printed
    await shop.service.audit()


def test_docs_are_whole_and_name_no_other_host(shop: Shop) -> None:
    with httpx.Client(base_url=shop.base_url, trust_env=False) as http:
        page = http.get("/docs")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http" not in page.text
        for asset in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
            assert f"/docs/assets/{asset}" in page.text
            assert http.get(f"/docs/assets/{asset}").status_code == 200
        assert http.get("/docs/assets/../v1.py").status_code == 404
        described = http.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    assert {one["tags"][0] for path in described["paths"].values() for one in path.values()} == {
        "Voucher Request API", "Client API v3",
    }  # fmt: skip


NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
def test_docs_show_both_apis_in_a_browser_and_no_request_leaves_the_machine(shop: Shop, tmp_path: Path) -> None:
    assert BROWSER is not None
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-default-apps",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=20000",
            "--dump-dom", f"{shop.base_url}/docs",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (
        "Voucher Request API",
        "Client API v3",
        "/api/v1/voucher/request",
        "/v3/products/{code}",
        "/oauth2/token",
    ):
        assert text in done.stdout.replace("\u200b", ""), text
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What the browser asks for on its own account (its updates, say) has no page for an initiator, and finds no host.
    asked = {event["url"] for event in events if event.get("initiator") == shop.base_url}
    assert f"{shop.base_url}/openapi.json" in asked
    assert {url for url in asked if not url.startswith(shop.base_url)} == set()
