"""Log lines: what is in each, what must never be in one, and that docs/logs.md lists them all."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from service import logs
from service.tokens import SECRET_PREFIX, new_token
from tests.secrecy import leaks
from tests.unit.test_documents import ROOT, rows

LEVELS = ("debug", "info", "warning", "error", "critical")
Read = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _libraries() -> Iterator[None]:
    """What libraries log goes again where it went before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str]) -> Read:
    """The lines written since the last look."""
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_every_line_says_when_how_bad_and_of_which_process(read: Read) -> None:
    logs.configure("work")
    structlog.get_logger().warning("step failed", loop="flush")
    [line] = read()
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "step failed", "level": "warning", "process": "work", "pid": os.getpid(), "loop": "flush"}


def test_no_line_below_the_level_is_written(read: Read) -> None:
    logs.configure("work", level="error")
    log = structlog.get_logger()
    for level in LEVELS:
        getattr(log, level)(level)
    assert [line["event"] for line in read()] == ["error", "critical"]


def test_lines_for_people_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("serve", style="console")
    structlog.get_logger().error("worker_ended", worker=2)
    line = capsys.readouterr().err
    assert line.endswith("\n") and line.count("\n") == 1
    assert {"worker_ended", "worker=2", "process=serve"} <= set(line.split())
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_fault_is_logged_without_its_text(style: logs.Format, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("work", style=style)
    try:
        raise ValueError("the code SPR-0001 is bad")
    except ValueError:
        structlog.get_logger().exception("step failed", loop="flush")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "SPR-0001" not in line
    assert "ValueError" in line and "test_logs.py" in line


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize(
    "held",
    [
        pytest.param(new_token(), id="token"),
        pytest.param(new_token(SECRET_PREFIX), id="secret"),
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJjbGllbnQifQ.c2ln",
        "-----BEGIN PRIVATE KEY-----",
        "redis://voucherd:hunter2@redis.internal:6379/0",
    ],
)
def test_what_looks_like_a_secret_is_struck_out(
    held: str, style: logs.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("work", style=style)
    structlog.get_logger().warning("step failed", loop="flush", detail=f"it said {held}, and more")
    line = capsys.readouterr().err
    assert "struck out" in line and "hunter2" not in line
    assert leaks(line, []) == []
    assert leaks(logs.without_secrets(held), []) == []


async def test_a_callback_that_fails_does_not_log_what_it_was_given(read: Read) -> None:
    def tell(answer: str) -> None:
        raise RuntimeError(answer)

    logs.configure("serving")
    asyncio.get_running_loop().call_soon(tell, "SPR-0001")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    [line] = read()
    assert (line["event"], line["logger"], line["fault"], line["level"]) == (
        "library", "asyncio", "RuntimeError", "error",
    )  # fmt: skip
    assert line["message"].startswith("Exception in callback")
    assert "SPR-0001" not in str(line)


def test_every_event_is_documented_and_no_other() -> None:
    listed = rows((ROOT / "docs" / "logs.md").read_text(), "event")
    said: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for path in sorted((ROOT / "service").rglob("*.py")):
        for event, levels, fields in events(path):
            said[event][0].update(levels)
            said[event][1].update(fields)
    found = {
        event: (", ".join(level for level in LEVELS if level in levels), ", ".join(sorted(fields)))
        for event, (levels, fields) in said.items()
    }
    assert {event: (level, fields) for event, level, fields, *_ in listed} == found
    assert len(listed) == len(found)


def events(path: Path) -> Iterator[tuple[str, set[str], set[str]]]:
    """The events that a file logs: name, levels, fields."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        branches = [call.func.body, call.func.orelse] if isinstance(call.func, ast.IfExp) else [call.func]
        of_log = [one for one in branches if isinstance(one, ast.Attribute) and is_log(one.value)]
        if not of_log or of_log[0].attr not in (*LEVELS, "exception"):
            continue
        event = call.args[0]
        assert isinstance(event, ast.Constant), f"{path}:{call.lineno}: an event has a name of its own"
        fields: set[str] = set()
        for given in call.keywords:
            if given.arg is not None:
                fields.add(given.arg)
            elif "where(" in (text := ast.unparse(given.value)):
                fields |= {"fault", "at"}
            else:
                assert text in EXPANDED, f"{path}:{call.lineno}: what fields are in **{text}?"
                fields |= EXPANDED[text]
        if of_log[0].attr == "exception":
            fields |= {"fault", "at"}
        yield event.value, {"error" if one.attr == "exception" else one.attr for one in of_log}, fields


# Fields that a call is given by name, together.
EXPANDED = {"asking.named": {"request_id", "trace_id", "parent_id"}}


def is_log(value: ast.expr) -> bool:
    if isinstance(value, ast.Name):
        return value.id == "log"
    return isinstance(value, ast.Call) and ast.unparse(value.func).endswith("get_logger")
