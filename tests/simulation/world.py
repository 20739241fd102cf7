"""One simulated installation: a Redis, a store, processes that serve and work, operators, clients, and a nemesis.

What runs is the service's own code: the scripts, the issuer, the steps of the worker, the commands.  Simulated are
the servers, the network and time.  ``simulate`` runs one schedule and says what it broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal, cast
from zlib import crc32

import msgspec
import structlog
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.catalogue import Cap, Period
from service.domain import Busy, CapHolder, Outcome, RateLimit, RateLimited, Record, Request, Unavailable
from service.errors import Conflict, Fault, ScriptFailed, StoreIsOlder
from service.issuance import Issuer
from service.scripts import Scripts
from service.store import campaigns, control, ledger, stock
from service.store.answers import Answers
from service.store.database import Database
from service.store.schema import distributors
from service.tokens import digest
from service.web.preload import Preload
from service.worker import flush as flushing
from service.worker import patience, publish, repair, stocking, taking_back, withdrawing
from service.worker.adoption import Adoption
from service.worker.flush import Flush
from service.worker.partner_file import Line
from service.worker.publish import change, republish_once
from service.worker.recover import Recover
from service.worker.refill import Refill
from service.worker.restart import note_synced
from service.worker.unseen import Back
from service.worker.watch import Watch
from tests.simulation.check import Happened, Limit, Truth, codes_in_outboxes, open_generation
from tests.simulation.memory import Client, Data, Server
from tests.simulation.schedule import (
    CALM,
    Network,
    Odds,
    Process,
    Scheduler,
    Stuck,
    VirtualLoop,
    make_task,
)
from tests.simulation.store import Store, template

# Long waits of the service are made shorter here, so that a schedule of some seconds holds several of them: when an
# entry is taken over from a worker, and how long a command tries to reach a partition.
CLAIM_AFTER_MS: Final = 800
UNREACHED_S: Final = 1.0
DEADLINE_S: Final = 0.6

# How often the command that repairs the store is tried: beyond that something is in its way for good.
REPAIRS_MAX: Final = 60

# How long what was on its way when the last fault ended may take to arrive.
LATE_S: Final = 5.0

# Longest time between two looks of one worker at what may be wrong.
WATCH_S_MAX: Final = 5.0

# --- one schedule ----------------------------------------------------------------------------------------------------

Family = Literal["calm", "crashes", "network", "redis", "store", "older", "mixed", "split"]
# In "split", an old primary answers again after a failover.  It knows nothing of what happened since, and until its
# generation is left some promises can't be kept (check.Truth.went_back); P1, P2, P4 and P5 are.
FAMILIES: Final[tuple[Family, ...]] = (
    "calm", "crashes", "network", "redis", "redis", "redis", "split", "store", "older", "mixed", "mixed", "mixed",
)  # fmt: skip

NEVER_A_COPY: Final[tuple[Family, ...]] = ("calm", "crashes", "network", "store", "older")

PRODUCTS: Final = ("PAY", "MOB")
TERMINALS: Final = ("T1", "T2", "T3")
ZONES: Final = ("UTC", "Europe/Berlin", "Asia/Kolkata")
DISTRIBUTORS: Final = ("D1", "D2")
QUIET_S: Final = 120.0  # longest that an installation without faults may take to come to rest


class Result(msgspec.Struct):
    """What one schedule did and broke."""

    seed: int
    family: str
    violations: list[str]
    counts: dict[str, int]
    trace: list[str]


class Serve:
    """One serving process, and what clients need of it."""

    def __init__(self, process: Process, issuer: Issuer) -> None:
        self.process = process
        self.issuer = issuer


class World:
    """One installation under one seed."""

    def __init__(self, seed: int, loop: VirtualLoop, directory: Path, family: Family | None) -> None:
        self.loop = loop
        self.scheduler = Scheduler(seed, loop, CALM)
        self.rng = self.scheduler.rng
        rng = self.rng
        chosen = rng.choice(FAMILIES)
        self.family: Family = chosen if family is None else family
        # Half of those whose Redis never comes back older promise that, and are restarted often.
        self.in_place = self.family in NEVER_A_COPY and random.Random(seed).random() < 0.5
        self.retention_s = 86_400
        self.outbox_max = rng.choice((8, 30, 200))
        self.low_water = rng.choice((2, 4, 8))
        self.counts: Counter[str] = Counter()
        self.ids = itertools.count(1)
        self.server = Server(self.scheduler.unix, lambda: f"{next(self.ids):040d}")
        self.network = Network(self.server)
        self.store = Store(self.scheduler, directory)
        self.truth = Truth(self.server, self.store.peek, self.retention_s)
        self.tokens: dict[str, list[str]] = {distributor: [] for distributor in DISTRIBUTORS}
        self.pools: list[str] = []
        self.campaigns: list[str] = []
        self.serves: dict[str, Serve] = {}
        self.healthy = False  # the nemesis is gone: whoever dies now stays dead
        self.over = False
        self.processes: list[Process] = []
        self.numbers = itertools.count(1)
        self.snapshots: list[Data] = []
        self.store_snapshots: list[bytes] = []
        self.opened_on: set[str] = set()  # run ids under which a worker opened a generation
        self.is_older = False
        self.repairing: asyncio.Task[None] | None = None
        self.recovery = rng.choice((1, 4))  # how much slower than usual
        self.outbox_bytes_max = rng.choice((1_500, 10**6))
        for distributor in DISTRIBUTORS:
            if rng.random() < 0.4:
                self.truth.rates[distributor] = RateLimit(rng.choice((1, 3, 7)), rng.choice((2, 5)))

    def unix(self) -> int:
        return int(self.scheduler.unix())

    def scripts(self, process: Process) -> Scripts:
        return Scripts(cast(Any, Client(self.scheduler.to_redis(process, self.network))))

    # --- the schedule --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        rng = self.rng
        await self._set_up()
        self.scheduler.odds = self._odds()
        serves = rng.choice((1, 2, 2))
        workers = rng.choice((1, 2, 2, 3))
        keepers = [self._keep(f"serve-{i}", self._serve) for i in range(serves)]
        keepers += [self._keep(f"work-{i}", self._work) for i in range(workers)]
        duration = rng.uniform(1.5, 4.0)
        self.loop.set_exception_handler(self._defect)
        tasks = [self.loop.create_task(keeper) for keeper in keepers]
        clients = [self.loop.create_task(self._buy(rng.random() * duration)) for _ in range(rng.randrange(25, 60))]
        operating = self.loop.create_task(self._operate(duration))
        nemesis = self.loop.create_task(self._nemesis(duration))
        await asyncio.gather(*clients, operating, nemesis)
        self._heal()
        if self.repairing is not None:
            await self.repairing
            # A command that began before the loss may have put in force since what the store has no more.
            await asyncio.sleep(LATE_S)
            await self._recover_store(0.0)
            await self._quiet()
            self.is_older = False  # whoever says so from here on is wrong
            self.truth.store_was_repaired(self.pools)
        await self._quiet()
        for distributor in DISTRIBUTORS:
            if rng.random() < 0.4:
                await self._adopt(distributor)
        if rng.random() < 0.4:
            for pool in self.pools:
                await self._return_unseen(pool)
            await self._quiet()
        await self._probe()
        await self._quiet()
        self.truth.check_quiet()
        self.over = True
        for task in tasks:
            task.cancel()

    def _defect(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.truth.broken("defect", f"{context.get('message')}: {context.get('exception')!r}")

    def _odds(self) -> Odds:
        rng, family = self.rng, self.family
        odds = Odds(
            slow=rng.choice((0.0, 0.03, 0.15)), slow_s=rng.choice((0.1, 0.5, 1.0)), quick_s=rng.choice((0.001, 0.01))
        )
        if family in ("crashes", "mixed"):
            odds.crash = rng.choice((0.002, 0.01, 0.03))
        if family in ("network", "mixed", "older"):
            odds.unsent, odds.late, odds.unheard = (rng.choice((0.0, 0.01, 0.03)) for _ in range(3))
        if family in ("store", "mixed", "crashes"):
            odds.commit_unknown = rng.choice((0.0, 0.02, 0.1))
        return odds

    def _heal(self) -> None:
        self.scheduler.note("nemesis", "heals everything")
        self.scheduler.odds = CALM
        self.healthy = True
        self.network.reachable, self.server.loading = True, False
        if self.server.role != "master":
            self.server.promote(self.server.data)
        self.store.away = False
        for process in self._alive():
            process.asleep_until = 0.0

    async def _quiet(self) -> None:
        """Waits until nothing is left to do."""
        deadline = self.loop.time() + QUIET_S
        while (busy := self._busy()) and not self.truth.violations:
            if self.loop.time() > deadline:
                self.truth.broken("rest", f"without faults the installation does not come to rest: {busy}")
                return
            await asyncio.sleep(0.25)

    def _busy(self) -> str:
        data: Any = self.server.data.keys
        generation = data.get("{0}:generation", {})
        opened = open_generation(self.server.data)
        if not opened or generation.get("replid") != self.server.replid:
            return "no generation is open"
        if "restoring" in generation:
            return "records are being restored"
        if codes_in_outboxes(self.server.data):
            return "the outbox is not empty"
        if self.store.peek("select 1 from generations where generation = ? and state <> 'open'", opened):
            return "the open generation is not open in the store"
        ((version,),) = self.store.peek("select version from catalogue_head")
        if int(data.get("{0}:fence", -1)) < version:
            return "the fence is behind the store"
        live = self.store.peek(
            "select pool from campaigns where not paused and (until = 0 or until > ?)", self.scheduler.unix()
        )
        for pool, stock_version in self.store.peek("select id, stock_version from pools"):
            if pool not in self.truth.campaign_pools.values():
                continue
            held = data.get(f"{{0}}:{opened}:pool:{pool}", {})
            if int(held.get("stock", 0)) < stock_version:
                return f"{pool}'s stock version is behind the store"
            length = len(data.get(f"{{0}}:{opened}:window:{pool}", ()))
            if (pool,) in live and length < self.low_water and held.get("exhausted") != str(stock_version):
                return f"{pool} is below its low water"
        leases = self.store.peek("select id, pool from leases where generation = ? order by rowid desc", opened)
        for pool in {pool for _, pool in leases}:
            last = next(id for id, of in leases if of == pool)
            if data.get(f"{{0}}:{opened}:pool:{pool}", {}).get("lease") != last:
                return f"{pool}'s last lease is not applied"
        return ""

    async def _probe(self) -> None:
        """Everybody gets a definite answer."""
        while any(not serve.process.alive for serve in self.serves.values()):
            await asyncio.sleep(0.1)
        distributor = self.rng.choice(DISTRIBUTORS)
        token = self._new_token(distributor)
        if not await self._make_token(distributor, token):
            self.truth.broken("rest", "without faults a token can't be made")
            return
        for name in sorted(self.serves):
            request = self._request(distributor, f"probe-{next(self.numbers)}")
            outcome: Outcome | None = None
            for _ in range(5):
                outcome = await self._ask(self.serves[name], token, request)
                if not isinstance(outcome, Busy):
                    break
                await asyncio.sleep(1.0)
            if outcome is None or isinstance(outcome, Busy):
                self.truth.broken("rest", f"without faults {name} answers {outcome}")

    # --- set-up --------------------------------------------------------------------------------------------------

    async def _set_up(self) -> None:
        """A catalogue, stock, and a first generation, before anything goes wrong."""
        rng, process = self.rng, Process("setup")
        database, scripts, now = self.store.door(process), self.scripts(process), self.unix()
        self.pools = [f"pool-{i}" for i in range(rng.choice((1, 2, 2)))]
        self.campaigns = [f"camp-{i}" for i in range(rng.choice((1, 2, 3)))]
        tokens = {distributor: self._new_token(distributor) for distributor in DISTRIBUTORS}

        async def edit(conn: AsyncConnection) -> None:
            for pool in self.pools:
                self.truth.least_life[pool] = rng.choice((0, 0, 2))
                await control.create_pool(
                    conn, pool, default_expires_at=now + 30 * 86_400, least_life_s=self.truth.least_life[pool], now=now
                )
            for distributor, token in tokens.items():
                await control.create_distributor(conn, distributor, distributor, now)
                await control.add_credential(conn, distributor, digest(token), now)
                if (limit := self.truth.rates.get(distributor)) is not None:
                    # Below what an operator may set: a schedule holds few vouchers.
                    values = {"rate": limit.rate, "burst": limit.burst}
                    await conn.execute(update(distributors).where(distributors.c.id == distributor).values(values))
            for campaign in self.campaigns:
                pool, zone, caps = (
                    rng.choice(self.pools),
                    rng.choice(ZONES),
                    self._caps(("campaign", "distributor", "terminal")),
                )
                await campaigns.create(
                    conn, campaign, category="CAT", products=rng.sample(PRODUCTS, rng.choice((1, 2, 2))), pool=pool,
                    priority=rng.randrange(3), starts_at=now - 60, until=rng.choice((0, 0, 0, now + 6)), time_zone=zone,
                    caps=caps, now=now,
                )  # fmt: skip
                self.truth.zones[campaign], self.truth.campaign_pools[campaign] = zone, pool
                for cap in caps:
                    self.truth.limits[campaign, cap.holder, "", cap.period] = [Limit(cap.limit)]
                for distributor in DISTRIBUTORS[: rng.choice((1, 2, 2, 2))]:
                    caps = self._caps(("distributor", "terminal"))
                    await campaigns.assign(conn, campaign, distributor, caps, now)
                    for cap in caps:
                        self.truth.limits[campaign, cap.holder, distributor, cap.period] = [Limit(cap.limit)]

        flush = self._flush(process, database, scripts)
        recover = self._recover(database, scripts, flush)
        await recover.run_once()
        await recover.run_once()  # nothing has to be restored
        await change(database, scripts, edit, actor="setup", action="create", subject="all")
        for token in tokens.values():
            self.truth.changes[token].append(Happened("made", 0, 0))
        async with database.write() as conn:
            for pool in self.pools:
                rows = self._rows()
                await stock.begin_import(conn, f"import-{pool}", pool, now)
                await stock.import_rows(conn, f"import-{pool}", pool, rows, now)
                await stock.finish_import(conn, f"import-{pool}", now)
        for pool in self.pools:
            self.truth.stock_known(pool)

    def _caps(self, holders: Sequence[CapHolder]) -> list[Cap]:
        periods: tuple[Period, ...] = ("total", "day", "hour")
        return [
            Cap(holder, period, self.rng.randrange(1, 12))
            for holder in holders
            for period in periods
            if self.rng.random() < 0.06
        ]

    def _new_token(self, distributor: str) -> str:
        token = f"token-{next(self.numbers)}"
        self.tokens[distributor].append(token)
        return token

    # --- processes -----------------------------------------------------------------------------------------------

    async def _keep(self, name: str, start: Callable[[Process], None]) -> None:
        """Starts a process again whenever it died."""
        for life in itertools.count():
            process = Process(name if self.rng.random() < 0.5 else f"{name}.{life}")
            self.processes.append(process)
            start(process)
            while process.alive:
                await asyncio.sleep(0.05)
            await asyncio.sleep(self.rng.random())

    def _serve(self, process: Process) -> None:
        database, scripts = self.store.door(process), self.scripts(process)

        async def lookup(requests: Sequence[Request]) -> Mapping[Request, Record]:
            found: dict[Request, Record] = {}
            async with database.read() as conn:
                for request in requests:
                    known = await ledger.lookup(conn, request.api, request.client, [request.key])
                    if request.key in known:
                        found[request] = known[request.key]
            return found

        preload = Preload(
            database, scripts, lambda catalogue: issuer.adopt(catalogue),
            lambda: -1 if issuer.catalogue is None else issuer.catalogue.version,
        )  # fmt: skip
        issuer = Issuer(
            scripts, preload.load, lookup, Answers(database).replays,
            outbox_max=self.outbox_max, outbox_bytes_max=self.outbox_bytes_max, retention_s=self.retention_s,
            queue_max=64, deadline_s=DEADLINE_S, clock=self.loop.time, unix_clock=self.scheduler.unix,
        )  # fmt: skip

        async def begin() -> None:
            issuer.start()

        self.scheduler.spawn(process, begin())
        self.serves[process.name.split(".")[0]] = Serve(process, issuer)

    def _work(self, process: Process) -> None:
        database, scripts = self.store.door(process), self.scripts(process)
        flush = self._flush(process, database, scripts)
        recover = self._recover(database, scripts, flush)
        refill = self._refill(process)
        watch = Watch(
            database, scripts, planned_rate=1, outbox_max=self.outbox_max, outbox_bytes_max=self.outbox_bytes_max,
            now=self.scheduler.unix,
        )  # fmt: skip

        async def watch_step() -> None:
            await watch.count_once()
            if older := await watch.run_once():
                self.counts["store older noticed"] += 1
                if not self.is_older:
                    self.truth.broken("watch", f"the store is called older and is not: {older}")

        async def recover_step() -> None:
            done = await recover.run_once()
            if done.opened:
                self.counts["went on"] += not done.rolled and self.server.run_id not in self.opened_on
                self.opened_on.add(self.server.run_id)

        for step, least, most in (
            (recover_step, 0.1 * self.recovery, 0.8 * self.recovery), (flush.run_once, 0.05, 0.8),
            (lambda: refill.step(wait_s=0), 0.1, 0.8), (lambda: republish_once(database, scripts), 0.2, 1.5),
            (recover.clean_once, 0.5, 2.5), (watch_step, 0.5, WATCH_S_MAX),
        ):  # fmt: skip
            self.scheduler.spawn(process, self._loop(step, least, most))
        if self.in_place:
            self.scheduler.spawn(process, self._loop(lambda: note_synced(scripts), 0.1, 0.5))

    def _flush(self, process: Process, database: Database, scripts: Scripts) -> Flush:
        return Flush(database, scripts, consumer=process.name, retention_s=self.retention_s, now=self.unix)

    def _refill(self, process: Process) -> Refill:
        return Refill(
            self.store.door(process), self.scripts(process), low_water=self.low_water, store_outage_s=1,
            now=self.unix, clock=self.loop.time, lease_id=lambda: f"lease-{next(self.numbers)}",
        )  # fmt: skip

    def _recover(self, database: Database, scripts: Scripts, flush: Flush) -> Recover:
        return Recover(
            database, scripts, flush, outbox_max=self.outbox_max, retention_s=self.retention_s,
            restart_in_place=self.in_place, now=self.unix,
        )  # fmt: skip

    async def _loop(self, step: Callable[[], Awaitable[object]], least: float, most: float) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(least, most))
            try:
                await step()
            except Fault as fault:
                self.counts[f"step {type(fault).__name__}"] += 1
                self.scheduler.note("step", type(fault).__name__, str(fault))
                if isinstance(fault, ScriptFailed):
                    self.truth.broken("defect", f"a step of the worker: {fault}")
            except Exception as defect:  # noqa: BLE001 - whatever the worker's own loops would survive and log
                self.truth.broken("defect", f"a step of the worker: {''.join(traceback.format_exception(defect))}")

    # --- operators -----------------------------------------------------------------------------------------------

    async def _operate(self, duration: float) -> None:
        """One command after the other, each in a process of its own."""
        rng = self.rng
        end = self.loop.time() + duration
        while self.loop.time() < end:
            await asyncio.sleep(rng.uniform(0.05, 1.0))
            what = rng.choice(
                ("pause", "pause", "import", "import", "token", "revoke", "caps", "withdraw", "back", "adopt")
            )
            if what == "pause":
                campaign = rng.choice(self.campaigns)
                for paused in (True, False):
                    await self._set_paused(campaign, paused)
                    await asyncio.sleep(rng.random())
            elif what == "import":
                await self._command(self._import, rng.choice(self.pools))
            elif what == "withdraw":
                await self._command(self._withdraw, rng.choice(self.pools))
            elif what == "back":
                await self._take_back(rng.choice(self.pools))
            elif what == "adopt":
                await self._adopt(rng.choice(DISTRIBUTORS))
            elif what == "token":
                distributor = rng.choice(DISTRIBUTORS)
                await self._make_token(distributor, self._new_token(distributor))
            elif what == "revoke":
                distributor = rng.choice(DISTRIBUTORS)
                if len(self.tokens[distributor]) > 1:
                    await self._revoke(rng.choice(self.tokens[distributor]))
            else:
                await self._change_caps()

    async def _set_paused(self, campaign: str, paused: bool) -> bool:
        return await self._publish(
            campaign,
            "pause" if paused else "resume",
            lambda conn: campaigns.set_paused(conn, campaign, paused, self.unix()),
        )

    async def _make_token(self, distributor: str, token: str) -> bool:
        return await self._publish(
            token, "made", lambda conn: control.add_credential(conn, distributor, digest(token), self.unix())
        )

    async def _revoke(self, token: str) -> bool:
        return await self._publish(
            token, "revoked", lambda conn: control.revoke_credentials(conn, token_sha256=digest(token), now=self.unix())
        )

    async def _change_caps(self) -> None:
        rng, limits = self.rng, self.truth.limits
        assigned = sorted({(campaign, distributor) for campaign, _, distributor, _ in limits if distributor})
        if not assigned:
            return
        campaign, distributor = rng.choice(assigned)
        mine = [cap for cap in sorted(limits) if cap[0] == campaign and cap[2] == distributor]
        caps = [Cap(cast(CapHolder, cap[1]), cast(Period, cap[3]), rng.randrange(1, 12)) for cap in mine]
        for cap, new in zip(mine, caps, strict=True):
            limits[cap].append(Limit(new.limit))
        done = await self._publish(
            f"caps of {campaign}", "caps", lambda conn: campaigns.assign(conn, campaign, distributor, caps, self.unix())
        )
        if done:
            for cap in mine:
                for old in limits[cap][:-1]:
                    old.until = min(old.until, self.scheduler.unix())

    async def _publish(self, subject: str, what: str, edit: Callable[[AsyncConnection], Awaitable[object]]) -> bool:
        """Whether the change is in force everywhere."""
        happened = Happened(what, self.scheduler.unix())
        self.truth.changes[subject].append(happened)

        async def command(process: Process) -> bool:
            published = await change(
                self.store.door(process), self.scripts(process), edit, actor="operator", action=what, subject=subject
            )
            if published.unreached:
                return False
            happened.returned = self.scheduler.unix()
            return True

        return await self._command(command)

    async def _command(self, command: Callable[..., Awaitable[bool]], *arguments: object) -> bool:
        """Runs a command in a process of its own; whether it did what it was to do."""
        process = Process(f"command-{next(self.numbers)}")

        async def run() -> bool:
            try:
                return await command(process, *arguments)
            except StoreIsOlder:
                if not self.is_older:
                    self.truth.broken("watch", "a command says that the store is older, and it is not")
                return False
            except (Fault, Conflict) as fault:
                self.counts[f"command {type(fault).__name__}"] += 1
                return False

        task = self.scheduler.spawn(process, run())
        await asyncio.wait([task])
        return not task.cancelled() and task.result()

    def _rows(self) -> list[stock.Row]:
        """Codes for an import, of one expiry or of several: some expire within the schedule."""
        rng, number, now = self.rng, next(self.numbers), self.unix()
        expiries = [None, None, now + 3, now + 15, now + 5_000]
        expiry = rng.choice(expiries)
        return [
            stock.Row(line, f"CODE-{number}-{line}", None, expiry if rng.random() < 0.9 else rng.choice(expiries))
            for line in range(1, rng.randrange(2, 40))
        ]

    async def _import(self, process: Process, pool: str) -> bool:
        report = await stocking.import_codes(
            self.store.door(process), self.scripts(process), pool, self._rows(),
            import_id=f"import-{next(self.numbers)}", now=self.unix,
        )  # fmt: skip
        if report.unreached:
            return False
        self.truth.stock_known(pool)
        return True

    async def _withdraw(self, process: Process, pool: str) -> bool:
        """Some codes, or a whole lot; what may have been given to somebody by then is not held against it."""
        rng, path = self.rng, self.store.path
        stored = self.store.peek("select lot, seq, code from codes where pool = ? order by lot, seq", pool)
        lots = sorted({lot for lot, _, _ in stored})
        lot = rng.choice(lots) if lots and rng.random() < 0.2 else None
        chosen = [row for row in stored if (row[0] == lot if lot is not None else rng.random() < 0.15)]
        done = await withdrawing.withdraw(
            self.store.door(process), self.scripts(process), self._refill(process), pool,
            named=[code for _, _, code in chosen] if lot is None else (), lot=lot,
            reason="leaked", actor="operator", now=self.unix,
        )  # fmt: skip
        self.counts["withdrawn"] += done.stock + done.windows
        if done.unreached or self.store.path != path:  # the store that it was done in is gone
            return False
        for position in {(at, seq) for at, seq, _ in chosen} - set(self.truth.left):
            self.truth.withdrawn.setdefault(position, self.scheduler.unix())
        return True

    async def _take_back(self, pool: str) -> None:
        """What issues from the pool is paused, and goes on afterwards; maybe before all is back in stock."""
        issuing = [campaign for campaign in self.campaigns if self.truth.campaign_pools[campaign] == pool]
        for campaign in issuing:
            await self._set_paused(campaign, True)
        await self._command(self._take, pool)
        for campaign in issuing:
            await self._set_paused(campaign, False)

    async def _take(self, process: Process, pool: str) -> bool:
        done = await taking_back.take_back(
            self.store.door(process), self.scripts(process), self._refill(process), pool,
            reason="over", actor="operator", outbox_max=self.outbox_max, now=self.unix,
        )  # fmt: skip
        self.counts["taken back"] += done.returned
        return not done.unfinished

    async def _adopt(self, distributor: str) -> None:
        """What the distributor was told of vouchers of one campaign, by a file that names the keys."""
        campaign, lines = self.rng.choice(self.campaigns), list[Line]()
        for (client, key), answers in self.truth.told.items():
            records = [Record.unpack(answer.record) for answer in answers if client == distributor]
            lines += [
                Line(len(lines), code.code, key, received_at=record.issued_at if self.rng.random() < 0.5 else None)
                for record in records
                if record.rule.campaign == campaign
                for code in record.codes
            ]
        await self._command(self._adopt_lines, campaign, distributor, lines)

    async def _adopt_lines(self, process: Process, campaign: str, distributor: str, lines: list[Line]) -> bool:
        adoption = Adoption(
            self.store.door(process), self.scripts(process), campaign, distributor,
            reason="lost", actor="operator", rehearse=False, now=self.unix,
        )  # fmt: skip
        await adoption.begin()
        await adoption.adopt(lines)
        self.counts["adopted"] += adoption.adopted
        return True

    async def _return_unseen(self, pool: str) -> None:
        """All clients have said what they received.  The command may die anywhere, and is then typed again."""
        rng = self.rng
        for _ in range(REPAIRS_MAX):
            process = Process(f"return-{next(self.numbers)}")
            command = self.scheduler.spawn(process, self._return(process, pool))
            await asyncio.wait([command], timeout=rng.random() * 0.05 if rng.random() < 0.4 else None)
            if not command.done():
                self.counts["return unseen died"] += 1
                await self._die(process)
            elif not command.cancelled() and command.result():
                self.truth.stock_known(pool)
                return
            await asyncio.sleep(rng.random())
        self.truth.broken("rest", f"what nobody received is not in stock after {REPAIRS_MAX} times")

    async def _return(self, process: Process, pool: str) -> bool:
        told = (Record.unpack(one.record) for answers in self.truth.told.values() for one in answers)
        received = {stock.digest(code.code) for record in told for code in record.codes}
        back = Back(
            self.store.door(process), self.scripts(process), pool, DISTRIBUTORS, self.unix() + 1,
            reason="lost", actor="operator", rehearse=False, now=self.unix,
        )  # fmt: skip
        try:
            self.counts["returned unseen"] += await back.run(received.__contains__)
        except (Fault, Conflict) as fault:
            self.counts[f"return unseen {type(fault).__name__}"] += 1
            self.scheduler.note(process.name, type(fault).__name__, str(fault))
            return False
        return True

    # --- clients -------------------------------------------------------------------------------------------------

    def _request(self, distributor: str, key: str) -> Request:
        rng = self.rng
        terminal = rng.choice(TERMINALS)
        products = tuple(rng.sample(PRODUCTS, rng.choice((1, 2))))
        number = crc32(f"{distributor} {key}".encode())
        trace = f"00-{number:032x}-{'1' * 16}-01" if number % 2 else ""  # so that batches have some, none, or one each
        return Request("v1", distributor, key, distributor, products, f"{terminal}\t{','.join(products)}", trace=trace)

    async def _buy(self, after: float) -> None:
        """One key: asked until there is an answer, and asked again later."""
        rng = self.rng
        await asyncio.sleep(after)
        distributor = rng.choice(DISTRIBUTORS)
        request = self._request(distributor, f"key-{next(self.numbers)}")
        for _ in range(rng.choice((1, 4, 8))):
            if rng.random() < 0.1:
                pair = [self._ask_any(request), self._ask_any(request)]
                outcome = (await asyncio.gather(*pair))[0]
            else:
                outcome = await self._ask_any(request)
            if outcome is not None and not isinstance(outcome, (Busy, RateLimited, Unavailable)):
                break
            if isinstance(outcome, Unavailable) and rng.random() < 0.7:
                break
            await asyncio.sleep(rng.random() * 0.6)
        for _ in range(rng.choice((0, 0, 1, 2))):
            await asyncio.sleep(rng.random() * 1.5)
            again = request
            if rng.random() < 0.3:
                again = msgspec.structs.replace(
                    request, payload=request.payload + "X", products=(*request.products, "X")
                )
            await self._ask_any(again)

    async def _ask_any(self, request: Request) -> Outcome | None:
        if not self.serves:
            return None
        token = self.rng.choice(self.tokens[request.distributor])
        return await self._ask(self.serves[self.rng.choice(sorted(self.serves))], token, request)

    async def _ask(self, serve: Serve, token: str, request: Request) -> Outcome | None:
        """What the client is told; None if its connection broke or it did not wait."""
        if not serve.process.alive:
            return None
        begun = self.scheduler.unix()
        task = self.scheduler.spawn(serve.process, serve.issuer.issue(token, request))
        patience = self.rng.random() * 0.5 if not self.healthy and self.rng.random() < 0.03 else None
        await asyncio.wait([task], timeout=patience)
        if not task.done():
            task.cancel()
            return None
        if task.cancelled():
            return None
        outcome = task.result()
        self.scheduler.note("client", f"{request.key} is told", outcome)
        self.truth.answered(token, request, outcome, begun)
        return outcome

    # --- the nemesis ---------------------------------------------------------------------------------------------

    async def _nemesis(self, duration: float) -> None:
        """What goes wrong at large: servers, clocks, sleepers.  Small things happen at every point by themselves."""
        rng, family = self.rng, self.family
        end = self.loop.time() + duration
        acts: list[Callable[[], Awaitable[None]]] = [self._snapshot]
        if family != "calm":
            acts += [self._sleeper, self._sleeper, self._jump]
        if family in ("redis", "mixed", "network", "split"):
            acts += [self._restart, self._rename, self._forget_scripts]
        if family in ("redis", "mixed"):
            acts += [
                self._older_copy,
                self._empty,
                self._promoted,
                self._demoted,
                self._older_copy,
                self._promoted,
                self._older_copy,
            ]
        if family == "split":
            acts += [self._old_primary, self._old_primary]
        if family in ("store", "mixed"):
            acts += [self._store_away]
        if self.in_place:
            acts += [self._restart] * 3
        if family == "older":
            acts += [self._store_older, self._store_older, self._store_away]
        while self.loop.time() < end:
            await asyncio.sleep(rng.uniform(0.1, 1.0))
            act = rng.choice(acts)
            self.counts[act.__name__.strip("_")] += 1
            await act()
            if rng.random() < 0.5:
                await self._snapshot()

    async def _snapshot(self) -> None:
        self.snapshots.append(self.server.data.copy())
        if self.family == "older":
            self.store_snapshots.append(self.store.snapshot())

    async def _sleeper(self) -> None:
        """A process stands still: a short time, or longer than its claim on what it was doing."""
        if processes := self._alive():
            process = self.rng.choice(processes)
            seconds = self.rng.choice((0.3, 1.0, 2.0, 3.0))
            process.asleep_until = self.loop.time() + seconds
            self.scheduler.note("nemesis", f"{process.name} sleeps for {seconds} s")

    def _alive(self) -> list[Process]:
        self.processes = [process for process in self.processes if process.alive]
        return self.processes

    async def _jump(self) -> None:
        seconds = self.rng.choice((20.0, 20.0, 3_700.0, 90_000.0))
        self.scheduler.note("nemesis", f"it is {seconds:.0f} s later")
        self.loop.jump(seconds)

    async def _down(self) -> None:
        self.network.reachable = False
        self.network.cut()
        await asyncio.sleep(self.rng.choice((0.01, 0.2, 0.8)))

    async def _up(self) -> None:
        self.network.reachable = True
        if self.rng.random() < 0.3:
            self.server.loading = True
            await asyncio.sleep(self.rng.random() * 0.5)
            self.server.loading = False

    async def _restart(self) -> None:
        self.scheduler.note("nemesis", "Redis restarts with all its data")
        await self._down()
        self.server.restart(self.server.data)
        await self._up()

    async def _rename(self) -> None:
        self.scheduler.note("nemesis", "the same server has a new replication id")
        self.server.rename()

    async def _forget_scripts(self) -> None:
        self.server.scripts.clear()

    def _some_snapshot(self) -> Data:
        data = self.rng.choice(self.snapshots).copy() if self.snapshots else Data()
        self.truth.lose(self.server.data, data)
        return data

    async def _older_copy(self) -> None:
        await self._down()
        data = self._some_snapshot()
        self.scheduler.note("nemesis", "Redis is restored from an older copy")
        self.server.restart(data)
        await self._up()

    async def _empty(self) -> None:
        await self._down()
        self.scheduler.note("nemesis", "Redis is empty")
        self.truth.lose(self.server.data, Data())
        self.server.restart(Data())
        await self._up()

    async def _promoted(self) -> None:
        data = self._some_snapshot()
        if self.rng.random() < 0.5:
            await self._down()
        self.network.cut()
        self.truth.lose(self.server.data, data)
        self.scheduler.note("nemesis", "a lagging replica is promoted")
        self.server.restart(data, follows=True)
        await self._up()

    async def _old_primary(self) -> None:
        """A failover, and then the address leads to the server from before it, which knows nothing of that."""
        before = self.server.identity()
        await self._promoted()
        await asyncio.sleep(self.rng.random() * 2)
        if self.server.role != "master":
            return
        await self._down()
        self.scheduler.note("nemesis", "the old primary is back")
        self.truth.lose(self.server.data, before[0])
        self.truth.went_back = True
        self.server.become(before)
        await self._up()

    async def _demoted(self) -> None:
        self.scheduler.note("nemesis", "Redis is demoted")
        self.server.demote()
        await asyncio.sleep(self.rng.random())
        data = self._some_snapshot() if self.rng.random() < 0.5 else self.server.data
        self.scheduler.note("nemesis", "Redis is promoted again")
        self.server.promote(data)

    async def _store_away(self) -> None:
        self.scheduler.note("nemesis", "the store is away")
        self.store.away = True
        self.store.drop()
        await asyncio.sleep(self.rng.choice((0.2, 0.8, 1.5)))
        self.store.away = False
        self.scheduler.note("nemesis", "the store is back")

    async def _store_older(self) -> None:
        if self.store_snapshots and not self.is_older:
            self.scheduler.note("nemesis", "the store is restored from an older copy")
            before = self.truth.in_ledger()
            self.store.restore(self.rng.choice(self.store_snapshots))
            self.is_older = True
            self.truth.store_came_back(before)
            self.repairing = self.loop.create_task(
                self._recover_store(self.rng.random() * self.rng.choice((0.3, 3.0, 2 * WATCH_S_MAX)))
            )

    async def _recover_store(self, after_s: float) -> None:
        """An operator repairs the store; the command may die anywhere, and is then typed again."""
        rng = self.rng
        await asyncio.sleep(after_s)
        lost = self.truth.check_kept()
        for attempt in range(REPAIRS_MAX):
            process = Process(f"repair-{next(self.numbers)}")
            command = self.scheduler.spawn(process, self._repair(process))
            await asyncio.wait([command], timeout=rng.random() * 0.4 if rng.random() < 0.4 else None)
            if not command.done():
                self.counts["recover-store died"] += 1
                await self._die(process)
            elif not command.cancelled() and (done := command.result()) is not None:
                if lost and not done.older and not attempt:
                    self.truth.broken("watch", f"the store lost {lost} vouchers, and is not called older")
                self.counts["recover-store"] += 1
                self.counts["recreated"] += done.vouchers
                return
            await asyncio.sleep(rng.random())
        self.truth.broken("rest", f"the store is not repaired after {REPAIRS_MAX} times")

    async def _die(self, process: Process) -> None:
        self.scheduler.note(process.name, "dies", "killed")
        process.kill()
        await asyncio.sleep(0)

    async def _repair(self, process: Process) -> repair.Repair | None:
        database, scripts = self.store.door(process), self.scripts(process)
        flush = self._flush(process, database, scripts)
        recover = self._recover(database, scripts, flush)
        try:
            return await repair.repair(database, scripts, flush, recover, actor="operator", now=self.unix)
        except Fault as fault:
            self.counts[f"recover-store {type(fault).__name__}"] += 1
            self.scheduler.note(process.name, type(fault).__name__, str(fault))
            if isinstance(fault, ScriptFailed):
                self.truth.broken("defect", f"recover-store: {fault}")
            return None


# --- running one -----------------------------------------------------------------------------------------------------

_loops: Final[list[VirtualLoop]] = []


def simulate(seed: int, family: Family | None = None) -> Result:
    """Runs the schedule of ``seed``, one of ``family`` if given.  The same seed does the same, in every process."""
    if not _loops:
        template()
        loop = VirtualLoop()
        loop.set_task_factory(cast(Any, make_task))
        _loops.append(loop)
    loop = _loops[0]
    gc.disable()  # statements and tasks leave cycles behind; looking for them all the time costs a fifth
    if seed % 20 == 0:
        gc.collect()
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as directory:
        world = World(seed, loop, Path(directory), family)
        with _in_virtual_time(world), _heard(world):
            main = loop.create_task(_until_broken(world))
            try:
                loop.run_until_complete(main)
            except Stuck:
                world.truth.broken("rest", "everybody waits for ever")
            finally:
                loop.shut()
                world.store.close()
                gc.enable()
    counts = Counter(world.counts)
    counts.update(world.truth.outcomes)
    counts["issued"] += len(world.truth.records)
    counts["destroyed"] += len(world.truth.destroyed)
    return Result(
        seed, world.family, world.truth.violations, dict(counts),
        list(world.scheduler.told()) if world.truth.violations else [],
    )  # fmt: skip


async def _until_broken(world: World) -> None:
    running = asyncio.ensure_future(world.run())
    while not running.done() and not world.truth.violations:
        await asyncio.wait([running], timeout=0.2)
    if running.done():
        running.result()


@contextlib.contextmanager
def _in_virtual_time(world: World) -> Iterator[None]:
    """The commands look at the clock themselves."""
    clock: Any = SimpleNamespace(time=world.scheduler.unix, monotonic=world.loop.time)
    changed: list[tuple[Any, str, Any]] = [
        *((module, "time", clock) for module in (publish, repair, stocking, taking_back, withdrawing)),
        (patience, "UNREACHED_S", UNREACHED_S),
        (flushing, "CLAIM_AFTER_MS", CLAIM_AFTER_MS),
    ]
    real = [getattr(module, name) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changed, real, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _heard(world: World) -> Iterator[None]:
    """What the service logs; a defect that some loop survives is still one."""

    def hear(_logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event.get("exc_info"):
            world.truth.broken("defect", f"{event['event']}: {traceback.format_exc(limit=-4)}")
        elif method in ("warning", "error", "critical"):
            world.scheduler.note("log", method, {name: str(value) for name, value in event.items()})
        raise structlog.DropEvent

    config = structlog.get_config()
    structlog.configure(processors=[hear], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**config)
