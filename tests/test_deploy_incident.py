"""The pieces of the scripted incident: a device that dies on command, a supervisor, and what is made of Prometheus's series."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from service_fakes import FakeRuntime, picture
from service_onnx import write_model

from benchmarks.footprint import cpu_seconds, resident_bytes
from benchmarks.incident import Story, Supervised, copy_models, firing_spans, report
from benchmarks.incident_service import MortalRuntime
from benchmarks.live import ROOT, Service, free_port, pointed_at
from service.device_errors import DeviceLost
from service.health import EXIT_DEVICE_LOST


def test_a_mortal_device_answers_until_its_file_says_otherwise(tmp_path: Path) -> None:
    state = tmp_path / "device"
    runtime = MortalRuntime(FakeRuntime(), state, 0.0)
    images, sizes_hw = np.zeros((2, 96, 160, 3), np.uint8), np.array([[90, 60], [60, 90]], np.int64)
    assert len(runtime.run(images, sizes_hw).boxes) == 2
    state.write_text("lost\n")
    with pytest.raises(DeviceLost):
        runtime.run(images, sizes_hw)


def test_a_service_whose_device_is_lost_leaves_and_is_started_again(tmp_path: Path) -> None:
    write_model(tmp_path / "source", version="7")
    models, state, story, port = copy_models(tmp_path / "source", tmp_path / "models"), tmp_path / "device", Story(), free_port()
    assert [path.relative_to(models).as_posix() for path in models.rglob("*.onnx")] == ["blobs/1/model.onnx"]
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


def test_spans_join_the_series_of_an_alert_and_count_from_the_start() -> None:
    series = {
        "start": 100.0,
        "alerts": [
            {"metric": {"alertname": "B", "instance": "x"}, "values": [[120, "1"], [123, "1"], [150, "1"]]},
            {"metric": {"alertname": "B", "instance": "y"}, "values": [[125, "1"], [128, "1"]]},
            {"metric": {"alertname": "A"}, "values": [[110, "1"]]},
        ],
    }
    assert list(firing_spans(series).items()) == [("A", [(110.0, 110.0)]), ("B", [(120.0, 128.0), (150.0, 150.0)])]
    told = report(Story(phases=[("calm ", 101.0)], notes=[(102.5, "event")]), series)
    assert told["phases"] == [{"name": "calm", "from_s": 1.0}]
    assert told["events"] == [{"at_s": 2.5, "text": "event"}]
    assert told["alerts"]["B"] == [(20, 28), (50, 50)]


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
