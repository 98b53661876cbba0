"""Why average precision is lost: kinds of error and what each costs, and which classes are taken for which.

The kinds are those of TIDE (Bolya et al. 2020), at IoU .5 for a hit and .1 for touching an object at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.records import DetectionSet, Record
from model.metrics.matching import FALSE, IGNORED, TRUE, Matches, match_detections
from model.metrics.predictions import Prediction
from model.metrics.voc import make_curve

HIT_IOU, TOUCH_IOU = 0.5, 0.1
KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
"""Wrong class on the right place; right class on the wrong place; both wrong; a second find of one object; nothing there; not found."""

CONFUSION_SCORE = 0.5


@dataclass(frozen=True)
class ErrorBreakdown:
    """Kinds of error over a data set.

    Attributes:
        counts: how many there are among all detections, however low their score.
        ap_cost: what AP at IoU .5 (area, mean over classes) gains if the kind alone were mended.
        confusion: int64 [K + 1, K + 1]; rows truth, columns detections over CONFUSION_SCORE; the last row and column are the background.
    """

    counts: dict[str, int]
    ap_cost: dict[str, float]
    confusion: NDArray[np.int64]


@dataclass
class _Judged:
    """All detections of a data set: label, score, outcome, kind of error (-1: none), and the global number of the box it is about."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    outcome: NDArray[np.int64]
    kind: NDArray[np.int64]
    box: NDArray[np.int64]


def break_down(dataset: DetectionSet, predictions: Sequence[Prediction]) -> ErrorBreakdown:
    """Sorts every false detection and every missed object into kinds."""
    parts: list[_Judged] = []
    truth_labels: list[NDArray[np.int64]] = []
    counting: list[NDArray[np.bool_]] = []
    first = 0
    for record, prediction in zip(dataset.records, predictions, strict=True):
        parts.append(_judge(record, prediction, first))
        truth_labels.append(record.labels)
        counting.append(record.plain)
        first += len(record.labels)
    fields = ("labels", "scores", "outcome", "kind", "box")
    judged = _Judged(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
    labels, counts = np.concatenate(truth_labels), np.concatenate(counting)
    found = np.zeros(len(labels), dtype=bool)
    found[judged.box[judged.outcome == TRUE]] = True
    touched = np.zeros(len(labels), dtype=bool)
    touched[judged.box[(judged.kind == KINDS.index("class")) | (judged.kind == KINDS.index("localisation"))]] = True
    missed = counts & ~found & ~touched
    numbers = {kind: int((judged.kind == k).sum()) for k, kind in enumerate(KINDS)} | {"missed": int(missed.sum())}
    cost = _costs(judged, labels, counts, found, missed, len(dataset.class_names))
    return ErrorBreakdown(numbers, cost, confusion_matrix(dataset, predictions))


def _judge(record: Record, prediction: Prediction, first: int) -> _Judged:
    matches = match_detections(record, prediction, iou_thresh=HIT_IOU)
    labels = np.asarray(prediction["labels"], np.int64)[matches.order]
    kind, box = np.full(len(labels), -1), np.full(len(labels), -1)
    for n in np.flatnonzero(matches.outcome == FALSE):
        kind[n], box[n] = _false_kind(record, matches, int(labels[n]), int(n))
    hits = matches.outcome == TRUE
    box[hits] = matches.found[hits]
    scores = np.asarray(prediction["scores"], np.float64)[matches.order]
    return _Judged(labels, scores, matches.outcome, kind, np.where(box >= 0, box + first, -1))


def _false_kind(record: Record, matches: Matches, label: int, n: int) -> tuple[int, int]:
    same = np.where(record.labels == label, matches.overlaps[n], 0.0)
    other = np.where(record.labels != label, matches.overlaps[n], 0.0)
    best_same, best_other = (float(values.max(initial=0.0)) for values in (same, other))
    if best_same > HIT_IOU:
        return KINDS.index("duplicate"), int(same.argmax())
    if best_other > HIT_IOU:
        return KINDS.index("class"), int(other.argmax())
    if best_same > TOUCH_IOU:
        return KINDS.index("localisation"), int(same.argmax())
    if best_other > TOUCH_IOU:
        return KINDS.index("both"), int(other.argmax())
    return KINDS.index("background"), -1


def _costs(
    judged: _Judged, labels: NDArray[np.int64], counts: NDArray[np.bool_], found: NDArray[np.bool_], missed: NDArray[np.bool_], classes: int
) -> dict[str, float]:
    plain = _mean_ap(judged.labels, judged.scores, judged.outcome, np.bincount(labels[counts], minlength=classes + 1))
    costs = {}
    for k, kind in enumerate(KINDS):
        positives = np.bincount(labels[counts & ~missed] if kind == "missed" else labels[counts], minlength=classes + 1)
        fixed_labels, outcome = judged.labels, judged.outcome
        if kind != "missed":
            fixed_labels, outcome = _mend(judged, k, labels, found, counts)
        costs[kind] = _mean_ap(fixed_labels, judged.scores, outcome, positives) - plain
    return costs


def _mend(
    judged: _Judged, kind: int, labels: NDArray[np.int64], found: NDArray[np.bool_], counts: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels and outcomes as if a kind did not occur: wrong class or place becomes a find of a free box, everything else goes."""
    fixed_labels, outcome = judged.labels.copy(), judged.outcome.copy()
    free = counts & ~found
    for n in np.flatnonzero(judged.kind == kind)[np.argsort(-judged.scores[judged.kind == kind], kind="stable")]:
        outcome[n] = IGNORED
        box = judged.box[n]
        if KINDS[kind] in ("class", "localisation") and free[box]:
            outcome[n], fixed_labels[n], free[box] = TRUE, labels[box], False
    return fixed_labels, outcome


def _mean_ap(labels: NDArray[np.int64], scores: NDArray[np.float64], outcome: NDArray[np.int64], positives: NDArray[np.int64]) -> float:
    values = []
    for k in np.flatnonzero(positives):
        chosen = (labels == k) & (outcome != IGNORED)
        values.append(make_curve(scores[chosen], outcome[chosen] == TRUE, int(positives[k])).ap_area)
    return float(np.mean(values)) if values else 0.0


def confusion_matrix(
    dataset: DetectionSet, predictions: Sequence[Prediction], *, score_thresh: float = CONFUSION_SCORE
) -> NDArray[np.int64]:
    """Which class is taken for which: each detection over the threshold finds the box that it overlaps best, whatever its class.

    Returns:
        int64 [K + 1, K + 1]; rows truth, columns detections, the last of both the background.
    """
    background = len(dataset.class_names)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for record, prediction in zip(dataset.records, predictions, strict=True):
        kept = np.asarray(prediction["scores"]) >= score_thresh
        sure = Prediction(boxes=prediction["boxes"][kept], scores=prediction["scores"][kept], labels=prediction["labels"][kept])
        matches = match_detections(record, sure, iou_thresh=HIT_IOU, by_class=False)
        columns = np.asarray(sure["labels"], np.int64)[matches.order] - 1
        hits = matches.outcome == TRUE
        np.add.at(matrix, (record.labels[matches.found[hits]] - 1, columns[hits]), 1)
        np.add.at(matrix, (background, columns[matches.outcome == FALSE]), 1)
        lost = np.setdiff1d(np.flatnonzero(record.plain), matches.found[hits])
        np.add.at(matrix, (record.labels[lost] - 1, background), 1)
    return matrix
