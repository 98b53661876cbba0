"""Which detection finds which object, once for every metric that needs to know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.records import Record
from model.metrics.predictions import Prediction, pairwise_iou

TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Matches:
    """Detections of one picture by falling score, N of them, against its G boxes.

    Attributes:
        order: int [N], positions in the prediction.
        overlaps: float64 [N, G], IoU in this order.
        outcome: int [N], TRUE, FALSE or IGNORED (it met a difficult box or a crowd).
        found: int [N], the box that a TRUE detection found, else -1.
    """

    order: NDArray[np.intp]
    overlaps: NDArray[np.float64]
    outcome: NDArray[np.int64]
    found: NDArray[np.int64]


def match_detections(
    record: Record, prediction: Prediction, *, iou_thresh: float, pixel_offset: float = 0.0, by_class: bool = True
) -> Matches:
    """VOC's rule: by falling score, each detection goes to the box that it overlaps best, and finds it if that box is still free.

    Args:
        iou_thresh: the overlap must be larger than this.
        pixel_offset: 1 for inclusive pixels.
        by_class: boxes of other classes are out of reach.
    """
    order = np.argsort(-np.asarray(prediction["scores"]), kind="stable")
    overlaps = pairwise_iou(np.asarray(prediction["boxes"])[order], record.boxes, pixel_offset=pixel_offset)
    reach = overlaps
    if by_class:
        reach = np.where(np.asarray(prediction["labels"])[order][:, None] == record.labels[None, :], overlaps, -1.0)
    outcome, found = np.full(len(order), FALSE), np.full(len(order), -1)
    used = np.zeros(len(record.boxes), dtype=bool)
    for n in range(len(order) if len(record.boxes) else 0):
        best = int(reach[n].argmax())
        if reach[n, best] <= iou_thresh:
            continue
        if not record.plain[best]:
            outcome[n] = IGNORED
        elif not used[best]:
            outcome[n], found[n], used[best] = TRUE, best, True
    return Matches(order, overlaps, outcome, found)
