"""voucherd: hands out voucher codes, one code to one request, for good.

Every command is in a file by its noun.  A fault is one line on standard error that says what to do, and exit status 1;
a command that was typed wrong exits with 2.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import typer

from service.cli.console import complain
from service.cli.lazy import LazyGroup, Listed
from service.errors import (
    Fault,
    RedisDiskFull,
    RedisFull,
    RedisUnreachable,
    ScriptFailed,
    StoreIsOlder,
    StoreUnreachable,
)
from service.garbage import collect_rarely

# The order is that of `voucherd --help`.
COMMANDS: Final = {
    "up": Listed(
        "service.cli.up:up",
        "Start everything on this machine: an embedded Valkey and SQLite, the API, the worker, and demo data.",
    ),
    "serve": Listed(
        "service.cli.serve:serve",
        "Serve the API, and metrics and health on the ops port, until SIGTERM or Ctrl-C; then drain and end.",
    ),
    "work": Listed(
        "service.cli.work:work",
        "Run the background worker: refill windows, write the ledger, recover. Several may run on PostgreSQL.",
    ),
    "migrate": Listed(
        "service.cli.migrate:migrate",
        "Bring the store's schema to this version, from any older one or from nothing. May be repeated.",
    ),
    "apply": Listed(
        "service.cli.apply:apply",
        "Make pools, distributors and campaigns as a file says: the plan is shown, then all is put in force at once.",
    ),
    "explain": Listed(
        "service.cli.explain:explain", "Say which campaign would win a request now, and what stops every other one."
    ),
    "audit": Listed(
        "service.cli.books:audit",
        "Check that the books balance: no code given twice or lost, no key answered twice, no cap exceeded.",
    ),
    "audit-log": Listed(
        "service.cli.audit_log:audit_log",
        "Show who changed what: each change of the control plane and of stock, the latest first.",
    ),
    "status": Listed(
        "service.cli.status:status",
        "Show stock, windows, burn rate, time to empty, outbox, fence, incidents, and how long the store may be away.",
    ),
    "recover-store": Listed(
        "service.cli.recover_store:recover_store",
        "Repair a store that is older than it was (a restored backup, a promoted standby) by what Redis knows.",
    ),
    "reconcile": Listed(
        "service.cli.reconcile:reconcile",
        "Hold what partners say they received against the ledger: matched, missing here, missing there, different.",
    ),
    "capacity": Listed(
        "service.cli.capacity:capacity",
        "Say what a load needs: memory of Redis, cores, connections and rows of PostgreSQL, disks, time of a restart.",
    ),
    "distributor": Listed(
        "service.cli.distributors:app", "Distributors: the partners whose terminals ask for vouchers."
    ),
    "token": Listed("service.cli.tokens:app", "Tokens: what lets a distributor in."),
    "product": Listed("service.cli.products:app", "Products: what Client API v3 sells."),
    "client": Listed("service.cli.clients:app", "Clients: who may use Client API v3."),
    "keys": Listed("service.cli.keys:app", "Keys: the secrets file, and what access tokens are signed with."),
    "pool": Listed("service.cli.pools:app", "Pools: where codes are kept."),
    "campaign": Listed("service.cli.campaigns:app", "Campaigns: rules that turn what a terminal sold into a voucher."),
    "codes": Listed("service.cli.codes:app", "Codes: stock comes in."),
    "voucher": Listed("service.cli.vouchers:app", "Vouchers of Client API v3: what became of them."),
    "ledger": Listed("service.cli.ledger:app", "The ledger: what was issued, for good."),
}

# What to do about a fault whose message does not say it.
ADVICE: Final[dict[type[Fault], str]] = {
    RedisUnreachable: "see that Redis runs, and that VOUCHERD_REDIS_URL or --data-dir names it",
    RedisFull: "give Redis more memory",
    RedisDiskFull: "give Redis' disk more room, or look why it can't be written to",
    StoreUnreachable: "see that the store runs, and that VOUCHERD_STORE_URL or --data-dir names it; "
    "then look whether the change was made before you repeat it",
    StoreIsOlder: "nothing was changed; bring back the newest store, or repair this one: `voucherd recover-store`",
    ScriptFailed: "see that all processes are of the same version; nothing else writes into this Redis",
}

NO_TEXT: Final = "what was typed is not text in UTF-8, and nothing can be called so"


class Commands(LazyGroup):
    """The boundary of every command: no fault leaves it as a traceback."""

    listed = COMMANDS

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
    except _of("redis.exceptions", "RedisError") as error:  # by its type alone: a message may quote what was sent
        _end(f"Redis refused or did not answer ({type(error).__name__}): {ADVICE[RedisUnreachable]}")
    except _of("sqlalchemy.exc", "SQLAlchemyError") as error:
        what = f"the store refused a statement ({type(error).__name__}): {ADVICE[StoreUnreachable]}"
        _end(NO_TEXT if _was_no_text(error) else what)
    except UnicodeEncodeError as error:
        if not _was_no_text(error):
            raise
        _end(NO_TEXT)
    except OSError as error:
        _end(f"{error.strerror or type(error).__name__}{f': {error.filename}' if error.filename else ''}")


def _of(module: str, name: str) -> tuple[type[Exception], ...]:
    """The errors of a library, none if nobody has imported it: then it can't have raised any."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


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


@app.callback()
def begin() -> None:
    import structlog  # a tenth of what a command imports, and `voucherd --help` has nothing to keep quiet

    collect_rarely()
    # A command says what it has to say itself; processes turn their log on.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    logging.basicConfig(handlers=[logging.NullHandler()])  # a library's traceback may quote what it was sent


def main() -> None:
    """The console script ``voucherd``."""
    app(prog_name="voucherd")


if __name__ == "__main__":
    main()
