"""A lock that goes with the process that holds it, however that ends; the file that is left behind means nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import Misconfigured


@contextmanager
def only_one(path: Path, taken: str) -> Iterator[None]:
    """No other process holds the lock at ``path`` meanwhile.

    Raises Misconfigured: ``taken``, with ``{pid}`` replaced by the holder's, or why there can be no lock.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Misconfigured(f"the lock {path} can't be had: {error.strerror}") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Misconfigured(taken.replace("{pid}", os.read(file, 20).decode() or "unknown")) from None
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        os.close(file)
