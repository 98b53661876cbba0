"""One evaluation of a set of predictions: COCO and VOC numbers, per class, as text and as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.records import DetectionSet
from model.metrics.coco import STATS, CocoResult, coco_evaluate
from model.metrics.errors import ErrorBreakdown, break_down
from model.metrics.plots import plot_confusion, plot_curves, plot_errors
from model.metrics.predictions import Prediction
from model.metrics.voc import Curve, voc_curves


@dataclass(frozen=True)
class Report:
    """What a set of predictions is worth on a data set. `curves` are at IoU .5, by class name."""

    dataset: str
    images: int
    coco: CocoResult
    curves: dict[str, Curve]
    errors: ErrorBreakdown

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
            "errors": {"counts": self.errors.counts, "ap50_cost": self.errors.ap_cost},
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
        kinds = (f"{kind} {count} ({self.errors.ap_cost[kind]:+.3f})" for kind, count in self.errors.counts.items())
        lines.append(f"  errors (AP50 gained if mended): {', '.join(kinds)}")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The report as a page; plots lie beside it."""
        lines = [f"# {self.dataset}: {self.images} pictures", "", "| number | value |", "| --- | --- |"]
        lines += [f"| {name} | {_shown(self.coco.stats[name])} |" for name in STATS]
        lines += [f"| VOC AP50, area | {self.voc_ap50:.4f} |", f"| VOC AP50, 11-point | {self.voc_ap50_11_point:.4f} |", ""]
        lines += ["| class | boxes | AP | AP50 | small | medium | large | AR@100 |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for name, curve in self.curves.items():
            numbers = self.coco.per_class[name]
            cells = (_shown(numbers[key]) for key in ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100"))
            lines.append(f"| {name} | {curve.positives} | {' | '.join(cells)} |")
        lines += ["", "| error | count | AP50 gained if mended |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {count} | {self.errors.ap_cost[kind]:.4f} |" for kind, count in self.errors.counts.items()]
        lines += ["", *(f"![{name}]({name}.png)\n" for name in ("precision_recall", "confusion", "errors"))]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes report.md, report.json and the plots."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(self.to_markdown())
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        plot_curves(folder / "precision_recall.png", self.curves)
        plot_confusion(folder / "confusion.png", self.errors.confusion, list(self.curves))
        plot_errors(folder / "errors.png", self.errors.ap_cost)


def evaluate_detections(dataset: DetectionSet, predictions: Sequence[Prediction]) -> Report:
    """Evaluates predictions, one a record in the records' order, against a data set. Where they come from does not matter."""
    coco = coco_evaluate(dataset, predictions)
    return Report(dataset.name, len(dataset), coco, voc_curves(dataset, predictions), break_down(dataset, predictions))


def _shown(value: float) -> str:
    return "-" if value < 0 else f"{value:.4f}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else float("nan")
