"""The files of deploy/ agree with the code and with each other, and are what the tools that read them take.

Read here by the parsers of Docker (deploy/Dockerfile) and of the Compose specification; held against the schemas of
Kubernetes and of the Prometheus operator, and put together by kubectl's kustomize, where those are installed (``make
manifests``).  The image is built and run by ``make image-test`` (tests/acceptance/test_image.py); no other one is, by
any test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import dockerfile
import httpx
import pytest
import yaml

from deploy.kubernetes import alerts
from service import __version__, keyring
from service.errors import Misconfigured
from service.settings import PREFIX, SECRETS, Settings, load
from service.store.database import connections_most
from service.vetting import COMMANDS
from service.web.serve import DRAIN_MARGIN_S
from tests.unit.test_documents import DOCUMENTS, assert_is_a_command

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
IMAGE = f"voucherd:{__version__}"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
APPLIED_BYTES_MAX = 262_144  # `kubectl apply` keeps what it was given in an annotation, which takes no more
OURS = {name: one for name, one in SERVICES.items() if one["image"] == IMAGE}
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
BUILT = dockerfile.parse_file(str(DEPLOY / "Dockerfile"))
(BASE,) = (one.value[0].removeprefix("BASE=") for one in BUILT if one.cmd == "ARG" and one.value[0].startswith("BASE="))
LAST_STAGE = BUILT[max(number for number, one in enumerate(BUILT) if one.cmd == "FROM") :]
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
MONITORING = KUBERNETES / "monitoring"


def _resources(directory: Path) -> list[dict[str, Any]]:
    files = [directory / name for name in yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]]
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


BASE_RESOURCES = _resources(KUBERNETES)
RESOURCES = [*BASE_RESOURCES, *_resources(MONITORING)]
PODS = {
    one["metadata"]["name"]: one["spec"]["template"]["spec"]
    for one in RESOURCES
    if one["kind"] in ("Deployment", "Job")
}
SETTINGS_MAP = dict(line.split("=", 1) for line in KUSTOMIZATION["configMapGenerator"][0]["literals"])


def _kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in RESOURCES if one["kind"] == kind}


def _in_image() -> dict[str, str]:
    (words,) = (one.value for one in LAST_STAGE if one.cmd == "ENV")
    return dict(zip(words[::2], words[1::2], strict=True))


def _environments() -> Iterator[tuple[str, dict[str, str]]]:
    for name, one in OURS.items():
        yield f"compose: {name}", {**_in_image(), **one["environment"]}
    yield "kubernetes", {**_in_image(), **SETTINGS_MAP}


# --- settings, commands


@pytest.mark.parametrize(("where", "environment"), list(_environments()))
def test_no_setting_is_unknown_or_refused(where: str, environment: dict[str, str], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    known = {f"{PREFIX}{name}_FILE".upper() for name in SECRETS}
    given = {name: str(secret) if name in known else text for name, text in environment.items()}
    settings = load(given)
    assert settings.production
    assert settings.host == settings.ops_host == "0.0.0.0", "a container's own loopback is nobody's"  # noqa: S104
    for url in (settings.redis_url, settings.store_url):
        assert re.fullmatch(r"\S+://voucherd:secret@\w+:\d+/\w+", url), "its password comes from a file"


def test_no_secret_is_written_into_a_file() -> None:
    for _, environment in _environments():
        for name in environment:
            assert name.removeprefix(PREFIX).lower() not in ("redis_password", "store_password")
    for name in COMPOSE["secrets"].values():
        assert (
            not (DEPLOY / name["file"]).is_relative_to(ROOT) or "deploy/secrets/" in (ROOT / ".gitignore").read_text()
        )


def test_every_command_exists() -> None:
    for one in OURS.values():
        assert_is_a_command(" ".join(one["command"]))
    for pod in PODS.values():
        assert_is_a_command(" ".join(pod["containers"][0]["args"]))
    told = {one.cmd: list(one.value) for one in LAST_STAGE if one.cmd in ("ENTRYPOINT", "CMD")}
    assert told == {"ENTRYPOINT": ["voucherd"], "CMD": ["serve"]}
    assert_is_a_command("serve")
    typed = re.findall(r"run --rm work ([a-z -]+?)(?:  |$)", (DEPLOY / "compose.yaml").read_text(), re.MULTILINE)
    head = (KUBERNETES / "kustomization.yaml").read_text()
    typed += re.findall(r"`voucherd ([^`]*)`", head) + re.findall(r"-- voucherd ([a-z -]+?)  ", head)
    assert typed == ["keys rotate", "status", "keys create", "keys rotate", "status"]
    for words in typed:
        assert_is_a_command(words)


@pytest.mark.parametrize("name", [*DOCUMENTS, "deploy/compose.yaml", "deploy/kubernetes/kustomization.yaml"])
def test_nothing_is_typed_in_a_container_that_is_not_there(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text())
    assert not re.search(r"docker compose (?!--file deploy/compose\.yaml )", text), "it is not found by itself"
    for file in re.findall(r"--file (deploy/\S+)", text):
        assert (ROOT / file).exists(), file
    for service in re.findall(r"docker compose (?:--file \S+ )+(?:exec|run)(?: --entrypoint \S+| --?\S+)* (\w+)", text):
        assert service in SERVICES, service
    for deployment in re.findall(r"kubectl (?:exec(?: -i)?|port-forward) deploy/(\S+)", text):
        assert deployment in _kind("Deployment"), deployment


def test_who_looks_into_redis_in_its_container_may() -> None:
    """By what is typed there, and by its healthcheck: a user with the right, and a password that is mounted."""
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    (kind, healthcheck) = SERVICES["valkey"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    looks = re.findall(r"'(REDISCLI_AUTH=[^']*)'", runbook)
    assert len(looks) == 1
    for look in (healthcheck.replace("$$", "$").removesuffix(" | grep -q PONG"), *looks):
        said = re.fullmatch(
            r"REDISCLI_AUTH=\$\(cat /run/secrets/redis_(\w+)_password\) valkey-cli --user (\w+) (\w+).*", look
        )
        assert said is not None, look
        whose, user, command = said.groups()
        assert whose == user
        assert f"redis_{user}_password" in SERVICES["valkey"]["secrets"]
        assert f"+{command}" in _rights(user)


# --- ports


def test_one_port_is_the_same_in_every_file() -> None:
    public, ops = Settings().port, Settings().ops_port
    work_ops = int(SETTINGS_MAP["VOUCHERD_WORK_OPS_PORT"])
    assert str(work_ops) == SERVICES["work"]["environment"]["VOUCHERD_WORK_OPS_PORT"]
    (exposed,) = (list(one.value) for one in LAST_STAGE if one.cmd == "EXPOSE")
    assert exposed == [str(public), str(ops)]
    for environment in dict(_environments()).values():
        assert not {"VOUCHERD_PORT", "VOUCHERD_OPS_PORT"} & environment.keys(), "the defaults are meant everywhere"

    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in PROMETHEUS["scrape_configs"]}
    assert targets == {"voucherd-serve": [f"serve:{ops}"], "voucherd-work": [f"work:{work_ops}"]}
    assert {target.partition(":")[0] for one in targets.values() for target in one} <= SERVICES.keys()

    def ports(deployment: str) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in PODS[deployment]["containers"][0]["ports"]}

    assert ports("voucherd-serve") == {"http": public, "ops": ops}
    assert ports("voucherd-work") == {"ops": work_ops}
    monitors = _kind("PodMonitor")
    assert monitors.keys() == targets.keys() <= PODS.keys()
    for job, monitor in monitors.items():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in ports(job)
        assert endpoint["interval"] == PROMETHEUS["global"]["scrape_interval"]
        assert {"action": "replace", "targetLabel": "job", "replacement": job} in endpoint["relabelings"]

    (service,) = _kind("Service").values()
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    assert SERVICES["serve"]["ports"] == [f"127.0.0.1:{public}:{public}"]
    (healthcheck,) = (str(one.value[-1]) for one in LAST_STAGE if one.cmd == "HEALTHCHECK")
    assert f"127.0.0.1:{ops}/healthz" in healthcheck
    assert f"127.0.0.1:{work_ops}/healthz" in SERVICES["work"]["healthcheck"]["test"][-1]


def test_ops_ports_are_published_for_a_load_test_on_loopback() -> None:
    public = yaml.safe_load((DEPLOY / "compose.ops.yaml").read_text())["services"]
    compose_spec.PyCompose.from_json(
        json.dumps({"services": {name: {"image": IMAGE, **public[name]} for name in public}})
    )
    ports = {"serve": Settings().ops_port, "work": int(SETTINGS_MAP["VOUCHERD_WORK_OPS_PORT"])}
    assert {name: one["ports"] for name, one in public.items()} == {
        name: [f"127.0.0.1:{port}:{port}"] for name, port in ports.items()
    }
    for name, one in public.items():
        assert "outside" in {*SERVICES[name]["networks"], *one.get("networks", ())}, (
            "an internal network publishes none"
        )


def test_ops_ports_are_for_prometheus_alone() -> None:
    policies = _kind("NetworkPolicy")
    ops = {Settings().ops_port, int(SETTINGS_MAP["VOUCHERD_WORK_OPS_PORT"])}
    for policy in policies.values():
        assert policy["spec"]["podSelector"]["matchLabels"], "one without labels is for every pod of the namespace"
        for rule in policy["spec"]["ingress"]:
            opened = {port["port"] for port in rule["ports"]}
            if "from" in rule:
                assert opened == ops
                assert rule["from"] == [
                    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
                ]
            else:
                assert opened == {Settings().port}
    assert {"voucherd", "voucherd-serve"} == policies.keys()
    for name, one in SERVICES.items():
        published = {text.rsplit(":", 1)[1] for text in one.get("ports", ())}
        assert not published & {str(port) for port in ops}, name
        assert all(text.startswith("127.0.0.1:") for text in one.get("ports", ())), name
    assert COMPOSE["networks"]["inside"]["internal"]
    assert {name for name, one in SERVICES.items() if "outside" in one["networks"]} == {
        "serve",
        "prometheus",
        "alertmanager",
        "grafana",
    }


# --- alerts


def test_nobody_on_kubernetes_is_woken_by_other_rules() -> None:
    assert (MONITORING / "alerts.yaml").read_text() == alerts.prometheus_rule(), "`make alerts` makes it"
    (rule,) = _kind("PrometheusRule").values()
    rules = alerts.RULES.read_text()
    assert rule["spec"] == yaml.safe_load(rules)
    jobs = {job for jobs in re.findall(r'\bjob=~?"([^"]+)"', rules) for job in jobs.split("|")}
    assert jobs == _kind("PodMonitor").keys() == {job["job_name"] for job in PROMETHEUS["scrape_configs"]}


def test_no_alert_is_sent_where_nobody_listens() -> None:
    (listed,) = PROMETHEUS["alerting"]["alertmanagers"]
    assert listed == {"static_configs": [{"targets": ["alertmanager:9093"]}]}
    assert alertmanager_keys() == set(SERVICES["alertmanager"]["secrets"])
    alertmanager = SERVICES["alertmanager"]
    assert alertmanager["ports"] == ["127.0.0.1:9093:9093"], "and it listens at its default port"
    assert not [word for word in alertmanager["command"] if word.startswith("--web.listen-address")]
    assert "127.0.0.1:9093/" in alertmanager["healthcheck"]["test"][-1]
    assert set(alertmanager["networks"]) == {"inside", "outside"}, "from Prometheus to whoever is told"
    (mounted,) = re.findall(r"--config.file=(\S+)", " ".join(alertmanager["command"]))
    assert f"./alertmanager/alertmanager.yml:{mounted}:ro" in alertmanager["volumes"]


def alertmanager_keys() -> set[str]:
    """Secrets that the receivers of the runbook's example take their keys from."""
    (said,) = (text for text in snippets("docs/runbook.md") if "receivers" in yaml.safe_load(text))
    files = re.findall(r"_file: (/\S+?)}", said)
    assert len(files) == len(yaml.safe_load(said)["receivers"]) == 2
    assert {str(Path(file).parent) for file in files} == {"/run/secrets"}
    return {Path(file).name for file in files}


def snippets(document: str) -> list[str]:
    """What it shows as YAML."""
    return re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


# --- how processes run


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_that_never_becomes_another_user_keeps_a_right(name: str) -> None:
    one = SERVICES[name]
    if name in ("valkey", "postgres"):  # they begin as root, give the data to their user, and become it
        assert "cap_drop" not in one
        return
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_health_of_every_service_is_asked_for_and_through_no_proxy(name: str) -> None:
    if name == "serve":  # has that of the image
        return
    healthcheck = SERVICES[name]["healthcheck"]
    if name == "migrate":
        assert healthcheck == {"disable": True}
    elif healthcheck["test"][:2] == ["CMD", "wget"]:
        *words, url = healthcheck["test"]
        assert words == ["CMD", "wget", "-q", "-Y", "off", "-O", "/dev/null"]
        (published,) = SERVICES[name]["ports"]
        assert url.startswith(f"http://127.0.0.1:{published.rsplit(':', 1)[1]}/")
    else:
        assert name in ("work", "valkey", "postgres")


@pytest.mark.parametrize("name", PODS)
def test_no_pod_has_more_rights_than_it_needs(name: str) -> None:
    pod = PODS[name]
    assert pod["serviceAccountName"] in _kind("ServiceAccount")
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["image"] == "voucherd"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {"requests", "limits"} <= container["resources"].keys()
    assert pod["enableServiceLinks"] is False
    with pytest.raises(Misconfigured):  # what it would set for a Service of that name
        load({"VOUCHERD_PORT": "tcp://10.0.0.1:80"})
    with pytest.raises(Misconfigured):
        load({"VOUCHERD_SERVICE_HOST": "10.0.0.1"})
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounted["tmp"] == "/tmp"
    for variable, path in SETTINGS_MAP.items():
        if variable.endswith("_FILE"):
            assert str(Path(path).parent) == mounted["secrets"], variable


def test_user_and_version_are_the_same_everywhere() -> None:
    (user,) = (one.value[0] for one in LAST_STAGE if one.cmd == "USER")
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", user)
    for pod in PODS.values():
        context = pod["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
        assert context["fsGroup"] == context["runAsGroup"], "or it can't read its secrets"
    assert KUSTOMIZATION["images"] == [{"name": "voucherd", "newTag": __version__}]
    assert OURS.keys() == {"migrate", "serve", "work"}
    assert f"--tag {IMAGE} ." in (DEPLOY / "Dockerfile").read_text()


def test_no_process_is_killed_while_it_drains() -> None:
    takes = Settings().drain_s + DRAIN_MARGIN_S
    for name in ("serve", "work"):
        assert _seconds(OURS[name]["stop_grace_period"]) > takes
        pod = PODS[f"voucherd-{name}"]
        stop = pod["containers"][0].get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})
        assert stop["exec"]["command"][0] == "sleep"
        assert pod["terminationGracePeriodSeconds"] > int(stop["exec"]["command"][1]) + takes
    assert "preStop" in PODS["voucherd-serve"]["containers"][0]["lifecycle"], "nobody is sent to a port that is closed"
    (signal,) = (one.value[0] for one in LAST_STAGE if one.cmd == "STOPSIGNAL")
    assert signal == "SIGTERM"


def test_one_of_each_is_always_there() -> None:
    for name in ("voucherd-serve", "voucherd-work"):
        deployment, budget = _kind("Deployment")[name], _kind("PodDisruptionBudget")[name]
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]
        assert PODS[name]["topologySpreadConstraints"]
    scaler = _kind("HorizontalPodAutoscaler")["voucherd-serve"]["spec"]
    assert scaler["minReplicas"] >= 2
    assert scaler["scaleTargetRef"]["name"] == "voucherd-serve"
    assert "replicas" not in _kind("Deployment")["voucherd-serve"]["spec"], "the scaler's number would be set back"
    works = _kind("Deployment")["voucherd-work"]["spec"]["replicas"]
    assert works == 2
    # In a rollout each may be there twice: the new one, and the one that drains, which maxSurge does not count.
    serving = scaler["maxReplicas"] * int(SETTINGS_MAP["VOUCHERD_WORKERS"])
    (room,) = re.findall(r"max_connections has to leave room for (\d+)", (KUBERNETES / "serve.yaml").read_text())
    assert int(room) == connections_most(2 * serving, works=2 * works)
    probes = PODS["voucherd-serve"]["containers"][0]
    assert probes["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "ops"}
    assert probes["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "ops"}


def _seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# --- images and files


def test_every_image_is_pinned_and_of_no_particular_registry() -> None:
    assert {one.value[0] for one in BUILT if one.cmd == "FROM"} == {"${BASE}"}, "one base, which a build may replace"
    for image in [one["image"] for one in SERVICES.values()] + [BASE]:
        assert re.fullmatch(r"[a-z]+(/[a-z]+)?:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image), image
    assert "@sha256:" in BASE


def test_extras_of_the_image_are_those_of_the_package() -> None:
    assert [one.value[0] for one in BUILT if one.cmd == "ARG"] == [f"BASE={BASE}", "EXTRAS="]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [(DEPLOY / "Dockerfile").read_text(), *((ROOT / name).read_text() for name in DOCUMENTS)]
    named = {extra for text in texts for extra in re.findall(r"--build-arg EXTRAS=(\w+)", text)}
    assert named == {"otel"} <= known.keys()


def test_what_is_copied_or_mounted_is_there() -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for one in BUILT if one.cmd == "COPY" and not one.flags for source in one.value[:-1]]
    assert sorted(copied) == sorted(let_in)
    for name in copied:
        assert (ROOT / name).exists(), name
    for name, one in SERVICES.items():
        for volume in one.get("volumes", ()):
            source, _, _ = volume.partition(":")
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], (
                name,
                volume,
            )
        for secret in one.get("secrets", ()):
            assert secret in COMPOSE["secrets"], (name, secret)
    mounted = " ".join(volume for one in SERVICES.values() for volume in one.get("volumes", ()))
    for rules in PROMETHEUS["rule_files"]:
        assert f"/etc/prometheus/{rules}" in mounted


def make_secrets(folder: Path) -> dict[str, str]:
    """What `make secrets` makes, with the environment that runs this test: nothing is to be installed for it."""
    subprocess.run(
        ["make", "--assume-old=.venv/.installed", "secrets", f"SECRETS={folder}",
         f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")},
    )  # fmt: skip
    return {file.name: file.read_text().strip() for file in folder.iterdir()}


def test_all_secrets_are_made_by_make_and_none_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = make_secrets(folder)
    assert made.keys() == {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert len(set(made.values())) == len(made)
    assert all(len(text) >= 16 for text in made.values()), "deploy/redis/start.sh takes no shorter one"
    assert folder.stat().st_mode & 0o077 == 0
    keyring.load(folder / "voucherd_secrets")
    assert make_secrets(folder) == made
    for name in alertmanager_keys():
        assert (folder / name).stat().st_mode & 0o777 == 0o644, "an operator fills it in, and the container reads it"
        (folder / name).write_text("the-key-of-somebody\n")
        made[name] = "the-key-of-somebody"
    assert make_secrets(folder) == made
    cut_off = {"store_password", "voucherd_secrets"}
    for name in cut_off:
        (folder / name).unlink()
        (folder / name).touch(mode=0o444)
    after = make_secrets(folder)
    assert {name for name in made if after[name] != made[name]} == cut_off
    assert all(after.values())
    keyring.load(folder / "voucherd_secrets")


def test_an_upgrade_applies_the_new_settings_before_the_first_pod_that_waits_for_them() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    first = re.findall(r"^kubectl apply --kustomize deploy/kubernetes(.*)$", runbook, re.MULTILINE)[0]
    (components,) = re.findall(r"--selector 'app\.kubernetes\.io/component in \((.*)\)'", first)
    applied = set(components.split(", "))
    (settings,) = KUSTOMIZATION["configMapGenerator"]
    needed = [
        settings["options"],
        _kind("ServiceAccount")["voucherd"]["metadata"],
        _kind("Job")["voucherd-migrate"]["metadata"],
    ]
    assert {one["labels"]["app.kubernetes.io/component"] for one in needed} == applied


# --- what reads them takes them


def test_compose_takes_its_file() -> None:
    tags = re.sub(r"@sha256:[0-9a-f]{64}", "", json.dumps(COMPOSE))  # Compose takes both, and this parser one of them
    found = compose_spec.PyCompose.from_json(tags)
    assert set(found.service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="read_onyl"):
        compose_spec.PyCompose.from_json(json.dumps({"services": {"x": {"image": "x", "read_onyl": True}}}))


def test_a_second_file_by_the_documents_lets_spans_out_of_compose() -> None:
    (said,) = (text for text in snippets("docs/logs.md") if "services" in yaml.safe_load(text))
    second = yaml.safe_load(said)
    compose_spec.PyCompose.from_json(json.dumps({"services": second["services"]}))
    assert second["services"].keys() == OURS.keys(), "who shares the image is built alike"
    for name, one in second["services"].items():
        assert one["image"] != IMAGE, "what is there is not taken for it"
        assert one["build"] == {"args": {"EXTRAS": "otel"}}
        assert COMPOSE["networks"].keys() >= set(one["networks"]), name
        assert "outside" in one["networks"]
        merged = {**SERVICES[name]["environment"], **one["environment"]}
        assert load({key: text for key, text in merged.items() if not key.endswith("_FILE")}).otel
        assert merged["OTEL_EXPORTER_OTLP_ENDPOINT"].startswith("http")


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_kubernetes_takes_its_files(version: str) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip(
            "kubernetes-validate is not installed (`make manifests` does): no manifest was held against a schema"
        )
    import kubernetes_validate

    held = []
    for one in RESOURCES:
        if not one["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(one, version, strict=True)
            held.append(one["kind"])
    assert len(held) >= 10
    print(f"held against the schemas of Kubernetes {version}: {', '.join(held)}")
    wrong = json.loads(json.dumps(_kind("Deployment")["voucherd-serve"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessPorbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_prometheus_operator_takes_its_files() -> None:
    """By models that are made from its definitions; they pass over a field that is none, so it is missed afterwards."""
    if importlib.util.find_spec("cloudcoil") is None:
        pytest.skip("cloudcoil is not installed (`make manifests` does): PodMonitors were held against no schema")
    import cloudcoil.models.prometheus_operator.v1 as operator
    from pydantic import ValidationError

    def taken(one: dict[str, Any]) -> dict[str, Any]:
        found = getattr(operator, one["kind"]).model_validate(one)
        return found.model_dump(mode="json", by_alias=True, exclude_unset=True)

    held = [one for one in RESOURCES if one["apiVersion"].startswith("monitoring.coreos.com/")]
    assert {one["kind"] for one in held} == {"PodMonitor", "PrometheusRule"}
    for one in held:
        assert taken(one) == one
    wrong = json.loads(json.dumps(_kind("PodMonitor")["voucherd-serve"]))
    wrong["spec"]["podMetricsEndpoints"][0]["intreval"] = "10s"
    assert taken(wrong) != wrong
    wrong["spec"]["podMetricsEndpoints"][0]["interval"] = "10 seconds"
    with pytest.raises(ValidationError):
        taken(wrong)


@pytest.fixture(scope="module")
def kubectl() -> str:
    """That of ``make manifests`` or of the machine."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("no kubectl (`make manifests` installs one): the kustomization was read as YAML alone")
    return found


def _kustomize(kubectl: str, directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_kustomize_puts_it_together(kubectl: str) -> None:
    made = _kustomize(kubectl, KUBERNETES)
    assert len(made) == len(BASE_RESOURCES) + 1
    groups = {one["apiVersion"].rpartition("/")[0] for one in made}
    assert not [group for group in groups if "." in group and not group.endswith("k8s.io")], "no cluster lacks a kind"
    (settings,) = (one["metadata"]["name"] for one in made if one["kind"] == "ConfigMap")
    pods = [one["spec"]["template"] for one in made if one["kind"] in ("Deployment", "Job")]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert container["image"] == IMAGE
        assert container["envFrom"] == [{"configMapRef": {"name": settings}}]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for one in made:
        selectors = [one.get("spec", {}).get(name) for name in ("selector", "podSelector")]
        for selector in filter(None, selectors):
            wanted = selector.get("matchLabels", selector)
            assert "app.kubernetes.io/name" in wanted, one["metadata"]["name"]
            assert any(wanted.items() <= found.items() for found in labels), one["metadata"]["name"]


def test_an_overlay_by_the_runbook_gives_every_alert_a_link_and_the_operator_its_label(
    kubectl: str, tmp_path: Path
) -> None:
    said, made = _overlay(kubectl, "docs/runbook.md", "components", tmp_path)
    for one in made:
        assert one["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert sum(one["kind"] == "PodMonitor" for one in made) == 2
    for one in made:
        if one["kind"] in ("PodMonitor", "PrometheusRule"):
            assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "voucherd"
    (shown,) = (one for one in made if one["metadata"]["labels"].get("grafana_dashboard") == "1")
    assert shown["data"] == {"voucherd.json": (DEPLOY / "grafana" / "voucherd.json").read_text()}
    assert len(json.dumps(shown)) < APPLIED_BYTES_MAX
    (rule,) = (one for one in made if one["kind"] == "PrometheusRule")
    links = {one["alert"]: one["annotations"]["runbook_url"] for one in _alerts(rule["spec"])}
    assert links.keys() == {one["alert"] for one in _alerts(_kind("PrometheusRule")["voucherd"]["spec"])}
    (address,) = re.findall(r"address=([^\"]+)", said)
    assert links == {name: f"{address}#{name.lower()}" for name in links}


def test_an_overlay_by_the_runbook_takes_the_image_from_another_registry(kubectl: str, tmp_path: Path) -> None:
    said, made = _overlay(kubectl, "docs/runbook.md", "images", tmp_path)
    (image,) = yaml.safe_load(said)["images"]
    pods = [one["spec"]["template"]["spec"] for one in made if one["kind"] in ("Deployment", "Job")]
    assert len(pods) == len(PODS)
    for pod in pods:
        assert [one["image"] for one in pod["containers"]] == [f"{image['newName']}:{__version__}"]


def test_an_overlay_by_the_documents_lets_spans_out(kubectl: str, tmp_path: Path) -> None:
    _, made = _overlay(kubectl, "docs/logs.md", "patches", tmp_path)
    (settings,) = (one for one in made if one["kind"] == "ConfigMap")
    assert settings["data"].items() > SETTINGS_MAP.items()
    environment = {name: text for name, text in settings["data"].items() if not name.endswith("_FILE")}
    assert load(environment).otel
    port = httpx.URL(settings["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"]).port
    policies = {one["metadata"]["name"]: one["spec"] for one in made if one["kind"] == "NetworkPolicy"}
    before = {name: one["spec"] for name, one in _kind("NetworkPolicy").items()}
    rules = policies["voucherd"]["egress"]
    assert rules == [*before["voucherd"]["egress"], {"ports": [{"protocol": "TCP", "port": port}]}]
    assert "egress" not in policies["voucherd-serve"]


def _overlay(kubectl: str, document: str, has: str, directory: Path) -> tuple[str, list[dict[str, Any]]]:
    """The one overlay of a document that has this field, and what kustomize makes of it beside the base."""
    (said,) = (text for text in snippets(document) if {"resources", has} <= yaml.safe_load(text).keys())
    base = os.path.relpath(KUBERNETES, directory.resolve())
    (directory / "kustomization.yaml").write_text(said.replace("../deploy/kubernetes", base))
    shutil.copy(DEPLOY / "grafana" / "voucherd.json", directory)
    return said, _kustomize(kubectl, directory)


def _alerts(rules: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]


# --- users of Redis


def _rights(user: str) -> list[str]:
    (line,) = (
        line for line in (DEPLOY / "redis" / "users.acl").read_text().splitlines() if line.startswith(f"user {user} ")
    )
    return line.split()[2:]


# What redis-py sends by itself: a transaction around a pipeline, the database of a URL.
BY_REDIS_PY = {"multi", "exec", "select"}
NO_COMMANDS = {"aclose", "execute", "pipeline"}  # of redis-py's clients


def test_no_user_of_redis_may_do_what_nobody_does() -> None:
    assert _rights("default") == ["off", "resetpass", "resetkeys", "resetchannels", "-@all"]
    rights = _rights("voucherd")
    assert rights[0] == "on"
    assert [word for word in rights if word.startswith(("~", "%", "&"))] == ["~{0}:*"]
    allowed = {word[1:] for word in rights if word.startswith("+")}
    assert not [word for word in allowed if word.startswith("@")], "commands by name, not by the dozen"
    called = "\n".join(file.read_text() for file in sorted((ROOT / "service").rglob("*.py")))
    used = {name for name in allowed if f".{name.replace('|', '_')}(" in called}
    assert allowed - used - set(COMMANDS) - BY_REDIS_PY == set()
    assert set(COMMANDS) <= allowed
    direct = set(re.findall(r"\b(?:redis|pipe)\.([a-z_]+)\(", called)) - NO_COMMANDS
    direct = {name for name in direct if f"def {name}(" not in called}
    assert len(direct) > 20
    assert direct <= {name.replace("|", "_") for name in allowed}
    operator = {word[1:] for word in _rights("operator") if word.startswith("+")}
    assert not operator & (allowed - {"info", "config|get"}), "no right to any key, or to run a script"


@pytest.mark.parametrize("password", [None, "", "\n", "short"])
def test_redis_never_starts_without_a_password_for_each_user(tmp_path: Path, password: str | None) -> None:
    (tmp_path / "redis_voucherd_password").write_text("a-password-that-is-long-enough")
    if password is not None:
        (tmp_path / "redis_operator_password").write_text(password)
    done = subprocess.run(
        ["sh", DEPLOY / "redis" / "start.sh", "echo", "started"], capture_output=True, text=True, check=False,
        env={"USERS": str(DEPLOY / "redis" / "users.acl"), "SECRETS": str(tmp_path), "READY": str(tmp_path / "ready"),
             "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "redis_operator_password" in done.stderr
    assert "started" not in done.stdout
