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
from model.metrics.predictions import Prediction, pairwise_iou

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
    """Precision and recall of every class.

    Args:
        pixel_offset: 1 for the official evaluation's inclusive pixels.
    """
    return {
        name: class_curve(dataset, predictions, label, iou_thresh=iou_thresh, pixel_offset=pixel_offset)
        for label, name in enumerate(dataset.class_names, start=1)
    }


def class_curve(
    dataset: DetectionSet, predictions: Sequence[Prediction], label: int, *, iou_thresh: float = 0.5, pixel_offset: float = 0.0
) -> Curve:
    """Precision and recall of one class; ties in score keep the order of the pictures."""
    scores, hits = [], []
    positives = 0
    for record, prediction in zip(dataset.records, predictions, strict=True):
        truth = record.labels == label
        chosen = prediction["labels"] == label
        order = np.argsort(-prediction["scores"][chosen], kind="stable")
        overlaps = pairwise_iou(prediction["boxes"][chosen][order], record.boxes[truth], pixel_offset=pixel_offset)
        scores.append(np.asarray(prediction["scores"][chosen][order], np.float64))
        hits.append(_match(overlaps, record.plain[truth], iou_thresh))
        positives += int(record.plain[truth].sum())
    return _curve(np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0), *hits]), positives)


def _match(overlaps: NDArray[np.float64], counts: NDArray[np.bool_], iou_thresh: float) -> NDArray[np.float64]:
    """1 true, 0 false, NaN ignored, for detections by falling score: overlaps [N, G], counts bool [G] -> [N]."""
    hits = np.zeros(len(overlaps))
    if not len(counts):
        return hits
    used = np.zeros(len(counts), dtype=bool)
    for n, best in enumerate(overlaps.argmax(axis=1)):
        if overlaps[n, best] <= iou_thresh:
            continue
        hits[n] = np.nan if not counts[best] else float(not used[best])
        used[best] = True
    return hits


def _curve(scores: NDArray[np.float64], hits: NDArray[np.float64], positives: int) -> Curve:
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(hits[order])]
    true = np.cumsum(hits[order])
    recall = true / max(positives, 1)
    return Curve(recall, true / np.arange(1, len(true) + 1), scores[order], positives)
