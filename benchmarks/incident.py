"""A scripted incident, watched by a real Prometheus: `python -m benchmarks.incident --out FOLDER`.

Calm, then many more requests than the two devices can answer, calm, a broken model version, devices whose memory is full, calm, one of
them lost, then the other hangs and both stay so when the service is started again, both lost until they are repaired, calm, a service
that nobody starts again.
Every alert of deploy/prometheus fires. Writes when (incident.json), the charts (incident.png) and every panel of the Grafana dashboard
(incident_dashboard.png); ends with 1 if an alert never fired or a panel stayed empty.

The service, Prometheus, its rules and the supervisor are real. Simulated are the device's faults (benchmarks/incident_service.py), most
of its time for a picture, and the exporters of a GPU machine (benchmarks/incident_exporter.py). 9 minutes, since by default the rules
want a fault to last only a twentieth of what they usually do; with `--hold 1`, which leaves them as they are, 28.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.incident_exporter import GpuMachine, exported
from benchmarks.incident_report import Story, plot, plot_dashboard, read_series, report
from benchmarks.live import ROOT, Prometheus, Service, beside, free_port
from service.auth import make_key

CALM_S, WINDOW_S, MARGIN_S = 40.0, 60.0, 18.0
HOLD = 0.05
OVERLOAD_FOR_S, MEMORY_FOR_S, DEVICE_LOST_FOR_S, NOT_READY_FOR_S, DOWN_FOR_S = 600.0, 300.0, 60.0, 120.0, 60.0
"""How long the rules want these faults to last: DetectorSaturated, DeviceMemoryHigh, DetectorDeviceLost, DetectorNotReady, DetectorDown."""
WATCHDOG_S = 60.0
IMAGE_MS = 60.0
"""Then two devices hold 20 to 30 pictures a second, whatever the demo model costs, and are full before two cores are."""
RESTART_S = 3.0
"""A supervisor waits this long before it starts the service again."""
IMPATIENT_S = 1.5
"""Clients of the overload leave after this."""
FULL_MEMORY = 0.96
SHADOW_SHARE = 0.2
SETTINGS = {
    "provider": "cpu",
    "device_ids": "0,1",
    "intra_op_threads": 1,
    "drain_seconds": 0,
    "canary_seconds": 5,
    "request_timeout_ms": 2000,
    "watchdog_seconds": WATCHDOG_S,
}


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


@dataclass(frozen=True)
class Stage:
    """What a play needs: where things are, and how much of it."""

    story: Story
    url: str
    admin_key: str
    models: Path
    device: Path
    """The file that says what the device does."""
    gpu: GpuMachine
    calm_rate: float
    overload_rate: float
    hold: float


@contextmanager
def load(url: str, rate: float, *, timeout_s: float = 5.0) -> Iterator[None]:
    """Requests in an open loop while inside."""
    command = [sys.executable, "-m", "benchmarks.load", f"{url}/v1/detect", "--rate", str(rate), "--seconds", "7200"]
    process = subprocess.Popen([*command, "--timeout", str(timeout_s)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def ticking(gpu: GpuMachine, prometheus: Prometheus) -> Iterator[None]:
    """Let the simulated GPU be as busy as the device of the service is."""

    def tick(over: threading.Event) -> None:
        while not over.wait(1.0):
            found = prometheus.query("detector:saturation:ratio_rate1m")
            gpu.tick(min(1.0, float(found[0]["value"][1])) if found else 0.0)

    with beside(tick):
        yield


def play(folder: Path, repository: Path, rates: tuple[float, float], *, image_ms: float, hold: float) -> tuple[Story, dict[str, Any]]:
    """The incident. Returns the story, and every chart's, panel's and alert's series."""
    story, device, gpu, port = Story(), folder / "device", GpuMachine(), free_port()
    device.write_text("works")
    models = copy_models(repository, folder / "models")
    key, line = make_key("incident")
    (folder / "keys").write_text(line + "\n")
    shadow = f"{next(models.iterdir()).name}@1={SHADOW_SHARE}"
    settings = {**SETTINGS, "model_repository": models, "admin_keys_file": folder / "keys", "shadow": shadow}
    command = [sys.executable, "-m", "benchmarks.incident_service", device, str(image_ms)]
    supervised = Supervised(lambda: Service(folder / "service.log", port=port, command=command, **settings), story)
    try:
        supervised.service.until_ready()
        with exported(gpu) as exporter_port, Prometheus(folder / "prometheus", port, exporter_port=exporter_port, hold=hold) as prometheus:
            started = time.time()
            with ticking(gpu, prometheus):
                perform(Stage(story, supervised.service.url, key, models, device, gpu, *rates, hold))
                story.phase("stopped")
                supervised.stop()
                time.sleep(DOWN_FOR_S * hold + MARGIN_S)
            return story, read_series(prometheus, started, time.time())
    finally:
        device.write_text("works")
        supervised.stop()


def perform(stage: Stage) -> None:
    """Phase after phase."""
    story, device, hold = stage.story, stage.device, stage.hold
    with load(stage.url, stage.calm_rate):
        story.phase("calm")
        time.sleep(CALM_S)
        with load(stage.url, stage.overload_rate, timeout_s=IMPATIENT_S):
            story.phase("overload")
            time.sleep(WINDOW_S + OVERLOAD_FOR_S * hold + MARGIN_S)
        story.phase("calm ")
        time.sleep(CALM_S)
        story.phase("broken model")
        story.note(break_model(stage))
        time.sleep(MARGIN_S)
        story.phase("memory full")
        stage.gpu.use(FULL_MEMORY)
        device.write_text("memory")
        time.sleep(MEMORY_FOR_S * hold + MARGIN_S)
        story.phase("calm  ")
        stage.gpu.use(0.4)
        device.write_text("works")
        time.sleep(MARGIN_S)
        story.phase("one lost")
        device.write_text("lost 1")
        time.sleep(DEVICE_LOST_FOR_S * hold + MARGIN_S)
        story.phase("other hangs")
        device.write_text("hang")
        time.sleep(WATCHDOG_S + WINDOW_S / 2 + NOT_READY_FOR_S * hold + 2 * MARGIN_S)
        story.phase("both lost")
        device.write_text("lost")
        time.sleep(WINDOW_S + MARGIN_S)
        story.phase("repaired")
        device.write_text("works")
        time.sleep(CALM_S)


def copy_models(source: Path, target: Path) -> Path:
    """Each model's newest version, twice: as 1, which runs in the shadow, and as 2, which is served. The incident writes into the copy."""
    for name in sorted(path for path in source.iterdir() if path.is_dir()):
        newest = max((file.parent for file in name.glob("*/model.onnx")), key=lambda folder: int(folder.name), default=None)
        for version in ("1", "2") if newest is not None else ():
            place = target / name.name / version
            place.mkdir(parents=True)
            (place / "model.onnx").write_bytes((newest / "model.onnx").read_bytes())
    return target


def break_model(stage: Stage) -> str:
    """A version whose copy was cut off. Returns what the service says to it."""
    name = next(stage.models.iterdir()).name
    whole = (stage.models / name / "2" / "model.onnx").read_bytes()
    (stage.models / name / "3").mkdir()
    (stage.models / name / "3" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    headers = {"authorization": f"Bearer {stage.admin_key}"}
    answer = httpx.post(f"{stage.url}/v1/models/{name}/load", json={"version": "3"}, headers=headers, timeout=60)
    return f"load of version 3: {answer.status_code} {answer.json().get('detail', '')[:200]}".replace(str(stage.models), "model_repository")


def main() -> int:
    """Play it and write what was seen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.incident", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for incident.json, incident.png and incident_dashboard.png")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="model to serve (default: the bundled demo)")
    parser.add_argument("--calm", type=float, default=3.0, help="requests a second in calm times (default 3)")
    parser.add_argument("--overload", type=float, default=60.0, help="more of them during the overload (default 60)")
    parser.add_argument(
        "--image-ms",
        type=float,
        default=IMAGE_MS,
        help=f"simulated time of a device on top of each image's inference (default {IMAGE_MS:g})",
    )
    parser.add_argument("--hold", type=float, default=HOLD, help=f"factor on the rules' `for:` (default {HOLD:g}; 1: as they are)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rates = (options.calm, options.overload)
    with tempfile.TemporaryDirectory() as folder:
        story, series = play(Path(folder), options.repository, rates, image_ms=options.image_ms, hold=options.hold)
    given = {
        "rules_hold": options.hold,
        "simulated_image_ms": options.image_ms,
        "calm_rate": options.calm,
        "overload_rate": options.overload,
    }
    found = {**given, **report(story, series)}
    (options.out / "incident.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(story, series, options.out / "incident.png")
    plot_dashboard(story, series, options.out / "incident_dashboard.png")
    print(json.dumps({name: found[name] for name in ("alerts", "alerts_that_never_fired", "panels_without_data")}, indent=1))
    return 1 if found["alerts_that_never_fired"] or found["panels_without_data"] else 0


if __name__ == "__main__":
    sys.exit(main())
