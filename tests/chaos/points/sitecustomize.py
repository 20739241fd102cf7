"""Places between two lines at which a real process dies.

An interpreter that has this directory on PYTHONPATH imports this file before anything else, so a process is given crash
points by its environment, and ``service`` knows nothing of them: where they are off they are not there.

Each script call is a place before it and one after it.  The file ``issue-after`` in $CHAOS_POINTS kills the first
process that has read the reply of an ``issue`` and has told nobody yet; ``flushed-before`` the first that has committed
entries and has not acknowledged them.  The file has that process's id for an ending then.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from functools import wraps

SCRIPTS = ("issue", "flushed", "restock", "open", "restore", "publish", "stock")


def die_at(point: str) -> None:
    path = os.path.join(os.environ["CHAOS_POINTS"], point)
    try:
        os.rename(path, f"{path}.{os.getpid()}")  # for one process only
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def between(name: str, call):
    @wraps(call)
    async def called(*arguments, **named):
        die_at(f"{name}-before")
        done = await call(*arguments, **named)
        die_at(f"{name}-after")
        return done

    return called


class Finder:
    """Of one module, which it changes when it has been loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "service.scripts":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            for script in SCRIPTS:
                setattr(module.Scripts, script, between(script, getattr(module.Scripts, script)))

        spec.loader.exec_module = exec_module
        return spec


if "CHAOS_POINTS" in os.environ:
    sys.meta_path.insert(0, Finder())
