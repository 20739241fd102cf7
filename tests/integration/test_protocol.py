"""HTTP on real sockets: uvicorn with uvloop, httptools and our bounds, over an issuer without servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from loadtest.servers import until
from service.settings import Settings
from service.web.app import App
from service.web.incoming import BODY_MAX
from service.web.protocol import (
    HEAD_BYTES_MAX,
    HEADER_BYTES_MAX,
    HEADERS_MAX,
    LINGER_BYTES,
    PIPELINE_MAX,
    BoundedProtocol,
)
from service.web.serving import Server, configured
from service.web.v1 import PATH
from tests.issuers import DISTRIBUTOR, TOKEN, FakeIssuer
from tests.wire import PATIENCE_S, Answer, Client

RECEIVE_TIMEOUT_S = 0.4
CONNECTIONS_MAX = 40


def body(request_id: str = "req-1001") -> bytes:
    return json.dumps(
        {"request_id": request_id, "distributor_id": DISTRIBUTOR, "terminal_id": "T1", "product_ids": ["PAY"]}
    ).encode()


def head(
    method: str = "POST",
    path: str = PATH,
    *,
    length: int | None = None,
    token: str = TOKEN,
    version: str = "1.1",
    extra: str = "",
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json"]
    lines.append(f"Authorization: Bearer {token}")
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n" + extra + "\r\n").encode()


def request(request_id: str = "req-1001", **given: Any) -> bytes:
    content = body(request_id)
    return head(length=len(content), **given) + content


class Running:
    """A server in a thread, as a serving process runs it."""

    def __init__(self, *, connections_max: int = CONNECTIONS_MAX, drain_s: int = 5) -> None:
        self.issuer = FakeIssuer()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: tuple[str, int] = self.listener.getsockname()
        settings = Settings(receive_timeout_ms=int(RECEIVE_TIMEOUT_S * 1000), drain_s=drain_s)
        self.server = Server(configured(App(self.issuer), settings, connections_max=connections_max))
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.loop = runner.get_loop()
            runner.run(self.server.serve(sockets=[self.listener]))

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.server.started, "the start of the server")

    def stop(self) -> None:
        self.server.should_exit = True

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not stop"

    def draining(self) -> bool:
        connections = list(self.server.server_state.connections)
        return any(isinstance(one, BoundedProtocol) and one.draining for one in connections)

    def client(self) -> Client:
        return Client(self.address)

    def ask(self, data: bytes) -> Answer:
        with self.client() as client:
            return client.send(data).answer()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Requests that reach the issuer meanwhile wait until the end."""
        gate = self.issuer.gate = asyncio.Event()
        yield
        assert self.loop is not None
        self.issuer.gate = None
        self.loop.call_soon_threadsafe(gate.set)


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    server.start()
    yield server
    server.stop()
    server.join()


def assert_problem(answer: Answer, code: str) -> None:
    assert answer.headers["content-type"] == "application/problem+json", answer
    assert answer.content["code"] == code
    assert answer.content["status"] == answer.status
    assert_headers(answer)


def assert_headers(answer: Answer) -> None:
    assert "date" in answer.headers
    assert "server" not in answer.headers


# --- what must work


def test_voucher_over_a_kept_connection(running: Running) -> None:
    with running.client() as client:
        first, second = client.send(request()).answer(), client.send(request()).answer()
    assert (first.status, second.status) == (200, 200)
    assert first.body == second.body
    assert second.headers["idempotent-replayed"] == "true"
    assert "connection" not in first.headers
    assert_headers(first)


@pytest.mark.parametrize(
    "unusual",
    [
        {"extra": "Expect: 100-continue\r\n"},
        {"extra": 'Idempotency-Key: "req-1001"\r\n'},
        {"extra": "Accept: a\r\nAccept: b\r\n"},
    ],
)
def test_unusual_request_is_answered_as_a_plain_one_is(running: Running, unusual: dict[str, str]) -> None:
    plain = running.ask(request())
    with running.client() as client:
        client.send(request(**unusual))
        if "Expect" in unusual["extra"]:
            assert client.socket.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        answer = client.answer()
    assert (answer.status, answer.body) == (plain.status, plain.body)
    assert answer.headers.keys() - {"idempotent-replayed"} == plain.headers.keys()


@pytest.mark.parametrize("connection", ["one", "another"])
def test_headers_that_came_before_never_decide_what_is_new_about_a_request(running: Running, connection: str) -> None:
    """The same headers, byte for byte, over bodies of one length and then otherwise: they were read once."""
    same, other, no_json = body("req-1001"), body("req-1002"), body("req-1003").replace(b":", b";")
    with running.client() as first, running.client() as second:
        first.send(head(length=len(same)) + same).answer()
        client = first if connection == "one" else second
        voucher = client.send(head(length=len(same)) + same).answer()
        assert voucher.headers["idempotent-replayed"] == "true"
        new = client.send(head(length=len(other)) + other).answer()
        assert "idempotent-replayed" not in new.headers
        assert (voucher.content["request_id"], new.content["request_id"]) == ("req-1001", "req-1002")
        assert_problem(client.send(head(length=len(no_json)) + no_json).answer(), "invalid_json")
        client.send(head(length=len(same)))  # and the body later
        assert client.send(same).answer().body == voucher.body
        client.send(2 * (head(length=len(same)) + same) + head(length=len(other)) + other)
        assert [client.answer().body for _ in range(3)] == [voucher.body, voucher.body, new.body]
        client.send(head(length=len(same)) + same[:-1])
        assert client.send(same[-1:]).answer().body == voucher.body
        assert client.send(head(length=len(same), token=TOKEN[:-1] + "A") + same).answer().status == 401
        assert client.send(head(length=len(same)) + same).answer().body == voucher.body


def test_known_headers_that_end_the_connection_end_it_again(running: Running) -> None:
    for _ in range(3):
        with running.client() as client:
            answer = client.send(request(extra="Connection: close\r\n")).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert client.ended()


def test_known_headers_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.web.protocol.HEADS_MAX", 3)
    known = running.server.config.http_protocol_class.heads  # type: ignore[attr-defined]
    for number in range(10):
        assert running.ask(request(extra=f"X-Number: {number}\r\n")).status == 200
        assert 1 <= len(known) <= 3
    for extra in (f"X-Long: {HEAD_BYTES_MAX * 'x'}\r\n", "Connection: close\r\n"):
        before = dict(known)
        assert running.ask(request(extra=extra)).status == 200
        assert known == before, "headers that are too long, or that never come again, are not kept"


def test_headers_that_differ_in_their_key_alone_are_known_once(running: Running) -> None:
    known = running.server.config.http_protocol_class.heads  # type: ignore[attr-defined]
    known.clear()
    for number in range(10, 20):
        sent = body(request_id=f"req-{number}")
        assert running.ask(head(length=len(sent), extra=f"Idempotency-Key: req-{number}\r\n") + sent).status == 200
    assert len(known) == 1


def test_refusal_of_a_plain_request_is_the_one_of_any_other(running: Running) -> None:
    bad = b'{"request_id": ""}'
    for data in (head(length=len(bad)) + bad, head(length=len(bad), extra="Accept: a\r\nAccept: b\r\n") + bad):
        assert_problem(running.ask(data), "invalid_field")
    assert_problem(running.ask(request(token="vch_unknown")), "token_unknown")
    running.issuer.fault = RuntimeError("a defect")
    assert_problem(running.ask(request()), "internal")


def test_client_that_hangs_up_before_its_answer_holds_no_drain_up() -> None:
    server = Running(drain_s=int(PATIENCE_S))
    server.start()
    with server.held():
        with server.client() as client:
            client.send(request())
            until(lambda: len(server.issuer.asked) == 1, "the request")
            client.reset()
        until(lambda: not server.server.server_state.connections, "the end of the connection")
    began = time.monotonic()
    server.stop()
    server.join()
    assert time.monotonic() - began < PATIENCE_S / 2


def test_http_1_0_is_answered_and_closed(running: Running) -> None:
    with running.client() as client:
        answer = client.send(request(version="1.0")).answer()
        assert answer.status == 200
        assert client.ended()


def test_chunked_body_is_read(running: Running) -> None:
    content = body()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:7], content[7:])) + b"0\r\n\r\n"
    with running.client() as client:
        client.send(head(extra="Transfer-Encoding: chunked\r\n"))
        for byte in chunks:
            client.send(bytes([byte]))
        assert client.answer().status == 200
        assert client.send(request()).answer().status == 200


def test_trailers_never_become_headers(running: Running) -> None:
    content = body()
    trailers = f"Authorization: Bearer {TOKEN}\r\nIdempotency-Key: other\r\n".encode()
    chunks = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(content), content, trailers)
    with running.client() as client:
        answer = client.send(head(token="none", extra="Transfer-Encoding: chunked\r\n") + chunks).answer()
        assert_problem(answer, "token_unknown")
        assert client.send(head(extra="Transfer-Encoding: chunked\r\n") + chunks).answer().status == 200


def test_pipelined_requests_are_answered_in_order(running: Running) -> None:
    keys = [f"req-{number}" for number in range(PIPELINE_MAX // 2)]
    with running.client() as client:
        client.send(b"".join(map(request, keys)))
        assert [client.answer().content["request_id"] for _ in keys] == keys


def test_endless_pipeline_is_bounded(running: Running) -> None:
    with running.client() as client:
        with running.held():
            client.send(b"".join(request(f"req-{number}") for number in range(2 * PIPELINE_MAX)))
            until(lambda: len(running.issuer.asked) == 1, "the first request")
        answers = [client.answer() for _ in range(PIPELINE_MAX + 2)]
        assert [answer.status for answer in answers] == [200] * (PIPELINE_MAX + 1) + [503]
        assert_problem(answers[-1], "overloaded")
        assert client.ended()


def test_expected_continue_is_said_only_when_the_body_is_wanted(running: Running) -> None:
    content = body()
    with running.client() as client:
        client.send(head(length=len(content), extra="Expect: 100-continue\r\n"))
        assert client.answer(bodyless=True).status == 100
        assert client.send(content).answer().status == 200
    with running.client() as client:
        client.send(head(length=10_000_000, extra="Expect: 100-continue\r\n"))
        assert_problem(client.answer(), "too_large")
        assert client.socket.recv(1) == b""


def test_client_that_stops_sending_still_gets_its_answer(running: Running) -> None:
    with running.client() as client:
        with running.held():
            client.send(request())
            client.socket.shutdown(socket.SHUT_WR)
            until(lambda: len(running.issuer.asked) == 1, "the request")
        assert client.answer().status == 200
        assert client.ended()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", [PATH, "/", "/other"])
def test_wrong_methods_and_paths_are_problems(running: Running, method: str, path: str) -> None:
    with running.client() as client:
        answer = client.send(head(method, path)).answer(bodyless=method == "HEAD")
        assert answer.status == (405 if path == PATH else 404)
        assert answer.headers["content-type"] == "application/problem+json"
        if path == PATH:
            assert answer.headers["allow"] == "POST"
        if method != "HEAD":
            assert_problem(answer, "method_not_allowed" if path == PATH else "not_found")
        assert client.send(request()).answer().status == 200


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_offer_of_another_protocol_never_costs_the_body(running: Running, upgrade: str) -> None:
    extra = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    assert_problem(running.ask(head("GET", "/other", extra=extra)), "not_found")
    with running.client() as client:
        assert client.send(request("req-1", extra=extra)).answer().status == 200
        data = request("req-2", extra=extra)
        client.send(data[:-90])
        client.send(data[-90:-5])
        assert client.send(data[-5:]).answer().status == 200
        assert client.send(request("req-3", extra=extra) + request("req-4")).answer().status == 200
        assert client.answer().content["request_id"] == "req-4"


# --- what is no HTTP, or too much of it


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # a TLS hello
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET http://[::bad HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost:1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        head(extra="Content-Length: 5\r\nContent-Length: 6\r\n") + b"hello",
        head(extra="Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        head(extra="Content-Length: -5\r\n"),
        head(extra="Content-Length: 99999999999999999999999\r\n"),
        head(extra="Transfer-Encoding: chunked\r\n") + b"xyz\r\n",
        head(extra="Transfer-Encoding: chunked\r\n") + b"5\r\nhel",
        request(extra="Host: other\r\n"),
        request(extra=f"Authorization: Bearer {TOKEN}\r\n"),
        request(extra="Content-Length: 1\r\n"),
    ],
)
def test_what_is_no_http_is_told_so(running: Running, data: bytes) -> None:
    with running.client() as client:
        answer = client.send(data).answer()
        assert answer.status in (400, 408)
        assert_problem(answer, "malformed_request" if answer.status == 400 else "request_timeout")
        assert answer.headers["connection"] == "close"
        assert client.ended()
    assert not running.issuer.asked


@pytest.mark.parametrize(
    "extra",
    [
        f"X: {'x' * HEADER_BYTES_MAX}\r\n",
        "".join(f"X-{number}: {number}\r\n" for number in range(HEADERS_MAX)),
        f"X: {'x' * 5_000_000}\r\n",
    ],
)
def test_headers_are_bounded(running: Running, extra: str) -> None:
    with running.client() as client:
        with contextlib.suppress(ConnectionError):  # it need not listen to all of it
            client.send(request(extra=extra))
        assert_problem(client.answer(), "headers_too_large")
    assert running.ask(request()).status == 200


def test_header_without_end_is_cut_off(running: Running) -> None:
    with running.client() as client:
        client.send(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(2 * HEADER_BYTES_MAX // 1_000):
            with contextlib.suppress(ConnectionError):
                client.send(b"x" * 1_000)
        assert_problem(client.answer(), "headers_too_large")


def test_malformed_request_never_takes_the_answer_of_the_one_before(running: Running) -> None:
    with running.client() as client:
        with running.held():
            client.send(request("req-1") + request("req-2") + b"\x00\x00\r\n\r\n")
            until(lambda: len(running.issuer.asked) == 1, "the first request")
        assert client.answer().content["request_id"] == "req-1"
        assert client.answer().content["request_id"] == "req-2"
        assert_problem(client.answer(), "malformed_request")
        assert client.ended()


# --- large bodies


@pytest.mark.parametrize("chunked", [False, True])
def test_10_mb_are_refused_without_reading_them_all(running: Running, chunked: bool) -> None:
    size = 10_000_000
    with running.client() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        if chunked:
            client.send(head(extra="Transfer-Encoding: chunked\r\n") + b"%x\r\n" % size)
        else:
            client.send(head(length=size))
        sent, block = 0, b"x" * 65_536
        client.socket.settimeout(0.3)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while sent < size:
                sent += client.socket.send(block)
        client.socket.settimeout(PATIENCE_S)
        answer = client.answer()
        assert_problem(answer, "too_large")
        assert answer.headers["connection"] == "close"
        assert client.ended()
        assert sent < size
        assert sent < LINGER_BYTES + 8_000_000  # what kernels hold of it
    assert not running.issuer.asked


@pytest.mark.parametrize("data", [head(token="x", length=10_000_000), head("PUT", "/other", length=10_000_000)])
def test_large_body_that_nobody_wants_is_not_read_either(running: Running, data: bytes) -> None:
    with running.client() as client:
        answer = client.send(data + b"x" * 100_000).answer()
        assert answer.status in (401, 404)
        assert answer.headers["connection"] == "close"
        assert client.ended()


def test_small_body_that_nobody_wants_does_not_cost_the_connection(running: Running) -> None:
    with running.client() as client:
        assert_problem(client.send(head("PUT", "/other", length=100)).answer(), "not_found")
        client.send(b"x" * 100)
        assert client.send(request()).answer().status == 200


def test_body_just_over_the_limit_is_refused(running: Running) -> None:
    content = body() + b" " * BODY_MAX
    assert_problem(running.ask(head(length=len(content)) + content), "too_large")


# --- time


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", ""),
        (b"POST", "request_timeout"),
        (request()[:-5], "request_timeout"),
        (head(extra="Transfer-Encoding: chunked\r\n") + b"5\r\nhello\r\n", "request_timeout"),
    ],
    ids=["silent", "half a header", "half a body", "half the chunks"],
)
def test_slow_clients_are_closed_at_the_limit_while_others_are_served(running: Running, data: bytes, code: str) -> None:
    began = time.monotonic()
    slow = [running.client().send(data) for _ in range(CONNECTIONS_MAX // 2)]
    assert running.ask(request()).status == 200
    assert time.monotonic() - began < RECEIVE_TIMEOUT_S + 1.0
    for client in slow:
        with client:
            if code:
                assert_problem(client.answer(), code)
            assert client.ended()
    assert time.monotonic() - began >= RECEIVE_TIMEOUT_S * 0.9
    assert running.ask(request()).status == 200
    until(lambda: not running.server.server_state.connections, "the end of all connections")


def test_dripping_never_extends_the_time_limit(running: Running) -> None:
    began = time.monotonic()
    with running.client() as client:
        with contextlib.suppress(ConnectionError):
            for byte in request():
                client.send(bytes([byte]))
                if time.monotonic() - began > 3 * RECEIVE_TIMEOUT_S:
                    break
                time.sleep(RECEIVE_TIMEOUT_S / 10)  # the drip itself
        assert_problem(client.answer(), "request_timeout")
    assert not running.issuer.asked


def test_slow_answers_and_kept_connections_are_left_alone(running: Running) -> None:
    with running.client() as slow, running.client() as kept:
        assert kept.send(request("req-0")).answer().status == 200
        began = time.monotonic()
        with running.held():
            slow.send(request())
            until(lambda: time.monotonic() - began > 2 * RECEIVE_TIMEOUT_S, "the time limit")
        assert slow.answer().status == 200
        assert kept.send(request()).answer().status == 200


def test_idle_connection_is_closed_and_a_used_one_is_not() -> None:
    server = Running()
    server.server.config.timeout_keep_alive = 1
    server.start()
    with server.client() as idle, server.client() as used:
        began = time.monotonic()
        idle.send(request()).answer()
        while time.monotonic() - began < 1.5:
            assert used.send(request()).answer().status == 200
        assert idle.ended()
        assert used.send(request()).answer().status == 200
        began = time.monotonic()
        assert used.ended()
        assert 0.9 < time.monotonic() - began < PATIENCE_S / 2
    server.stop()
    server.join()


def test_connections_over_the_limit_are_told_so_and_others_go_on(running: Running) -> None:
    kept = [running.client() for _ in range(CONNECTIONS_MAX)]
    for client in kept:
        assert client.send(request()).answer().status == 200
    with running.client() as client:
        answer = client.answer()
        assert_problem(answer, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert client.ended()
    for client in kept:
        with client:
            assert client.send(request()).answer().status == 200
    until(lambda: len(running.server.server_state.connections) < CONNECTIONS_MAX, "a free connection")
    assert running.ask(request()).status == 200


# --- draining


def test_a_request_that_comes_just_as_its_idle_connection_is_closed_is_answered(running: Running) -> None:
    with running.client() as client:
        assert client.send(request()).answer().status == 200
        (connection,) = running.server.server_state.connections

        def at_the_last_moment() -> None:
            """In the thread of the loop, which has not looked at the network since."""
            connection.shutdown()
            client.send(request("req-1002"))
            connection._close_if_idle()  # type: ignore[union-attr]

        assert running.loop is not None
        running.loop.call_soon_threadsafe(at_the_last_moment)
        answer = client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_drain_answers_what_is_in_flight_and_closes_what_is_idle() -> None:
    running = Running()
    running.start()
    with running.client() as idle, running.client() as busy, running.client() as half, running.client() as pipelined:
        assert idle.send(request("req-0")).answer().status == 200
        data = request("req-2")
        half.send(data[:-5])
        with running.held():
            busy.send(request("req-1"))
            pipelined.send(request("req-3") + request("req-4"))
            until(lambda: len(running.issuer.asked) == 3, "the requests")
            running.stop()
            assert idle.ended()
            half.send(data[-5:])
            until(lambda: len(running.issuer.asked) == 4, "the rest of a request")
        for client, key in ((busy, "req-1"), (half, "req-2"), (pipelined, "req-3"), (pipelined, "req-4")):
            answer = client.answer()
            assert (answer.status, answer.content["request_id"]) == (200, key)
            assert ("connection" in answer.headers) == (key != "req-3")
        for client in (busy, half, pipelined):
            assert client.ended()
    running.join()
    assert running.issuer.draining


def test_request_on_its_way_to_an_idle_connection_is_not_cut_by_a_drain() -> None:
    running = Running()
    running.start()
    with running.client() as client:
        assert client.send(request()).answer().status == 200
        running.stop()
        until(lambda: running.draining(), "the drain")
        answer = client.send(request()).answer()
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert client.ended()
    running.join()


def test_request_that_outlives_the_drain_is_told_so() -> None:
    running = Running(drain_s=1)
    running.start()
    running.issuer.gate = asyncio.Event()
    with running.client() as client:
        client.send(request())
        until(lambda: len(running.issuer.asked) == 1, "the request")
        running.stop()
        assert_problem(client.answer(), "draining")
    running.join()
