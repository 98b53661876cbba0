"""AP of an exported file against the network it came from, on real pictures: the gate of every precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from export.evaluate import evaluate_file
from export.precision import MAX_AP_DROP, Kind
from model.data.records import DetectionSet
from model.faster_rcnn import FasterRCNN
from model.inference import predict
from model.metrics.report import evaluate_detections
from service.runtime import Runtime

PADDING_AP_GATE = 0.001


class GateFailed(RuntimeError):
    """The file does not answer as the network does; no version was written."""


@dataclass(frozen=True)
class Scores:
    """One figure (0..1) of the file, of the network in fp32, and of the file without the bucket's padding."""

    file: float
    network: float
    exact_padding: float


def broken_gate(kind: Kind, scores: dict[str, Scores]) -> str | None:
    """A sentence if the file lost more than its precision may.

    fp32 should equal the network, so a gain is as suspicious as a loss, in VOC AP as well; below fp32 only a loss of AP counts.
    """
    limit = MAX_AP_DROP[kind]
    for name, own in scores.items():
        if not all(0 <= value <= 1 for value in (own.file, own.network)):  # -1 and NaN stand for no ground truth
            return f"{name} is unknown (file {own.file:g}, network {own.network:g}): the data set has no box that counts"
        drop = own.network - own.file
        if (kind == "fp32" and abs(drop) > limit) or (kind != "fp32" and name == "ap" and drop > limit):
            return (
                f"{name} of the {kind} file is {own.file:.4f}, of the network in fp32 {own.network:.4f}: "
                f"{100 * drop:.2f} points lost, allowed {100 * limit:g}"
            )
    return None


def countable_boxes(dataset: DetectionSet) -> int:
    """Boxes that AP is about: neither difficult nor crowds."""
    return sum(int(record.plain.sum()) for record in dataset.records)


def compare_accuracy(
    detector: FasterRCNN, runtime: Runtime, dataset: DetectionSet, console: Console, kind: Kind = "fp32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """AP of the file, of the network, and of the file without the bucket's padding, held against each other.

    Args:
        detector: in fp32, whatever the file's precision is. An fp32 file would be the same reference: it may differ from this network
            by no more than 1e-3 px and 1e-4 in score.

    Returns:
        The numbers for the manifest, and the file's whole report as plain values.

    Raises:
        GateFailed: they differ by more than they may, or the data set cannot show it.
    """
    boxes = countable_boxes(dataset)
    console.print(f"measuring AP on {dataset.name}, {len(dataset)} pictures with {boxes} boxes, three times, on {runtime.provider}")
    mine = evaluate_file(runtime, dataset)
    reference = evaluate_detections(dataset, predict(detector, dataset, batch_size=1))
    tight = evaluate_file(runtime, dataset, exact_padding=True)
    scores = {"ap": Scores(mine.ap, reference.ap, tight.ap), "voc_ap50": Scores(mine.voc_ap50, reference.voc_ap50, tight.voc_ap50)}
    for name, own in scores.items():
        console.print(f"{name}: file {own.file:.4f}, network {own.network:.4f}, file with exact padding {own.exact_padding:.4f}")
    sentence = broken_gate(kind, scores)
    if sentence is not None:
        raise GateFailed(f"{sentence}; {dataset.name}, {len(dataset)} pictures with {boxes} boxes")
    if abs(mine.ap - tight.ap) > PADDING_AP_GATE:
        console.print(f"padding to buckets moves AP by {abs(mine.ap - tight.ap):.4f}, aimed at {PADDING_AP_GATE}", style="yellow")
    numbers = {name: {"file": s.file, "network": s.network, "exact_padding": s.exact_padding} for name, s in scores.items()}
    gate = {"checked": True, "ap_drop": scores["ap"].network - scores["ap"].file, "max_ap_drop": MAX_AP_DROP[kind]}
    return {"dataset": dataset.name, "pictures": len(dataset), "boxes": boxes, **numbers, **gate}, mine.to_dict()


def unmeasured(kind: Kind) -> dict[str, Any]:
    """What the manifest says where a reduced precision was published without its gate."""
    reason = (
        f"AP may drop by at most {100 * MAX_AP_DROP[kind]:g} points in {kind}, "
        "but no data set was given and the export was told to go on without one."
    )
    return {"checked": False, "max_ap_drop": MAX_AP_DROP[kind], "reason": reason}
