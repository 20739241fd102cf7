"""Alerts: each fires and is silent when it should, by Prometheus' own tool, and has its section in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import metrics
from service.checks import CHECKS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "voucherd.rules.yml"
TESTS = sorted(RULES.parent.glob("*.test.yml"))
PROMTOOL_S = 60.0


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool on PATH (Debian's package is prometheus): the alerts were not run")
    return found


def _rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in _rules() if "alert" in rule]


def _tool(promtool: str, *arguments: str) -> None:
    done = subprocess.run(
        [promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=PROMTOOL_S
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_no_alert_is_silent_when_it_must_fire_or_fires_when_it_must_not(promtool: str, file: Path) -> None:
    _tool(promtool, "test", "rules", file.name)


def test_prometheus_takes_the_rules_and_the_configuration(promtool: str) -> None:
    _tool(promtool, "check", "rules", RULES.name)
    _tool(promtool, "check", "config", "prometheus.yml")


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
    allowed = {
        "check": set(CHECKS),
        "loop": set(re.findall(r'_loop\("(\w+)"', (ROOT / "service" / "worker" / "runner.py").read_text())),
        "guard": set(metrics.GUARDS),
        "kind": {"quarantine"},
        "code": {"issued", "replayed", "207-762"},
    }
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


def test_nothing_that_a_power_cut_loses_vouchers_by_waits_for_the_morning() -> None:
    (durable,) = [rule["expr"] for rule in _rules() if rule.get("alert") == "VoucherdNotDurable"]
    named = re.search(r'check=~"([^"]+)"', durable)
    assert named is not None
    assert set(named[1].split("|")) == {
        "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "fsync", "full_page_writes", "synchronous_commit",
        "synchronous",
    }  # fmt: skip
