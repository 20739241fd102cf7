"""HTTP/1.1 byte by byte, for what no client library would send: one connection, and the answers on it."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Self

import msgspec

PATIENCE_S = 10.0


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body)
        return content


def first_answer(data: bytes, *, bodyless: bool = False) -> tuple[Answer, bytes] | None:
    """The first whole answer in ``data`` and what comes after it; None if it is not whole yet.

    Fails if it is anything but an answer with a length.  ``bodyless``: it was to HEAD.
    """
    text, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    status, *lines = text.decode("latin-1").split("\r\n")
    version, number, *_ = status.split(" ")
    assert version == "HTTP/1.1", data
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(pairs), "a header was answered twice"
    length = 0 if bodyless or number == "100" else int(headers["content-length"])
    return (Answer(int(number), headers, rest[:length]), rest[length:]) if len(rest) >= length else None


def all_answers(data: bytes) -> list[Answer]:
    """Fails if there is anything in ``data`` but whole answers."""
    found = []
    while data:
        first = first_answer(data)
        assert first is not None, f"a part of an answer: {data!r}"
        answer, data = first
        found.append(answer)
    return found


class Client:
    """One connection, byte by byte."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def answer(self, *, bodyless: bool = False) -> Answer:
        """The next whole answer."""
        while (first := first_answer(self._received, bodyless=bodyless)) is None:
            data = self.socket.recv(65_536)
            assert data, f"the connection was dropped after {self._received!r}"
            self._received += data
        answer, self._received = first
        return answer

    def rest(self) -> list[Answer]:
        """All answers until the server ends the connection; fails if it does not."""
        self._read_to_end()
        answers, self._received = all_answers(self._received), b""
        return answers

    def ended(self) -> bool:
        """Whether the server ends the connection, with nothing more said before."""
        self._read_to_end()
        return not self._received

    def reset(self) -> None:
        """Ends the connection abruptly: what is on its way in either direction is lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read_to_end(self) -> None:
        try:
            while data := self.socket.recv(65_536):
                self._received += data
        except ConnectionResetError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
