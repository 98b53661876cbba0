"""Write the Grafana dashboard: `python deploy/grafana/dashboard.py` makes dashboards/detector.json beside it.

A dashboard's JSON is a thousand lines in which a changed query cannot be seen, so what it shows is written in panels.py. A test keeps
the committed JSON equal to what this script makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panels import ROWS, Panel

TARGET = Path(__file__).parent / "dashboards" / "detector.json"
COLUMNS = 24
"""Width of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Grafana's form of a panel at one place of the grid."""
    targets = [
        {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend, "range": True}
        | ({"format": "heatmap"} if panel.kind == "heatmap" else {})
        for at, (legend, expression) in enumerate(panel.queries.items())
    ]
    steps = [{"color": "green", "value": None}, *({"color": colour, "value": value} for colour, value in panel.limits)]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        defaults |= {"min": 0, "custom": {"showPoints": "never", "lineWidth": 2} | panel.custom}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": panel.options,
    }


def layout() -> list[dict[str, Any]]:
    """All panels, row after row, each placed left to right and wrapped at the grid's width."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        y, x, height = y + 1, 0, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                y, x, height = y + height, 0, 0
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return panels


def variables() -> list[dict[str, Any]]:
    """The data source, so that the file works in any Grafana, and the replicas to look at."""
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {"text": "Prometheus", "value": "prometheus"},
        },
        {
            "name": "instance",
            "label": "Replica",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": 'label_values(detector_inflight_requests{job="detector"}, instance)', "refId": "instance"},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def annotations() -> list[dict[str, Any]]:
    """A mark wherever a model version starts to be served, and one where a process starts."""
    marks = {
        "Model versions": (
            "blue",
            "count by (model, version) (detector_model_info unless detector_model_info offset 1m)",
            "{{model}} version {{version}}",
        ),
        "Restarts": ("purple", 'changes(process_start_time_seconds{job="detector"}[1m]) > 0', "{{instance}} started again"),
    }
    return [
        {
            "name": name,
            "enable": True,
            "iconColor": colour,
            "datasource": DATASOURCE,
            "expr": expression,
            "step": "15s",
            "titleFormat": text,
            "useValueForTime": False,
        }
        for name, (colour, expression, text) in marks.items()
    ]


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "detector",
        "title": "Detector",
        "description": "Frames per second, latency, and why. Runbook: deploy/RUNBOOK.md",
        "tags": ["detector"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": annotations()},
        "panels": layout(),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")
    print(f"wrote {TARGET} with {len(dashboard()['panels'])} panels and rows")
