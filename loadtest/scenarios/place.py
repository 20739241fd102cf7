"""Where a load test is run: a service of its own or one that runs already, and what an operator does there."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtest import contenders
from loadtest.processes import module, wait_for
from loadtest.scenarios.outcome import Issued
from loadtest.scenarios.plan import Seller
from loadtest.scenarios.record import digest
from loadtest.scenarios.scenario import Scenario

SETTLE_S_MAX: Final = 120.0  # for the worker to have written to the ledger what was issued
COMMAND_S_MAX: Final = 600.0  # an audit reads the whole ledger
EXPIRES: Final = "2040-01-01"
# Of a service of its own: windows hold so many seconds of the largest load, so that refills are part of the test.
OUTAGE_S: Final = 10


class Place(msgspec.Struct, frozen=True):
    """A service at ``url``; its metrics are at ``ops_urls`` (none: nowhere).  ``voucherd`` and ``where``: how its
    commands are typed, before and after what they are.  ``groups``: its processes, if it is the test's own."""

    url: str
    ops_urls: list[str]
    voucherd: list[str]
    where: list[str]
    environment: dict[str, str]
    groups: dict[str, list[int]] = {}

    def command(self, *arguments: str, given: str = "", may_fail: bool = False) -> str:
        """What a command printed that was given this on standard input.  Raises SystemExit, with what it complained
        about, if it failed, unless it may."""
        done = subprocess.run(
            [*self.voucherd, *arguments, *self.where], env=self.environment, input=given, capture_output=True,
            text=True, timeout=COMMAND_S_MAX, check=False,
        )  # fmt: skip
        if done.returncode and not may_fail:
            raise SystemExit(f"voucherd {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The same of a command that prints JSON, whatever its exit status."""
        said = self.command(*arguments, "--json", may_fail=True)
        if not said.strip():
            self.command(*arguments, "--json")  # says why
            raise SystemExit(f"voucherd {' '.join(arguments)} printed nothing")
        return json.loads(said)


@contextmanager
def own(folder: Path, rate: int, voucherd: Sequence[str] = ()) -> Iterator[Place]:
    """`voucherd up` with its data in ``folder``, made for so many vouchers a second."""
    data = folder / "data"
    environment = {
        **os.environ, "VOUCHERD_PLANNED_RATE": str(rate), "VOUCHERD_STORE_OUTAGE_S": str(OUTAGE_S),
    }  # fmt: skip
    with contenders.started(data, environment) as (pid, demo):
        yield Place(
            demo["base_url"], [demo["ops_url"]], [*(voucherd or module("service.cli.main"))], ["--data-dir", str(data)],
            environment, contenders.groups(pid),
        )  # fmt: skip


def running(url: str, ops_urls: Sequence[str], data_dir: Path | None, voucherd: Sequence[str] = ()) -> Place:
    """A service that runs; without ``data_dir`` the VOUCHERD_… settings say where its Redis and its store are."""
    where = [] if data_dir is None else ["--data-dir", str(data_dir)]
    return Place(url, [*ops_urls], [*(voucherd or module("service.cli.main"))], where, dict(os.environ))


# --- before --------------------------------------------------------------------------------------------------------


def furnish(
    place: Place, scenario: Scenario, seconds: float, codes: int | None
) -> tuple[dict[str, Seller], dict[str, int]]:
    """Distributors, campaigns and pools of names that nobody else has, with a token each; ``codes`` in the pools of the
    Voucher Request API if it is said, else what the scenario wants.  Windows are filled.

    Returns the sellers by what the scenario calls them, and the codes in stock for them by pool.
    """
    mark = f"LT-{secrets.token_hex(4)}"
    ids = {seller: f"{mark}-{seller}" for seller in scenario.sellers}
    wanted = {
        "distributors": [
            {"id": id, **({"rate": scenario.limits[seller]} if seller in scenario.limits else {})}
            for seller, id in ids.items()
        ],
        "pools": [{"id": id, "expires": EXPIRES} for id in ids.values()],
        "campaigns": [
            {"id": id, "category": id, "products": [id], "pool": id, "assigned": [{"distributor": id}]}
            for id in ids.values()
        ],
    }  # fmt: skip
    place.command("apply", "-", "--yes", given=json.dumps(wanted))
    sellers, stocked = {}, {}
    for seller, id in ids.items():
        stocked[id] = scenario.codes(seconds, "v1", seller) if codes is None else codes
        place.command("codes", "import", id, "-", given=_codes(mark, seller, stocked[id]))
        token = place.json("token", "issue", id)["token"]
        sellers[seller] = Seller(id, id, "first", token)
        if any(part.seller == seller and part.api == "v3" for part in scenario.parts):
            product = f"{id}-v3"
            stocked[product] = scenario.codes(seconds, "v3", seller)
            client = place.json("client", "create", id, "--distributor", id)
            place.command(
                "product", "create", product, "--name", "Load test", "--url", "https://vouchers.example/",
                "--amount", "1000", "--currency", "SGD",
            )  # fmt: skip
            place.command("codes", "import", product, "-", given=_codes(mark, f"{seller}-v3", stocked[product]))
            place.command("product", "assign", product, id)
            sellers[seller] = msgspec.structs.replace(
                sellers[seller], client_id=client["client_id"], client_secret=client["client_secret"],
                product_code=product,
            )  # fmt: skip
    stocked = {pool: count for pool, count in stocked.items() if count}

    def filled() -> bool:
        windows = {one["pool"]: one["window"] for one in place.json("status")["pools"]}
        return all(windows.get(pool) for pool in stocked)

    wait_for("codes in the windows", filled)
    return sellers, stocked


def _codes(mark: str, name: str, count: int) -> str:
    return "\n".join(["code", *(f"{mark}-{name}-{number:07}-{secrets.token_hex(3)}" for number in range(count))]) + "\n"


# --- meanwhile -----------------------------------------------------------------------------------------------------


def rotated(place: Place, seller: Seller) -> Seller:
    """The seller with another token; the one that it had is good too."""
    token = place.json("token", "issue", seller.distributor)["token"]
    return msgspec.structs.replace(seller, token_name="second", token=token)


def revoke(place: Place, seller: Seller) -> float:
    """The Unix second by which the command had returned that revoked the seller's token."""
    place.command("token", "revoke", "--token", "-", given=f"{seller.token}\n")
    return time.time()


# --- afterwards ----------------------------------------------------------------------------------------------------


def settle(place: Place) -> None:
    """Everything issued is in the ledger.  Raises SystemExit if that does not come."""

    def flushed() -> bool:
        partition = place.json("status")["partition"]
        return partition is not None and not partition["outbox_codes"]

    wait_for("an empty outbox", flushed, SETTLE_S_MAX)


def left(place: Place, pools: Mapping[str, int]) -> dict[str, int]:
    """Codes of these pools that nobody has."""
    counted = {one["pool"]: one["stored"] + one["out"] for one in place.json("codes", "count")}
    return {pool: counted[pool] for pool in pools}


def audit(place: Place) -> list[str]:
    """What the audit finds, a line each."""
    return [
        f"{one['promise']}, {one['subject']}: {one['detail']} {one['figures'] or ''}".strip()
        for one in place.json("audit")["findings"]
    ]


def ledger(place: Place, sellers: Mapping[str, Seller], since: float) -> list[Issued]:
    """What was issued to them since then."""
    names = {seller.distributor: name for name, seller in sellers.items()}
    begun = datetime.fromtimestamp(int(since) - 1, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = []
    for distributor, name in names.items():
        lines = place.command(
            "ledger", "export", "--distributor", distributor, "--from", begun, "--format", "ndjson"
        )  # fmt: skip
        for line in lines.splitlines():
            one = json.loads(line)
            found.append(Issued(name, one["request_id"], digest(one["voucher_code"].encode()), one["double"]))
    return found
