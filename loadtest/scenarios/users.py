"""The users, as locust runs them: ``LOADTEST_PLAN=plan.json locust -f loadtest/scenarios/users.py``.

`make loadtest` starts this; on further machines it is started by hand (docs/loadtest.md).  The process that leads
(locust's only one, or its master) writes the record: workers send it their attempts with their statistics.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from base64 import b64encode
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import gevent
from gevent.lock import BoundedSemaphore
from locust import FastHttpUser, LoadTestShape, events, runners, task
from locust.contrib.fasthttp import FastHttpSession
from locust.env import Environment

from loadtest.scenarios import plan as plans
from loadtest.scenarios.plan import FILE_VARIABLE, Plan, Seller
from loadtest.scenarios.record import CUT, ISSUED, NO_ACCESS, REPLAYED, TIMED_OUT, Attempt, digest, encode
from loadtest.scenarios.scenario import SCENARIOS, Part

ANSWER_S: Final = 10.0  # several times the service's own deadline; then the answer is given up
PATIENCE_S: Final = 20.0  # of one sale, from its first attempt
HASTY_TRIES: Final = 3
BEHIND_S_MAX: Final = 1.0  # what a user has not come to in time is made up for as far as this
RETRY_S: Final = (0.05, 1.0)  # pause before an attempt after a refusal, twice as long each time
TERMINALS: Final = 1_000
ANSWERS: Final = frozenset(range(100, 600))  # statuses that are no fault of the connection: the sale looks at them
LEAD_S: Final = 0.5  # the leading process writes, and looks for another plan, this often
TOKEN_LEFT_S: Final = 30.0  # an access token with less left is not used any more
SPAWN: Final = 10_000  # users a second: a stage begins at once
# After the last sale was begun: until all have come to their end and workers have reported them.
REST_S: Final = 2.0
REST_DISTRIBUTED_S: Final = 3.0

runners.WORKER_REPORT_INTERVAL = 1.0  # seconds; locust's own 3 are long for whoever looks on

# Not the end of a sale: the same key is sent again.
_AGAIN: Final = frozenset({0, 429, 500, 502, 503, 504})
_VOUCHERS: Final = frozenset({200, 207})


class _Now:
    """What this process knows: the plan, whether new sales are begun, and what is not written yet."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.over = False
        self.attempts: list[bytes] = []


_now: Final = _Now(plans.load(Path(os.environ[FILE_VARIABLE])))
_scenario: Final = SCENARIOS[_now.plan.scenario]


class Stages(LoadTestShape):
    """The scenario's, in the time that the plan gives them; then a rest in which nothing new is begun."""

    def tick(self) -> tuple[int, float] | None:
        ends, elapsed = _scenario.ends(_now.plan.seconds), self.get_run_time()
        for stage, end in zip(_scenario.stages, ends, strict=True):
            if elapsed < end:
                return stage.users, SPAWN
        assert self.runner is not None
        if not _now.over:
            _now.over = True
            self.runner.send_message("over")
        rest_s = REST_DISTRIBUTED_S if isinstance(self.runner, runners.MasterRunner) else REST_S
        return (_scenario.stages[-1].users, SPAWN) if elapsed < ends[-1] + rest_s else None


class _Sale:
    """What one sale asks for: the same in each of its attempts."""

    def __init__(self, part: Part, seller: Seller) -> None:
        self.key = str(uuid.uuid4())
        self.wanted = random.randint(*part.quantities)
        if part.api == "v1":
            self.path = "/api/v1/voucher/request"
            self.body = (
                f'{{"request_id":"{self.key}","distributor_id":"{seller.distributor}",'
                f'"terminal_id":"AT-{random.randrange(TERMINALS)}","product_ids":["{seller.product}"]}}'
            )
        else:
            self.path = f"/v3/products/{seller.product_code}"
            self.body = f'{{"quantity":{self.wanted}}}'


class Terminal(FastHttpUser):
    """Makes one sale after the other."""

    abstract = True
    host = _now.plan.url
    part: Part

    def on_start(self) -> None:
        self._seller = _now.plan.sellers[self.part.seller]
        self._patient = self._session(ANSWER_S)
        self._hasty = self._session(self.part.hasty_s)
        self._due = time.perf_counter()
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Seconds until the next sale, by chance, so that all users together come as independent ones do (a Poisson
        process), and as many in a second as they are meant to, however long an answer takes."""
        now = time.perf_counter()
        self._due = max(self._due + random.expovariate(self.part.rate), now - BEHIND_S_MAX)
        return max(0.0, self._due - now)

    def _session(self, patience_s: float) -> FastHttpSession:
        """One that waits so long for an answer; what there is to retry is up to the sale."""
        session = FastHttpSession(
            self.host, self.environment.events.request, self, max_retries=0, connection_timeout=ANSWER_S,
            network_timeout=patience_s,
        )  # fmt: skip
        session.client.valid_response_codes = ANSWERS  # type: ignore[misc] # it is read through self
        return session

    @task
    def sell(self) -> None:
        if _now.over:
            gevent.sleep(1.0)
            return
        if not self.part.late:
            self._seller = _now.plan.sellers[self.part.seller]
        sale = _Sale(self.part, self._seller)
        for _ in range(2 if 100 * random.random() < self.part.repeats else 1):
            self._see_through(sale)

    def _see_through(self, sale: _Sale) -> None:
        """Until there is a final answer, or the user's patience is over."""
        began, number = time.time(), 0
        pause, longest = RETRY_S
        while True:
            number += 1
            hasty = bool(self.part.hasty_s) and number <= HASTY_TRIES
            attempt = self._attempt(sale, number, began, hasty=hasty)
            _now.attempts.append(encode(attempt))
            if attempt.final or time.time() - began > PATIENCE_S:
                return
            if not (hasty and attempt.kind == TIMED_OUT):
                gevent.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, longest)

    def _attempt(self, sale: _Sale, number: int, sale_began: float, *, hasty: bool) -> Attempt:
        seller = self._seller
        headers = {"Content-Type": "application/json"}
        if self.part.api == "v1":
            headers["Authorization"] = f"Bearer {seller.token}"
        else:
            began, since = time.time(), time.perf_counter()
            try:
                headers |= {"Authorization": f"Bearer {_access(seller)}", "Idempotency-Key": sale.key}
            except OSError:
                return Attempt(
                    self.part.name, self.part.seller, sale.key, sale.wanted, number, sale_began, began,
                    time.perf_counter() - since, 0, NO_ACCESS, seller.token_name, "", (), False,
                )  # fmt: skip
        began, since = time.time(), time.perf_counter()
        session = self._hasty if hasty else self._patient
        with session.request(
            "POST", sale.path, name=self.part.name, data=sale.body, headers=headers, catch_response=True
        ) as answer:
            seconds = time.perf_counter() - since
            status, content = answer.status_code, answer.content or b""
            kind = _kind(answer, status, content)
            final = status not in _AGAIN or (status == 429 and not self.part.insists)
            if status == 401 and (newer := _now.plan.sellers[self.part.seller]) != seller:
                self._seller, final = newer, False
            answer.success() if final else answer.failure(kind)
        told = status in _VOUCHERS
        return Attempt(
            self.part.name, self.part.seller, sale.key, sale.wanted, number, sale_began, began, seconds, status, kind,
            seller.token_name, digest(content) if told else "", _codes(content) if told else (), final,
        )  # fmt: skip


for _part in _scenario.parts:
    _name = _part.name.title()
    globals()[_name] = type(
        _name, (Terminal,),
        {"abstract": False, "part": _part, "weight": _part.share},
    )  # fmt: skip


def _kind(answer: Any, status: int, content: bytes) -> str:
    if status == 0:
        return TIMED_OUT if isinstance(getattr(answer.error, "original", answer.error), TimeoutError) else CUT
    if status == 200:
        return REPLAYED if "true" in (_header(answer, "Idempotent-Replayed"), _header(answer, "Idempotency-Record")) \
            else ISSUED  # fmt: skip
    try:
        said = json.loads(content)
        return str(said["error"]["code"] if isinstance(said.get("error"), dict) else said["code"])
    except (ValueError, KeyError, AttributeError):
        return str(status)


def _header(answer: Any, name: str) -> str:
    return str(answer.headers.get(name) or "")


def _codes(content: bytes) -> tuple[str, ...]:
    said = json.loads(content)
    return tuple(digest(one["voucher_code"].encode()) for one in said.get("vouchers", [said]))


# --- access tokens of Client API v3: one a process and client ------------------------------------------------------

_tokens: Final[dict[str, tuple[str, float]]] = {}  # by client: the token, and until when it is used
_asking: Final = BoundedSemaphore()


def _access(seller: Seller) -> str:
    """Raises OSError if the service gives none now."""
    with _asking:
        token, until = _tokens.get(seller.client_id, ("", 0.0))
        if time.time() < until:
            return token
        basic = b64encode(f"{seller.client_id}:{seller.client_secret}".encode()).decode()
        answer = FastHttpSession(_now.plan.url, _unheard, None, max_retries=0).request(
            "POST", "/oauth2/token", data=urlencode({"grant_type": "client_credentials"}),
            headers={"Authorization": f"Basic {basic}", "Content-Type": "application/x-www-form-urlencoded"},
        )  # fmt: skip
        if answer.status_code != 200:
            raise OSError(f"no access token: {answer.status_code}")
        said = json.loads(answer.content or b"")
        _tokens[seller.client_id] = (said["access_token"], time.time() + said["expires_in"] - TOKEN_LEFT_S)
        return str(said["access_token"])


class _Unheard:
    def fire(self, **_: Any) -> None:
        """Tokens are no sales: they are not in the statistics."""


_unheard: Final = _Unheard()


# --- between processes ---------------------------------------------------------------------------------------------


@events.init.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    assert runner is not None

    def is_over(**_: Any) -> None:
        _now.over = True

    def take(msg: Any, **_: Any) -> None:
        _now.plan = plans.decode(msg.data.encode())

    runner.register_message("over", is_over)
    runner.register_message("plan", take)
    if isinstance(runner, runners.WorkerRunner):
        environment.events.report_to_master.add_listener(_report)
        return
    record = Path(_now.plan.record).open("ab")  # noqa: SIM115 - until the process ends
    environment.events.worker_report.add_listener(_reported)
    environment.events.quitting.add_listener(lambda **_: _write(record))
    gevent.spawn(_lead, environment, record)


def _report(client_id: str, data: dict[str, Any]) -> None:
    data["attempts"], _now.attempts = _now.attempts, []


def _reported(client_id: str, data: dict[str, Any]) -> None:
    _now.attempts += data["attempts"]


def _lead(environment: Environment, record: Any) -> None:
    file = Path(os.environ[FILE_VARIABLE])
    seen = file.stat().st_mtime_ns
    while True:
        gevent.sleep(LEAD_S)
        _write(record)
        if (changed := file.stat().st_mtime_ns) != seen:
            seen = changed
            _now.plan = plans.load(file)
            assert environment.runner is not None
            environment.runner.send_message("plan", file.read_text())


def _write(record: Any) -> None:
    some, _now.attempts = _now.attempts, []
    record.write(b"".join(one + b"\n" for one in some))
    record.flush()
