"""COCO's average precision and recall, computed by pycocotools itself."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.data.records import DetectionSet
from model.metrics.predictions import Prediction

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
"""pycocotools' twelve numbers in its order; -1 where there is no ground truth of that size."""

AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class CocoResult:
    """The twelve numbers, and per class name: AP over all thresholds and by size, AP50, AR at 100. -1: no ground truth."""

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]


class _Evaluation(COCOeval):  # type: ignore[misc]
    """pycocotools overwrites `ignore` with `iscrowd`; objects marked difficult are ignored too, by their ordinary IoU."""

    def _prepare(self) -> None:
        super()._prepare()
        for boxes in self._gts.values():
            for box in boxes:
                box["ignore"] = int(box["ignore"] or box["difficult"])


def coco_evaluate(dataset: DetectionSet, predictions: Sequence[Prediction]) -> CocoResult:
    """Evaluates boxes as COCO does: IoU .50:.05:.95, at most 100 detections a picture.

    Args:
        predictions: one a record, in the records' order.

    Raises:
        ValueError: not one prediction a record.
    """
    if len(predictions) != len(dataset):
        raise ValueError(f"expected one prediction for each of {len(dataset)} pictures, got {len(predictions)}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools narrates
        evaluation = _Evaluation(_index(dataset, _truth(dataset)), _index(dataset, _detections(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {name: float(value) for name, value in zip(STATS, evaluation.stats, strict=True)}
    return CocoResult(stats, {name: _class_numbers(evaluation.eval, k) for k, name in enumerate(dataset.class_names)})


def _class_numbers(result: dict[str, Any], k: int) -> dict[str, float]:
    precision, recall = result["precision"], result["recall"]  # [T, R, K, area, maxDets], [T, K, area, maxDets]
    numbers = {f"AP_{area}" if a else "AP": _mean(precision[:, :, k, a, -1]) for a, area in enumerate(AREAS)}
    return {**numbers, "AP50": _mean(precision[0, :, k, 0, -1]), "AR_100": _mean(recall[:, k, 0, -1])}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _index(dataset: DetectionSet, annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": record.size_hw[0], "width": record.size_hw[1]} for i, record in enumerate(dataset.records, start=1)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(dataset.class_names, start=1)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _truth(dataset: DetectionSet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, record in enumerate(dataset.records, start=1):
        for box, label, area, crowd, difficult in zip(
            record.boxes, record.labels, record.areas, record.crowd, record.difficult, strict=True
        ):
            flags = {"iscrowd": int(crowd), "difficult": int(difficult)}
            rows.append({"id": len(rows) + 1, "image_id": i, "category_id": int(label), "bbox": _xywh(box), "area": float(area), **flags})
    return rows


def _detections(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, prediction in enumerate(predictions, start=1):
        for box, score, label in zip(prediction["boxes"], prediction["scores"], prediction["labels"], strict=True):
            x, y, width, height = _xywh(box)
            row = {"id": len(rows) + 1, "image_id": i, "category_id": int(label), "bbox": [x, y, width, height], "iscrowd": 0}
            rows.append({**row, "score": float(score), "area": width * height})
    return rows


def _xywh(box: NDArray[np.floating]) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]
