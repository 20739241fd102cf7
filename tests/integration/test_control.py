"""The control plane's rules and the snapshot that is published of it, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import catalogue
from service.catalogue import CANDIDATES_MAX, Cap
from service.domain import BURST_MIN, BURST_S_MAX, RATE_MAX, RateLimit
from service.errors import Conflict, NotFound
from service.store import campaigns, control, schema
from service.store.database import Database

NOW = 1_800_000_000
TOKEN = "a" * 64
OTHER = "b" * 64
Edit = Callable[[AsyncConnection], Awaitable[object]]


async def make_pool(connection: AsyncConnection, id: str = "P") -> None:
    await control.create_pool(connection, id, default_expires_at=NOW + 1000, least_life_s=10, now=NOW)


async def make_campaign(
    connection: AsyncConnection,
    id: str = "C",
    *,
    category: str = "PAY",
    products: tuple[str, ...] = ("PAY",),
    pool: str = "P",
    priority: int = 0,
    starts_at: int = NOW,
    until: int = 0,
    time_zone: str = "Europe/Berlin",
    caps: tuple[Cap, ...] = (),
) -> None:
    await campaigns.create(
        connection, id, category=category, products=products, pool=pool, priority=priority,
        starts_at=starts_at, until=until, time_zone=time_zone, caps=caps, now=NOW,
    )  # fmt: skip


@pytest.fixture
async def furnished(database: Database) -> Database:
    """Distributor D, pool P, campaign C."""
    async with database.write() as connection:
        await control.create_distributor(connection, "D", "Distributor", NOW)
        await make_pool(connection)
        await make_campaign(connection)
    return database


async def _refuse(database: Database, fault: type[Exception], edit: Edit) -> str:
    """The edit raises ``fault``, and nothing in the control plane has changed."""
    before = await _everything(database)
    with pytest.raises(fault) as caught:
        async with database.write() as connection:
            await edit(connection)
    assert await _everything(database) == before
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


async def _everything(database: Database) -> dict[str, list[tuple[object, ...]]]:
    async with database.read() as connection:
        return {
            table.name: sorted((tuple(row) for row in await connection.execute(select(table))), key=repr)
            for table in schema.metadata.sorted_tables
        }


# --- distributors and tokens ---------------------------------------------------------------------------------


async def test_no_name_that_could_break_a_key_or_a_record_is_accepted(database: Database) -> None:
    async with database.write() as connection:
        await make_pool(connection)
    before = await _everything(database)
    async with database.write() as c:
        for id in ("", "x" * 65, "a b", "ä", "a/b", "a\n", "{0}", "a\x00"):
            for attempt in (
                control.create_distributor(c, id, "name", NOW),
                make_pool(c, id),
                make_campaign(c, id),
                make_campaign(c, category=id),
                make_campaign(c, products=("PAY", id)),
            ):
                with pytest.raises(Conflict):
                    await attempt
    assert await _everything(database) == before


async def test_nothing_is_created_twice(furnished: Database) -> None:
    await _refuse(furnished, Conflict, lambda c: control.create_distributor(c, "D", "again", NOW))
    await _refuse(furnished, Conflict, make_pool)
    await _refuse(furnished, Conflict, make_campaign)


async def test_no_name_of_a_distributor_that_can_not_be_shown_is_accepted(database: Database) -> None:
    async with database.write() as c:
        for name in ("", "x" * 201, "a\nb", "a\x00b"):
            with pytest.raises(Conflict):
                await control.create_distributor(c, "D", name, NOW)


async def test_a_token_is_not_given_out_twice_nor_to_nobody_nor_in_clear(furnished: Database) -> None:
    async with furnished.write() as connection:
        await control.add_credential(connection, "D", TOKEN, NOW)
    await _refuse(furnished, Conflict, lambda c: control.add_credential(c, "D", TOKEN, NOW))
    await _refuse(furnished, NotFound, lambda c: control.add_credential(c, "nobody", OTHER, NOW))
    message = await _refuse(furnished, Conflict, lambda c: control.add_credential(c, "D", "vch_clear", NOW))
    assert "vch_clear" not in message


async def test_revoked_tokens_are_not_in_the_snapshot_and_do_not_come_back(furnished: Database) -> None:
    async with furnished.write() as connection:
        await control.create_distributor(connection, "E", "Other", NOW)
        await control.add_credential(connection, "D", TOKEN, NOW)
        await control.add_credential(connection, "D", OTHER, NOW)
        await control.add_credential(connection, "E", "c" * 64, NOW)
        assert await control.revoke_credentials(connection, token_sha256=TOKEN, now=NOW + 1) == 1
        assert await control.revoke_credentials(connection, token_sha256=TOKEN, now=NOW + 2) == 0
        assert (await control.snapshot(connection, 1)).tokens == {OTHER: "D", "c" * 64: "E"}
        assert await control.revoke_credentials(connection, distributor="D", now=NOW + 3) == 1
        assert (await control.snapshot(connection, 1)).tokens == {"c" * 64: "E"}
    await _refuse(furnished, Conflict, lambda c: control.add_credential(c, "D", TOKEN, NOW))
    await _refuse(furnished, NotFound, lambda c: control.revoke_credentials(c, token_sha256="d" * 64, now=NOW))
    await _refuse(furnished, NotFound, lambda c: control.revoke_credentials(c, distributor="nobody", now=NOW))
    not_its_own = "c" * 64
    await _refuse(
        furnished,
        NotFound,
        lambda c: control.revoke_credentials(c, distributor="D", token_sha256=not_its_own, now=NOW),
    )
    await _refuse(furnished, ValueError, lambda c: control.revoke_credentials(c, now=NOW))


async def test_suspended_distributor_keeps_its_tokens_but_is_not_active(furnished: Database) -> None:
    async with furnished.write() as connection:
        await control.add_credential(connection, "D", TOKEN, NOW)
        await control.set_active(connection, "D", False)
        taken = await control.snapshot(connection, 1)
        assert taken.distributors == {"D": False}
        assert taken.tokens == {TOKEN: "D"}
        await control.set_active(connection, "D", True)
        assert (await control.snapshot(connection, 1)).distributors == {"D": True}
    await _refuse(furnished, NotFound, lambda c: control.set_active(c, "nobody", False))


async def test_limit_that_the_script_would_not_count_is_refused(furnished: Database) -> None:
    async with furnished.write() as connection:
        await control.set_limit(connection, "D", RateLimit(RATE_MAX, RATE_MAX * BURST_S_MAX))
        assert (await control.snapshot(connection, 1)).limits == {"D": RateLimit(RATE_MAX, RATE_MAX * BURST_S_MAX)}
        await control.set_limit(connection, "D", RateLimit(1, BURST_MIN))
        await control.set_limit(connection, "D", None)
        assert (await control.snapshot(connection, 1)).limits == {}
    for rate, burst in ((0, 20), (RATE_MAX + 1, RATE_MAX), (5, BURST_MIN - 1), (5, 5 * BURST_S_MAX + 1)):
        await _refuse(furnished, Conflict, lambda c, wrong=(rate, burst): control.set_limit(c, "D", RateLimit(*wrong)))
    await _refuse(furnished, NotFound, lambda c: control.set_limit(c, "nobody", RateLimit(1, 20)))


# --- pools and campaigns -------------------------------------------------------------------------------------


async def test_pool_that_could_never_issue_is_refused(database: Database) -> None:
    def make(default_expires_at: int | None, least_life_s: int) -> Edit:
        return lambda c: control.create_pool(
            c, "P", default_expires_at=default_expires_at, least_life_s=least_life_s, now=NOW
        )

    await _refuse(database, Conflict, make(NOW, 0))
    await _refuse(database, Conflict, make(control.TIME_MAX + 1, 0))
    await _refuse(database, Conflict, make(None, -1))
    async with database.write() as connection:
        await make(None, 0)(connection)


WRONG_CAMPAIGNS: list[dict[str, Any]] = [
    {"products": ()},
    {"products": tuple(f"p{number}" for number in range(257))},
    {"starts_at": NOW, "until": NOW},
    {"starts_at": NOW, "until": NOW - 1},
    {"starts_at": -1},
    {"until": control.TIME_MAX + 1},
    {"time_zone": "Mars/Olympus"},
    {"time_zone": "../../etc/passwd"},
    {"time_zone": ""},
    {"priority": 2**31},
    {"caps": (Cap("campaign", "total", -1),)},
    {"caps": (Cap("campaign", "total", 2**53 + 1),)},
    {"caps": (Cap("campaign", "week", 1),)},  # type: ignore[arg-type]
    {"caps": (Cap("planet", "day", 1),)},  # type: ignore[arg-type]
    {"caps": (Cap("campaign", "day", 1), Cap("campaign", "day", 2))},
]


async def test_campaign_that_no_rule_could_decide_is_refused(furnished: Database) -> None:
    before = await _everything(furnished)
    async with furnished.write() as connection:
        for wrong in WRONG_CAMPAIGNS:
            with pytest.raises(Conflict):
                await make_campaign(connection, "new", **wrong)
    assert await _everything(furnished) == before


async def test_campaign_of_an_unknown_pool_is_refused(furnished: Database) -> None:
    await _refuse(furnished, NotFound, lambda c: make_campaign(c, "new", pool="none"))


async def test_unknown_campaigns_are_not_assigned_or_paused(furnished: Database) -> None:
    await _refuse(furnished, NotFound, lambda c: campaigns.assign(c, "none", "D", (), NOW))
    await _refuse(furnished, NotFound, lambda c: campaigns.assign(c, "C", "nobody", (), NOW))
    await _refuse(furnished, NotFound, lambda c: campaigns.set_paused(c, "none", True, NOW))


async def test_assignment_can_not_carry_the_campaigns_own_cap(furnished: Database) -> None:
    own = (Cap("campaign", "total", 1),)
    await _refuse(furnished, Conflict, lambda c: campaigns.assign(c, "C", "D", own, NOW))


async def test_assigning_again_replaces_the_caps_and_adds_no_second_assignment(furnished: Database) -> None:
    first = (Cap("distributor", "day", 100), Cap("terminal", "hour", 2**53))
    async with furnished.write() as connection:
        await campaigns.assign(connection, "C", "D", first, NOW)
        assert (await control.snapshot(connection, 1)).campaigns[0].assigned == {"D": first}
        await campaigns.assign(connection, "C", "D", (Cap("distributor", "day", 0),), NOW + 1)
        await campaigns.assign(connection, "C", "D", (Cap("distributor", "day", 0),), NOW + 1)
        assert (await control.snapshot(connection, 1)).campaigns[0].assigned == {"D": (Cap("distributor", "day", 0),)}
        await campaigns.assign(connection, "C", "D", (), NOW + 2)
        assert (await control.snapshot(connection, 1)).campaigns[0].assigned == {"D": ()}
        assert (await connection.execute(select(func.count()).select_from(schema.assignments))).scalar_one() == 1


async def test_no_more_campaigns_compete_than_a_script_looks_at(database: Database) -> None:
    async with database.write() as connection:
        await control.create_distributor(connection, "D", "Distributor", NOW)
        await control.create_distributor(connection, "E", "Other", NOW)
        await make_pool(connection)
        for number in range(CANDIDATES_MAX):
            await make_campaign(connection, f"C{number}", products=("PAY", "MOB"))
            await campaigns.assign(connection, f"C{number}", "D", (), NOW)
        await make_campaign(connection, "over", starts_at=NOW - 9, until=NOW)
        await campaigns.assign(connection, "over", "D", (), NOW)  # is over: it doesn't compete
        await make_campaign(connection, "else", products=("ELSE",))
        await campaigns.assign(connection, "else", "D", (), NOW)  # another product
        await make_campaign(connection, "more", products=("NEW", "MOB"))
        await campaigns.assign(connection, "more", "E", (), NOW)  # another distributor
        await campaigns.assign(connection, "C0", "D", (), NOW)  # the same again
    message = await _refuse(database, Conflict, lambda c: campaigns.assign(c, "more", "D", (), NOW))
    assert "MOB" in message


async def test_assignments_racing_each_other_do_not_slip_past_the_limit(database: Database) -> None:
    async with database.write() as connection:
        await control.create_distributor(connection, "D", "Distributor", NOW)
        await make_pool(connection)
        for number in range(CANDIDATES_MAX + 4):
            await make_campaign(connection, f"C{number}")

    async def assign(number: int) -> bool:
        try:
            async with database.write() as connection:
                await campaigns.assign(connection, f"C{number}", "D", (), NOW)
        except Conflict:
            return False
        return True

    assigned = await asyncio.gather(*(assign(number) for number in range(CANDIDATES_MAX + 4)))
    assert sum(assigned) == CANDIDATES_MAX


# --- snapshots and versions ----------------------------------------------------------------------------------


async def test_snapshot_forgets_nothing_and_survives_publication(furnished: Database) -> None:
    own = (Cap("campaign", "total", 10), Cap("distributor", "day", 5), Cap("terminal", "hour", 1))
    async with furnished.write() as connection:
        await control.create_distributor(connection, "E", "Other", NOW)
        await make_campaign(
            connection, "B", category="MOB", products=("MOB", "PAY", "MOB"), priority=-3, until=NOW + 5, caps=own
        )
        await campaigns.assign(connection, "B", "E", (Cap("terminal", "total", 3),), NOW)
        await campaigns.assign(connection, "C", "E", (), NOW)
        await campaigns.set_paused(connection, "C", True, NOW)
        await control.add_credential(connection, "E", TOKEN, NOW)
        taken = await control.snapshot(connection, 7)
        await control.save_snapshot(connection, 7, catalogue.encode(taken), NOW)
    assert taken == catalogue.Snapshot(
        version=7,
        tokens={TOKEN: "E"},
        distributors={"D": True, "E": True},
        pools=(catalogue.Pool("P", 10),),
        campaigns=(
            catalogue.Campaign(
                "B", "MOB", ("MOB", "PAY"), "P", -3, NOW, NOW + 5, False, "Europe/Berlin", own,
                {"E": (Cap("terminal", "total", 3),)},
            ),
            catalogue.Campaign("C", "PAY", ("PAY",), "P", 0, NOW, 0, True, "Europe/Berlin", (), {"E": ()}),
        ),
    )  # fmt: skip
    async with furnished.read() as connection:
        version, blob = await control.load_snapshot(connection)
    assert version == 7
    assert blob == catalogue.encode(taken)


async def test_two_changes_do_not_get_one_version(database: Database) -> None:
    async def publish() -> int:
        async with database.write() as connection:
            number = await control.raise_version(connection)
            await control.save_snapshot(connection, number, str(number).encode(), NOW)
            return number

    numbers = await asyncio.gather(*(publish() for _ in range(12)))
    assert sorted(numbers) == list(range(1, 13))
    async with database.read() as connection:
        assert await control.version(connection) == 12
        assert await control.load_snapshot(connection) == (12, b"12")


async def test_a_version_that_was_rolled_back_is_not_skipped_or_shown(database: Database) -> None:
    with pytest.raises(RuntimeError, match="half-way"):  # noqa: PT012 - a transaction is a block
        async with database.write() as connection:
            await control.raise_version(connection)
            raise RuntimeError("half-way")
    async with database.write() as connection:
        assert await control.version(connection) == 0
        with pytest.raises(NotFound):
            await control.load_snapshot(connection)
        assert await control.raise_version(connection) == 1


async def test_audit_log_does_not_refuse_a_long_subject(database: Database) -> None:
    async with database.write() as connection:
        await control.log(connection, actor="a" * 300, action="import", subject="s" * 300, detail="d" * 9000, now=NOW)
        row = (await connection.execute(select(schema.audit_log))).one()
    assert (row.at, row.actor, row.subject, row.detail) == (NOW, "a" * 128, "s" * 128, "d" * 9000)
