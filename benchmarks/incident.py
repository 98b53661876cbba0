"""A scripted incident, watched by a real Prometheus: `python -m benchmarks.incident --out FOLDER` (about 18 minutes).

Calm, then many more requests than the device can answer, calm, a broken model version, calm, a device that hangs and stays lost until it
is repaired, calm, a service that nobody starts again. Writes what alerts fired when (incident.json) and what the dashboard showed
(incident.png).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl

from benchmarks.live import ROOT, Prometheus, Service, free_port
from service.auth import make_key

CALM_S, OVERLOAD_S, HANG_S, LOST_S, STOPPED_S = 75.0, 400.0, 90.0, 180.0, 75.0
GAP_S = 5.0
"""Alerts that are silent no longer than this are one span."""
RESTART_S = 3.0
"""A supervisor waits this long before it starts the service again."""
SETTINGS = {"provider": "cpu", "intra_op_threads": 1, "drain_seconds": 0, "canary_seconds": 5, "request_timeout_ms": 2000}

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
    },
    "oldest in queue, s": {"oldest": "max(detector_queue_oldest_age_seconds)"},
    "failed reloads, restarts": {
        "failed reloads": 'sum(detector_reloads_total{outcome="failed"})',
        "restarts": 'changes(process_start_time_seconds{job="detector"}[30m])',
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


class Supervised:
    """Starts the service again whenever it ends, as Docker and Kubernetes do."""

    def __init__(self, start: Callable[[], Service], story: Story) -> None:
        self._start, self._story = start, story
        self._over = threading.Event()
        self.service = start()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            code = self.service.process.poll()
            if code is not None:
                self._story.note(f"the service ended with exit code {code}")
                self.service.stop()
                if not self._over.wait(RESTART_S):
                    self.service = self._start()

    def stop(self) -> None:
        """The end of the service, for good."""
        self._over.set()
        self._thread.join()
        self.service.stop()


@contextmanager
def load(url: str, rate: float) -> Iterator[None]:
    """Requests in an open loop while inside."""
    command = [sys.executable, "-m", "benchmarks.load", f"{url}/v1/detect", "--rate", str(rate), "--seconds", "3600", "--timeout", "5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def play(folder: Path, repository: Path, rates: tuple[float, float], image_ms: float) -> tuple[Story, dict[str, Any]]:
    """The incident. Returns the story, and every chart's and the alerts' series."""
    story, state = Story(), folder / "device"
    state.write_text("works")
    models = copy_models(repository, folder / "models")
    key, line = make_key("incident")
    (folder / "keys").write_text(line + "\n")
    settings = {**SETTINGS, "model_repository": models, "admin_keys_file": folder / "keys"}
    command = [sys.executable, "-m", "benchmarks.incident_service", state, str(image_ms)]
    port = free_port()
    supervised = Supervised(lambda: Service(folder / "service.log", port=port, command=command, **settings), story)
    try:
        supervised.service.until_ready()
        with Prometheus(folder / "prometheus", port) as prometheus:
            started = time.time()
            perform(story, supervised.service.url, key, models, state, rates)
            story.phase("stopped")
            supervised.stop()
            time.sleep(STOPPED_S)
            return story, read_series(prometheus, started, time.time())
    finally:
        state.write_text("works")
        supervised.stop()


def perform(story: Story, url: str, key: str, models: Path, state: Path, rates: tuple[float, float]) -> None:
    """Phase after phase."""
    calm, overload = rates
    with load(url, calm):
        story.phase("calm")
        time.sleep(CALM_S)
        with load(url, overload):
            story.phase("overload")
            time.sleep(OVERLOAD_S)
        story.phase("calm ")
        time.sleep(CALM_S)
        story.phase("broken model")
        story.note(break_model(url, key, models))
        time.sleep(CALM_S)
        story.phase("device hangs")
        state.write_text("hang")
        time.sleep(HANG_S)
        story.phase("device lost")
        state.write_text("lost")
        time.sleep(LOST_S)
        story.phase("repaired")
        state.write_text("works")
        time.sleep(2 * CALM_S)


def copy_models(source: Path, target: Path) -> Path:
    """Each model's newest version; the incident writes into the copy."""
    for name in sorted(path for path in source.iterdir() if path.is_dir()):
        newest = max((file.parent for file in name.glob("*/model.onnx")), key=lambda folder: int(folder.name), default=None)
        if newest is not None:
            place = target / name.name / "1"
            place.mkdir(parents=True)
            (place / "model.onnx").write_bytes((newest / "model.onnx").read_bytes())
    return target


def break_model(url: str, key: str, models: Path) -> str:
    """A version whose copy was cut off. Returns what the service says to it."""
    name = next(models.iterdir()).name
    whole = (models / name / "1" / "model.onnx").read_bytes()
    (models / name / "2").mkdir()
    (models / name / "2" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    answer = httpx.post(f"{url}/v1/models/{name}/load", json={"version": "2"}, headers={"authorization": f"Bearer {key}"}, timeout=60)
    return f"load of version 2: {answer.status_code} {answer.json().get('detail', '')[:200]}"


def read_series(prometheus: Prometheus, start: float, end: float) -> dict[str, Any]:
    """Everything that the plot and the report need."""
    charts = {
        chart: {label: prometheus.query_range(expression, start, end) for label, expression in lines.items()}
        for chart, lines in CHARTS.items()
    }
    return {"start": start, "end": end, "charts": charts, "alerts": prometheus.query_range('ALERTS{alertstate="firing"}', start, end)}


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


def report(story: Story, series: dict[str, Any]) -> dict[str, Any]:
    """Phases, events and alerts with seconds since the start."""
    start = series["start"]
    return {
        "phases": [{"name": name.strip(), "from_s": round(at - start, 1)} for name, at in story.phases],
        "events": [{"at_s": round(at - start, 1), "text": text} for at, text in story.notes],
        "alerts": {name: [(round(a - start), round(b - start)) for a, b in spans] for name, spans in firing_spans(series).items()},
    }


def plot(story: Story, series: dict[str, Any], path: Path) -> None:
    """The charts over one time axis, with the phases behind them and the alerts below."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    start = series["start"]
    figure, axes = plt.subplots(len(CHARTS) + 1, 1, figsize=(13, 15), sharex=True, constrained_layout=True)
    for axis, (unit, lines) in zip(axes, series["charts"].items(), strict=False):
        for label, found in lines.items():
            for one in found:
                axis.plot([t - start for t, _ in one["values"]], [float(v) for _, v in one["values"]], label=label)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", fontsize=8)
    spans = firing_spans(series)
    for row, fired in enumerate(spans.values()):
        axes[-1].broken_barh([(first - start, max(last - first, 1.0)) for first, last in fired], (row - 0.4, 0.8), color="tab:red")
    axes[-1].set_yticks(range(len(spans)), list(spans))
    axes[-1].set_xlabel("seconds")
    ends = [at for _, at in story.phases[1:]] + [series["end"]]
    for axis in axes:
        for (name, at), until in zip(story.phases, ends, strict=True):
            if not name.startswith("calm") and name != "repaired":
                axis.axvspan(at - start, until - start, color="tab:orange", alpha=0.15)
    for name, at in story.phases:
        axes[0].text(at - start, axes[0].get_ylim()[1], name, fontsize=8, va="bottom", rotation=15)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Play it and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for incident.json and incident.png")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="model to serve (default: the bundled demo)")
    parser.add_argument("--calm", type=float, default=3.0, help="requests a second in calm times (default 3)")
    parser.add_argument("--overload", type=float, default=60.0, help="more of them during the overload (default 60)")
    parser.add_argument("--image-ms", type=float, default=0.0, help="simulated device time on top of each image's inference (default 0)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        story, series = play(Path(folder), options.repository, (options.calm, options.overload), options.image_ms)
    found = report(story, series)
    (options.out / "incident.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(story, series, options.out / "incident.png")
    print(json.dumps(found["alerts"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
