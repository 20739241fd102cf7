"""docs/operations.md: each of its commands is run, in order, and prints what the document shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance.service import DEADLINE_S, Service
from tests.acceptance.test_up import ROOT

DOCUMENT = ROOT / "docs" / "operations.md"
ANYTHING = "…"  # in what is shown: any text, or, alone on its line, any lines
DAY_S = 300.0  # seconds that the whole day takes at most
ADDRESS = "http://127.0.0.1:8080"  # where the document says that the API is


class Step(NamedTuple):
    """A command as it is typed, and what the document shows of its output."""

    line: int
    command: str
    shown: str


def steps(text: str) -> Iterator[Step]:
    """What stands in ``console`` blocks: a command after ``$``, its further lines after ``>``."""
    inside = False
    line, command, shown = 0, "", ""
    for number, content in enumerate(text.splitlines(), 1):
        fence = content.startswith("```")
        if command and (fence or content.startswith("$ ")):
            yield Step(line, command, shown)
            command = ""
        if fence:
            inside = content == "```console"
        elif inside and content.startswith("$ "):
            line, command, shown = number, content[2:], ""
        elif inside and command and not shown and content.startswith("> "):
            command += "\n" + content[2:]
        elif inside:
            shown += content + "\n"


def fits(printed: str, shown: str) -> bool:
    """Whether ``printed`` is what is ``shown``, however wide its columns are and whatever its empty lines."""
    pattern = "".join(
        "(?:.*\n)*" if line == ANYTHING else ".*".join(map(re.escape, line.split(ANYTHING))) + "\n"
        for line in _lines(shown)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _lines(printed))) is not None


def _lines(text: str) -> list[str]:
    return [line for line in (re.sub(r"[ ─]+", " ", line).strip() for line in text.splitlines()) if line]


class Shell:
    """One bash in which the commands are typed one after the other, as a reader of the document does."""

    def __init__(self, service: Service, directory: Path) -> None:
        programs = directory / "bin"
        programs.mkdir(parents=True)
        if shutil.which("curl") is None:
            interpreter = shlex.quote(sys.executable)
            (programs / "curl").write_text(f'#!/bin/sh\nexec {interpreter} -m tests.acceptance.curl "$@"\n')
            (programs / "curl").chmod(0o755)
        work = directory / "work"
        work.mkdir()
        environment = {
            **service.environment,
            "PATH": f"{programs}:{service.program.parent}:{os.environ['PATH']}",
            "COLUMNS": "80",
        }
        self._service = service
        self._address = f"http://127.0.0.1:{service.port}"
        self._bash = subprocess.Popen(
            ["bash"], cwd=work, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def type(self, command: str) -> str:
        """What ``command`` printed, when the worker had done with all before it, as it has by the time one is typed."""
        self._service.quiet()
        self._service.refilled()
        assert self._bash.stdin is not None and self._bash.stdout is not None
        self._bash.stdin.write(f"{command.replace(ADDRESS, self._address)}\necho; echo '# end of it'\n")
        self._bash.stdin.flush()
        printed = ""
        too_long = threading.Timer(DEADLINE_S, self._bash.kill)
        too_long.start()
        for line in self._bash.stdout:
            if line == "# end of it\n":
                too_long.cancel()
                return printed.replace(self._address, ADDRESS)
            printed += line
        raise AssertionError(f"bash ended, or {command} took more than {DEADLINE_S:g} s: {printed}")

    def close(self) -> None:
        try:
            self._bash.communicate(timeout=DEADLINE_S)
        finally:
            self._bash.kill()


@pytest.fixture
def shell(service: Service, tmp_path: Path) -> Iterator[Shell]:
    left_s = 86_400 - time.time() % 86_400
    if left_s < DAY_S:
        time.sleep(left_s)  # the document settles "today": its vouchers have to be of one day
    opened = Shell(service, tmp_path / "shell")
    yield opened
    opened.close()


def test_every_command_of_the_first_day_prints_what_the_document_shows(shell: Shell) -> None:
    typed = list(steps(DOCUMENT.read_text()))
    for step in typed:
        printed = shell.type(step.command)
        assert fits(printed, step.shown), f"line {step.line}: {step.command}\n{printed}"
    assert len(typed) > 20
