"""Pascal VOC's average precision, 11-point and area under the monotone envelope.

Detections of a class are taken by falling score over the whole set; each goes to the box of its picture that it overlaps best, and is
true if that overlap passes the threshold and the box is still free. Difficult boxes and crowds count neither for nor against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.records import DetectionSet
from model.metrics.matching import IGNORED, TRUE, match_detections
from model.metrics.predictions import Prediction

RECALL_POINTS = np.linspace(0.0, 1.0, 11)


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one class, one point a detection, by falling score.

    Attributes:
        recall, precision, scores: float64 [N].
        positives: number of ground-truth boxes that count.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[np.float64]
    positives: int

    @property
    def ap_area(self) -> float:
        """Area under the monotone envelope (VOC 2010 and later); NaN without ground truth."""
        if not self.positives:
            return float("nan")
        recall = np.concatenate([[0.0], self.recall, [1.0]])
        envelope = np.maximum.accumulate(np.concatenate([[0.0], self.precision, [0.0]])[::-1])[::-1]
        return float((np.diff(recall) * envelope[1:]).sum())

    @property
    def ap_11_point(self) -> float:
        """Mean of the best precision at recall >= 0, .1, ..., 1 (VOC 2007); NaN without ground truth."""
        if not self.positives:
            return float("nan")
        return float(np.mean([self.precision[self.recall >= point].max(initial=0.0) for point in RECALL_POINTS]))


def voc_curves(
    dataset: DetectionSet, predictions: Sequence[Prediction], *, iou_thresh: float = 0.5, pixel_offset: float = 0.0
) -> dict[str, Curve]:
    """Precision and recall of every class; ties in score keep the order of the pictures.

    Args:
        pixel_offset: 1 for the official evaluation's inclusive pixels.
    """
    scores, labels, outcomes = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    positives = np.zeros(len(dataset.class_names) + 1, dtype=np.int64)
    for record, prediction in zip(dataset.records, predictions, strict=True):
        matches = match_detections(record, prediction, iou_thresh=iou_thresh, pixel_offset=pixel_offset)
        scores.append(np.asarray(prediction["scores"], np.float64)[matches.order])
        labels.append(np.asarray(prediction["labels"], np.int64)[matches.order])
        outcomes.append(matches.outcome)
        positives += np.bincount(record.labels[record.plain], minlength=len(positives))
    every = np.concatenate(scores), np.concatenate(labels), np.concatenate(outcomes)
    return {name: _class_curve(*every, k, int(positives[k])) for k, name in enumerate(dataset.class_names, start=1)}


def _class_curve(scores: NDArray[np.float64], labels: NDArray[np.int64], outcomes: NDArray[np.int64], label: int, positives: int) -> Curve:
    chosen = (labels == label) & (outcomes != IGNORED)
    return make_curve(scores[chosen], outcomes[chosen] == TRUE, positives)


def make_curve(scores: NDArray[np.float64], hits: NDArray[np.bool_], positives: int) -> Curve:
    """The curve of detections [N], of which `hits` found one of `positives` objects."""
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum(hits[order])
    return Curve(true / max(positives, 1), true / np.arange(1, len(true) + 1), scores[order], positives)
