"""A real Prometheus with the project's configuration scrapes the real service under load: every query must parse and return data."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service_onnx import write_model

from benchmarks.live import ROOT, Prometheus, Service
from service.auth import make_key

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "detector.json").read_text())
FOREIGN: dict[str, str] = runpy.run_path(str(ROOT / "deploy" / "grafana" / "panels.py"))["NOT_FROM_THE_SERVICE"]
DATA_WITHIN_S = 60.0
SETTINGS = {"provider": "cpu", "intra_op_threads": 1, "decode_threads": 1, "canary_seconds": 0, "drain_seconds": 0}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after a restart of the service, a good reload, a refused one, and with load that goes on."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus here; install the Debian package `prometheus`")
    folder = tmp_path_factory.mktemp("live")
    repository = folder / "models"
    write_model(repository, version="1")
    key, line = make_key("test")
    (folder / "keys").write_text(line + "\n")
    settings = {**SETTINGS, "model_repository": repository, "admin_keys_file": folder / "keys"}
    first = Service(folder / "service.log", **settings)
    with Prometheus(folder / "prometheus", first.port) as running:
        try:
            first.until_ready()
            first.until(lambda: _finite(running.query("process_start_time_seconds")), "Prometheus does not scrape")
        finally:
            first.stop()
        with Service(folder / "service.log", port=first.port, **settings) as service:
            service.until_ready()
            service.until(lambda: _finite(running.query('detector_reloads_total{outcome="failed"}')), "Prometheus does not scrape")
            load = subprocess.Popen(_load_command(service.url), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
            try:
                _reload(service.url, key, repository)
                yield running
            finally:
                load.terminate()
                load.wait(30)


def _load_command(url: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.load", f"{url}/v1/detect", "--rate", "15", "--seconds", "120", "--bad", "0.1"]


def _reload(url: str, key: str, repository: Path) -> None:
    """Version 2 is good; version 3 answers its golden picture otherwise than it promises."""
    headers = {"authorization": f"Bearer {key}"}
    write_model(repository, version="2", score=0.65)
    assert httpx.post(f"{url}/v1/models/blobs/load", headers=headers, timeout=60).status_code == 200
    write_model(repository, version="3", golden_score=0.2)
    answer = httpx.post(f"{url}/v1/models/blobs/load", json={"version": "3"}, headers=headers, timeout=60)
    assert answer.status_code == 409, answer.text


def _finite(series: list[dict[str, Any]]) -> bool:
    return any(math.isfinite(float(one["value"][1])) for one in series)


def _dashboard_queries() -> list[tuple[str, str]]:
    panels = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return panels + [(mark["name"], mark["expr"]) for mark in DASHBOARD["annotations"]["list"]]


def _without_variables(expression: str) -> str:
    for name, value in {"$__rate_interval": "20s", "$instance": ".+"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"the test knows no value for a variable of {expression}"
    return expression


def _foreign(expression: str) -> str | None:
    return next((reason for beginning, reason in FOREIGN.items() if beginning in expression), None)


def _until_data(prometheus: Prometheus, expression: str) -> None:
    deadline = time.monotonic() + DATA_WITHIN_S
    while not _finite(prometheus.query(expression)):
        assert time.monotonic() < deadline, f"no data: {expression}"
        time.sleep(0.2)


@pytest.mark.parametrize(("title", "expression"), _dashboard_queries())
def test_each_query_of_the_dashboard_returns_data(prometheus: Prometheus, title: str, expression: str) -> None:
    if _foreign(expression):
        assert prometheus.query(_without_variables(expression)) == []
    else:
        _until_data(prometheus, _without_variables(expression))


def test_each_recorded_series_has_data(prometheus: Prometheus) -> None:
    recording = [rule for rule in prometheus.rules() if rule["type"] == "recording"]
    assert len(recording) > 15
    for rule in recording:
        if not _foreign(rule["query"]):
            _until_data(prometheus, rule["name"])


def test_no_rule_fails_and_alerts_compare_series_that_exist(prometheus: Prometheus) -> None:
    for rule in prometheus.rules():
        assert rule["health"] == "ok", rule
        names = re.findall(r"[a-z_:]*(?:detector|process)[_:][a-z_:0-9]+", rule["query"])
        for name in set(names) if rule["type"] == "alerting" else ():
            _until_data(prometheus, name)


def test_the_autoscalers_queries_return_data(prometheus: Prometheus) -> None:
    values = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "prometheus-adapter" / "values.yaml").read_text())
    for rule in values["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].split("{")[0])
        _until_data(prometheus, query.replace("<<.GroupBy>>", "instance").replace("<<.LabelMatchers>>", 'job="detector"'))


def test_a_refused_version_fires_its_alert_and_nothing_else(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + DATA_WITHIN_S
    while prometheus.firing() != {"DetectorReloadFailed"}:
        assert time.monotonic() < deadline, prometheus.firing()
        time.sleep(0.2)


def test_the_dashboards_numbers_are_those_of_the_load(prometheus: Prometheus) -> None:
    """15 requests a second, one in ten of them broken: within what a Poisson process allows in a minute."""
    _until_data(prometheus, "detector:images_served:rate1m")
    served = prometheus.query("detector:images_served:rate1m / on () (detector:images_offered:rate1m > 0)")
    assert 0.75 < float(served[0]["value"][1]) < 1
