"""The service as in production: own Valkey, own store, `serve` with two processes, `work`, and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy.ext.asyncio import AsyncConnection

from loadtest.client import run
from loadtest.servers import until
from loadtest.vouchers import VoucherRequests
from service import tokens
from service.store import campaigns, control, ledger
from service.worker.generating import AHEAD_CODES
from service.worker.publish import change
from tests.acceptance.service import Service

SOON_S = 1.0  # "503 within a second"


only_sqlite = pytest.mark.parametrize("running", ["sqlite"], indirect=True)


async def test_the_same_request_gets_the_same_bytes_after_everything_was_killed(
    service: Service, tmp_path: Path
) -> None:
    await service.furnish(200)
    async with service.client() as client:
        first = await service.voucher(client, "req-1")
        again = await service.voucher(client, "req-1")
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.content == first.content
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
    service.kill()
    service.valkey.kill()
    service.valkey.start()
    service.start("serve", "work")
    async with service.client() as client:
        revived = await service.voucher(client, "req-1")
    assert revived.content == first.content
    assert revived.headers["idempotent-replayed"] == "true"
    found = json.loads(service.succeed("ledger", "find", "--request-id", "req-1", "--json"))
    assert [row["voucher_code"] for row in found] == [first.json()["voucher_code"]]
    service.quiet()
    assert json.loads(service.succeed("audit", "--json"))["findings"] == []
    service.stop()


@only_sqlite
async def test_a_request_is_followed_from_the_log_into_the_ledger_and_a_change_into_the_log(service: Service) -> None:
    await service.furnish(20)
    trace_id = uuid.uuid4().hex
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    async with service.client() as client:
        for number in range(3):  # the headers of the first are learnt, those of the others are known
            given = await service.ask(client, f"req-{number}", headers=headers)
            assert given.status_code == 200
        refused = await service.ask(client, "req-0", terminal="T-2", headers=headers)
        assert refused.status_code == 422
    service.quiet()
    found = json.loads(service.succeed("ledger", "find", "--trace", headers["traceparent"], "--json"))
    assert {(row["request_id"], row["parent_id"]) for row in found} == {
        (f"req-{number}", "00f067aa0ba902b7") for number in range(3)
    }
    service.succeed("campaign", "pause", service.campaign)

    def lines(event: str) -> list[Any]:
        parsed = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in parsed if line["event"] == event]

    [line] = [one for one in lines("refused") if one["trace_id"] == trace_id]
    assert (line["code"], line["request_id"], line["process"]) == ("key_reused", "req-0", "serving")

    def paused() -> list[Any]:
        return [
            one for one in lines("change") if (one["action"], one["subject"]) == ("campaign pause", service.campaign)
        ]

    until(paused, "a line of the change")
    [line] = paused()
    assert (line["outcome"], line["process"]) == ("done", "work")


@only_sqlite
async def test_2000_parallel_requests_on_500_codes_get_exactly_500_distinct_codes(
    service: Service, tmp_path: Path
) -> None:
    await service.furnish(500)
    keys = [f"req-{number}" for number in range(2_000)]
    async with service.client() as client:
        answers = await asyncio.gather(*(service.voucher(client, key) for key in keys))
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses == {200: 500, 409: 1_500}
        assert len({answer.json()["voucher_code"] for answer in answers if answer.status_code == 200}) == 500
        assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"exhausted"}
        issued = {key: answer for key, answer in zip(keys, answers, strict=True) if answer.status_code == 200}
        replays = await asyncio.gather(*(service.voucher(client, key) for key in issued))
        assert [replay.content for replay in replays] == [answer.content for answer in issued.values()]
        assert all(replay.headers["idempotent-replayed"] == "true" for replay in replays)
        other = await service.voucher(client, next(iter(issued)), terminal="T-2")
        assert (other.status_code, other.json()["code"]) == (422, "key_reused")
    await service.audit()


async def test_nothing_is_issued_after_a_revocation_or_pause_has_returned(service: Service, tmp_path: Path) -> None:
    await service.furnish(3_000)
    rng = random.Random(1)
    answers: list[tuple[float, float, str]] = []  # when a request began that got a code, when it had it, by which token
    token = service.token
    refused_from: dict[str, float] = {}
    allowed_from: dict[str, float] = {}
    paused: list[tuple[float, float]] = []
    over = asyncio.Event()

    async def load(client: httpx.AsyncClient, name: str) -> None:
        number = 0
        while not over.is_set():
            number += 1
            which, began = token, time.monotonic()
            response = await service.ask(client, f"{name}-{number}", token=which)
            if response.status_code == 200:
                answers.append((began, time.monotonic(), which))
            await asyncio.sleep(rng.random() / 500)

    async with service.client() as client, service.control_plane() as (database, scripts):

        async def publish(edit: Callable[[Any], Awaitable[object]]) -> None:
            done = await change(database, scripts, edit, actor="test", action="race", subject="race")
            assert done.unreached == []

        loads = [asyncio.create_task(load(client, f"load-{number}")) for number in range(8)]
        for _ in range(4):
            old, new = token, tokens.new_token()
            now = int(time.time())
            await publish(
                lambda conn, new=new, now=now: control.add_credential(
                    conn, service.distributor, tokens.digest(new), now
                )
            )
            allowed_from[new] = time.monotonic()
            first = await service.ask(client, f"fresh-{new[-6:]}", token=new)
            assert first.status_code == 200, "a token made works at once"
            token = new
            await publish(
                lambda conn, old=old, now=now: control.revoke_credentials(
                    conn, token_sha256=tokens.digest(old), now=now
                )
            )
            refused_from[old] = time.monotonic()
            late = await service.ask(client, f"late-{old[-6:]}", token=old)
            assert (late.status_code, late.json()["code"]) == (401, "token_unknown")
            await publish(lambda conn: campaigns.set_paused(conn, service.campaign, True, int(time.time())))
            stopped = time.monotonic()
            held = await service.ask(client, f"held-{new[-6:]}")
            assert held.status_code == 401 or held.json()["code"] == "not_running"
            held = await service.ask(client, f"held-{new[-6:]}", token=new)
            assert (held.status_code, held.json()["code"]) == (409, "not_running")
            ended = time.monotonic()
            await publish(lambda conn: campaigns.set_paused(conn, service.campaign, False, int(time.time())))
            paused.append((stopped, ended))
            assert (await service.ask(client, f"on-{new[-6:]}", token=new)).status_code == 200, "resumed works at once"
        over.set()
        await asyncio.gather(*loads)
    assert len(answers) > 50, "the race was one"
    afterwards = [which for began, _, which in answers if began >= refused_from.get(which, float("inf"))]
    assert not afterwards, "a revoked token issued after the command had returned"
    # One that had its answer only later may have reached the service after the pause was over.
    asleep = [began for began, got, _ in answers if any(stopped <= began and got < ended for stopped, ended in paused)]
    assert not asleep, "a paused campaign issued after the command had returned"
    await service.audit()


async def test_a_limit_holds_over_all_processes_from_when_the_command_returns(service: Service, tmp_path: Path) -> None:
    await service.furnish(600)
    async with service.client() as client:
        assert (await service.voucher(client, "before")).status_code == 200
        service.succeed("distributor", "limit", service.distributor, "40", "--burst", "60")
        began = time.monotonic()
        answers = await asyncio.gather(*(service.voucher(client, f"k-{number}") for number in range(300)))
        allowed = 60 + 40 * (time.monotonic() - began)
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses.keys() == {200, 429}
        assert 60 <= statuses[200] <= allowed
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert (refused.json()["code"], refused.json()["retryable"]) == ("rate_limited", True)
        assert refused.headers["ratelimit-policy"] == '"vouchers";q=60;w=2'
        assert refused.headers["ratelimit"] == '"vouchers";r=0;t=1'
        assert refused.headers["retry-after"] == "1"
        assert (await service.voucher(client, "before")).headers["idempotent-replayed"] == "true", "a replay is exempt"
        service.succeed("distributor", "limit", service.distributor, "none")
        later = await asyncio.gather(*(service.voucher(client, f"k-{number}") for number in range(300)))
        assert {answer.status_code for answer in later} == {200}, "the same keys, and nothing is in the way any more"
    await service.audit()


async def test_with_redis_away_replays_are_answered_and_nothing_is_issued(service: Service, tmp_path: Path) -> None:
    await service.furnish(50)
    async with service.client() as client:
        first = await service.voucher(client, "old")
        service.quiet()
        service.valkey.kill()
        try:

            async def replayed() -> bool:
                again = await service.ask(client, "old")
                assert again.status_code in (200, 503)
                return again.status_code == 200 and again.content == first.content

            deadline = time.monotonic() + 10
            while not await replayed():
                assert time.monotonic() < deadline, "no replay although the ledger has it"
            for number in range(20):
                new = await service.ask(client, f"new-{number}")
                assert (new.status_code, new.json()["code"]) == (503, "store_unreachable")
            assert (await service.ask(client, "old", token=tokens.new_token())).status_code == 503
            async with service.control_plane() as (database, _), database.write() as conn:
                await control.revoke_credentials(conn, distributor=service.distributor, now=int(time.time()))
            assert (await service.ask(client, "old")).status_code == 503, "the store has it revoked"
        finally:
            service.valkey.start()
        await service.furnish(50)  # who shares this service finds it issuing again, by what is in force
        after = [service.voucher(client, f"after-{number}") for number in range(40)]
        assert {answer.status_code for answer in await asyncio.gather(*after)} == {200}
    await service.audit()


async def test_a_distributor_assigned_under_load_works_at_once_on_every_process(
    service: Service, tmp_path: Path
) -> None:
    await service.furnish(500)
    async with service.client() as client, service.control_plane() as (database, scripts):
        for number in range(5):
            name, token, now = f"{service.distributor}-LATE-{number}", tokens.new_token(), int(time.time())

            async def edit(conn: Any, name: str = name, token: str = token, now: int = now) -> None:
                await control.create_distributor(conn, name, name, now)
                await control.add_credential(conn, name, tokens.digest(token), now)

            await change(database, scripts, edit, actor="test", action="race", subject=name)
            before = await asyncio.gather(
                *(service.ask(client, f"b-{i}", distributor=name, token=token) for i in range(8))
            )
            assert {(one.status_code, one.json()["code"]) for one in before} == {(409, "no_campaign")}

            async def assign(conn: AsyncConnection, name: str = name, now: int = now) -> None:
                await campaigns.assign(conn, service.campaign, name, (), now)

            await change(database, scripts, assign, actor="test", action="race", subject=name)
            after = await asyncio.gather(
                *(service.ask(client, f"a-{i}", distributor=name, token=token) for i in range(8))
            )
            assert {one.status_code for one in after} == {200}
    await service.audit()


async def test_what_a_file_says_is_in_force_on_every_process_when_apply_has_returned(
    service: Service, tmp_path: Path
) -> None:
    await service.furnish(100)
    file = tmp_path / "wanted.yaml"

    async def statuses(name: str) -> set[tuple[int, str]]:
        asked = await asyncio.gather(*(service.ask(client, f"{name}-{number}") for number in range(16)))
        return {(one.status_code, one.json().get("code", "")) for one in asked}

    async with service.client() as client:
        for number in range(3):
            assert await statuses(f"on-{number}") == {(200, "")}
            file.write_text(f"campaigns: [{{id: {service.campaign}, caps: {{terminal: {{total: 0}}}}}}]")
            assert "1 entry applied" in service.succeed("apply", str(file))
            assert await statuses(f"capped-{number}") == {(409, "cap_reached")}
            file.write_text(f"campaigns: [{{id: {service.campaign}, caps: {{terminal: {{total: null}}}}}}]")
            assert "1 entry applied" in service.succeed("apply", str(file))
    await service.audit()


async def test_import_racing_refill_racing_issuing_gives_no_false_409(service: Service, tmp_path: Path) -> None:
    """A 409 `exhausted` is true only if at some moment of the request everything imported by then was issued."""
    await service.furnish(50)
    imported = [(0.0, 50)]  # when the codes were certainly in stock, and how many in all
    asked: list[tuple[float, float, int]] = []
    over = asyncio.Event()

    async def load(client: httpx.AsyncClient, name: str) -> None:
        number = 0
        while not over.is_set():
            number += 1
            began = time.monotonic()
            response = await service.voucher(client, f"{name}-{number}")
            assert response.status_code in (200, 409), response.text
            if response.status_code == 409:
                assert response.json()["code"] == "exhausted"
            asked.append((began, time.monotonic(), response.status_code))

    async with service.client() as client, service.control_plane() as (database, scripts):
        loads = [asyncio.create_task(load(client, f"load-{number}")) for number in range(6)]
        for batch in range(15):
            await service.stock_up(database, scripts, f"more-{batch}", 40)
            imported.append((time.monotonic(), imported[-1][1] + 40))
        over.set()
        await asyncio.gather(*loads)
        last = await service.voucher(client, "drain-0")
        number = 0
        while last.status_code == 200:
            number += 1
            began = time.monotonic()
            last = await service.voucher(client, f"drain-{number}")
            asked.append((began, time.monotonic(), last.status_code))
    false = []
    for began, ended, status in asked:
        if status == 409:
            there = max(codes for at, codes in imported if at <= began)
            given = 1 + sum(1 for other, _, outcome in asked if outcome == 200 and other <= ended)
            if given < there:
                false.append((began, there, given))
    assert not false, f"409 although codes were left (imported, given): {false[:3]}"
    assert sum(status == 200 for _, _, status in asked) == imported[-1][1] - 1  # `drain-0` was not noted
    await service.audit()


async def _issue_some(service: Service, client: httpx.AsyncClient, prefix: str, count: int) -> dict[str, bytes]:
    answers = await asyncio.gather(*(service.voucher(client, f"{prefix}-{number}") for number in range(count)))
    assert {answer.status_code for answer in answers} == {200}
    return {f"{prefix}-{number}": answer.content for number, answer in enumerate(answers)}


def _codes(vouchers: dict[str, bytes]) -> list[str]:
    return [json.loads(body)["voucher_code"] for body in vouchers.values()]


async def _first_answer_is_503(service: Service, client: httpx.AsyncClient) -> None:
    """Within a second of the fault the client is told 503, or is served by the new generation already."""
    began = time.monotonic()
    with contextlib.suppress(httpx.TransportError):
        first = await service.ask(client, "at-the-fault")
        assert first.status_code in (503, 200), first.text
    assert time.monotonic() - began < SOON_S


async def test_flushall_on_a_running_service_issues_no_code_twice_and_goes_on_by_itself(
    service: Service, tmp_path: Path
) -> None:
    await service.furnish(1_000)
    async with service.client() as client:
        before = await _issue_some(service, client, "before", 60)
        service.quiet()
        with redis.Redis.from_url(service.valkey.url) as admin:
            admin.flushall()
        await _first_answer_is_503(service, client)
        after = await _issue_some(service, client, "after", 60)
        replays = {key: (await service.voucher(client, key)).content for key in before}
    assert replays == before
    assert len(set(_codes(before) + _codes(after))) == 120
    await service.audit()
    in_quarantine = await service.in_quarantine()
    assert in_quarantine, "what was in the windows is named"
    given = {json.loads(body)["serial_number"] for body in (*before.values(), *after.values())}
    assert not in_quarantine & given


async def test_flushall_before_the_flush_puts_what_was_lost_in_quarantine(service: Service, tmp_path: Path) -> None:
    await service.furnish(1_000)
    async with service.client() as client:
        kept = await _issue_some(service, client, "kept", 20)
        service.quiet()
        service.processes["work"].kill()
        service.processes.pop("work").wait()
        lost = await _issue_some(service, client, "lost", 20)
        with redis.Redis.from_url(service.valkey.url) as admin:
            admin.flushall()
        refused = await service.ask(client, "while-nobody-recovers")
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unreachable")
        service.start("work")
        after = await _issue_some(service, client, "after", 20)
        assert {key: (await service.voucher(client, key)).content for key in kept} == kept
    assert len(set(_codes(kept) + _codes(lost) + _codes(after))) == 60
    await service.audit()
    in_quarantine = await service.in_quarantine()
    assert {json.loads(body)["serial_number"] for body in lost.values()} <= in_quarantine


@pytest.mark.parametrize("flushed", [True, False], ids=["flushed", "not-flushed"])
@only_sqlite
async def test_valkey_restarted_on_an_old_copy_of_its_data_issues_no_code_twice(
    service: Service, flushed: bool
) -> None:
    """The copy is older by 40 vouchers; `not-flushed`: no worker ran meanwhile, so only the client knows them."""
    await service.furnish(1_000)
    async with service.client() as client:
        before = await _issue_some(service, client, "before", 20)
        service.quiet()
        if not flushed:
            service.processes["work"].kill()
            service.processes.pop("work").wait()
        service.valkey.keep()
        since = await _issue_some(service, client, "since", 40)
        if flushed:
            service.quiet()
        service.valkey.put_back()
        service.valkey.start()
        await _first_answer_is_503(service, client)
        if not flushed:
            service.start("work")
        after = await _issue_some(service, client, "after", 60)
        assert {key: (await service.voucher(client, key)).content for key in before} == before
        if flushed:
            assert {key: (await service.voucher(client, key)).content for key in since} == since
    assert len(set(_codes(before) + _codes(since) + _codes(after))) == 120
    await service.audit()
    if not flushed:
        in_quarantine = await service.in_quarantine()
        assert {json.loads(body)["serial_number"] for body in since.values()} <= in_quarantine


@only_sqlite
async def test_with_the_worker_away_issuing_goes_on_and_nothing_is_trimmed(service: Service, tmp_path: Path) -> None:
    await service.furnish(1_000)
    async with service.client() as client:
        await _issue_some(service, client, "before", 5)
        service.processes["work"].kill()
        service.processes.pop("work").wait()
        vouchers = await _issue_some(service, client, "alone", 50)  # planned_rate 5 x store_outage_s 10
    service.start("work")
    service.quiet()
    async with service.control_plane() as (database, _), database.read() as conn:
        assert set(await ledger.lookup(conn, "v1", service.distributor, list(vouchers))) == set(vouchers)
    await service.audit()


async def test_a_generated_pool_under_load_is_never_called_unavailable(service: Service, tmp_path: Path) -> None:
    """Four times what there is in stock ahead, through two serving processes."""
    service.succeed("pool", "create", "ENDLESS", "--pattern", "E-####-####*", "--expires-after", "30")
    service.succeed("distributor", "create", "DIST-E")
    service.succeed("campaign", "create", "C-E", "--category", "PAY", "--product", "PAY", "--pool", "ENDLESS")
    service.succeed("campaign", "assign", "C-E", "DIST-E")
    token = json.loads(service.succeed("token", "issue", "DIST-E", "--json"))["token"]
    asked = 4 * AHEAD_CODES
    seen = await asyncio.to_thread(run, "127.0.0.1", service.port, 32, asked, VoucherRequests(token, "DIST-E"))
    print(seen.statuses)
    assert set(seen.statuses) <= {200, 503}  # refilling, perhaps, and never 409
    assert seen.statuses[200] > 2 * AHEAD_CODES
    await service.audit()
    [counted] = json.loads(service.succeed("codes", "count", "ENDLESS", "--json"))
    assert counted["issued"] == seen.statuses[200]
