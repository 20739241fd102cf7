"""Whom a queue still takes: so that whoever is taken is called for in time, and one does not take it from the others.

Pure: no I/O, no clock.  Each call takes the same time, whatever is in the queue.
"""

from __future__ import annotations

import math
from typing import Final, Literal

Guard = Literal["", "queue", "delay", "share"]

# Of the time that the last batch took, this part goes into the pace: some eight batches count, as many as a stall of a
# few milliseconds (a fsync, a collection of garbage) is forgotten in.
NEWEST: Final = 1 / 8


class Admission:
    """The bounds of one queue that is called for in batches of at most ``batch_max``, one batch after the other.

    Its room is ``queue_max`` or, if that is less, what will have been called for within ``deadline_s`` at the pace of
    the last batches; the one under way counts for as long as it already takes.  Of the room a holder may have as much
    as it leaves free (the dynamic threshold of Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory
    packet switches", 1998): one alone gets half, each of two a third, and there is always something left for one who
    has nothing yet.
    """

    def __init__(self, queue_max: int, batch_max: int, deadline_s: float) -> None:
        self.queued = 0
        self._queue_max = queue_max
        self._batch_max = batch_max
        self._deadline_s = deadline_s
        self._held: dict[str, int] = {}  # of those who hold anything
        self._batch_s = 0.0  # what batches take
        self._since = 0.0  # the one under way
        self._late_at = math.inf  # from when on it takes longer than those before
        self._room = queue_max

    def take(self, holder: str, quantity: int, now: float) -> Guard:
        """'' and so many more are in the queue; or which bound they would not keep to, and nothing changed.

        ``queue``: it is full; ``delay``: they would have to wait for too long; ``share``: it is the holder's own that
        fill it.
        """
        room = self._room if now <= self._late_at else self._room_at(now - self._since)
        free = room - self.queued
        if quantity > free:
            return "queue" if room >= self._queue_max else "delay"
        held = self._held.get(holder, 0) + quantity
        if held > free:
            return "share"
        self._held[holder] = held
        self.queued += quantity
        return ""

    def put_back(self, holder: str, quantity: int) -> None:
        """So many that were taken before are in the queue again, whatever its bounds."""
        self._held[holder] = self._held.get(holder, 0) + quantity
        self.queued += quantity

    def leave(self, holder: str, quantity: int) -> None:
        """So many were called for."""
        self.queued -= quantity
        held = self._held[holder] - quantity
        if held:
            self._held[holder] = held
        else:
            del self._held[holder]

    def began(self, now: float) -> None:
        """A batch is under way."""
        self._since, self._late_at = now, now + self._batch_s
        self._room = self._room_at(self._batch_s)

    def ended(self, now: float) -> None:
        """It is answered, in whatever way."""
        self._batch_s += ((now - self._since) - self._batch_s) * NEWEST
        self._late_at = math.inf
        # Nobody is in the way of the next one, so it is tried however slow the last ones were.
        self._room = max(self._room_at(self._batch_s), min(self._queue_max, 2 * self._batch_max))

    def _room_at(self, batch_s: float) -> int:
        """What will have been called for within the deadline, after the batch under way."""
        if batch_s * self._queue_max <= (self._deadline_s - batch_s) * self._batch_max:
            return self._queue_max
        return max(0, int((self._deadline_s / batch_s - 1) * self._batch_max))
