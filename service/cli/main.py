"""voucherd: hands out voucher codes, one code to one request, for good.

Every command is in a file by its noun.  A fault is one line on standard error that says what to do, and exit status 1;
a command that was typed wrong exits with 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import typer
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from typer.core import TyperGroup

from service.cli import (
    books,
    campaigns,
    clients,
    codes,
    distributors,
    explain,
    keys,
    ledger,
    pools,
    processes,
    products,
    tokens,
    vouchers,
)
from service.cli.apply import apply
from service.cli.console import complain
from service.cli.status import status
from service.cli.up import up
from service.errors import Fault, RedisFull, RedisUnreachable, ScriptFailed, StoreIsOlder, StoreUnreachable

# What to do about a fault whose message does not say it.
ADVICE: Final[dict[type[Fault], str]] = {
    RedisUnreachable: "see that Redis runs, and that VOUCHERD_REDIS_URL or --data-dir names it",
    RedisFull: "give Redis more memory",
    StoreUnreachable: "see that the store runs, and that VOUCHERD_STORE_URL or --data-dir names it; "
    "then look whether the change was made before you repeat it",
    StoreIsOlder: "nothing was changed; bring back the newest store, or repair it, before going on",
    ScriptFailed: "see that all processes are of the same version; nothing else writes into this Redis",
}


class Commands(TyperGroup):
    """The boundary of every command: no fault leaves it as a traceback."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        with _faults_in_a_line():  # --install-completion writes into the home directory here
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: Any) -> Any:
        with _faults_in_a_line():
            return super().invoke(ctx)


@contextmanager
def _faults_in_a_line() -> Iterator[None]:
    try:
        yield
    except Fault as fault:
        advice = next((text for kind, text in ADVICE.items() if isinstance(fault, kind)), "")
        _end(f"{str(fault).rstrip('.')}{'; ' if advice else ''}{advice}")
    except RedisError as error:  # by its type alone: a message may quote what was sent
        _end(f"Redis refused or did not answer ({type(error).__name__}): {ADVICE[RedisUnreachable]}")
    except (UnicodeEncodeError, SQLAlchemyError) as error:
        if _was_no_text(error):
            _end("what was typed is not text in UTF-8, and nothing can be called so")
        if isinstance(error, UnicodeEncodeError):
            raise
        _end(f"the store refused a statement ({type(error).__name__}): {ADVICE[StoreUnreachable]}")
    except OSError as error:
        _end(f"{error.strerror or type(error).__name__}{f': {error.filename}' if error.filename else ''}")


def _was_no_text(error: BaseException | None) -> bool:
    """Whether it was that Python has half characters for an argument's bytes of another encoding.

    Drivers of stores find that out; files may be called so.
    """
    while error is not None:
        if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
            return True
        error = error.__cause__
    return False


def _end(text: str) -> None:
    complain(text)
    raise typer.Exit(1)


app = typer.Typer(
    cls=Commands,
    help="voucherd hands out voucher codes: one code to one request, for good.\n\n"
    "`voucherd up` starts everything on this machine. The other commands work on the data of an `up` "
    "(--data-dir), or on the Redis and the store that the VOUCHERD_… settings name.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(processes.serve)
app.command()(processes.work)
app.command()(processes.migrate)
app.add_typer(distributors.app, name="distributor")
app.add_typer(tokens.app, name="token")
app.add_typer(products.app, name="product")
app.add_typer(clients.app, name="client")
app.add_typer(keys.app, name="keys")
app.add_typer(pools.app, name="pool")
app.add_typer(campaigns.app, name="campaign")
app.add_typer(codes.app, name="codes")
app.add_typer(vouchers.app, name="voucher")
app.add_typer(ledger.app, name="ledger")
app.command()(apply)
app.command()(explain.explain)
app.command()(books.audit)
app.command()(status)


@app.callback()
def begin() -> None:
    # A command says what it has to say itself; processes turn their log on.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    logging.basicConfig(handlers=[logging.NullHandler()])  # a library's traceback may quote what it was sent


def main() -> None:
    """The console script ``voucherd``."""
    app(prog_name="voucherd")


if __name__ == "__main__":
    main()
