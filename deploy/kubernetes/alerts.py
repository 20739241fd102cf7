"""``python -m deploy.kubernetes.alerts``: the alerts for the Prometheus operator, monitoring/alerts.yaml.

The groups of a PrometheusRule are those of a rule file, so the text of that goes in as it stands, with its comments.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Final

RULES: Final = Path(__file__).parents[1] / "prometheus" / "voucherd.rules.yml"
HEAD: Final = """\
# Made by `make alerts` from deploy/prometheus/voucherd.rules.yml: change that, not this.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: voucherd
  labels: {app.kubernetes.io/component: alerts}
spec:
"""


def prometheus_rule() -> str:
    """The manifest, of the rules as they are."""
    about, groups, rules = RULES.read_text().partition("groups:\n")
    assert groups, RULES
    return HEAD + textwrap.indent(about + groups + rules, "  ")


if __name__ == "__main__":
    sys.stdout.write(prometheus_rule())
