"""Recall of proposals: how many objects are covered, before any class is decided.

P proposals of a picture, best first; G its boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.data.records import DetectionSet
from model.metrics.predictions import pairwise_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)

AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0, float("inf")),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, float("inf")),
    "96-128": (96**2, 128**2),
    "128-256": (128**2, 256**2),
    "256-512": (256**2, 512**2),
    "512-inf": (512**2, float("inf")),
}
"""Areas in square pixels of the original frame: COCO's three, then the ranges of the Faster R-CNN release."""


def covered_overlaps(boxes: NDArray[np.floating], proposals: NDArray[np.floating]) -> NDArray[np.float64]:
    """The IoU that each box gets, one proposal a box: the best pair of all is taken first, then the best of the rest.

    Args:
        boxes: [G, 4].  proposals: [P, 4].

    Returns:
        float64 [G]; 0 where no proposal is left.
    """
    overlaps = pairwise_iou(proposals, boxes)  # [P, G]
    got = np.zeros(len(boxes))
    for _ in range(min(overlaps.shape)):
        p, g = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        if overlaps[p, g] < 0:
            break
        got[g] = overlaps[p, g]
        overlaps[p, :] = overlaps[:, g] = -1.0
    return got


def proposal_recall(
    dataset: DetectionSet, proposals: Sequence[NDArray[np.floating]], *, top_n: Sequence[int] = (100, 300, 1000)
) -> dict[int, dict[str, dict[str, float]]]:
    """Recall and average recall of the best N proposals of each picture, by area of the objects.

    Args:
        proposals: one array [P, 4] a record, original frame, best first.

    Returns:
        N -> area -> {"AR": mean over IoU .5:.05:.95, "recall_50", "recall_75", "objects"}; NaN where there are no objects.
    """
    areas = np.concatenate([record.areas[record.plain] for record in dataset.records])
    result = {}
    for limit in top_n:
        pairs = zip(dataset.records, proposals, strict=True)
        got = np.concatenate([covered_overlaps(record.boxes[record.plain], boxes[:limit]) for record, boxes in pairs])
        result[limit] = {
            name: _numbers(got[(areas >= low) & (areas < high if np.isfinite(high) else True)]) for name, (low, high) in AREA_RANGES.items()
        }
    return result


def _numbers(overlaps: NDArray[np.float64]) -> dict[str, float]:
    if not overlaps.size:
        return {"AR": float("nan"), "recall_50": float("nan"), "recall_75": float("nan"), "objects": 0}
    # thresholds from linspace carry rounding; an overlap that equals one counts
    recalls = [(overlaps >= threshold - 1e-12).mean() for threshold in THRESHOLDS]
    return {"AR": float(np.mean(recalls)), "recall_50": float(recalls[0]), "recall_75": float(recalls[5]), "objects": int(overlaps.size)}
