"""Virtual time, processes that may die at any call, and what one seed decides about them.

Everything runs in one thread on an event loop whose clock jumps to the next timer.  Every call to Redis or to the
store is a *point*: there the seed decides how long it takes, whether the process dies before or after it, whether it
is executed late, and whether its reply arrives.  So the same seed always gives the same schedule.
"""

from __future__ import annotations

import asyncio
import random
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from redis.exceptions import BusyLoadingError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service import scripts
from tests.simulation.memory import Command, Send, Server, answered

_T = TypeVar("_T")

# 2026-03-10T22:59:50Z: ten seconds before an hour ends everywhere, and a day in Berlin.
BEGIN: Final = 1_773_183_590.0


class Stuck(Exception):
    """Nothing is left that could ever happen."""


class VirtualLoop(BaseEventLoop):
    """An event loop that waits for nothing: when nobody can run, it is the time of the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._now = 0.0
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """It is later all at once; every timer in between is overdue."""
        self._now += seconds

    def select(self, timeout: float | None) -> Sequence[object]:
        if timeout is None:
            raise Stuck
        self._now += timeout
        return ()

    def _process_events(self, events: Sequence[object]) -> None: ...

    def _write_to_self(self) -> None: ...

    def shut(self) -> None:
        """Forgets every timer, so that the next schedule begins alone."""
        for task in asyncio.all_tasks(self):
            task.cancel()
        for _ in range(100):
            if not asyncio.all_tasks(self):
                break
            self.call_soon(self.stop)
            self.run_forever()
        queues: Any = self  # the standard library's types don't name these
        queues._scheduled.clear()
        queues._ready.clear()
        self._now = 0.0


class Process:
    """A process of ours: its tasks die with it.  ``asleep_until`` is a virtual time: it stands still until then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.asleep_until = 0.0
        self.tasks: dict[asyncio.Task[Any], None] = {}

    def kill(self) -> None:
        """Nothing of it runs again, and nothing of what it had in mind is left."""
        self.alive = False
        for task in list(self.tasks):
            task.cancel()


CURRENT: Final[ContextVar[Process | None]] = ContextVar("process", default=None)


def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None = None) -> asyncio.Task[Any]:
    """A task that belongs to the process which makes it."""
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, context=context)
    process = CURRENT.get() if context is None else context.get(CURRENT)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
    return task


class Odds(msgspec.Struct):
    """How likely what is at one point, and how long things take (seconds)."""

    slow: float = 0.05
    slow_s: float = 1.0
    quick_s: float = 0.004
    crash: float = 0.0  # the process dies, before the call or after it
    unsent: float = 0.0  # the call never arrives
    late: float = 0.0  # it is executed after the caller has given up
    unheard: float = 0.0  # it is executed, its reply is lost
    commit_unknown: float = 0.0  # the store commits, or does not, and the caller does not learn it


CALM: Final = Odds(slow=0.0, quick_s=0.002)


class Scheduler:
    """Decides by a seed what happens at every point, and remembers it."""

    def __init__(self, seed: int, loop: VirtualLoop, odds: Odds) -> None:
        self.rng = random.Random(seed)
        self.loop = loop
        self.odds = odds
        self.trace: list[tuple[float, str, str, Any]] = []
        self.begin = BEGIN

    def unix(self) -> float:
        """Unix seconds, the same on every machine of the simulation."""
        return self.begin + self.loop.time()

    def note(self, who: str, what: str, detail: Any = "") -> None:
        self.trace.append((self.loop.time(), who, what, detail))

    def told(self) -> Iterator[str]:
        """The trace, a line each."""
        for at, who, what, detail in self.trace:
            yield f"{at:12.3f}  {who:<10} {what} {_short(detail)}".rstrip()

    def spawn(self, process: Process, coroutine: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Runs ``coroutine`` as a part of ``process``."""
        context = copy_context()
        context.run(CURRENT.set, process)
        return self.loop.create_task(coroutine, context=context)

    # --- points ------------------------------------------------------------------------------------------------

    async def pause(self, process: Process) -> None:
        """Some time passes; longer if the process is asleep, for ever if it is dead."""
        odds, chance = self.odds, self.rng.random()
        if chance < odds.slow:
            await asyncio.sleep(self.rng.random() * odds.slow_s)
        elif chance < 0.6:
            await asyncio.sleep(chance * odds.quick_s)
        while process.asleep_until > self.loop.time():
            await asyncio.sleep(process.asleep_until - self.loop.time())
        if not process.alive:
            await gone()

    async def may_crash(self, process: Process, where: str) -> None:
        if self.odds.crash and self.rng.random() < self.odds.crash:
            await self.crash(process, where)

    async def crash(self, process: Process, where: str) -> NoReturn:
        self.note(process.name, "dies", where)
        process.kill()
        await gone()

    def to_redis(self, process: Process, network: Network) -> Send:
        """The way of one process's calls to Redis."""

        async def send(commands: Sequence[Command]) -> list[Any]:
            await self.pause(process)
            what = named(commands)
            await self.may_crash(process, f"before {what}")
            odds, chance = self.odds, self.rng.random()
            if chance < odds.unsent:
                self.note(process.name, what, "never arrived")
                raise RedisTimeoutError("Timeout reading from socket")
            if chance < odds.unsent + odds.late:
                seconds = self.rng.random() * 4
                self.note(process.name, what, f"will be executed in {seconds:.3f} s")
                self.loop.call_later(seconds, self._late, process.name, network, network.connections, commands)
                raise RedisTimeoutError("Timeout reading from socket")
            try:
                replies = network.call(commands)
            except RedisConnectionError as error:
                self.note(process.name, what, type(error).__name__)
                raise
            self.note(process.name, what, replies)
            await self.may_crash(process, f"after {what}")
            if odds.unheard and self.rng.random() < odds.unheard:
                self.note(process.name, what, "the reply is lost")
                raise RedisConnectionError("Connection closed by server.")
            await self.pause(process)
            return replies

        return send

    def _late(self, who: str, network: Network, connections: int, commands: Sequence[Command]) -> None:
        if connections != network.connections:
            return  # the connection that it was waiting on is gone
        try:
            replies = network.call(commands)
        except RedisConnectionError:
            return
        self.note(who, named(commands), ["executed late", replies])


class Network:
    """Between everybody and the one Redis."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.reachable = True
        self.connections = 0  # which set of connections the present ones are
        self.after_call: Callable[[], None] = lambda: None

    def cut(self) -> None:
        """Every connection is closed; what was under way on them is not executed any more."""
        self.connections += 1

    def call(self, commands: Sequence[Command]) -> list[Any]:
        if not self.reachable:
            raise RedisConnectionError("Connection refused.")
        try:
            return answered(self.server, commands)
        except BusyLoadingError:
            raise
        finally:
            self.after_call()


async def gone() -> NoReturn:
    """What a dead process does from here on."""
    await asyncio.Event().wait()
    raise AssertionError


_SCRIPT_NAMES: Final[dict[str, str]] = {}


def named(commands: Sequence[Command]) -> str:
    """What a call is, for the trace."""
    words = []
    for command in commands:
        if command[0] == "evalsha":
            if command[1] not in _SCRIPT_NAMES:
                _SCRIPT_NAMES.update({scripts.load(name).sha: name for name in scripts.NAMES})
            words.append(f"{_SCRIPT_NAMES[command[1]]}.lua")
        else:
            words.append(" ".join(command[:2])[:60].replace("\n", "|"))
    return " + ".join(words)


def _short(detail: Any) -> str:
    text = detail if isinstance(detail, str) else repr(detail)
    text = text.replace("\n", "|").replace("\x1e", " ^ ")
    return text if len(text) <= 400 else text[:400] + "..."
