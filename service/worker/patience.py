"""How long a command tries to reach Redis or a partition that is being recovered, and that Ctrl-C ends it at once."""

from __future__ import annotations

import asyncio
from typing import Final

# A roll takes well under a second on a small ledger; an operator waits this long for the rest and not for ever.
UNREACHED_S: Final = 5.0
UNREACHED_POLL_S: Final = 0.1


def stop_if_cancelled() -> None:
    """Raises CancelledError if this task was cancelled and went on all the same.

    Before Python 3.12 asyncio.wait_for, which redis-py waits with, may swallow it, and Ctrl-C with it.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
