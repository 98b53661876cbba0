"""Batch costs: what the table says, what the drift changes, which size is favoured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batch_costs import RATE_TOLERANCE, RUNS_UNTIL_RAISE, BatchCosts

GPU_LIKE = {1: 0.0055, 2: 0.007, 4: 0.010, 8: 0.016, 16: 0.028}  # 4 ms + 1.5 ms an image
CPU_LIKE = {1: 0.030, 2: 0.060, 4: 0.121}  # batching gains nothing


def test_seconds_between_measured_sizes_are_interpolated() -> None:
    costs = BatchCosts(GPU_LIKE, 16)
    assert costs.seconds(0) == 0
    assert costs.seconds(4) == pytest.approx(0.010)
    assert costs.seconds(6) == pytest.approx(0.013)


def test_seconds_beyond_the_table_promise_no_gain() -> None:
    costs = BatchCosts(CPU_LIKE, 8)
    assert costs.seconds(8) == pytest.approx(0.242)


def test_seconds_below_the_smallest_size_are_those_of_the_smallest() -> None:
    assert BatchCosts({4: 0.01}, 4).seconds(2) == pytest.approx(0.01)


def test_favoured_size_is_large_where_batching_pays_and_one_where_it_does_not() -> None:
    gpu, cpu = BatchCosts(GPU_LIKE, 16), BatchCosts(CPU_LIKE, 16)
    assert gpu.favoured(1) == 1
    assert gpu.favoured(5) == 5
    assert gpu.favoured(100) == 14  # 560 images/s, within 2 % of the 571 of a batch of 16
    assert [cpu.favoured(waiting) for waiting in (1, 4, 16)] == [1, 1, 1]


def test_a_step_in_the_costs_is_not_crossed_for_nothing() -> None:
    costs = BatchCosts({1: 0.010, 2: 0.010, 3: 0.030, 4: 0.030}, 4)  # a runtime that pads to 2 and to 4
    assert [costs.favoured(waiting) for waiting in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_drain_seconds_counts_full_batches_and_the_rest() -> None:
    costs = BatchCosts({1: 1.0, 2: 1.5, 4: 2.0}, 4)
    assert costs.drain_seconds(0) == 0
    assert costs.drain_seconds(9) == pytest.approx(2 * 2.0 + 1.0)


def test_drift_follows_slower_runs_and_one_stall_counts_little() -> None:
    costs = BatchCosts(GPU_LIKE, 16)
    costs.observe(1, 1000.0)
    assert costs.drift < 2
    for _ in range(100):
        costs.observe(4, 0.020)
    assert costs.drift == pytest.approx(2.0, rel=0.01)
    assert costs.seconds(16) == pytest.approx(0.056, rel=0.01)
    assert costs.shortest_s == pytest.approx(0.0055)
    assert costs.favoured(16) == 14  # the choice of size is the table's


def test_lowered_limit_holds_for_a_while_and_then_recovers() -> None:
    costs = BatchCosts(GPU_LIKE, 16)
    costs.lower_limit(4)
    assert costs.limit == 4
    assert costs.favoured(100) == 4
    costs.lower_limit(8)
    assert costs.limit == 4, "a higher limit does not undo a lower one"
    for _ in range(RUNS_UNTIL_RAISE):
        costs.observe(4, 0.010)
    assert costs.limit == 8
    for _ in range(3 * RUNS_UNTIL_RAISE):
        costs.observe(4, 0.010)
    assert costs.limit == 16
    costs.lower_limit(0)
    assert costs.limit == 1


@pytest.mark.parametrize(
    ("measured", "max_batch_size"),
    [({}, 4), ({0: 0.1}, 4), ({1: 0.0}, 4), ({1: float("nan")}, 4), ({1: float("inf")}, 4), ({1: 0.1}, 0)],
)
def test_an_unusable_table_is_refused(measured: dict[int, float], max_batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"cost table|max_batch_size"):
        BatchCosts(measured, max_batch_size)


@given(
    table=st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10.0), min_size=1),
    max_batch_size=st.integers(1, 48),
    waiting=st.integers(1, 100),
)
def test_favoured_size_fits_and_is_nearly_the_best_rate(table: dict[int, float], max_batch_size: int, waiting: int) -> None:
    costs = BatchCosts(table, max_batch_size)
    size = costs.favoured(waiting)
    assert 1 <= size <= min(waiting, max_batch_size)
    best = max(other / costs.seconds(other) for other in range(1, min(waiting, max_batch_size) + 1))
    assert size / costs.seconds(size) >= RATE_TOLERANCE * best * (1 - 1e-9)
