"""Faults: what should not happen in a healthy run.  Expected outcomes are values, in ``domain``."""

from __future__ import annotations


class Fault(Exception):
    """Something outside this process failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class RedisUnreachable(Fault):
    """Redis did not answer in time: what was sent may or may not have been executed."""


class RedisFull(Fault):
    """Redis refused a script before its first line, because its memory limit is reached."""


class RedisDiskFull(RedisUnreachable):
    """Redis refused a script before its first line, because it can't write to its disk."""


class ReplyMismatch(Fault):
    """A reply belonged to another call; the connection was dropped."""


class ScriptFailed(Fault):
    """A script refused its arguments or found data that nothing of ours can have written."""


class StoreUnreachable(Fault):
    """The durable store did not answer: a transaction under way may or may not have been committed."""


class StoreIsOlder(Fault):
    """The durable store is older than Redis: leasing, importing and publishing are stopped."""


class LedgerLacks(StoreIsOlder):
    """The ledger lacks entries that were flushed into it; ``seq`` is the outbox sequence of one of them."""

    def __init__(self, seq: int) -> None:
        super().__init__()
        self.seq = seq


class GenerationClosed(Fault):
    """The generation is not open (or being built) in the store, so nothing may be leased to it."""


class Misconfigured(Fault):
    """A setting can't be used."""


class UnknownIdKey(Misconfigured):
    """Voucher ids were derived with a key that the secrets file does not hold."""


class NotFound(Fault):
    """There is no such thing in the control plane."""


class Conflict(Fault):
    """The control plane already holds something else under this name, or a rule forbids the change."""
