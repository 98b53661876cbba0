"""Write base/rules.yaml: the rule groups of deploy/prometheus/rules as the PrometheusRule that the Prometheus operator reads.

`python deploy/kubernetes/rules.py` after each change of a rule; kustomize cannot put one file into a field of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SOURCES = HERE.parent / "prometheus" / "rules"
TARGET = HERE / "base" / "rules.yaml"
HEAD = "# Made by deploy/kubernetes/rules.py out of deploy/prometheus/rules; change those.\n"


def prometheus_rule() -> dict[str, Any]:
    """The object, with every group of every file."""
    groups = [group for path in sorted(SOURCES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "detector", "labels": {"app.kubernetes.io/name": "detector"}},
        "spec": {"groups": groups},
    }


if __name__ == "__main__":
    TARGET.write_text(HEAD + yaml.safe_dump(prometheus_rule(), sort_keys=False, width=140))
