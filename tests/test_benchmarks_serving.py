"""The comparison of servers: servers start and end whole, give the same answer, and the report reads the least disturbed round."""

from __future__ import annotations

import cProfile
import email
import email.policy
import json
import os
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving_demo
from benchmarks.load_pictures import Picture, draw_pictures
from benchmarks.peers.simulated import LOCK_VARIABLE, SECONDS_A_BATCH, SECONDS_AN_IMAGE, SimulatedDevice
from benchmarks.serving import as_form, decode_limit
from benchmarks.serving_process import ServerMissing, busy_cpu_seconds, serving
from benchmarks.serving_profile import describe
from benchmarks.serving_report import targets, value, write_report

PICTURE = draw_pictures([(480, 640)], per_size=1)[0]


def post(url: str, picture: Picture) -> dict[str, Any]:
    request = urllib.request.Request(url, data=picture.body, headers={"Content-Type": picture.content_type})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_servers_answer_alike_count_their_cpu_and_leave_nothing_behind() -> None:
    answers = {}
    for name in ("ours", "fastapi"):
        with serving(name, PICTURE) as server:
            answers[name] = post(server.url, PICTURE)
            assert server.cpu_seconds() > 0.1
            leader = server.group
        assert not Path(f"/proc/{leader}").exists()
    assert len(answers["fastapi"]["detections"]) == 5
    for key in ("model", "image"):
        assert answers["ours"][key] == answers["fastapi"][key]
    for ours, theirs in zip(answers["ours"]["detections"], answers["fastapi"]["detections"], strict=True):
        assert ours["box"] == pytest.approx(theirs["box"], abs=0.01)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["class"] == theirs["class"]


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ServerMissing, match=r"No module named benchmarks\.peers\.nothing"), serving("nothing", PICTURE):
        pass


def test_the_profile_is_told_by_parts(tmp_path: Path) -> None:
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    for _ in range(50):
        json.dumps({"boxes": list(range(2000))}, indent=1)
    profile.disable()
    profile.dump_stats(tmp_path / "profile")
    text = describe(tmp_path / "profile", 10, request_ms=7.0, decode_ms=5.5)
    assert "7.00 ms CPU a request. Decoding alone takes 5.50 ms, everything else 1.50 ms." in text
    assert "| other libraries |" in text
    assert "json/encoder.py" in text


def test_the_bare_loop_needs_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving_demo.main(["--model-repository", str(tmp_path)])
    assert "holds no <name>/<version>/model.onnx" in capsys.readouterr().err


def test_a_form_holds_the_picture_byte_for_byte() -> None:
    form = as_form(PICTURE, "request")
    message = email.message_from_bytes(b"Content-Type: " + form.content_type.encode() + b"\r\n\r\n" + form.body, policy=email.policy.HTTP)
    (part,) = message.iter_parts()
    assert part.get_payload(decode=True) == PICTURE.body
    assert part.get_filename() == PICTURE.name
    assert part.get_content_type() == "image/jpeg"
    assert part.get_param("name", header="content-disposition") == "request"


def test_the_simulated_device_serves_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK_VARIABLE, str(tmp_path / "device"))
    devices = [SimulatedDevice(), SimulatedDevice()]  # as two processes would open it
    threads = [threading.Thread(target=device.run, args=(4,)) for device in devices for _ in range(2)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - started >= 4 * (SECONDS_A_BATCH + 4 * SECONDS_AN_IMAGE)
    for device in devices:
        device.close()


def test_decoders_alone_are_measured() -> None:
    limit = decode_limit([PICTURE], seconds=0.2)
    assert limit["per_s"] > 5
    assert 0.5 < limit["cpu_ms"] < 100


def test_busy_cpu_of_the_machine_grows_with_work() -> None:
    before, own = busy_cpu_seconds(), time.process_time()
    while time.process_time() < own + 0.2:
        pass
    assert busy_cpu_seconds() - before >= 0.15
    assert os.cpu_count() is not None


def run_of(rate: float, p50: float, *, foreign: float, refused: bool = False) -> dict[str, Any]:
    latency = {"p50": p50, "p99": 2 * p50, "p99.9": 2.5 * p50}
    return {
        "answered_per_s": rate,
        "offered_per_s": rate,
        "latency_ms": latency,
        "refusal_ms": {"p99": 4.0, "max": 9.0} if refused else {},
        "refusals_with_retry_after": 1.0,
        "cpu_ms_a_request": 6.0,
        "foreign_cpus": foreign,
        "curve": [(0.0, p50 / 2), (50.0, p50), (99.0, 2 * p50)],
    }


def measured(server: str, number: int, rate: float, p50: float, foreign: float) -> dict[str, Any]:
    run = run_of(rate, p50, foreign=foreign)
    return {
        "server": server,
        "round": number,
        "decoders": {"per_s": 400.0, "cpu_ms": 5.0, "foreign_cpus": foreign},
        "device": {"per_s": 560.0, "foreign_cpus": 0.0},
        "runs": {"one": run, "many": run, "steady": run, "overload": run_of(0.95 * rate, p50, foreign=foreign, refused=True)},
    }


def report() -> dict[str, Any]:
    return {
        "setup": {
            "date": "2025-06-01T12:00:00+00:00",
            "cpus": 2,
            "load_average": 0.5,
            "python": "3.11",
            "versions": {"fastapi": "1.0", "ray": None},
            "sizes_wh": ["640x480"],
            "mean_kilobytes": 100.0,
            "device": "simulated",
            "rounds": 2,
        },
        "measured": [
            measured("ours", 0, 100.0, 40.0, foreign=1.5),
            measured("ours", 1, 350.0, 10.0, foreign=0.1),
            measured("fastapi", 0, 170.0, 12.0, foreign=0.2),
            measured("fastapi", 1, 90.0, 30.0, foreign=1.0),
        ],
        "missing": {"ray": "No module named 'ray'"},
    }


def test_the_least_disturbed_round_counts() -> None:
    assert value(report(), "ours", "many", "answered_per_s") == 350
    assert value(report(), "fastapi", "many", "answered_per_s") == 170


def test_targets_are_judged_by_the_figures() -> None:
    judged = {what: (round(measured, 3), good) for what, measured, _, good in targets(report())}
    assert judged == {
        "32 clients, images/s, ours over the best peer": (round(350 / 170, 3), True),
        "32 clients, of the lower limit of device and decoders": (0.875, True),
        "one client, p50, ours over plain FastAPI": (0.833, True),
        "open loop at 80 %, p99.9 over p50": (2.5, True),
        "at 200 %, answered of capacity": (0.95, True),
        "at 200 %, slowest refusal, ms": (9.0, True),
        "at 200 %, refusals with Retry-After": (1.0, True),
    }
    slower = report()
    slower["measured"][1]["runs"]["many"]["answered_per_s"] = 200.0
    assert [good for _, _, _, good in targets(slower)][:2] == [False, False]


def test_the_report_names_what_was_left_out(tmp_path: Path) -> None:
    text = write_report(report(), tmp_path)
    assert "Left out: ray: No module named 'ray'" in text
    assert "| ours | 10.0 | 20.0 | 350 |" in text
    assert "| fastapi | 12.0 |" in text
    assert (tmp_path / "serving.md").read_text() == text
    assert (tmp_path / "serving.png").stat().st_size > 1000
