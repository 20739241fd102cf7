"""Each script's header is its contract; header and body are held together here, as far as a static reading can tell.

What a reading can't tell, the script suite does: it fails if a status of a header was answered by no test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from service.scripts import NAMES, load
from tests.scripting import statuses

FOLDER: Final = Path(__file__).parents[2] / "lua"

# Every command that a script may use.  A new one is added here, and to the rights that are asked for at boot.
READS: Final = frozenset(
    {"EXISTS", "GET", "HGET", "HMGET", "INFO", "LLEN", "LPOS", "LRANGE", "MGET", "TIME", "XLEN", "XRANGE", "ZCARD"}
)  # fmt: skip
WRITES: Final = frozenset(
    {"EXPIREAT", "HDEL", "HINCRBY", "HSET", "LPOP", "LREM", "RPUSH", "SET", "UNLINK", "XACK", "XADD", "XDEL", "ZADD"}
)  # fmt: skip
ONLY_FREE: Final = frozenset({"XACK", "XDEL", "HINCRBY", "HSET", "UNLINK"})  # of a script that runs in a full memory
# Without these no roll ends, and what it leaves is freed only after it.
OF_A_ROLL: Final = frozenset({"open", "restore"})
KEY_TYPES: Final = "string|hash|list|stream|sorted set"
CALL: Final = re.compile(r"redis\.call\('([A-Z]+)'")


def header(name: str) -> list[str]:
    lines = load(name).text.splitlines()[1:]
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))]


def body(name: str) -> str:
    """The script below its header, without comments."""
    lines = load(name).text.splitlines()[1 + len(header(name)) :]
    return "\n".join(re.sub(r"--.*", "", line) for line in lines)


def section(name: str, title: str, following: str) -> list[str]:
    """The lines of one section of the header, ``KEYS`` say, without its own."""
    lines = header(name)
    first = next(i for i, line in enumerate(lines) if line.startswith(f"-- {title}"))
    last = next(i for i, line in enumerate(lines) if line.startswith(f"-- {following}"))
    return lines[first + 1 : last]


def numbered(lines: list[str]) -> list[int]:
    """The numbers under which arguments are declared; a line may declare several."""
    return [int(number) for line in lines for number in re.findall(r"(?:^--|\S)\s{2,}(\d+)  (?=\S)", line)]


def more_follow(lines: list[str]) -> bool:
    """Whether there are arguments past the numbered ones."""
    return any(re.search(r"and on|^--   then per ", line) for line in lines)


def without_calls(text: str) -> str:
    """``text`` without the arguments of any ``redis.call``."""
    kept, at = [], 0
    for call in re.finditer(r"redis\.call\(", text):
        if call.start() < at:
            continue  # inside the one before
        kept.append(text[at : call.start()])
        at, depth = call.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
    return "".join([*kept, text[at:]])


def first_write(text: str) -> int:
    """Where the first writing command is, the length of the text if there is none."""
    return next((call.start() for call in CALL.finditer(text) if call[1] in WRITES), len(text))


def test_no_script_but_those_with_a_door() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.lua" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_header_has_every_section_in_its_place(name: str) -> None:
    text = load(name).text
    assert re.match(r"#!lua( flags=[a-z-]+)?\n-- [A-Z]", text), "line 1 is #!lua, line 2 says what for"
    titles = [line for line in header(name) if re.match(r"-- (KEYS|ARGV|Returns|Cost)", line)]
    assert len(titles) == 4
    keys, argv, returns, cost = titles
    assert keys in ("-- KEYS", "-- KEYS (none)")
    assert argv == "-- ARGV"
    assert returns.startswith("-- Returns {status")
    assert re.match(r"-- Cost: \d", cost)
    purpose = header(name)[: header(name).index(keys)]
    assert len(purpose) > 1
    assert purpose[-1] == "--"


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_too_long_where_luacheck_is_missing(name: str) -> None:
    assert [line for line in load(name).text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("title", "following"), [("KEYS", "ARGV"), ("ARGV", "Returns")])
def test_arguments_are_numbered_from_one_without_a_gap(name: str, title: str, following: str) -> None:
    declared = numbered(section(name, title, following))
    assert declared == list(range(1, len(declared) + 1))
    if title == "ARGV":
        assert declared or more_follow(section(name, title, following))


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_type(name: str) -> None:
    for line in section(name, "KEYS", "ARGV"):
        if "and on" not in line and re.match(r"--   \d", line):
            assert re.search(rf"\b({KEY_TYPES})$", line), line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("title", "following"), [("KEYS", "ARGV"), ("ARGV", "Returns")])
def test_no_argument_is_unused_or_undeclared(name: str, title: str, following: str) -> None:
    lines, text = section(name, title, following), body(name)
    declared, more = numbered(lines), more_follow(lines)
    fixed = declared[:-1] if more and any("and on" in line for line in lines) else declared
    used = {int(number) for number in re.findall(rf"\b{title}\[(\d+)\]", text)}
    if title == "ARGV":  # issue reads its numbers through a function
        used |= {int(number) for number in re.findall(r"\binteger\((\d+), ", text)}
    dynamic = re.search(rf"\b{title}\[(?!\d+\])|unpack\({title}\b", text)
    assert set(fixed) <= used, "declared and not used"
    assert more or used <= set(fixed), "used and not declared"
    assert bool(dynamic) == more, "arguments past the numbered ones"
    assert bool(re.search(rf"#{title}\b", text)) == more, "how many there are is checked"


@pytest.mark.parametrize("name", NAMES)
def test_statuses_of_header_and_body_are_the_same(name: str) -> None:
    answered = set(re.findall(r"'([A-Z]+)'", without_calls(body(name))))
    assert answered == statuses(name)


@pytest.mark.parametrize("name", NAMES)
def test_no_command_but_the_known_ones(name: str) -> None:
    text = body(name)
    assert {call[1] for call in CALL.finditer(text)} <= READS | WRITES
    assert len(CALL.findall(text)) == text.count("redis.call("), "a command's name is a literal"
    assert not re.search(r"redis\.pcall|\bcjson\b|\bcmsgpack\b|\bloadstring\b|\bmath\.random\b|\bos\.", text)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_after_the_first_write(name: str) -> None:
    text = body(name)
    start = first_write(text)
    assert not [call[1] for call in CALL.finditer(text, start) if call[1] in READS]
    reading = [
        function[1]
        for function in re.finditer(r"^local function (\w+)\(.*?^end$", text, re.MULTILINE | re.DOTALL)
        if CALL.search(function[0])
    ]
    assert not [function for function in reading if re.search(rf"\b{function}\(", text[start:])]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_refused_after_the_first_write(name: str) -> None:
    text = body(name)
    assert "error_reply" not in text[first_write(text) :]


@pytest.mark.parametrize("name", NAMES)
def test_flags_say_what_the_script_does(name: str) -> None:
    line = load(name).text.partition("\n")[0]
    commands = {call[1] for call in CALL.finditer(body(name))}
    assert ("no-writes" in line) == (not commands & WRITES)
    assert "allow-oom" not in line or commands & WRITES <= ONLY_FREE or name in OF_A_ROLL


@pytest.mark.parametrize("name", NAMES)
def test_no_reply_can_hold_a_nil(name: str) -> None:
    """A name that a command may have left nil is answered as ``name or …``, or after a guard that returned or went
    elsewhere if it was nil, or after it was given another value."""
    text = body(name)
    nilable: list[tuple[str, int]] = []
    for found in re.finditer(r"local ([\w, ]+?) = (.*)$", text, re.MULTILINE):
        if re.search(r"redis\.call\('(GET|HGET|HMGET)'|string\.match", found[2]) and " or " not in found[2]:
            nilable += [(one.strip(), found.end()) for one in found[1].split(",")]
    for answer in re.finditer(r"return (\{.*?\})|\breply\[[^\]]+\](?:, reply\[[^\]]+\])* = (.*)$", text, re.MULTILINE):
        answered = answer[1] or answer[2]
        assert not re.search(r"redis\.call|\bnil\b|\bfalse\b", re.sub(r"string\.format\(.*?\)\)", "", answered))
        for one, since in nilable:
            if since > answer.start() or not re.search(rf"(?<![\w'.]){one}\b(?!'| or )", answered):
                continue
            guard = rf"(\b{one} ~= ARGV|\bnot {one}\b)(.*\n)+?\s*(end|else)\b"
            given = rf"\b{one}(, \w+)* = ({one}|tonumber\({one}) or |, {one} = (.*, )?(tonumber\()?{one} or "
            assert re.search(f"{guard}|{given}", text[since : answer.start()]), f"{one} in {answer[0]}"


def test_replies_hold_no_fraction_and_no_large_number() -> None:
    """A Lua number becomes an integer reply, but only up to 2^53; what may be larger goes as text."""
    for name in NAMES:
        for answer in re.finditer(r"return \{(.*?)\}", body(name)):
            for one in re.findall(r"\b(version|fence|stock|seq)\b", re.sub(r"string\.format\([^)]*\)+", "", answer[1])):
                pytest.fail(f"{name} answers {one} as a number: {answer[0]}")
