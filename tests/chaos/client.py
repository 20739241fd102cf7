"""The load client: asks for vouchers as terminals do, and writes down every call before it is sent and every answer.

``python -m tests.chaos.client``: the first line on standard input is a ``Plan``, each further one an ``Order``.  It
says a ``Progress`` a second on standard output, and the last one when everything that it asked for has been answered,
or nothing final came for ``patience_s``.

A call without a final answer (no answer, a cut, 503, 500) is made again with the same key, by the same terminal.  Every
20th key is asked for again later, every 50th with another body.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import resource
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec
import uvloop

REPLAY_EVERY: Final = 20
CHANGE_EVERY: Final = 50
LATER_S: Final = (0.2, 20.0)  # a key is asked for again after so long

ANSWER_S: Final = 6.0  # three times the longest that the service may take; then the answer is given up
RETRY_S: Final = (0.02, 0.5)  # pause before a call is made again, twice as long each time
SAY_S: Final = 1.0

UNKNOWN: Final = frozenset({0, 429, 500, 502, 503, 504})  # statuses after which the same key is sent again
TOLD_WHEN: Final = frozenset({429, 503})  # statuses that have to say when
UNTOLD: Final = " without Retry-After"  # what the code of one that does not ends with


# What the codes of Client API v3 are called by the other API, as far as any comes.
NAMES: Final = {
    "400-0C6": "exhausted", "401-A04": "token_unknown", "409-C01": "not_running", "409-C02": "not_running",
    "409-C03": "cap_reached", "422-B03": "key_reused", "429-B04": "rate_limited", "500-B05": "internal",
    "503-B06": "overloaded", "503-B07": "store_unreachable", "503-B08": "refilling", "503-B09": "draining",
}  # fmt: skip


class Source(msgspec.Struct, frozen=True):
    """Sales of one product by one distributor's terminals; ``weight`` of all sales.

    By Client API v3 ``distributor`` is a client, and each sale is of 1 to ``quantity`` vouchers.
    """

    distributor: str
    product: str
    weight: float
    terminals: int = 1_000
    api: Literal["v1", "v3"] = "v1"
    quantity: int = 1


class Plan(msgspec.Struct, frozen=True):
    """``tokens``: those of each distributor by names of ours, one of which is taken at random for each call.  ``rate``:
    calls a second of all ``lanes`` together, as far as they are not waiting for answers."""

    file: str
    prefix: str
    seed: int
    ports: list[int]
    sources: list[Source]
    tokens: dict[str, dict[str, str]]
    lanes: int = 32
    rate: float = 500.0
    later_s: tuple[float, float] = LATER_S
    patience_s: float = 60.0


class Order(msgspec.Struct, frozen=True):
    """What changes while it runs; ``finish``: nothing new is asked for."""

    tokens: dict[str, dict[str, str]] | None = None
    rate: float | None = None
    finish: bool = False


class Progress(msgspec.Struct, frozen=True):
    """So far: calls, answers by kind, the last final one (Unix seconds), lanes that are without one, and whether this
    is the end."""

    calls: int
    kinds: dict[str, int]
    final_at: float
    stuck: int
    over: bool = False


class Call(msgspec.Struct, frozen=True, gc=False):
    """``token``: the name of the one it was made with; ``changed``: with another body than the key's first call."""

    at: float
    distributor: str
    key: str
    product: str
    terminal: str
    token: str
    changed: bool


class Answer(msgspec.Struct, frozen=True, gc=False):
    """``status`` 0: none came.  ``code``: of the problem, or what happened to the connection; ``body``: digest of the
    whole answer; ``voucher``: codes with commas between them; the last three are empty without a voucher."""

    at: float
    status: int
    code: str
    body: str
    voucher: str
    serial: str
    campaign: str


def read(path: Path) -> Iterator[tuple[Call, Answer | None]]:
    """Every call with its answer; None if the client ended before there was one.  In the order of the answers."""
    open_: dict[str, Call] = {}
    with path.open() as lines:
        for line in lines:
            kind, number, at, *fields = line.rstrip("\n").split("\t")
            if kind == "C":
                distributor, key, product, terminal, token, changed = fields
                open_[number] = Call(float(at), distributor, key, product, terminal, token, changed == "changed")
            else:
                status, code, body, voucher, serial, campaign = fields
                yield open_.pop(number), Answer(float(at), int(status), code, body, voucher, serial, campaign)
    for call in open_.values():
        yield call, None


class _Said(msgspec.Struct):
    code: str = ""
    voucher_code: str = ""
    serial_number: str = ""
    campaign_id: str = ""


class _Error(msgspec.Struct):
    code: str


class _Voucher(msgspec.Struct):
    voucher_code: str
    product_code: str


class _SaidByV3(msgspec.Struct):
    error: _Error | None = None
    vouchers: list[_Voucher] = []

    def told(self) -> _Said:
        if not self.vouchers:
            return _Said("" if self.error is None else NAMES.get(self.error.code, self.error.code))
        return _Said(
            voucher_code=",".join(one.voucher_code for one in self.vouchers), campaign_id=self.vouchers[0].product_code
        )


_decode = msgspec.json.Decoder(_Said).decode
_decode_v3 = msgspec.json.Decoder(_SaidByV3).decode


class _Connection(asyncio.Protocol):
    """One at a time: a request, and the answer to it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, data: bytes) -> tuple[int, bytes, bytes]:
        """Status, head in lower case, and body.  Raises OSError or TimeoutError; the connection is of no use then."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer = b""
        self.transport.write(data)
        async with asyncio.timeout(ANSWER_S):
            return await self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0 or self._answer is None or self._answer.done():
            return
        lines = self._buffer[: head + 2].lower()
        at = lines.find(b"content-length: ")
        length = int(lines[at + 16 : lines.index(b"\r\n", at)])
        if len(self._buffer) >= head + 4 + length:
            self._answer.set_result((int(self._buffer[9:12]), lines, self._buffer[head + 4 :]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError())

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Sale(msgspec.Struct, frozen=True):
    source: Source
    key: str
    terminal: str
    quantity: int

    def request(self, terminal: str, token: str) -> bytes:
        """``terminal``: another one, for another body under the same key."""
        if self.source.api == "v1":
            path, key = "/api/v1/voucher/request", ""
            body = msgspec.json.encode({
                "request_id": self.key, "distributor_id": self.source.distributor, "terminal_id": terminal,
                "product_ids": [self.source.product],
            })  # fmt: skip
        else:
            path, key = f"/v3/products/{self.source.product}", f"Idempotency-Key: {self.key}\r\n"
            body = msgspec.json.encode({"quantity": self.quantity, "client_reference": terminal})
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\n{key}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class _Client:
    def __init__(self, plan: Plan, file: Any) -> None:
        self._plan = plan
        self._file = file
        self._rng = random.Random(plan.seed)
        self._tokens = plan.tokens
        self._rate = plan.rate
        self._numbers = 0
        self._keys = 0
        self._due = 0.0  # when the next call may begin
        self._later: list[tuple[float, int, _Sale, bool]] = []
        self._finish = asyncio.Event()
        self.stuck: set[int] = set()
        self.kinds = Counter[str]()
        self.final_at = time.time()
        self._lanes: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self._lanes = [asyncio.create_task(self._lane(number)) for number in range(self._plan.lanes)]
        await asyncio.gather(*self._lanes, return_exceptions=True)
        for lane in self._lanes:
            if not lane.cancelled():
                lane.result()

    def obey(self, order: Order) -> None:
        if order.tokens is not None:
            self._tokens = order.tokens
        if order.rate is not None:
            self._rate = order.rate
        if order.finish:
            self.final_at = time.time()
            self._finish.set()

    def progress(self, *, over: bool = False) -> Progress:
        self._file.flush()
        if self._finish.is_set() and time.time() - self.final_at > self._plan.patience_s:
            for lane in self._lanes:
                lane.cancel()
        return Progress(self._numbers, dict(self.kinds), self.final_at, len(self.stuck), over)

    async def _lane(self, number: int) -> None:
        connections: dict[int, _Connection] = {}
        while True:
            now = time.monotonic()
            if self._later and (self._later[0][0] <= now or self._finish.is_set()):
                _, _, sale, changed = heapq.heappop(self._later)
                await self._sell(number, connections, sale, changed)
            elif self._finish.is_set():
                return
            else:
                await self._pace(now)
                await self._sell_new(number, connections)

    async def _pace(self, now: float) -> None:
        self._due = max(self._due, now - 0.1) + 1 / self._rate
        if self._due > now:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._finish.wait(), self._due - now)

    async def _sell_new(self, lane: int, connections: dict[int, _Connection]) -> None:
        rng, plan = self._rng, self._plan
        self._keys += 1
        mine = self._keys
        source = rng.choices(plan.sources, [one.weight for one in plan.sources])[0]
        # Half of the partners use UUIDs, which are stored in another way.
        is_uuid = mine % 2 or source.api == "v3"
        key = str(uuid.UUID(int=rng.getrandbits(128), version=4)) if is_uuid else f"{plan.prefix}-{mine}"
        quantity = rng.randint(1, source.quantity) if source.quantity > 1 else 1
        sale = _Sale(source, key, f"T-{rng.randrange(source.terminals)}", quantity)
        if await self._sell(lane, connections, sale, changed=False) == 200:
            for every, changed in ((REPLAY_EVERY, False), (CHANGE_EVERY, True)):
                if mine % every == 0:
                    due = time.monotonic() + rng.uniform(*plan.later_s)
                    heapq.heappush(self._later, (due, 2 * mine + changed, sale, changed))

    async def _sell(self, lane: int, connections: dict[int, _Connection], sale: _Sale, changed: bool) -> int:
        """Until there is a final answer; its status."""
        pause, longest = RETRY_S
        while True:
            status = await self._call(connections, sale, changed)
            if status not in UNKNOWN:
                self.stuck.discard(lane)
                self.final_at = time.time()
                return status
            self.stuck.add(lane)
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.5))
            pause = min(2 * pause, longest)

    async def _call(self, connections: dict[int, _Connection], sale: _Sale, changed: bool) -> int:
        self._numbers += 1
        number = self._numbers
        distributor, product = sale.source.distributor, sale.source.product
        name, token = self._rng.choice(list(self._tokens[distributor].items()))
        terminal = f"{sale.terminal}-changed" if changed else sale.terminal
        self._file.write(
            f"C\t{number}\t{time.time():.6f}\t{distributor}\t{sale.key}\t{product}\t{terminal}\t{name}\t"
            f"{'changed' if changed else ''}\n"
        )
        status, code, answered, said = 0, "", b"", _Said()
        port = self._rng.choice(self._plan.ports)
        try:
            connection = connections.get(port)
            if connection is None:
                async with asyncio.timeout(ANSWER_S):
                    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
                connections[port] = connection
            status, lines, answered = await connection.ask(sale.request(terminal, token))
            said = _decode(answered) if sale.source.api == "v1" else _decode_v3(answered).told()
            code = said.code
            if status in TOLD_WHEN and b"\r\nretry-after: " not in lines:
                code += UNTOLD
        except TimeoutError:
            code = "timeout"
        except ConnectionRefusedError:
            code = "refused"
        except OSError:
            code = "reset"
        except asyncio.CancelledError:
            code = "given up"
            raise
        finally:
            if status == 0 and (broken := connections.pop(port, None)) is not None:
                broken.abort()
            self.kinds[f"{status} {code}".strip() if status else code] += 1
            digest = blake2b(answered, digest_size=12).hexdigest() if status == 200 else ""
            self._file.write(
                f"A\t{number}\t{time.time():.6f}\t{status}\t{code}\t{digest}\t{said.voucher_code}\t"
                f"{said.serial_number}\t{said.campaign_id}\n"
            )
        return status


async def _main() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each lane
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    plan = msgspec.json.decode(await reader.readline(), type=Plan)
    with Path(plan.file).open("w") as file:
        client = _Client(plan, file)
        running = asyncio.create_task(client.run())

        async def obey() -> None:
            while line := await reader.readline():
                client.obey(msgspec.json.decode(line, type=Order))
            running.cancel()  # whoever started it is gone

        obeying = asyncio.create_task(obey())
        while not running.done():
            await asyncio.wait([running], timeout=SAY_S)
            print(msgspec.json.encode(client.progress()).decode(), flush=True)
        running.result()
        obeying.cancel()
        print(msgspec.json.encode(client.progress(over=True)).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
