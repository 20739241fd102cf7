"""Alerts: each fires and is silent when it should, by Prometheus' own tool, goes where it should, by Alertmanager's,
and has its section in the runbook.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import metrics
from service.checks import CHECKS
from tests.programs import installed
from tests.unit.test_deployment import snippets

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "voucherd.rules.yml"
ROUTES = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
TESTS = sorted(RULES.parent.glob("*.test.yml"))
PROMTOOL_S = 60.0


@pytest.fixture(scope="module")
def promtool() -> str:
    return installed("promtool", package="prometheus", untried="the alerts were not run")


def _groups() -> list[dict[str, Any]]:
    return yaml.safe_load(RULES.read_text())["groups"]


def _rules() -> list[dict[str, Any]]:
    return [rule for group in _groups() for rule in group["rules"]]


ALERTS = [rule for rule in _rules() if "alert" in rule]


def _tool(program: str, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=PROMTOOL_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_no_alert_is_silent_when_it_must_fire_or_fires_when_it_must_not(promtool: str, file: Path) -> None:
    _tool(promtool, "test", "rules", file.name)


def test_prometheus_takes_the_rules_and_the_configuration(promtool: str) -> None:
    _tool(promtool, "check", "rules", RULES.name)
    _tool(promtool, "check", "config", "prometheus.yml")


@pytest.fixture(scope="module")
def amtool() -> str:
    return installed("amtool", package="prometheus-alertmanager", untried="the routes were not tried")


def test_alertmanager_takes_its_configuration(amtool: str) -> None:
    assert "SUCCESS" in _tool(amtool, "check-config", str(ROUTES))


def test_alertmanager_takes_receivers_as_the_runbook_fills_them_in(amtool: str, tmp_path: Path) -> None:
    shown = (yaml.safe_load(text) for text in snippets("docs/runbook.md"))
    (filled,) = (one["receivers"] for one in shown if "receivers" in one)
    configured = yaml.safe_load(ROUTES.read_text())
    assert [one["name"] for one in filled] == [one["name"] for one in configured["receivers"]]
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump({**configured, "receivers": filled}))
    assert "SUCCESS" in _tool(amtool, "check-config", str(tmp_path / "alertmanager.yml"))


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [("severity=page", "page"), ("severity=ticket", "ticket"), ("severity=critical", "page"), ("alertname=X", "page")],
)
def test_no_alert_that_must_wake_somebody_waits_for_the_morning(amtool: str, labels: str, receiver: str) -> None:
    said = _tool(amtool, "config", "routes", "test", f"--config.file={ROUTES}", labels)
    assert said.split() == [receiver]


def test_nobody_takes_a_receiver_for_filled_in_that_is_not() -> None:
    """One without an address would be silent about it; these fail, in the log and in a metric."""
    for receiver in yaml.safe_load(ROUTES.read_text())["receivers"]:
        (address,) = receiver["webhook_configs"]
        assert re.fullmatch(r"http://fill-in-[a-z-]+\.invalid/", address["url"])
        assert f"- name: {receiver['name']}" in ROUTES.read_text()
    assert ROUTES.read_text().count("# FILL IN ") == 1 + 2


@pytest.mark.parametrize("rule", yaml.safe_load(ROUTES.read_text())["inhibit_rules"], ids=str)
def test_no_alert_waits_for_one_that_is_gone(rule: dict[str, Any]) -> None:
    """Alerts, their labels and values are there; what is waited for wakes somebody, and no promise waits."""
    allowed, named = _values(), {}
    for side in ("source_matchers", "target_matchers"):
        matchers = dict(re.fullmatch(r'(\w+)=~?"([^"]+)"', one).groups() for one in rule[side])  # type: ignore[union-attr]
        names = matchers.pop("alertname").split("|")
        alerts = [alert for alert in ALERTS if alert["alert"] in names]
        assert len(alerts) == len(names), names
        for alert in alerts:
            fired = [one["exp_labels"].keys() for one in _fired(alert["alert"])]
            assert any({*matchers, *rule.get("equal", ())} <= labels for labels in fired), alert["alert"]
        for label, values in matchers.items():
            assert set(values.split("|")) <= allowed[label]
        named[side] = alerts
    assert {alert["labels"]["severity"] for alert in named["source_matchers"]} == {"page"}
    (promises,) = (group["rules"] for group in _groups() if group["name"] == "voucherd-promises")
    assert not [alert for alert in named["target_matchers"] if alert in promises]


def _fired(name: str) -> list[dict[str, Any]]:
    """What tests of the rules expect of an alert that fires."""
    return [
        alert
        for file in TESTS
        for test in yaml.safe_load(file.read_text())["tests"]
        for one in test["alert_rule_test"]
        if one["alertname"] == name
        for alert in one["exp_alerts"]
    ]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_no_alert_is_without_its_tests_and_its_section(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    tested = [
        bool(one["exp_alerts"])
        for file in TESTS
        for test in yaml.safe_load(file.read_text())["tests"]
        for one in test["alert_rule_test"]
        if one["alertname"] == name
    ]
    assert set(tested) == {True, False}
    assert alert["labels"]["severity"] in ("page", "ticket")
    link = alert["annotations"]["runbook_url"]
    assert link == f'{{{{ or $externalLabels.voucherd_runbook "docs/runbook.md" }}}}#{name.lower()}'
    section = (ROOT / "docs" / "runbook.md").read_text().partition(f"\n### {name}\n")[2].strip()
    assert section.startswith(alert["labels"]["severity"] + ". ")


def test_the_runbook_has_no_section_for_an_alert_that_is_gone() -> None:
    sections = re.findall(r"^### (Voucherd\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in ALERTS]


def test_no_rule_asks_for_a_metric_that_does_not_exist() -> None:
    exposed = set()
    for name, kind, _ in metrics.declared():
        exposed |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    for rule in _rules():
        for name in re.findall(r"\bvoucherd_\w+", rule["expr"]):
            assert name in exposed, f"{rule.get('alert') or rule['record']}: {name}"


def test_no_rule_asks_for_a_label_that_is_never_there() -> None:
    """A check, a loop or a guard that was renamed would silence its alert."""
    allowed = _values()
    asked = [
        (rule.get("alert") or rule["record"], label, value)
        for rule in _rules()
        for label, values in re.findall(r'(\w+)[!=]~?"([^"]+)"', rule["expr"])
        for value in values.split("|")
        if label in allowed
    ]
    assert len(asked) > 10
    for name, label, value in asked:
        assert value in allowed[label], f"{name}: {label}={value}"


def _values() -> dict[str, set[str]]:
    """The values that labels may have, as the code has them."""
    worker = ROOT / "service" / "worker"
    scraped = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())["scrape_configs"]
    return {
        "check": set(CHECKS),
        "loop": set(re.findall(r'_loop\("(\w+)"', (worker / "runner.py").read_text())),
        "guard": set(metrics.GUARDS),
        "server": set(re.findall(r'\("(\w+)", self\._look_at_', (worker / "watch.py").read_text())),
        "job": {job["job_name"] for job in scraped},
        "kind": {"quarantine"},
        "code": {"issued", "replayed", "207-762"},
    }


def test_nothing_that_a_power_cut_loses_vouchers_by_waits_for_the_morning() -> None:
    (durable,) = [rule["expr"] for rule in _rules() if rule.get("alert") == "VoucherdNotDurable"]
    named = re.search(r'check=~"([^"]+)"', durable)
    assert named is not None
    assert set(named[1].split("|")) == {
        "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "fsync", "full_page_writes", "synchronous_commit",
        "synchronous",
    }  # fmt: skip
