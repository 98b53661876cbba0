"""The dashboard, its provisioning and the runbook agree with each other and with the service's names."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
GRAFANA = ROOT / "deploy" / "grafana"
RUNBOOK = (ROOT / "deploy" / "RUNBOOK.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "detector.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_committed_dashboard_is_what_the_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GRAFANA))
    made = runpy.run_path(str(GRAFANA / "dashboard.py"))["dashboard"]()
    sys.modules.pop("panels")
    assert made == DASHBOARD, "run `python deploy/grafana/dashboard.py` and commit what it writes"


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


def test_ids_and_titles_are_unique() -> None:
    for name in ("id", "title"):
        values = [panel[name] for panel in DASHBOARD["panels"]]
        assert len(values) == len(set(values))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_says_what_to_make_of_it_and_asks_the_chosen_data_source(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith((".", ")"))
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_provisioning_points_at_the_data_source_and_folder_that_compose_mounts() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert sources[0]["uid"] == DASHBOARD["templating"]["list"][0]["current"]["value"]
    assert sources[0]["jsonData"]["timeInterval"] == scrape


def test_the_red_of_p99_is_the_objective() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "recording.yml").read_text())["groups"]
    objective = next(rule["expr"] for group in rules for rule in group["rules"] if rule["record"] == "detector:latency_objective_seconds")
    p99 = next(panel for panel in PANELS if panel["title"] == "p99")
    assert objective == f"vector({p99['fieldConfig']['defaults']['thresholds']['steps'][-1]['value']})"


def test_the_runbook_names_only_panels_that_exist() -> None:
    quoted = set(re.findall(r'"([A-Z][^"\n]+|p99)"', RUNBOOK)) - {"Detector"}
    quoted = {name for name in quoted if not name.startswith("Authorization")}
    assert len(quoted) > 20
    assert quoted - {panel["title"] for panel in PANELS} == set()


def test_the_runbook_names_only_settings_that_exist() -> None:
    named = set(re.findall(ENV_PREFIX + r"[A-Z_]+", RUNBOOK))
    assert len(named) > 15
    assert named - {ENV_PREFIX + name.upper() for name in Settings.model_fields} == set()


def test_the_runbook_links_only_to_its_own_sections() -> None:
    sections = {line.removeprefix("## ").lower() for line in RUNBOOK.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\(#([a-z]+)\)", RUNBOOK)) - sections == set()
