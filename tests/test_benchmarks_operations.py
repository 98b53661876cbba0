"""The arithmetic behind the operations' figures: what a scrape costs, what reloads did to requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from service_onnx import write_model

from benchmarks.metrics_cost import Block, evaluate, interval
from benchmarks.reloads import Tally, measure, memory, summary


def test_a_paired_difference_has_its_confidence_interval() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found["high"] - 3.0 == pytest.approx(3.0 - found["low"])
    assert found["high"] == pytest.approx(3.0 + 2.78 * 1.5811 / 5**0.5, abs=1e-3)


def test_a_scrape_costs_what_it_adds_to_the_requests_beside_it() -> None:
    """20 scrapes of 2 ms beside 100 requests a second add 40 ms a second: 0.4 ms a request."""
    pairs = [(Block(100.0, 7.0, 0), Block(100.0, 7.4, 90)) for _ in range(5)]
    found = evaluate(pairs, seconds=4.0)
    assert found["scrapes_a_second_in_a_block"] == 20.0
    assert found["one_scrape_cpu_ms"]["mean"] == pytest.approx(2.0)
    assert found["throughput_lost_to_one_scrape_a_second"]["mean"] == 0.0


def test_lost_throughput_is_that_of_one_scrape_a_second() -> None:
    pairs = [(Block(100.0, 7.0, 0), Block(96.0, 7.0, 90)) for _ in range(5)]
    assert evaluate(pairs, seconds=4.0)["throughput_lost_to_one_scrape_a_second"]["mean"] == pytest.approx(0.002)


def test_everything_but_an_answer_of_a_version_is_a_failed_request() -> None:
    answers = Counter({"version 1": 5, "version 2": 4, "503": 2, "ReadError": 1})
    tally = Tally(answers, latencies_s=[0.01, 0.02, 0.03], reloads=Counter({200: 2}), reload_s=[0.5, 0.7], resident_mb=[100.0, 140.0])
    found = summary(tally)
    assert (found["requests"], found["failed_requests"]) == (12, 3)
    assert found["latency_ms"]["p50"] == 20.0


def test_memory_levels_off_or_grows_to_the_end() -> None:
    """The first third fills caches; what counts is whether it goes on."""
    filled = memory([100, 200, 300, 400, 390, 410, 400, 410, 390])
    assert (filled["after_the_first"], filled["largest"], filled["after_the_last"]) == (100, 410, 390)
    assert filled["medians_of_thirds"] == [200, 400, 400]
    assert filled["levels_off"]
    assert abs(filled["slope_mb_a_reload"]) < 1
    leaking = memory([100.0 + 10 * number for number in range(30)])
    assert leaking["slope_mb_a_reload"] == pytest.approx(10)
    assert not leaking["levels_off"]


@pytest.mark.parametrize(("growth", "levels_off"), [(0.0, True), (1.0, False)])
def test_a_leak_is_told_from_scatter(growth: float, levels_off: bool) -> None:
    scatter = np.random.default_rng(3).uniform(-45, 45, 100)
    found = memory([260 + growth * number + float(noise) for number, noise in enumerate(scatter)])
    assert 0.2 < found["uncertain_mb_a_reload"] < 0.6
    assert found["levels_off"] is levels_off


def test_reloads_of_a_small_model_fail_no_request(tmp_path: Path) -> None:
    write_model(tmp_path, version="4")
    found = measure(tmp_path, reloads=4, clients=2)
    assert found["reloads"] == {200: 4}
    assert found["failed_requests"] == 0
    assert len(found["resident_mb"]["each"]) == 4
    assert found["requests"] > 0
