"""The Prometheus configuration, its rules and their unit tests, judged by promtool itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import REQUEST_SECONDS

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("no promtool here; install the Debian package `prometheus`")
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _rules(kind: str) -> list[dict[str, Any]]:
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def _alert_tests() -> list[dict[str, Any]]:
    return [
        check for test in yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"] for check in test.get("alert_rule_test", [])
    ]


def test_promtool_accepts_the_configuration(promtool: str) -> None:
    assert f"{len(RULE_FILES)} rule files found" in _run(promtool, "check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")


def test_promtool_accepts_the_rules(promtool: str) -> None:
    _run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)


def test_rules_do_in_promtool_what_their_unit_tests_say(promtool: str) -> None:
    _run(promtool, "test", "rules", "rules_test.yml")


@pytest.mark.parametrize("alert", [rule["alert"] for rule in _rules("alert")])
def test_each_alert_has_a_unit_test_that_fires_and_one_that_does_not(alert: str) -> None:
    fires = {bool(check["exp_alerts"]) for check in _alert_tests() if check["alertname"] == alert}
    assert fires == {True, False}


@pytest.mark.parametrize("rule", _rules("alert"), ids=lambda rule: rule["alert"])
def test_each_alert_says_who_acts_and_where_its_runbook_section_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket"}
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = [line.lstrip("#").strip().lower() for line in (ROOT / file).read_text().splitlines() if line.startswith("#")]
    assert anchor == rule["alert"].lower()
    assert anchor in headings


def test_the_latency_objective_is_one_number_everywhere() -> None:
    rules = {rule["record"]: rule["expr"] for rule in _rules("record")}
    objective = rules["detector:latency_objective_seconds"].removeprefix("vector(").removesuffix(")")
    assert f'le="{objective}"' in rules["detector:goodput:rate1m"]


def test_the_latency_objective_is_a_bucket_of_the_service() -> None:
    rules = {rule["record"]: rule["expr"] for rule in _rules("record")}
    assert float(rules["detector:latency_objective_seconds"].removeprefix("vector(").removesuffix(")")) in REQUEST_SECONDS
