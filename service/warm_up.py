"""Before a version serves: what a batch costs, and on devices that prepare themselves for each shape, every shape once.

H W a bucket's size, B images of a batch.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.binding import full_size
from service.device_calls import Place, here
from service.device_errors import DeviceOutOfMemory
from service.golden import GOLDEN_LIMITS
from service.images import prepare
from service.manifest import Bucket, Manifest
from service.runtime import CostTable, Runtime, RuntimeLoadError

WORTHWHILE = 0.95
"""A larger batch must cost less than this share of the best time an image so far."""
TIMED_RUNS = 3
LONG_RUN_S = 0.03
"""A run that takes longer is timed once: the scheduler follows the real times anyway, and a start should take seconds."""
LONGEST_RUN_S = 1.0
"""No larger batch is tried after one that took longer: nobody wants to wait for it."""

logger = logging.getLogger(__name__)


def warm_up(runtime: Runtime, max_batch_size: int, place: Place = here, *, fills_up: bool = False) -> CostTable:
    """Seconds of a batch for every bucket.

    A GPU searches algorithms, allocates and records at the first run of a shape, so there every shape that may come is run now: each
    bucket with 1, 2, 4, ... images and `max_batch_size`. A CPU treats a new shape like an old one: there only the smallest and the
    largest bucket are run, and the rest is reckoned from their areas. That is a second of a start instead of many; the scheduler's
    estimates follow the real times from the first batch on.

    Args:
        max_batch_size: no batch is ever larger.
        place: where it runs, shape by shape, so that others get a turn between.
        fills_up: the runtime was told `max_batch_size` and fills batches between these sizes up to the next: the table charges them that.

    Raises:
        RuntimeLoadError: not even one picture fits into the device's memory. Where several do not, the table ends before them.
    """
    trial = _Trial(runtime, max_batch_size, place)
    try:
        table = trial.reckon() if runtime.provider == "cpu" else trial.measure()
    except DeviceOutOfMemory as error:
        raise RuntimeLoadError(
            f"model {runtime.manifest.name}: one picture does not fit into the device's memory ({error}); "
            "raise DETECTOR_GPU_MEMORY_LIMIT_BYTES if it is set, or make room on the device"
        ) from error
    return _charge_as_filled(table, max_batch_size) if fills_up else table


class _Trial:
    """Batches of one picture, timed."""

    def __init__(self, runtime: Runtime, max_batch_size: int, place: Place) -> None:
        self._runtime = runtime
        self._place = place
        self._max_batch_size = max_batch_size
        self._buckets = runtime.manifest.input.buckets
        self._picture = telling_picture(runtime.manifest)

    def measure(self) -> CostTable:
        """Every bucket by itself."""
        return {(bucket, size): seconds for bucket in self._buckets for size, seconds in self._batch_times(bucket)}

    def reckon(self) -> CostTable:
        """Batches from the smallest bucket; the others by their area, on the line through the smallest's and the largest's one image."""
        small, large = min(self._buckets, key=_area), max(self._buckets, key=_area)
        times = dict(self._batch_times(small))
        growth = 0.0
        if _area(large) > _area(small):
            one_large_s = self._place(partial(self._timed_run, *self._batch(large, 1)))  # the batches before it made room enough
            growth = max(0.0, one_large_s / times[1] - 1) / (_area(large) - _area(small))
        return {
            (bucket, size): seconds * (1 + growth * (_area(bucket) - _area(small)))
            for bucket in self._buckets
            for size, seconds in times.items()
        }

    def _batch_times(self, bucket: Bucket) -> Iterator[tuple[int, float]]:
        """(size, seconds) up to the size at which a larger batch brought nothing an image: more would only add latency."""
        best = float("inf")
        for size in sorted({full_size(size, self._max_batch_size) for size in range(1, self._max_batch_size + 1)}):
            try:
                seconds = self._place(partial(self._fastest, bucket, size))
            except DeviceOutOfMemory as error:
                if size == 1:
                    raise
                height, width = bucket
                logger.warning("%d pictures of %dx%d do not fit into the device's memory, fewer are run: %s", size, height, width, error)
                return
            yield size, seconds
            if seconds / size > WORTHWHILE * best or seconds > LONGEST_RUN_S:
                return
            best = seconds / size

    def _fastest(self, bucket: Bucket, size: int) -> float:
        """Seconds of one run, after one that pays for allocation and algorithm search."""
        images, sizes_hw = self._batch(bucket, size)
        self._runtime.run(images, sizes_hw)
        times: list[float] = []
        while not times or (len(times) < TIMED_RUNS and times[0] < LONG_RUN_S):
            times.append(self._timed_run(images, sizes_hw))
        return min(times)

    def _timed_run(self, images: NDArray[np.uint8], sizes_hw: NDArray[np.int64]) -> float:
        started = time.perf_counter()
        self._runtime.run(images, sizes_hw)
        return time.perf_counter() - started

    def _batch(self, bucket: Bucket, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """A batch [B, H, W, 3] of pictures that fill their bucket, and their sizes [B, 2]."""
        height, width = bucket
        down, across = -(-height // self._picture.shape[0]), -(-width // self._picture.shape[1])
        filled = np.tile(self._picture, (down, across, 1))[:height, :width]
        return np.repeat(filled[None], size, axis=0), np.tile(np.array([bucket], np.int64), (size, 1))


def telling_picture(manifest: Manifest) -> NDArray[np.uint8]:
    """A picture [h, w, 3] in which the network has something to do: the first golden one, or noise where the file has none.

    A network that drops proposals by their score, and a graph whose head looks only at those that are left, would answer an even
    picture sooner than any photograph.
    """
    if manifest.golden:
        return prepare(base64.b64decode(manifest.golden[0].image), manifest.input, GOLDEN_LIMITS).pixels
    return np.random.default_rng(0).integers(0, 256, (*manifest.input.buckets[0], 3), np.uint8)


def _charge_as_filled(table: CostTable, max_batch_size: int) -> CostTable:
    """A table of every size up to a bucket's largest: a size that was not run costs what it is filled up to."""
    filled = (
        (bucket, size, full_size(size, max_batch_size)) for bucket in {known for known, _ in table} for size in range(1, max_batch_size + 1)
    )
    return {(bucket, size): table[bucket, full] for bucket, size, full in filled if (bucket, full) in table}


def _area(bucket: Bucket) -> int:
    return bucket[0] * bucket[1]
