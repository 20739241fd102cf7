"""``voucherd`` typed many times: each command is a process of its own, forked from one that has imported everything.

What such a process is given (arguments, environment, directory, standard streams) and how it ends are those of one
that was started; only the second that an interpreter takes to import is spent once.  For commands that are not what a
test is about, or that are typed by the dozen.

    forked.py SOCKET              the one that has imported everything; ends when its standard input does
    forked.py SOCKET ARGUMENT...  one command: asks that one, and ends as the command did
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STREAMS = (0, 1, 2)


@contextlib.contextmanager
def commands(directory: Path, environment: dict[str, str]) -> Iterator[Path]:
    """The program ``voucherd`` in ``directory``, which works until this ends."""
    directory.mkdir(parents=True)
    at = directory / "socket"
    words = shlex.join([sys.executable, "-I", "-S", __file__, str(at)])
    program = directory / "voucherd"
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", at], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline(), "it could not start: its error is above"
        yield program
    finally:
        server.communicate()  # the end of its standard input


def ask(at: str, arguments: list[str]) -> int:
    """Runs one command with what this process was given; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(at)
        socket.send_fds(asking, [b"."], STREAMS)
        given = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
        asking.sendall(json.dumps(given).encode())
        asking.shutdown(socket.SHUT_WR)
        ended = asking.makefile("rb").read()  # to the end: then the process has closed all that it had
    return int(ended) if ended else 1


def serve(at: str) -> int:
    """Forks until its standard input ends; 0 for good."""
    from importlib import import_module

    from service.cli.main import COMMANDS

    for command in COMMANDS.values():
        import_module(command.where.partition(":")[0])
    gc.freeze()  # what is shared stays shared
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(at)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            with contextlib.suppress(ChildProcessError):  # whoever asked knows how it ended
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:
                return 0
            asked, _ = listener.accept()
            if os.fork() == 0:
                os._exit(_one(asked))  # taking 800 modules apart takes longer than most commands
            asked.close()


def _one(asked: socket.socket) -> int:
    """Is the command that was asked for, and says how it ended."""
    from service.cli.main import main

    _, files, _, _ = socket.recv_fds(asked, 1, len(STREAMS))
    given = json.loads(asked.makefile("rb").read())
    for stream, file in zip(STREAMS, files, strict=True):
        os.dup2(file, stream)
        os.close(file)
    os.chdir(given["directory"])
    os.environ.clear()
    os.environ.update(given["environment"])
    sys.argv = ["voucherd", *given["arguments"]]
    status = 1
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    asked.sendall(str(status).encode())
    return status


if __name__ == "__main__":
    at, *arguments = sys.argv[1:]
    sys.exit(ask(at, arguments) if arguments else serve(at))
