"""What an incident left in Prometheus: when which alert fired, the charts over the story's phases, and every panel of the dashboard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import yaml
from PIL import Image

from benchmarks.live import ROOT, Prometheus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "detector.json"
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"
VARIABLES = {"$__rate_interval": "20s", "$instance": ".+"}
GAP_S = 5.0
"""Alerts that are silent no longer than this are one span."""
GAP_STEPS = 3
"""A series without samples for so many steps was not there."""
PALETTE = 256
PANEL_COLUMNS = 4
LEGEND_LINES = 7

CHARTS: dict[str, dict[str, str]] = {
    "requests/s": {
        "offered": "detector:images_offered:rate1m",
        "served": "detector:images_served:rate1m",
        "goodput": "detector:goodput:rate1m",
    },
    "seconds": {
        "p50": "detector:request_seconds:p50_rate1m",
        "p99": "detector:request_seconds:p99_rate1m",
        "objective": "detector:latency_objective_seconds",
    },
    "share": {
        "server errors": "detector:errors:ratio_rate5m",
        "refused (429)": "detector:overload:ratio_rate5m",
        "saturation": "detector:saturation:ratio_rate1m",
        "GPU memory (simulated)": "instance:device_memory:ratio",
    },
    "oldest in queue, s": {"oldest": "max(detector_queue_oldest_age_seconds)"},
    "count": {
        "failed reloads": 'sum(detector_reloads_total{outcome="failed"})',
        "device errors": "sum(detector_device_errors_total)",
        "restarts in 30 min": 'changes(process_start_time_seconds{job="detector"}[30m])',
    },
}


@dataclass
class Story:
    """What happened, in seconds since 1970."""

    phases: list[tuple[str, float]] = field(default_factory=list)
    notes: list[tuple[float, str]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        """A new phase begins."""
        self.phases.append((name, time.time()))
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)

    def note(self, text: str) -> None:
        """One event."""
        self.notes.append((time.time(), text))
        print(f"{time.strftime('%H:%M:%S')}   {text}", flush=True)


def read_series(prometheus: Prometheus, start: float, end: float) -> dict[str, Any]:
    """Everything that the plots and the report need, as plain data."""
    charts = {
        chart: {label: prometheus.query_range(expression, start, end) for label, expression in lines.items()}
        for chart, lines in CHARTS.items()
    }
    panels = [
        {
            "title": panel["title"],
            "kind": panel["type"],
            "found": {
                target["legendFormat"]: prometheus.query_range(_filled(target["expr"]), start, end, step_s=(end - start) / 300)
                for target in panel["targets"]
            },
        }
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        if "targets" in panel
    ]
    alerts = prometheus.query_range('ALERTS{alertstate="firing"}', start, end)
    return {"start": start, "end": end, "charts": charts, "panels": panels, "alerts": alerts}


def _filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def firing_spans(series: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Alert -> the spans in which it fired for any replica, earliest alert first."""
    moments: dict[str, set[float]] = {}
    for alert in series["alerts"]:
        moments.setdefault(alert["metric"]["alertname"], set()).update(float(moment) for moment, _ in alert["values"])
    spans = {name: _joined(sorted(times)) for name, times in moments.items()}
    return dict(sorted(spans.items(), key=lambda item: item[1]))


def _joined(times: list[float]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for moment in times:
        if spans and moment - spans[-1][1] <= GAP_S:
            spans[-1] = (spans[-1][0], moment)
        else:
            spans.append((moment, moment))
    return spans


def alert_names() -> set[str]:
    """Every alert of this project."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


def report(story: Story, series: dict[str, Any]) -> dict[str, Any]:
    """Phases, events and alerts with seconds since the start; and what did not show: silent alerts, empty panels."""
    start = series["start"]
    spans = firing_spans(series)
    return {
        "phases": [{"name": name.strip(), "from_s": round(at - start, 1)} for name, at in story.phases],
        "events": list(_events(story, start)),
        "alerts": {name: [(round(a - start), round(b - start)) for a, b in found] for name, found in spans.items()},
        "alerts_that_never_fired": sorted(alert_names() - set(spans)),
        "panels": len(series["panels"]),
        "panels_without_data": [panel["title"] for panel in series["panels"] if not _has_data(panel)],
    }


def _events(story: Story, start: float) -> Iterator[dict[str, Any]]:
    """Notes; one that repeats is told once, with how often and until when."""
    last: dict[str, Any] | None = None
    for at, text in story.notes:
        if last is not None and last["text"] == text:
            last |= {"times": last.get("times", 1) + 1, "until_s": round(at - start, 1)}
            continue
        if last is not None:
            yield last
        last = {"at_s": round(at - start, 1), "text": text}
    if last is not None:
        yield last


def _has_data(panel: dict[str, Any]) -> bool:
    return any(math.isfinite(float(value)) for found in panel["found"].values() for one in found for _, value in one["values"])


def plot(story: Story, series: dict[str, Any], path: Path) -> None:
    """The charts over one time axis, with the phases behind them and the alerts below."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    start = series["start"]
    figure, axes = plt.subplots(len(CHARTS) + 1, 1, figsize=(13, 16), sharex=True, constrained_layout=True)
    for axis, (unit, lines) in zip(axes, series["charts"].items(), strict=False):
        for label, found in lines.items():
            for number, one in enumerate(found):
                axis.plot(*_points(one, start), label=label if number == 0 else None)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", fontsize=8)
    spans = firing_spans(series)
    for row, fired in enumerate(spans.values()):
        axes[-1].broken_barh([(first - start, max(last - first, 1.0)) for first, last in fired], (row - 0.4, 0.8), color="tab:red")
    axes[-1].set_yticks(range(len(spans)), list(spans))
    axes[-1].set_xlabel("seconds")
    for axis in axes:
        _shade(axis, story, start, series["end"])
    named = [(name, at - start) for name, at in story.phases if not _is_calm(name)]
    for number, (name, at) in enumerate(named):  # in steps, so that short phases leave each other's names room
        axes[0].annotate(name, (at, 1.02 + 0.09 * (number % 3)), xycoords=("data", "axes fraction"), fontsize=8)
    _save(figure, path, dpi=90)
    plt.close(figure)


def _save(figure: Figure, path: Path, *, dpi: int) -> None:
    """With a palette: lines on white need no more colours, and the file half the bytes."""
    figure.savefig(path, dpi=dpi)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(PALETTE)
    small.save(path, optimize=True)


def _is_calm(phase: str) -> bool:
    return phase.startswith("calm")


def _shade(axis: Axes, story: Story, start: float, end: float) -> None:
    """Colour behind every phase but the calm ones, neighbours a little different."""
    ends = [at for _, at in story.phases[1:]] + [end]
    for number, ((name, at), until) in enumerate(zip(story.phases, ends, strict=True)):
        if not _is_calm(name):
            axis.axvspan(at - start, until - start, color="tab:orange", alpha=(0.12, 0.2)[number % 2], linewidth=0)


def _points(one: dict[str, Any], start: float) -> tuple[list[float], list[float]]:
    """Times since the start and values, with a NaN wherever samples are missing, so that a line ends there."""
    times, values = [float(t) - start for t, _ in one["values"]], [float(value) for _, value in one["values"]]
    steps = np.diff(times)
    gaps = np.flatnonzero(steps > GAP_STEPS * steps.min(initial=np.inf)) + 1
    return np.insert(times, gaps, np.nan).tolist(), np.insert(values, gaps, np.nan).tolist()


def plot_dashboard(story: Story, series: dict[str, Any], path: Path) -> None:
    """Every panel of the Grafana dashboard, drawn from its own queries over the whole incident."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    start, panels = series["start"], series["panels"]
    rows = math.ceil(len(panels) / PANEL_COLUMNS)
    figure, axes = plt.subplots(rows, PANEL_COLUMNS, figsize=(5 * PANEL_COLUMNS, 2.7 * rows), constrained_layout=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_title(panel["title"], fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlim(0, series["end"] - start)
        _shade(axis, story, start, series["end"])
        DRAW.get(panel["kind"], _draw_lines)(axis, panel, start)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    _save(figure, path, dpi=70)
    plt.close(figure)


def _draw_lines(axis: Axes, panel: dict[str, Any], start: float) -> None:
    for legend, one in _named(panel):
        axis.plot(*_points(one, start), label=legend[:40], linewidth=1.2)
    axis.set_ylim(bottom=0)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        axis.legend(handles[:LEGEND_LINES], labels[:LEGEND_LINES], fontsize=6, loc="upper right")


def _draw_states(axis: Axes, panel: dict[str, Any], start: float) -> None:
    """One bar a series, wherever it is above 0."""
    for row, (legend, one) in enumerate(_named(panel)):
        step = np.diff([t for t, _ in one["values"]]).min(initial=30.0)
        colour = "tab:red" if legend.endswith("firing") else "tab:blue"
        axis.broken_barh([(t - start, step) for t, value in one["values"] if float(value) > 0], (row - 0.4, 0.8), color=colour, alpha=0.6)
        axis.text(0.01, row, legend[:44], transform=axis.get_yaxis_transform(), fontsize=5, va="center")
    axis.set_yticks([])


def _draw_heat_map(axis: Axes, panel: dict[str, Any], start: float) -> None:
    """Buckets of a cumulative histogram: each row is what its bound adds to the one below."""
    by_bound = sorted(((float(legend), one) for legend, one in _named(panel)), key=lambda item: item[0])
    times = sorted({t for _, one in by_bound for t, _ in one["values"]})
    counts = np.array([[dict(map(tuple, one["values"])).get(t, "0") for t in times] for _, one in by_bound], float)
    axis.pcolormesh([t - start for t in times], range(len(by_bound)), np.diff(counts, axis=0, prepend=0), cmap="Oranges", shading="nearest")
    axis.set_yticks(range(len(by_bound)), [f"{bound:g}" for bound, _ in by_bound], fontsize=5)


def _named(panel: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Series with their legends filled in."""
    for legend, found in panel["found"].items():
        for one in found:
            filled = legend
            for label, value in one["metric"].items():
                filled = filled.replace("{{" + label + "}}", value)
            yield filled, one


DRAW = {"state-timeline": _draw_states, "heatmap": _draw_heat_map}
