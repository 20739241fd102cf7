"""What goes wrong, by the numbers of the table of faults in docs/reliability.md, and how it is mended.

Each fault is a function of the stage and a source of randomness.  It injects, waits, and heals what it has broken; dead
programs are started again by whoever called it (``Stage.mend``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import msgspec
import psutil
import redis
from redis.client import Pipeline

from loadtest.servers import free_port
from service import keys
from service.store.flush import STORE_OLDER
from service.worker.flush import CLAIM_AFTER_MS
from tests.chaos import power
from tests.chaos.stage import OUTAGE_S, Paused, Program, Stage, Store, Stuck, until

Happening = Callable[[Stage, random.Random], Any]

# Which of these are never injected at the same time: each needs the thing that it breaks to be whole.
Place = Literal["redis", "store", "process"]

# So long clients go on with what was revoked or paused, and so long a command may be refused while all is broken.
PROBE_S: Final = 0.7
RESUME_S: Final = 300.0

REPAIR_S: Final = 240.0  # a store that came back older is repaired within
MORE_LANES: Final = 1_000  # clients of an overload
MORE_S: Final = 120.0  # after it they all have their vouchers within

POINT_S: Final = 5.0  # a crash point that no process has come to by then is taken away
FULL_BYTES: Final = 50_000  # of commands and of memory, after which the disk or the memory is full
FLUSH_SCRIPTS_S: Final = 0.05


class Fault(msgspec.Struct, frozen=True):
    """``row`` of the table; 0 for what is not in it.  ``loses``: no copy of the outbox survives; ``power``: of a stage
    whose power can be cut; ``incidents``: what is on record afterwards."""

    name: str
    row: int
    place: Place
    happen: Happening
    loses: bool = False
    stores: tuple[Store, ...] = ("postgresql", "sqlite")
    power: bool = False
    incidents: tuple[str, ...] = ()

    def possible(self, stage: Stage) -> bool:
        return stage.store in self.stores and (stage.power or not self.power)


# --- processes ---------------------------------------------------------------------------------------------------


def _a_serving_process(stage: Stage, rng: random.Random) -> int | None:
    """The pid of one of those that answer; None if there is none just now."""
    pids = [pid for program in stage.serves for pid in program.pids[1:]]
    return rng.choice(pids) if pids else None


def _kill(pid: int | None) -> None:
    if pid is not None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def serving_processes_die(stage: Stage, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        _kill(_a_serving_process(stage, rng))
        time.sleep(rng.uniform(0, 0.3))


def serve_dies(stage: Stage, rng: random.Random) -> None:
    """The parent of serving processes, which drain then."""
    rng.choice(stage.serves).kill()


def serve_is_restarted(stage: Stage, rng: random.Random) -> None:
    """As an operator does it: what is in flight is answered."""
    rng.choice(stage.serves).stop()


def a_serving_process_sleeps(stage: Stage, rng: random.Random) -> None:
    pid = _a_serving_process(stage, rng)
    if pid is None:
        return
    try:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.uniform(0.2, 3.0))
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def dies_at(point: str) -> Happening:
    """One process dies between two lines; False if none came there."""

    def happen(stage: Stage, rng: random.Random, within_s: float = POINT_S) -> bool:
        path = stage.dies_at(point)

        def is_dead() -> bool:
            """One came there, and is gone: what still runs is not started again."""
            came = list(path.parent.glob(f"{point}.*"))
            return bool(came) and all(_ended(stage, int(one.suffix[1:])) for one in came)

        try:
            until(is_dead, f"a process that dies at {point}", within_s)
        except Stuck:
            return False
        finally:
            path.unlink(missing_ok=True)
            for one in path.parent.glob(f"{point}.*"):
                one.unlink(missing_ok=True)
        return True

    return happen


def _ended(stage: Stage, pid: int) -> bool:
    """Whether the process is no more.  Of a program of ours that is so when it can be waited for: until its last thread
    has ended, in a sync of a disk perhaps, it counts as alive."""
    for program in stage.programs:
        if program.process is not None and program.process.pid == pid:
            return not program.alive
    return not psutil.pid_exists(pid)  # one of `serve`, which waits for it


def workers_die(stage: Stage, rng: random.Random) -> None:
    for program in rng.sample(stage.works, rng.randint(1, len(stage.works))):
        program.kill()
        time.sleep(rng.uniform(0, 1.0))
        program.start()


def a_worker_sleeps_past_the_claim(stage: Stage, rng: random.Random) -> None:
    """Others take over what it has read; then it goes on where it was."""
    sleeper: Program = rng.choice(stage.works)
    sleeper.send(signal.SIGSTOP)
    time.sleep(CLAIM_AFTER_MS / 1000 + rng.uniform(0.5, 2.0))
    sleeper.send(signal.SIGCONT)


def all_workers_are_away(stage: Stage, rng: random.Random) -> None:
    for program in stage.works:
        program.kill()
    time.sleep(rng.uniform(0.5, OUTAGE_S / 2))
    for program in stage.works:
        program.start()


# --- Redis -------------------------------------------------------------------------------------------------------


def replies_are_lost(stage: Stage, rng: random.Random) -> None:
    stage.relay.deaf = True
    time.sleep(rng.uniform(0.05, 1.5))
    stage.relay.deaf = False
    stage.cut()


def replies_are_late(stage: Stage, rng: random.Random) -> None:
    stage.hold()
    time.sleep(rng.uniform(0.1, 3.0))
    stage.release()


def connections_are_reset(stage: Stage, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 20)):
        stage.cut()
        time.sleep(rng.uniform(0, 0.1))


def redis_cannot_be_reached(stage: Stage, rng: random.Random) -> None:
    stage.relay.refusing = True
    stage.cut()
    time.sleep(rng.uniform(0.2, 3.0))
    stage.relay.refusing = False


def redis_stands_still(stage: Stage, rng: random.Random, seconds: float | None = None) -> None:
    stage.redis.send(signal.SIGSTOP)
    time.sleep(rng.uniform(0.2, 3.5) if seconds is None else seconds)
    stage.redis.send(signal.SIGCONT)


def redis_dies(stage: Stage, rng: random.Random, seconds: float | None = None) -> None:
    stage.redis.kill()
    time.sleep(rng.choice((0.0, rng.uniform(0, 5.0))) if seconds is None else seconds)
    stage.redis.start()


def redis_is_restarted(stage: Stage, rng: random.Random) -> None:
    stage.redis.stop()
    stage.redis.start()


def the_power_is_cut(stage: Stage, rng: random.Random) -> None:
    """What the server had not synced is gone; it has told nobody of it."""
    power.cut(stage.redis)
    time.sleep(rng.uniform(0, 1.0))
    stage.redis.start()


def the_disk_is_full(stage: Stage, rng: random.Random) -> None:
    """The append-only file can grow by FULL_BYTES; under ``always`` the server ends then, and is started with space."""
    server = stage.redis
    assert server.process is not None
    largest = max(file.stat().st_size for file in (server.directory / "appendonlydir").iterdir())
    limit = largest + rng.randint(1, FULL_BYTES)
    _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, most))
    try:
        server.process.wait(2 * POINT_S)
    except Exception:  # noqa: BLE001 - nothing was issued for so long; the server goes on
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
        return
    time.sleep(rng.uniform(0, 1.0))
    server.kill()
    server.start()


def memory_is_full(stage: Stage, rng: random.Random) -> None:
    with stage.admin() as admin:
        admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) + rng.randint(1, FULL_BYTES))
        time.sleep(rng.uniform(0.5, 4.0))
        admin.config_set("maxmemory", 0)


def scripts_are_forgotten(stage: Stage, rng: random.Random) -> None:
    with stage.admin() as admin:
        end = time.monotonic() + rng.uniform(0.5, 3.0)
        while time.monotonic() < end:
            admin.script_flush()
            time.sleep(FLUSH_SCRIPTS_S)


def the_file_is_rewritten(stage: Stage, rng: random.Random) -> None:
    with stage.admin() as admin:
        admin.bgrewriteaof()
        until(lambda: not int(admin.info("persistence")["aof_rewrite_in_progress"]), "a rewritten file")


def redis_was_a_replica(stage: Stage, rng: random.Random) -> None:
    """Demoted and promoted again: the same process, the same connections."""
    with stage.admin() as admin:
        admin.replicaof("127.0.0.1", free_port())
        time.sleep(rng.uniform(0.05, 1.5))
        admin.replicaof("NO", "ONE")


def a_lagging_replica_is_promoted(
    stage: Stage, rng: random.Random, cut_off: Callable[[], None] = lambda: None
) -> float:
    """Returns since when what was told may be lost.  ``cut_off`` is called when the replica has just been."""
    primary, replica = stage.redis, stage.new_server()
    replica.start()
    with redis.Redis(port=replica.port, decode_responses=True, socket_timeout=10.0) as admin:
        admin.replicaof("127.0.0.1", primary.port)
        until(lambda: admin.info("replication")["master_link_status"] == "up", "a replica in step")
        until(stage.is_open, "a primary that is trusted with its first replica")
        time.sleep(rng.uniform(0, 1.0))
        admin.replicaof("127.0.0.1", free_port())  # it keeps what it has
        cut_off()
        since = stage.oldest_unflushed()
        time.sleep(rng.uniform(0.3, 1.5))
        primary.kill()
        time.sleep(rng.uniform(0, 1.0))
        admin.replicaof("NO", "ONE")
    stage.switch_to(replica)
    shutil.rmtree(primary.directory)
    return since


def an_old_copy_is_restored(stage: Stage, rng: random.Random) -> float:
    """Returns since when what was told may be lost."""
    server = stage.redis
    with stage.admin() as admin:  # a rewrite in between would leave a copy that is neither
        until(lambda: not int(admin.info("persistence")["aof_rewrite_in_progress"]), "a quiet file")
    server.keep()
    time.sleep(rng.uniform(0.5, 3.0))
    since = stage.oldest_unflushed()
    server.put_back()
    server.start()
    return since


def redis_is_emptied(stage: Stage, rng: random.Random) -> float:
    """Returns since when what was told may be lost."""
    server = stage.redis
    since = stage.oldest_unflushed()
    if rng.random() < 0.5:
        with stage.admin() as admin:
            admin.flushall()
        return since
    server.kill()
    shutil.rmtree(server.directory)
    server.start()
    return since


# --- the store ---------------------------------------------------------------------------------------------------


def the_store_is_away(stage: Stage, rng: random.Random, seconds: float | None = None) -> None:
    away_s = rng.uniform(0.5, 0.8 * OUTAGE_S) if seconds is None else seconds
    if stage.postgres is None:
        with stage.sqlite_locked():
            time.sleep(away_s)
        return
    stage.postgres.stop(signal.SIGQUIT)
    time.sleep(away_s)
    stage.postgres.start()


def the_store_stands_still(stage: Stage, rng: random.Random) -> None:
    assert stage.postgres is not None
    pids = stage.postgres.pids()
    for pid in pids:
        stage.postgres.send(signal.SIGSTOP, pid)
    time.sleep(rng.uniform(0.5, 0.8 * OUTAGE_S))
    for pid in pids:
        stage.postgres.send(signal.SIGCONT, pid)


def the_store_dies(stage: Stage, rng: random.Random) -> None:
    postgres = stage.postgres
    assert postgres is not None and postgres.process is not None
    for pid in postgres.pids():
        postgres.send(signal.SIGKILL, pid)
    postgres.stop()
    time.sleep(rng.uniform(0, 1.0))
    postgres.start()


def the_store_came_back_older(stage: Stage, rng: random.Random) -> bool:
    """An old copy of it is put in place, and an operator repairs it; False if nothing had happened since."""
    postgres = stage.postgres
    assert postgres is not None
    postgres.stop(signal.SIGQUIT)
    postgres.keep("kept")
    postgres.start()
    time.sleep(rng.uniform(1.0, 6.0))
    postgres.stop(signal.SIGQUIT)
    postgres.put_back("kept")
    postgres.start()
    time.sleep(rng.choice((0.0, rng.uniform(0, 15.0))))  # before the worker has noticed, or after
    end = time.monotonic() + REPAIR_S
    while (done := stage.command("recover-store", "--yes", "--json", within_s=REPAIR_S)).returncode != 0:
        if time.monotonic() > end:
            raise Stuck(f"the store is not repaired: {done.stderr}")
    return bool(json.loads(done.stdout)["older"])


# --- too much ------------------------------------------------------------------------------------------------------


def more_is_asked_for_than_can_be_issued(stage: Stage, rng: random.Random) -> None:
    """Redis is slow, and there are many more clients than before, each of which asks until it has a voucher."""
    load = stage.load(
        f"more-{len(stage.loads)}", seed=rng.randrange(2**32), lanes=MORE_LANES, rate=10_000.0, later_s=(0.1, 1.0)
    )
    stage.relay.delay_s = rng.uniform(0.05, 0.4)
    time.sleep(rng.uniform(2.0, 5.0))
    stage.relay.delay_s = 0.0
    load.finish(MORE_S)


# --- what nobody should write --------------------------------------------------------------------------------------


def a_malformed_entry(stage: Stage, rng: random.Random) -> bool:
    """False if no outbox takes entries now."""
    odd = rng.choice(({"x": "y"}, {"generation": "1", "seq": "-3", "codes": "0", "issued": "", "asides": ""}))
    with stage.admin() as admin, _taking_entries(admin) as (pipe, generation):
        if generation:
            pipe.xadd(f"{{0}}:{generation}:outbox", odd)  # type: ignore[arg-type]
    return bool(generation)


def entries_come_twice(stage: Stage, rng: random.Random) -> bool:
    """Some of what is in the outbox is there once more, and counted once more, as it would be; False if there is
    nothing."""
    with stage.admin() as admin, _taking_entries(admin) as (pipe, generation):
        outbox, totals = f"{{0}}:{generation}:outbox", f"{{0}}:{generation}:totals"
        entries = [fields for _, fields in admin.xrange(outbox, count=rng.randint(1, 5))] if generation else []
        again = [fields for fields in entries if "issued" in fields and "seq" in fields]
        for fields in again:
            pipe.xadd(outbox, fields)
            for count in ("codes", "bytes"):
                pipe.hincrby(totals, count, int(fields[count]))
    return bool(again)


@contextlib.contextmanager
def _taking_entries(admin: redis.Redis) -> Iterator[tuple[Pipeline, str]]:
    """What is put into the pipe is written as scripts would: while this generation is open, or not at all ('': none
    is).  An entry in one that was left, or of none, would be of nobody's making, and nobody would look for it there."""
    with admin.pipeline(transaction=True) as pipe:
        pipe.watch(keys.generation(0))
        seen = pipe.hgetall(keys.generation(0))
        agrees = seen.get("replid") == pipe.info("replication")["master_replid"]
        pipe.multi()
        yield pipe, seen.get("open", "") if agrees else ""
        pipe.execute()


# --- what operators do -------------------------------------------------------------------------------------------


def a_token_is_revoked(stage: Stage, rng: random.Random) -> bool:
    """Clients have another one by then and go on with both for a moment; False if the commands could not be done."""
    distributor = rng.choice(stage.world.distributors)
    [(old_name, old)] = stage.tokens[distributor].items()
    made = stage.command("token", "issue", distributor, "--json")
    if made.returncode != 0:
        return False
    new_name, new = f"{distributor}/{time.time():.3f}", str(json.loads(made.stdout)["token"])
    stage.use_tokens(distributor, {old_name: old, new_name: new})
    time.sleep(PROBE_S)
    stage.revoking.add(old_name)
    done = stage.command("token", "revoke", "--token", old)
    if done.returncode == 0:
        stage.revoked[old_name] = time.time()
    time.sleep(PROBE_S)
    stage.use_tokens(distributor, {new_name: new})
    return done.returncode == 0


def a_campaign_is_paused(stage: Stage, rng: random.Random, campaign: str = "") -> bool:
    """For a moment; False if it could not be."""
    campaign = campaign or rng.choice(stage.world.campaigns).id
    noun = "product" if campaign in {one.id for one in stage.world.products} else "campaign"
    begun = time.time()
    paused = stage.command(noun, "pause", campaign).returncode == 0
    since = time.time() if paused else math.inf
    time.sleep(PROBE_S)
    while True:  # until then nobody knows whether it is
        until_ = time.time()
        if stage.command(noun, "resume", campaign).returncode == 0:
            break
        if until_ > begun + RESUME_S:
            raise Stuck(f"{campaign} can't be resumed")
    stage.paused.append(Paused(campaign, begun, since, until_, time.time()))
    return paused


def together(*happenings: Happening) -> Happening:
    """All of them at the same time."""

    def happen(stage: Stage, rng: random.Random) -> None:
        failed: list[BaseException] = []

        def one(happening: Happening, own: random.Random) -> None:
            try:
                happening(stage, own)
            except BaseException as error:  # noqa: BLE001 - raised below, by who called
                failed.append(error)

        threads = [
            threading.Thread(target=one, args=(happening, random.Random(rng.random()))) for happening in happenings
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in failed:
            raise error

    return happen


FAULTS: Final = (
    Fault("serving processes die", 1, "process", serving_processes_die),
    Fault("a process dies after the script, before the answer", 1, "process", dies_at("issue-after")),
    Fault("serve dies", 1, "process", serve_dies),
    Fault("serve is restarted", 0, "process", serve_is_restarted),
    Fault("a serving process sleeps", 0, "process", a_serving_process_sleeps),
    Fault("replies of Redis are lost", 2, "redis", replies_are_lost),
    Fault("replies of Redis are late", 2, "redis", replies_are_late),
    Fault("connections to Redis are reset", 2, "redis", connections_are_reset),
    Fault("Redis cannot be reached", 4, "redis", redis_cannot_be_reached),
    Fault("Redis stands still", 3, "redis", redis_stands_still),
    Fault("Redis dies and comes back", 4, "redis", redis_dies),
    Fault("Redis is restarted", 4, "redis", redis_is_restarted),
    Fault("the power is cut", 5, "redis", the_power_is_cut, power=True),
    Fault("the disk of Redis is full", 6, "redis", the_disk_is_full),
    Fault("the memory of Redis is full", 7, "redis", memory_is_full),
    Fault("scripts are forgotten", 8, "redis", scripts_are_forgotten),
    Fault("the append-only file is rewritten", 0, "redis", the_file_is_rewritten),
    Fault("a lagging replica is promoted", 9, "redis", a_lagging_replica_is_promoted, loses=True),
    Fault("Redis is restored from an old copy", 10, "redis", an_old_copy_is_restored, loses=True),
    Fault("Redis is empty", 11, "redis", redis_is_emptied, loses=True),
    Fault("Redis was demoted and promoted", 21, "redis", redis_was_a_replica),
    Fault("the store is away", 12, "store", the_store_is_away),
    Fault("the store stands still", 12, "store", the_store_stands_still, stores=("postgresql",)),
    Fault("the store dies", 13, "store", the_store_dies, stores=("postgresql",)),
    Fault("more is asked for than can be issued", 18, "redis", more_is_asked_for_than_can_be_issued),
    Fault(
        "the store came back older",
        20,
        "store",
        the_store_came_back_older,
        stores=("postgresql",),
        incidents=(STORE_OLDER,),
    ),
    Fault("workers die", 14, "process", workers_die),
    Fault("a worker dies between commit and acknowledge", 14, "process", dies_at("flushed-before")),
    Fault("a worker dies after a lease, before its codes are in Redis", 0, "process", dies_at("restock-before")),
    Fault("a worker dies after a window was filled", 0, "process", dies_at("restock-after")),
    Fault(
        "a worker dies when it has opened a generation",
        0,
        "redis",
        together(dies_at("open-after"), redis_was_a_replica),
    ),
    Fault("a worker dies before it opens a generation", 0, "redis", together(dies_at("open-before"), redis_dies)),
    Fault("a worker dies while it restores records", 0, "redis", together(dies_at("restore-before"), redis_dies)),
    Fault("a worker sleeps past the claim", 15, "process", a_worker_sleeps_past_the_claim),
    Fault("all workers are away", 12, "process", all_workers_are_away),
    Fault("a token is revoked", 17, "process", a_token_is_revoked),
    Fault("a campaign is paused", 17, "process", a_campaign_is_paused),
    Fault("a malformed entry is in the outbox", 16, "process", a_malformed_entry),
    Fault("entries come twice", 16, "process", entries_come_twice),
)
