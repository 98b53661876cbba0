"""Every kind of client at once: a few seconds of what `make soak` does for half an hour; and how that is judged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from service_onnx import write_model

from benchmarks.soak import measure
from benchmarks.soak_report import draw_report, judge_memory, summary

MINUTE = 60.0


def judged(*, good: dict[str, int] | None = None, growth_mb_an_hour: float = 0.0, slower: float = 1.0, minutes: int = 30) -> dict[str, Any]:
    """A run whose memory fills up in its first tenth and then grows; its latency rises to a multiple."""
    answers = {
        "good": Counter(good or {"200": 500}),
        "bad": Counter({"415": 3, "400": 2}),
        "slow": Counter(),
        "reload": Counter({"200": 9}),
    }
    moments = [minutes * MINUTE * i / 200 for i in range(200)]
    resident = [(at, 200.0 + 10 * min(1.0, i / 20) + growth_mb_an_hour * at / 3600) for i, at in enumerate(moments)]
    latency = [(at, 0.05 * (1 + (slower - 1) * i / 200)) for i, at in enumerate(moments)]
    return summary(answers, 4, latency, resident)


def test_a_run_without_fault_has_none(tmp_path: Path) -> None:
    found = judged()
    assert found["faults"] == []
    assert found["resident_mb"]["slope_mb_an_hour"] == pytest.approx(0, abs=1e-6)
    assert found["latency_ms"] == {"p50": 50.0, "p99": 50.0, "last_over_first": 1.0, "p50_slope_ms_an_hour": pytest.approx(0, abs=1e-6)}
    draw_report(found, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"good": {"200": 500, "503": 2}}, "good clients got 2 times 503"),
        ({"good": {"ReadError": 1, "200": 3}}, "good clients got 1 times ReadError"),
        ({"growth_mb_an_hour": 60.0}, "resident memory grew by 19.8"),
        ({"slower": 3.0}, "median latency rose to"),
    ],
)
def test_what_should_not_be_is_a_fault_in_words(run: dict[str, Any], words: str) -> None:
    (fault,) = judged(**run)["faults"]
    assert words in fault


def test_the_slope_is_of_what_follows_the_first_third() -> None:
    found = judge_memory([(0.0, 10.0), (300.0, 300.0), (1200.0, 300.0), (2400.0, 310.0), (3600.0, 320.0)])
    assert found["slope_mb_an_hour"] == pytest.approx(30)
    assert found["growth_mb"] == pytest.approx(20, abs=0.1)


def test_a_few_seconds_of_everything_at_once(tmp_path: Path) -> None:
    write_model(tmp_path, version="1")
    lines: list[str] = []
    found = measure(tmp_path, 0.1, lines.append)
    assert [fault for fault in found["faults"] if "clients got" in fault] == []
    assert found["exit_code"] == 0
    assert found["answers"]["good"]["200"] > 0
    assert found["vanished"] > 0
    assert found["resident_mb"]["samples"] > 0
    assert "resident" in lines[-1]
