"""The sizing calculator: against queueing theory where it has an answer, and for what it must never promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sizing import capacity_per_s, main, parse_costs, plan, rate_within, scaling, simulate, simulated_costs
from service.batch_costs import BatchCosts

GPU = BatchCosts(simulated_costs(), 16)


def test_one_server_without_batches_waits_as_long_as_theory_says() -> None:
    service_s, rate = 0.010, 70.0
    load = rate * service_s
    fleet = simulate(BatchCosts({1: service_s}, 1), gpus=1, rate_per_s=rate, images=60_000)
    assert fleet.utilisation == pytest.approx(load, rel=0.03)
    assert fleet.mean_batch == 1
    # Pollaczek and Khinchine, constant service: the mean wait is load * service / (2 * (1 - load))
    assert fleet.mean_ms == pytest.approx(1e3 * (service_s + load * service_s / (2 * (1 - load))), rel=0.05)


def test_an_empty_fleet_answers_in_the_time_of_one_image() -> None:
    fleet = simulate(GPU, gpus=4, rate_per_s=2.0, images=2000)
    assert fleet.p50_ms == pytest.approx(5.5)
    assert fleet.p99_ms < 12
    assert fleet.mean_batch < 1.05


def test_batches_carry_a_load_that_single_images_could_not() -> None:
    assert capacity_per_s(GPU) == pytest.approx(14 / 0.025)
    fleet = simulate(GPU, gpus=1, rate_per_s=400.0, images=20_000)  # single images end at 182 a second
    assert fleet.mean_batch > 2
    assert fleet.p99_ms < 60


def test_rate_within_keeps_the_bound_and_grows_with_it() -> None:
    tight, loose = rate_within(GPU, 30.0), rate_within(GPU, 100.0)
    assert tight < loose < capacity_per_s(GPU)
    assert simulate(GPU, gpus=1, rate_per_s=tight, images=40_000, seed=5).p99_ms < 30.0 * 1.15
    assert simulate(GPU, gpus=1, rate_per_s=tight * 1.1, images=40_000, seed=5).p99_ms > 30.0 * 0.95


def test_a_bound_below_one_image_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"one image alone takes 5\.5 ms"):
        rate_within(GPU, 5.0)
    with pytest.raises(ValueError, match="no room for two images"):
        rate_within(GPU, 5.6)


def test_plan_counts_gpus_spares_cores_and_network() -> None:
    found = plan(GPU, fps=3000, p99_ms=60, spare=0.1, decode_ms=7.0, kilobytes=100)
    assert 0 <= found.gpus + 3000 // -found.per_gpu_per_s <= 1  # rounded up, and one more where the whole fleet needs it
    assert found.spare == 1
    assert found.checked.gpus == found.gpus
    assert found.checked.p99_ms <= 60
    assert found.cores == pytest.approx(3000 * 0.007 / 0.7)
    assert found.gigabits_per_s == pytest.approx(2.4)
    assert plan(GPU, fps=1, p99_ms=60, spare=0.0).spare == 0


def test_better_routing_shortens_the_tail_of_a_fleet() -> None:
    fleets = scaling(GPU, 450.0, fleets=(32,))
    random, two, shared = (fleets[routing][0].p99_ms for routing in ("random", "two", "shared"))
    assert shared < two < random


def test_a_fleet_behind_random_routing_is_many_single_gpus() -> None:
    one = simulate(GPU, gpus=1, rate_per_s=400.0, images=40_000)
    many = simulate(GPU, gpus=64, rate_per_s=64 * 400.0, images=64 * 1000)
    assert many.p99_ms == pytest.approx(one.p99_ms, rel=0.15)
    assert many.utilisation == pytest.approx(one.utilisation, rel=0.05)


def test_costs_are_read_from_the_command_line() -> None:
    assert parse_costs("1=5.5,16=28") == {1: 0.0055, 16: 0.028}
    with pytest.raises(ValueError, match="expected BATCH=MILLISECONDS"):
        parse_costs("1:5.5")


def test_the_command_writes_figures_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plot = tmp_path / "sizing.json", tmp_path / "sizing.svg"
    arguments = [
        "--fps",
        "1000",
        "--p99",
        "60",
        "--costs",
        "1=5.5,16=28",
        "--largest-fleet",
        "4",
        "--json",
        str(figures),
        "--plot",
        str(plot),
    ]
    assert main([*arguments, "--decode-ms", "5", "--kilobytes", "100"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "GPUs, and 1 spare, for 1000 images/s with p99 within 60 ms" in output
    assert "CPU cores" in output
    assert "0.8 Gbit/s" in output
    assert [fleet["gpus"] for fleet in json.loads(figures.read_text())["scaling"]["two"]] == [1, 4]
    assert plot.stat().st_size > 1000
    assert main(["--fps", "1000", "--p99", "1"]) == 2
    assert "no number of GPUs" in capsys.readouterr().out
