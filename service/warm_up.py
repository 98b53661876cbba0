"""Before a version serves: what a batch costs, and on devices that prepare themselves for each shape, every shape once.

H W a bucket's size; sizes of batches are 1, 2, 4, ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from service.manifest import Bucket
from service.runtime import CostTable, Runtime

WORTHWHILE = 0.95
"""A larger batch must cost less than this share of the best time an image so far."""
TIMED_RUNS = 3
LONG_RUN_S = 0.03
"""A run that takes longer is timed once: the scheduler follows the real times anyway, and a start should take seconds."""
LONGEST_RUN_S = 1.0
"""No larger batch is tried after one that took longer: nobody wants to wait for it."""


def warm_up(runtime: Runtime, max_batch_size: int) -> CostTable:
    """Seconds of a batch for every bucket.

    A GPU searches algorithms, allocates and records at the first run of a shape, so there every bucket and size is run now. A CPU treats
    a new shape like an old one: there only the smallest and the largest bucket are run, and the rest is reckoned from their areas. That
    is a second of a start instead of many; the scheduler's estimates follow the real times from the first batch on.
    """
    if runtime.provider == "cpu":
        return _reckon(runtime, max_batch_size)
    buckets = runtime.manifest.input.buckets
    return {(bucket, size): seconds for bucket in buckets for size, seconds in _batch_times(runtime, bucket, max_batch_size)}


def _reckon(runtime: Runtime, max_batch_size: int) -> CostTable:
    """Batches from the smallest bucket; the other buckets by their area, on the line through the smallest's and the largest's one image."""
    buckets = runtime.manifest.input.buckets
    small, large = min(buckets, key=_area), max(buckets, key=_area)
    times = dict(_batch_times(runtime, small, max_batch_size))
    growth = 0.0
    if _area(large) > _area(small):
        one_large_s = _timed_run(runtime, *_grey(large, 1))  # the batches before it made room enough
        growth = max(0.0, one_large_s / times[1] - 1) / (_area(large) - _area(small))
    return {
        (bucket, size): seconds * (1 + growth * (_area(bucket) - _area(small))) for bucket in buckets for size, seconds in times.items()
    }


def _area(bucket: Bucket) -> int:
    return bucket[0] * bucket[1]


def _batch_times(runtime: Runtime, bucket: Bucket, max_batch_size: int) -> Iterator[tuple[int, float]]:
    """(size, seconds) up to the size at which a doubling brought nothing an image: larger batches would only add latency."""
    best, size = float("inf"), 1
    while size <= max_batch_size:
        seconds = _fastest(runtime, bucket, size)
        yield size, seconds
        if seconds / size > WORTHWHILE * best or seconds > LONGEST_RUN_S:
            return
        best, size = seconds / size, 2 * size


def _fastest(runtime: Runtime, bucket: Bucket, size: int) -> float:
    """Seconds of one run, after one that pays for allocation and algorithm search."""
    images, sizes_hw = _grey(bucket, size)
    runtime.run(images, sizes_hw)
    times: list[float] = []
    while not times or (len(times) < TIMED_RUNS and times[0] < LONG_RUN_S):
        times.append(_timed_run(runtime, images, sizes_hw))
    return min(times)


def _timed_run(runtime: Runtime, images: NDArray[np.uint8], sizes_hw: NDArray[np.int64]) -> float:
    started = time.perf_counter()
    runtime.run(images, sizes_hw)
    return time.perf_counter() - started


def _grey(bucket: Bucket, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A batch [size, H, W, 3] of grey pictures that fill their bucket, and their sizes [size, 2].

    The graph has fixed numbers of proposals, so grey costs what a photograph full of cells does: 111 against 113 ms with the demo.
    """
    return np.full((size, *bucket, 3), 114, np.uint8), np.tile(np.array([bucket], np.int64), (size, 1))
