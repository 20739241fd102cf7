"""One running service for all faults of a file, made anew after one that it did not get over."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtest.servers import PostgresServer
from tests.acceptance.test_up import environment
from tests.chaos.stage import Stage, Store, world
from tests.chaos.trial import Trial
from tests.forked import commands
from tests.programs import server_binary

VOUCHERS = 4_000  # so many calls make the small pool run dry

NewStage = Callable[..., Stage]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "short":
        late = [item for item in items if item.get_closest_marker("long") is not None]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    made = yield
    if made.failed:
        item.stash[FAILED] = True
    return made


FAILED = pytest.StashKey[bool]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each fault on the stage that its file names, or with ``--chaos all`` on every one where it can happen."""
    if "trial" not in metafunc.fixturenames:
        return
    marks = list(metafunc.definition.iter_markers("stage"))
    stores = marks[0].args  # the nearest
    if metafunc.config.getoption("--chaos") == "short":
        where = [(stores[0], "valkey")]
    else:
        where = [(store, server) for store, server in WHERE if store in stores]
    metafunc.parametrize("where", where, ids="-".join, scope="module")


WHERE: tuple[tuple[Store, str], ...] = (("postgresql", "valkey"), ("sqlite", "redis"))


@pytest.fixture(scope="session")
def typed(servers_dir: Path) -> Iterator[Path]:
    """``voucherd`` for what operators type meanwhile."""
    with commands(servers_dir / "chaos-commands", environment(checkout=True)) as program:
        yield program


@pytest.fixture(scope="session")
def new_stage(servers_dir: Path, typed: Path, _postgres_binaries: Path) -> NewStage:
    """Makes a stage, which has not begun, of a store and a server's name; ``how`` as ``Stage`` takes it."""

    def make(store: Store, server: str, vouchers: int = VOUCHERS, **how: object) -> Stage:
        directory = Path(tempfile.mkdtemp(prefix="stage-", dir=servers_dir))
        directory.chmod(0o755)
        binary = server_binary(server, untried="the same was tried on Valkey")
        postgres = None
        if store == "postgresql":
            # What a commit does not wait for is written as late as can be, so that it is missed if it is lost.
            postgres = PostgresServer(
                _postgres_binaries, directory / "postgres", max_connections="200", wal_writer_delay="10s"
            )
        return Stage(
            directory, store, binary=Path(binary), voucherd=typed, postgres=postgres, world=world(vouchers), **how
        )  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def standing(new_stage: NewStage) -> Iterator[list[Trial]]:
    """The trials of this file on the present stage."""
    trials: list[Trial] = []
    yield trials
    if trials:
        trials[-1].stage.__exit__()


@pytest.fixture
def trial(
    where: tuple[Store, str],
    standing: list[Trial],
    new_stage: NewStage,
    rng: random.Random,
    request: pytest.FixtureRequest,
) -> Iterator[Trial]:
    """What one test does on the stage of its file, after all that others have done there."""
    if standing and standing[-1].where != where:
        standing[-1].stage.__exit__()
        standing.clear()
    stage = standing[-1].stage if standing else new_stage(*where).__enter__()
    standing.append(Trial(stage, where, rng, past=standing[-1].past if standing else None))
    yield standing[-1]
    if request.node.stash.get(FAILED, False) or standing[-1].spoilt:
        stage.__exit__()
        standing.clear()
