"""One batch on one device: assemble, run, split. Called on the device's thread by the scheduler.

B images, D detections a row can hold, N detections of one image.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed
from service.images import Prepared, assemble
from service.loading import LoadedVersion
from service.metrics import Metrics
from service.runtime import Detections, OnnxRuntime
from service.scheduler import Assemble, Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """One image's detections, best first, boxes [N, 4] xyxy in the input frame."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]  # [N]
    labels: NDArray[np.int64]  # [N], 1..K


@dataclass(frozen=True, slots=True)
class Assembled:
    """A batch as the runtime takes it: images [B, H, W, 3] and their sizes [B, 2]."""

    images: NDArray[np.uint8]
    image_sizes_hw: NDArray[np.int64]


def make_steps(loaded: LoadedVersion, metrics: Metrics) -> tuple[Assemble, Run]:
    """The two callables by which the scheduler runs batches of this version."""

    def join(device: int, items: Sequence[Prepared]) -> Assembled:
        started = time.perf_counter()
        runtime = loaded.runtimes[device]
        images, image_sizes_hw = assemble(items, runtime.input_buffer if isinstance(runtime, OnnxRuntime) else None)
        metrics.stage_seconds["assemble"].observe(time.perf_counter() - started)
        metrics.batch_padding_ratio.observe(1.0 - float(image_sizes_hw.prod(axis=1).sum()) / (images.size / 3))
        return Assembled(images, image_sizes_hw)

    def run(device: int, batch: Assembled) -> list[ImageDetections | InferenceFailed]:
        started = time.perf_counter()
        detections = loaded.runtimes[device].run(batch.images, batch.image_sizes_hw)
        metrics.stage_seconds["infer"].observe(time.perf_counter() - started)
        results = split(detections, len(batch.images))
        bad = sum(isinstance(result, InferenceFailed) for result in results)
        if bad:
            metrics.device_errors["bad_output"].inc(bad)
            logger.error("%s@%s gave numbers that are no detections for %d of %d images", loaded.name, loaded.version, bad, len(results))
        return results

    return join, run


def split(detections: Detections, count: int) -> list[ImageDetections | InferenceFailed]:
    """Cut a batch into images. An image with a NaN, an infinity or an impossible count becomes the error that its request gets.

    Raises:
        ValueError: the runtime answered for another number of images.
    """
    boxes, scores, labels, num_detections = detections
    if not len(boxes) == len(scores) == len(labels) == len(num_detections) == count:
        raise ValueError(f"the runtime answered for {len(num_detections)} images instead of {count}")
    finite = np.isfinite(boxes).all(axis=(1, 2)) & np.isfinite(scores).all(axis=1)  # [B]
    usable = (finite & (num_detections >= 0) & (num_detections <= scores.shape[1])).tolist()
    results: list[ImageDetections | InferenceFailed] = []
    for i in range(count):
        if usable[i]:
            n = int(num_detections[i])
            results.append(ImageDetections(boxes[i, :n], scores[i, :n], labels[i, :n]))
        else:
            results.append(InferenceFailed("the model gave numbers that are no detections for this image; try another image or version"))
    return results
