"""The pieces of the scripted incident: a device that dies on command, a supervisor, and what is made of Prometheus's series."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from service_fakes import FakeRuntime, picture
from service_onnx import write_model

from benchmarks.footprint import cpu_seconds, resident_bytes
from benchmarks.incident import Supervised, copy_models
from benchmarks.incident_exporter import GpuMachine, exported
from benchmarks.incident_report import Story, alert_names, firing_spans, plot, plot_dashboard, report
from benchmarks.incident_service import RUNS_UNTIL_FULL, MortalRuntime
from benchmarks.live import ROOT, Service, free_port, impatient_rules, pointed_at
from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.health import EXIT_DEVICE_LOST


def test_a_mortal_device_answers_until_its_file_says_otherwise(tmp_path: Path) -> None:
    state = tmp_path / "device"
    runtime = MortalRuntime(FakeRuntime(), state, 0.0)
    images, sizes_hw = np.zeros((2, 96, 160, 3), np.uint8), np.array([[90, 60], [60, 90]], np.int64)
    assert len(runtime.run(images, sizes_hw).boxes) == 2
    state.write_text("lost\n")
    with pytest.raises(DeviceLost):
        runtime.run(images, sizes_hw)
    state.write_text("lost 1")
    assert len(runtime.run(images, sizes_hw).boxes) == 2
    with pytest.raises(DeviceLost):
        MortalRuntime(FakeRuntime(), state, 0.0, device=1).run(images, sizes_hw)
    state.write_text("memory")
    outcomes = [_outcome(runtime, images, sizes_hw) for _ in range(RUNS_UNTIL_FULL)]
    assert sorted(outcomes) == ["answered"] * (RUNS_UNTIL_FULL - 1) + ["out of memory"]


def _outcome(runtime: MortalRuntime, images: NDArray[np.uint8], sizes_hw: NDArray[np.int64]) -> str:
    try:
        runtime.run(images, sizes_hw)
    except DeviceOutOfMemory:
        return "out of memory"
    return "answered"


def test_a_service_whose_device_is_lost_leaves_and_is_started_again(tmp_path: Path) -> None:
    write_model(tmp_path / "source", version="7")
    models, state, story, port = copy_models(tmp_path / "source", tmp_path / "models"), tmp_path / "device", Story(), free_port()
    assert [path.relative_to(models).as_posix() for path in sorted(models.rglob("*.onnx"))] == ["blobs/1/model.onnx", "blobs/2/model.onnx"]
    command = [sys.executable, "-m", "benchmarks.incident_service", state, "0"]
    settings = {"model_repository": models, "provider": "cpu", "intra_op_threads": 1, "drain_seconds": 0, "canary_seconds": 0}
    supervised = Supervised(lambda: Service(tmp_path / "log", port=port, command=command, **settings), story)
    try:
        first = supervised.service.until_ready().process.pid
        state.write_text("lost")
        assert httpx.post(f"http://127.0.0.1:{port}/v1/detect", content=picture(), timeout=20).status_code >= 500
        supervised.service.process.wait(30)
        state.write_text("works")
        while supervised.service.process.pid == first:
            supervised._over.wait(0.05)
        supervised.service.until_ready()
    finally:
        supervised.stop()
    assert story.notes[0][1] == f"the service ended with exit code {EXIT_DEVICE_LOST}"


SERIES = {
    "start": 100.0,
    "end": 160.0,
    "charts": {"requests/s": {"offered": [{"metric": {}, "values": [[100.0, "1"], [160.0, "3"]]}]}},
    "panels": [
        {"title": "Lines", "kind": "timeseries", "found": {"{{a}}": [{"metric": {"a": "x"}, "values": [[100.0, "1"], [101.0, "2"]]}]}},
        {"title": "Number", "kind": "stat", "found": {"now": [{"metric": {}, "values": [[100.0, "NaN"]]}]}},
        {"title": "States", "kind": "state-timeline", "found": {"{{a}}": [{"metric": {"a": "x"}, "values": [[100.0, "1"], [130.0, "0"]]}]}},
        {
            "title": "Heat",
            "kind": "heatmap",
            "found": {
                "{{le}}": [
                    {"metric": {"le": "0.5"}, "values": [[100.0, "1"], [130.0, "2"]]},
                    {"metric": {"le": "+Inf"}, "values": [[100.0, "2"], [130.0, "5"]]},
                ]
            },
        },
        {"title": "Nothing", "kind": "timeseries", "found": {"x": []}},
    ],
    "alerts": [
        {"metric": {"alertname": "B", "instance": "x"}, "values": [[120, "1"], [123, "1"], [150, "1"]]},
        {"metric": {"alertname": "B", "instance": "y"}, "values": [[125, "1"], [128, "1"]]},
        {"metric": {"alertname": "A"}, "values": [[110, "1"]]},
    ],
}


def test_spans_join_the_series_of_an_alert_and_count_from_the_start() -> None:
    assert list(firing_spans(SERIES).items()) == [("A", [(110.0, 110.0)]), ("B", [(120.0, 128.0), (150.0, 150.0)])]
    notes = [(102.5, "event"), (104.0, "died"), (108.0, "died"), (112.0, "died"), (120.0, "event")]
    told = report(Story(phases=[("calm ", 101.0)], notes=notes), SERIES)
    assert told["phases"] == [{"name": "calm", "from_s": 1.0}]
    assert told["events"] == [
        {"at_s": 2.5, "text": "event"},
        {"at_s": 4.0, "text": "died", "times": 3, "until_s": 12.0},
        {"at_s": 20.0, "text": "event"},
    ]
    assert told["alerts"]["B"] == [(20, 28), (50, 50)]
    assert told["alerts_that_never_fired"] == sorted(alert_names())
    assert told["panels_without_data"] == ["Number", "Nothing"]


def test_the_plots_draw_every_kind_of_panel(tmp_path: Path) -> None:
    story = Story(phases=[("calm", 100.0), ("overload", 120.0)])
    plot(story, SERIES, tmp_path / "incident.png")
    plot_dashboard(story, SERIES, tmp_path / "dashboard.png")
    for name in ("incident.png", "dashboard.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_the_simulated_gpu_says_what_it_is_and_how_full() -> None:
    machine = GpuMachine()
    machine.use(0.96)
    machine.tick(1.0)
    with exported(machine) as port:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    used, free = (float(values[f'DCGM_FI_DEV_FB_{what}{{Hostname="simulated",gpu="0"}}']) for what in ("USED", "FREE"))
    assert used / (used + free) == pytest.approx(0.96)
    assert float(values['container_cpu_cfs_throttled_periods_total{container="detector",pod="simulated"}']) > 0


def test_impatient_rules_differ_in_nothing_but_how_long_they_wait(tmp_path: Path) -> None:
    copies = {path.name: yaml.safe_load(path.read_text()) for path in impatient_rules(tmp_path, 0.1)}
    for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"):
        ours = yaml.safe_load(path.read_text())
        for rule in (rule for group in ours["groups"] for rule in group["rules"]):
            if "for" in rule:
                rule["for"] = f"{int(rule['for'].removesuffix('m')) * 6}s"
        assert copies[path.name] == ours


def test_the_pointed_configuration_keeps_the_rules_and_looks_at_one_place() -> None:
    configuration = pointed_at(4321, 0.5)
    (job,) = configuration["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("detector", [{"targets": ["127.0.0.1:4321"]}])
    assert configuration["global"]["scrape_interval"] == "500ms"
    assert list(ROOT.glob(str(Path(configuration["rule_files"][0]).relative_to(ROOT))))


def test_a_process_can_be_weighed() -> None:
    with subprocess.Popen([sys.executable, "-c", "x = bytearray(50_000_000); input()"], stdin=subprocess.PIPE) as process:
        while resident_bytes(process.pid) < 50_000_000:
            assert process.poll() is None
        assert resident_bytes(process.pid) < 100_000_000
        assert cpu_seconds(process.pid) < 30
        process.communicate(b"\n")
