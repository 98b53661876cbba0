"""A candidate version on a share of the traffic: its answers are compared with the given ones and thrown away.

N detections of one image.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
from numpy.typing import NDArray

from service.errors import DetectorError, InferenceFailed, QueueFull, WouldMissDeadline
from service.images import Prepared, prepare_pixels, resized_hw
from service.inference import ImageDetections
from service.metrics import Metrics
from service.repository import ServedVersion
from service.scheduler import Priority, Scheduler

MAX_OUTSTANDING = 32
"""Candidates' images in the queue at once; beyond, images are skipped rather than anybody delayed."""
PATIENCE_S = 10.0
COMPARED_SCORE = 0.5
"""Detections below this are no part of the comparison: nobody is shown them by default."""
SAME_IOU = 0.5
SAME_SCORE = 0.1

logger = logging.getLogger(__name__)


class Shadow:
    """Runs a candidate beside the active version of its name, at low priority, on images that were answered already."""

    def __init__(self, candidate: ServedVersion, share: float, scheduler: Scheduler, metrics: Metrics) -> None:
        self.candidate = candidate
        self._share = share
        self._scheduler = scheduler
        self._metrics = metrics
        self._debt = 0.0
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, served: ServedVersion, prepared: Prepared, given: ImageDetections) -> None:
        """Take the image for comparison if it is its turn. Returns at once."""
        if served.name != self.candidate.name or served is self.candidate:
            return
        self._debt += self._share
        if self._debt < 1.0:
            return
        self._debt -= 1.0
        if len(self._running) >= MAX_OUTSTANDING:
            self._metrics.shadow["skipped"].inc()
            return
        task = asyncio.create_task(self._compare(prepared, given))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, prepared: Prepared, given: ImageDetections) -> None:
        try:
            with self.candidate.lease():
                own = await self._own_frame(prepared)
                outcome = await self._ask(own)
            scale = np.array([prepared.w / own.w, prepared.h / own.h] * 2, np.float32)
            self._metrics.shadow["agree" if agree(given, outcome, scale) else "disagree"].inc()
        except (QueueFull, WouldMissDeadline):
            self._metrics.shadow["skipped"].inc()
        except DetectorError as error:
            self._metrics.shadow["failed"].inc()
            logger.warning("shadow %s failed: %s", self.candidate.reference, error.detail)
        except Exception:
            self._metrics.shadow["failed"].inc()
            logger.exception("shadow %s failed", self.candidate.reference)

    async def _own_frame(self, prepared: Prepared) -> Prepared:
        """The picture in the candidate's input frame: the same pixels where both agree on sizes, else resized once more."""
        spec = self.candidate.manifest.input
        if resized_hw((prepared.h, prepared.w), spec) == (prepared.h, prepared.w) and prepared.bucket in spec.buckets:
            return prepared
        return await asyncio.to_thread(prepare_pixels, prepared.pixels, spec)

    async def _ask(self, prepared: Prepared) -> ImageDetections:
        answer = await self._scheduler.submit(
            self.candidate.lane(prepared.bucket),
            prepared,
            nbytes=prepared.pixels.nbytes,
            deadline=time.monotonic() + PATIENCE_S,
            priority=Priority.LOW,
        )
        if isinstance(answer.result, InferenceFailed):
            raise answer.result
        detections: ImageDetections = answer.result
        return detections

    async def close(self) -> None:
        """Drop what is outstanding."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def agree(given: ImageDetections, candidate: ImageDetections, scale: NDArray[np.float32]) -> bool:
    """Whether both show the same objects: as many, each with a partner of its class, box and score.

    Args:
        scale: from the candidate's boxes to the given ones', per side [4].
    """
    first, second = _shown(given), _shown(candidate)
    if len(first.scores) != len(second.scores):
        return False
    free = list(range(len(second.scores)))
    for box, score, label in zip(first.boxes, first.scores, first.labels, strict=True):
        partner = next(
            (
                i
                for i in free
                if second.labels[i] == label
                and abs(second.scores[i] - score) <= SAME_SCORE
                and iou(box, second.boxes[i] * scale) >= SAME_IOU
            ),
            None,
        )
        if partner is None:
            return False
        free.remove(partner)
    return True


def _shown(detections: ImageDetections) -> ImageDetections:
    count = int(np.count_nonzero(detections.scores >= COMPARED_SCORE))
    return ImageDetections(detections.boxes[:count], detections.scores[:count], detections.labels[:count])


def iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Intersection over union of two boxes xyxy; 0 for empty ones."""
    width, height = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    if width <= 0 or height <= 0:
        return 0.0
    shared = float(width * height)
    areas = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (one, other))
    return shared / (areas - shared)
