"""Requests whose headers are known by their bytes, fed to the protocol piece by piece: never answered otherwise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from uvicorn.server import ServerState

from service.domain import Busy, Issued, Outcome, Record, Request, Terms
from service.identity import IdKeys
from service.settings import Settings
from service.web.access import Access
from service.web.app import App
from service.web.exchange import Head
from service.web.serving import configured
from service.web.v1 import PATH
from service.web.v3 import ClientApi
from tests.issuers import DISTRIBUTOR, TOKEN, FakeIssuer
from tests.wire import Answer, all_answers

TURNS = 40  # of the loop, in which whatever is whole is answered; what is not may wait for ever


def body(key: str = "req-1001", terminal: str = "T1") -> bytes:
    asked = {"request_id": key, "distributor_id": DISTRIBUTOR, "terminal_id": terminal, "product_ids": ["PAY"]}
    return json.dumps(asked).encode()


def head(*lines: str, length: int | None = None, method: str = "POST", path: str = PATH, token: str = TOKEN) -> bytes:
    sent = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    sent += [f"Authorization: Bearer {token}", *lines]
    if length is not None:
        sent.append(f"Content-Length: {length}")
    return ("\r\n".join(sent) + "\r\n\r\n").encode()


def request(key: str = "req-1001", *lines: str) -> bytes:
    return head(*lines, length=len(body(key))) + body(key)


CODE = "MAMVDDMMYY01"
TERMS = Terms(
    "Gift", True, False, True, True, "SGD", 1000, "until:1888156799", "Asia/Singapore", "https://v.example/", ""
)
KEY, OTHER_KEY = "30c40ad6-f135-4aad-97d5-79f195680458", "b3e7a1f0-52a6-4f5e-9d0c-0a1b2c3d4e5f"


def order(
    key: str = KEY, *lines: str, token: str = TOKEN, path: str = f"/v3/products/{CODE}", quantity: int = 2
) -> bytes:
    """A request of Client API v3."""
    sent = json.dumps({"quantity": quantity}).encode()
    return head(f"Idempotency-Key: {key}", *lines, length=len(sent), path=path, token=token) + sent


class Wire(asyncio.Transport):
    """The server's end of a connection: what was written to it, and whether it takes more."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.ended = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.ended:
            self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.ended

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def _telling(written: bytes) -> list[Answer]:
    """The answers, without what differs from one time to another."""
    answers = all_answers(written)
    for answer in answers:
        for name in ("date", "idempotent-replayed", "idempotency-record"):
            answer.headers.pop(name, None)
        if answer.status >= 400 and answer.headers.get("content-type") == "application/json; charset=utf-8":
            answer.body = json.dumps(json.loads(answer.body) | {"request_id": "another one each time"}).encode()
    return answers


class Tokens:
    """Admits TOKEN; ``known``: without waiting."""

    def __init__(self, known: bool) -> None:
        self.known = known

    def remembered(self, authorization: bytes, scope: str) -> Access | None:
        found = Access("CLIENT", DISTRIBUTOR, TOKEN, frozenset({scope}))
        return found if self.known and authorization == f"Bearer {TOKEN}".encode() else None

    async def admit(self, authorization: bytes, scope: str) -> Access | str:
        self_known, self.known = self.known, True
        found = self.remembered(authorization, scope)
        self.known = self_known
        return found or "token_unknown"


class Reading:
    """Nothing here reads."""

    async def products(self, *_: Any) -> Any:
        raise AssertionError("not asked for")

    product = vouchers = voucher = products


class Issuing(FakeIssuer):
    """Issues for both APIs."""

    async def issue(self, credential: str, request: Request) -> Outcome:
        outcome = await super().issue(credential, request)
        if request.api == "v1" or not isinstance(outcome, Issued):
            return outcome
        record = Record.unpack(outcome.record)
        rule = replace(record.rule, id_key="k1", terms=TERMS.pack())
        return Issued(replace(record, rule=rule, codes=record.codes * request.quantity).pack(), outcome.replayed)


class Immediate(Issuing):
    """Is too busy, and says so before ``submit`` has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = Busy("overloaded")

    def submit(self, credential: str, request: Request, answered: Callable[[Outcome], None]) -> None:
        self.asked.append(request)
        answered(Busy("overloaded"))


class Uneven(Issuing):
    """Takes longer for the first request than for those that come after it."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = TURNS // 4

    async def issue(self, credential: str, request: Request) -> Outcome:
        turns, self.turns = self.turns, 0
        for _ in range(turns):
            await asyncio.sleep(0)
        return await super().issue(credential, request)


class Edge:
    """The protocol of one process; its connections share the heads that are known.

    ``verified``: access tokens were seen before, so that requests which carry one may be plain.
    """

    def __init__(self, issuer: FakeIssuer | None = None, *, verified: bool = True) -> None:
        self.issuer = issuer or Issuing()
        client_api = ClientApi(self.issuer, Tokens(verified), Reading(), Reading(), IdKeys("k1", {"k1": b"k" * 32}))
        self._config = configured(App(self.issuer, client_api), Settings(), connections_max=10)
        self._config.load()
        self._state = ServerState()

    @property
    def known(self) -> dict[bytes | tuple[int, bytes], Head]:
        return self._config.http_protocol_class.heads  # type: ignore[union-attr,no-any-return]

    async def learn(self, streams: Iterable[bytes]) -> None:
        """The requests in ``streams`` have come before, each by itself, so long ago that their keys are forgotten."""
        for stream in streams:
            await self.say([stream])
        self.issuer.forget()

    async def say(self, pieces: Sequence[bytes], *, hasty: bool = False) -> tuple[list[Answer], list[Request]]:
        """What a client that sends ``pieces``, one after the other, is answered, and what was asked of the issuer.

        Each piece comes when all before it is answered; ``hasty``: all but the last come before anything is answered.
        """
        before = len(self.issuer.asked)
        wire = Wire()
        loop = asyncio.get_running_loop()
        connection: Any = self._config.http_protocol_class(self._config, self._state, {}, loop)  # type: ignore[operator]
        connection.connection_made(wire)
        for number, piece in enumerate(pieces, 1):
            if wire.is_closing():
                break
            connection.data_received(piece)
            if hasty and number < len(pieces) and wire.reading:
                continue
            for _ in range(TURNS):
                await asyncio.sleep(0)
                if not self._state.tasks and not hasty:
                    break
            assert wire.reading or wire.is_closing(), "nothing is left to be answered"
        connection.connection_lost(None)
        return _telling(wire.written), self.issuer.asked[before:]


GOOD = request()
OTHER = request("req-1002", "X-Number: 2")
FOREIGN = GOOD.replace(TOKEN.encode(), TOKEN[:-1].encode() + b"A")  # by a token that is not in force
SPACED = head(length=len(body()) + 2) + body() + b"  "
KEYED = request("req-1005", "Idempotency-Key: req-1005")
ORDER = order()
LEARNT = (GOOD, OTHER, SPACED, FOREIGN + GOOD, GOOD + FOREIGN, KEYED, ORDER, order("x"), order(token=TOKEN[:-1] + "A"))
STREAMS = {
    "one": GOOD,
    "two of the same": GOOD + GOOD,
    "two": GOOD + OTHER,
    "an empty line between": GOOD + b"\r\n" + OTHER,
    "empty lines before": b"\r\n\r\n" + GOOD,
    "the last of its connection": request("req-1003", "Connection: close") + GOOD,
    "garbage behind": GOOD + b"\x00\x01\x02\r\n\r\n",
    "a body too long": head(length=len(body())) + body() + b'"}',
    "a body too short": head(length=len(body())) + body()[:-1] + GOOD,
    "no JSON": head(length=len(body())) + body().replace(b":", b";"),
    "another body of the same length": head(length=len(body())) + body("req-9999"),
    "another path behind": GOOD + head(method="GET", path="/other") + GOOD,
    "chunks": head("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body()), body()) + GOOD,
    "another protocol offered": request("req-1004", "Connection: Upgrade", "Upgrade: h2c") + GOOD,
    "a key in a header": KEYED + GOOD,
    "another key in a header": KEYED + request("req-100", "Idempotency-Key: req-100") + KEYED,
    "two orders": ORDER + order(OTHER_KEY),
    "an order and a request": ORDER + KEYED + order(OTHER_KEY),
    "a token not in force": FOREIGN + GOOD,
    "spaces within the body": SPACED + GOOD,
    "spaces behind the body": GOOD + b"  " + GOOD,
    "a body that nobody reads": head(length=len(GOOD), method="PUT", path="/other") + GOOD,
    "a request in a header": b"POST /other HTTP/1.1\r\nX: " + GOOD,
    "a body in the body": head(length=len(body() + GOOD)) + body() + GOOD,
}
KEYS = {
    "a key of another request": KEYED + request("req-1006", "Idempotency-Key: req-1005") + KEYED,
    "no key after one": KEYED + request("req-1006", "Idempotency-Key: ") + GOOD,
    "an order": ORDER,
    "the same order twice": ORDER + ORDER,
    "an order for more": ORDER + order(quantity=20),
    "an order under a key in quotes": ORDER + order(f'"{OTHER_KEY}"') + order(OTHER_KEY.upper()),
    "an order under no key": ORDER + order("") + order(OTHER_KEY),
    "an order under what is no key": ORDER + order(KEY[:-1]) + order(KEY + "0") + order(OTHER_KEY),
    "an order under two keys": ORDER + order(KEY, f"Idempotency-Key: {OTHER_KEY}") + order(OTHER_KEY),
    "an order with spaces around its key": ORDER + order(f" {OTHER_KEY} ") + order(f"\t{KEY}"),
    "an order by a token not in force": ORDER + order(token=TOKEN[:-1] + "A") + order(OTHER_KEY),
    "an order for nothing": ORDER + order(quantity=0) + order(OTHER_KEY),
    "an order with a query": ORDER + order(path=f"/v3/products/{CODE}?a=b") + order(OTHER_KEY),
    "an order of another product": ORDER + order(path="/v3/products/OTHER") + order(OTHER_KEY),
    "an order of an encoded product": ORDER + order(path="/v3/products/MAM%2E1") + order(OTHER_KEY),
    "an order to nowhere": ORDER + order(path="/v3/products/MAM/1") + order(OTHER_KEY),
    "an order with a line feed in its key": ORDER + order("x\ny") + order(OTHER_KEY),
}


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
async def test_where_a_stream_is_cut_never_changes_an_answer(stream: bytes, known: bool) -> None:
    expected = await Edge().say([stream])
    edge = Edge()
    for at in range(1, len(stream)):
        if known:
            await edge.learn(LEARNT)
            edge.issuer.asked.clear()
            assert len(edge.known) >= 5
        else:
            edge.known.clear()
        assert await edge.say([stream[:at], stream[at:]]) == expected, f"cut at {at}: {stream[:at]!r}"
    assert await edge.say([stream[at : at + 1] for at in range(len(stream))]) == expected


async def test_the_streams_are_what_they_are_called() -> None:
    """Else the tests around them would compare nothing with nothing."""
    statuses = {
        name: [one.status for one in (await Edge().say([stream]))[0]] for name, stream in (STREAMS | KEYS).items()
    }
    assert statuses == {
        "one": [200],
        "two of the same": [200, 200],
        "two": [200, 200],
        "an empty line between": [200, 200],
        "empty lines before": [200],
        "the last of its connection": [200],
        "garbage behind": [200, 400],
        "a body too long": [200, 400],
        "a body too short": [400, 400],
        "no JSON": [400],
        "another body of the same length": [200],
        "another path behind": [200, 404, 200],
        "chunks": [200, 200],
        "another protocol offered": [200, 200],
        "a key in a header": [200, 200],
        "another key in a header": [200, 200, 200],
        "a key of another request": [200, 400, 200],
        "no key after one": [200, 400, 200],
        "an order": [200],
        "the same order twice": [200, 200],
        "two orders": [200, 200],
        "an order for more": [200, 422],
        "an order and a request": [200, 200, 200],
        "an order under a key in quotes": [200, 200, 200],
        "an order under no key": [200, 400, 200],
        "an order under what is no key": [200, 400, 400, 200],
        "an order under two keys": [200, 400, 200],
        "an order with spaces around its key": [200, 200, 200],
        "an order by a token not in force": [200, 401, 200],
        "an order for nothing": [200, 400, 200],
        "an order with a query": [200, 200, 200],
        "an order of another product": [200, 422, 200],
        "an order of an encoded product": [200, 422, 200],
        "an order to nowhere": [200, 404, 200],
        "an order with a line feed in its key": [200, 400],
        "a token not in force": [401, 200],
        "spaces within the body": [200, 200],
        "spaces behind the body": [200, 400],
        "a body that nobody reads": [404],
        "a request in a header": [404],
        "a body in the body": [400],
    }


async def test_a_body_is_never_executed_as_a_request() -> None:
    edge = Edge()
    await edge.learn([GOOD])
    inner = request("req-inner")
    for outer in (
        head(length=len(body() + inner)) + body() + inner,
        head(length=len(inner)) + inner,
        head("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner),
        head(length=len(inner), method="PUT", path="/other") + inner,
        head(length=len(inner), method="GET") + inner,
        head("Expect: 100-continue", length=len(inner)) + inner,
        head("Connection: Upgrade", "Upgrade: h2c", length=len(inner)) + inner,
    ):
        answers, asked = await edge.say([GOOD + outer])
        assert [one.key for one in asked] == ["req-1001"], outer
        assert [one.status for one in answers if one.status != 100][:1] == [200]
        assert len([one for one in answers if one.status != 100]) == 2
        assert {one.status for one in answers[1:]} <= {100, 400, 404, 405}


@pytest.mark.parametrize("stream", KEYS.values(), ids=KEYS.keys())
async def test_an_order_past_asgi_is_never_answered_otherwise_than_through_it(stream: bytes) -> None:
    assert await Edge().say([stream]) == await Edge(verified=False).say([stream])


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
async def test_a_request_never_overtakes_the_one_before_it(known: bool) -> None:
    for pieces in (
        [GOOD, OTHER, GOOD],
        [ORDER, KEYED, order(OTHER_KEY), GOOD],
        [GOOD + OTHER, GOOD],
        [OTHER, GOOD[:50], GOOD[50:]],
        [GOOD, FOREIGN, OTHER],
    ):
        expected, asked = await Edge().say([b"".join(pieces)])
        edge = Edge(issuer := Uneven())
        if known:
            await edge.learn(LEARNT)
            issuer.turns = TURNS // 4
        assert await edge.say(pieces, hasty=True) == (expected, asked), pieces


@pytest.mark.parametrize("stream", [GOOD, KEYED, ORDER], ids=["plain", "keyed", "order"])
async def test_line_ends_after_a_request_in_pieces_are_never_remembered_as_its_headers(stream: bytes) -> None:
    edge = Edge()
    length = len(stream) - stream.index(b"\r\n\r\n") - 4
    ends = b"\r\n\r\n" + (length * b"\r\n")[:length]
    answers, _ = await edge.say([stream[:50], stream[50:], ends, stream])
    assert [one.status for one in answers] == [200, 200]
    heads = [data[1] if isinstance(data, tuple) else data for data in edge.known]
    assert all(head.lstrip(b"\r\n").startswith(b"POST ") for head in heads), heads


async def test_heads_are_remembered_as_what_they_say_or_not_at_all() -> None:
    known = 0
    for issuer in (Issuing(), Immediate()):
        for stream in (*STREAMS.values(), *KEYS.values(), *LEARNT):
            for at in (0, 1, 30, len(stream) // 2, len(stream) - 1):
                edge = Edge(issuer)
                await edge.say([piece for piece in (stream[:at], stream[at:]) if piece])
                known += len(edge.known)
                for data, said in edge.known.items():
                    assert isinstance(data, tuple) == said.keyed
                    if isinstance(data, tuple):
                        at, data = data
                        assert data[:at].endswith((b"\r\nIdempotency-Key: ", b"\r\nIdempotency-Key: \t"))
                        assert data[at:].lstrip(b" ").startswith(b"\r\n")
                    first = data.lstrip(b"\r\n")
                    assert first.startswith((f"POST {PATH} ".encode(), b"POST /v3/products/"))
                    assert data.index(b"\r\n\r\n", 4) == len(data) - 4
                    said_token = said.token if said.api.name == "v1" else said.authorization.decode()[7:]
                    assert f"\r\nAuthorization: Bearer {said_token}\r\n".encode() in data
                    assert f"\r\nContent-Length: {said.length}\r\n".encode() in data
    assert known >= 10, "some were remembered"


@pytest.mark.parametrize("immediate", [False, True])
async def test_nothing_is_executed_behind_the_last_request_of_a_connection(immediate: bool) -> None:
    edge = Edge(Immediate() if immediate else None)
    for last in (request("req-last", "Connection: close"), request("req-last").replace(b"HTTP/1.1", b"HTTP/1.0")):
        for behind in (GOOD, head(method="GET", path="/other"), b"\x00\x00\r\n\r\n"):
            answers, asked = await edge.say([last + behind])
            assert [one.key for one in asked] == ["req-last"]
            assert [one.status for one in answers] == [503 if immediate else 200]


TRACES = [f"00-{'ab' * 16}-{number:016x}-01" for number in range(1, 6)]
TRACED = request("req-2001", f"traceparent: {TRACES[0]}")


async def test_a_trace_is_the_one_that_was_sent_whether_its_headers_are_known_or_not() -> None:
    edge = Edge()
    for number, trace in enumerate(TRACES):
        _, [asked] = await edge.say([request(f"req-200{number}", f"traceparent: {trace}")])
        assert asked.trace == trace
    assert len(edge.known) == 1, "another trace is no other head"
    _, [asked] = await edge.say([request("req-2009")])
    assert asked.trace == ""
    assert len(edge.known) == 1, "nor is none"


UNUSUAL = {
    "another case": (f"Traceparent: {TRACES[0]}", TRACES[0]),
    "no space": (f"traceparent:{TRACES[0]}", TRACES[0]),
    "more space": (f"traceparent:   {TRACES[0]}  ", TRACES[0]),
    "bad": (f"traceparent: {TRACES[0][:-1]}g", ""),
    "longer": (f"traceparent: {TRACES[0]}-later", ""),
    "shorter": ("traceparent: 00", ""),
    "later version": (f"traceparent: 01{TRACES[0][2:]}", TRACES[0]),
    "later version, longer": (f"traceparent: 01{TRACES[0][2:]}-x", TRACES[0]),
    "twice": (f"traceparent: {TRACES[0]}\r\ntraceparent: {TRACES[1]}", ""),
    "good and bad": (f"traceparent: {TRACES[0]}\r\ntraceparent: bad", ""),
    "bad and good": (f"traceparent: bad\r\ntraceparent: {TRACES[0]}", ""),
    "another header's end": (f"X-Note: traceparent: {TRACES[0]}", ""),
}


@pytest.mark.parametrize("name", UNUSUAL)
async def test_an_unusual_trace_is_taken_as_the_parser_takes_it(name: str) -> None:
    line, trace = UNUSUAL[name]
    edge = Edge()
    for learnt in ((), LEARNT, (request("req-2000", f"traceparent: {TRACES[4]}"),), (request("req-1", line),)):
        await edge.learn(learnt)
        answers, [asked] = await edge.say([request("req-2001", line)])
        assert (answers[0].status, asked.trace) == (200, trace)
        heads = [known if isinstance(known, bytes) else known[1] for known in edge.known]
        assert not any(b"traceparent" in one.lower() for one in heads)


FRAGMENTS = st.sampled_from(
    [
        GOOD, OTHER, SPACED, FOREIGN, KEYED, ORDER, order(OTHER_KEY), f"Idempotency-Key: {KEY}\r\n".encode(),
        head(length=len(body())), body(), body("req-9999"), b"\r\n", b"\n", b"\r", b" ",
        b"\r\n\r\n", b"0", b"\x00", b"POST ", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n",
        TRACED, f"traceparent: {TRACES[0]}\r\n".encode(), b"\r\ntraceparent: ", TRACES[0].encode(),
        b"5\r\nhello\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"X: y\r\n",
        b"GET / HTTP/1.1\r\n",
    ]
)  # fmt: skip


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """Good requests with some of their bytes changed, dropped, or pushed apart."""
    whole = [GOOD, OTHER, SPACED, FOREIGN, KEYED, ORDER, order(OTHER_KEY), TRACED]
    stream = draw(st.lists(st.sampled_from(whole), min_size=1, max_size=3).map(b"".join))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(stream)))
        gone = draw(st.sampled_from([0, 0, 1, 1, 2, 16]))
        stream = stream[:at] + draw(st.one_of(st.binary(max_size=2), FRAGMENTS)) + stream[at + gone :]
    return stream


@given(
    stream=st.one_of(st.lists(FRAGMENTS, max_size=6).map(b"".join), _mutated()),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
@example(stream=GOOD + b"\r\n" + GOOD, cuts=[0.5])
@settings(max_examples=300)
def test_known_heads_in_pieces_are_answered_as_unknown_ones_in_one(stream: bytes, cuts: list[float]) -> None:
    async def both() -> None:
        expected = await Edge().say([stream])
        edge = Edge()
        await edge.learn(LEARNT)
        places = sorted({int(cut * len(stream)) for cut in cuts} - {0, len(stream)})
        pieces = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
        answers, asked = await edge.say(pieces)
        assert (answers, asked) == expected
        vouchers, refused = (sum(one.status == status for one in answers) for status in (200, 401))
        assert vouchers <= len(asked) <= vouchers + refused, "one answer a request, one request an answer"

    asyncio.run(both())
