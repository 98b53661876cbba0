"""One evaluation of a set of predictions: COCO and VOC numbers, per class, as text and as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.data.records import DetectionSet
from model.metrics.coco import CocoResult, coco_evaluate
from model.metrics.predictions import Prediction
from model.metrics.voc import Curve, voc_curves


@dataclass(frozen=True)
class Report:
    """What a set of predictions is worth on a data set. `curves` are at IoU .5, by class name."""

    dataset: str
    images: int
    coco: CocoResult
    curves: dict[str, Curve]

    @property
    def ap(self) -> float:
        """COCO AP, the number that checkpoints are chosen by."""
        return self.coco.stats["AP"]

    @property
    def voc_ap50(self) -> float:
        """Mean over the classes that occur, area under the envelope."""
        return _mean([curve.ap_area for curve in self.curves.values()])

    @property
    def voc_ap50_11_point(self) -> float:
        return _mean([curve.ap_11_point for curve in self.curves.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; None where a class has no ground truth."""
        per_class = {
            name: {**self.coco.per_class[name], "voc_ap50": _known(curve.ap_area), "ground_truth": curve.positives}
            for name, curve in self.curves.items()
        }
        return {
            "dataset": self.dataset,
            "images": self.images,
            "coco": self.coco.stats,
            "voc_ap50": _known(self.voc_ap50),
            "voc_ap50_11_point": _known(self.voc_ap50_11_point),
            "per_class": per_class,
        }

    def to_text(self) -> str:
        """A few lines for a terminal."""
        lines = [f"{self.dataset}: {self.images} pictures"]
        lines += [f"  {name:<10} {value:7.4f}" for name, value in self.coco.stats.items()]
        lines += [f"  {'VOC AP50':<10} {self.voc_ap50:7.4f}  (area), {self.voc_ap50_11_point:.4f} (11-point)"]
        lines += [f"  {'class':<20} {'AP':>7} {'AP50':>7} {'VOC50':>7} {'boxes':>6}"]
        for name, curve in self.curves.items():
            if curve.positives:
                numbers = self.coco.per_class[name]
                lines.append(f"  {name:<20} {numbers['AP']:7.4f} {numbers['AP50']:7.4f} {curve.ap_area:7.4f} {curve.positives:6d}")
        return "\n".join(lines)


def evaluate_detections(dataset: DetectionSet, predictions: Sequence[Prediction]) -> Report:
    """Evaluates predictions, one a record in the records' order, against a data set. Where they come from does not matter."""
    coco = coco_evaluate(dataset, predictions)
    return Report(dataset.name, len(dataset), coco, voc_curves(dataset, predictions))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else float("nan")
