"""Becomes a command that does not outlive its parent and can be told from any other: run as a script,
``leash.py LOCK PARENT COMMAND [ARGUMENT...]``.

The record lock on the file LOCK belongs to this process alone: it survives the exec, no fork inherits it, and it
goes with the process however that ends.  So whoever finds it held knows that the pid in the file is alive and is
this very command, which a pid file alone never says.  Imports nothing of the project and starts in a few ms.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
HELD = 75  # exit status: LOCK is held by another process
LOCK_WAIT_S = 1.0  # somebody who looks whether it is held holds it for a moment


def main(lock: str, parent: str, *command: str) -> int:
    """Never returns if all goes well.  The parent's end sends SIGTERM (Linux; elsewhere the lock is all there is)."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                return HELD
            time.sleep(0.01)
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    os.set_inheritable(file, True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return 0  # it ended before it could be heard
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
