"""What every metric takes: one `Prediction` a picture, in the order of the data set's records."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class Prediction(TypedDict):
    """Detections of one picture: boxes float [N, 4] xyxy in the original frame, scores float [N], labels int [N] in 1..K."""

    boxes: NDArray[np.floating]
    scores: NDArray[np.floating]
    labels: NDArray[np.integer]


def empty_prediction() -> Prediction:
    return Prediction(boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32), labels=np.zeros(0, np.int64))


def pairwise_iou(
    boxes: NDArray[np.floating], others: NDArray[np.floating], *, crowd: NDArray[np.bool_] | None = None, pixel_offset: float = 0.0
) -> NDArray[np.float64]:
    """Intersection over union of boxes [N, 4] with others [M, 4]: float64 [N, M].

    Args:
        crowd: bool [M]; against a crowd region the intersection is divided by the area of the box alone, as COCO does.
        pixel_offset: 1 for boxes that name their first and last pixel (official VOC evaluation).
    """
    a, b = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(others, np.float64).reshape(-1, 4)
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (bottom_right - top_left + pixel_offset).clip(0).prod(axis=-1)
    area_a = (a[:, 2:] - a[:, :2] + pixel_offset).prod(axis=1)[:, None]
    area_b = (b[:, 2:] - b[:, :2] + pixel_offset).prod(axis=1)[None, :]
    union = area_a + area_b - shared
    if crowd is not None:
        union = np.where(crowd[None, :], area_a, union)
    overlaps: NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlaps
