"""The model card beside a version: what it is, where it comes from, how good it is, where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.precision import described
from export.report import accuracy_in_words
from service.manifest import Manifest

WEAK_AP50 = 0.75


@dataclass(frozen=True)
class CardFacts:
    """What only the person who exports can know; everything else is taken from the file.

    Attributes:
        description: one sentence: what the model finds, in what pictures.
        licence: of the weights.
        data_licence: of the training pictures, with their origin.
        training_time: hardware and duration.
        known_failures: sentences.
    """

    description: str = ""
    licence: str = ""
    data_licence: str = ""
    training_time: str = ""
    known_failures: Sequence[str] = ()


def model_card(manifest: Manifest, facts: CardFacts, metrics: Mapping[str, Any], export_command: str, file_bytes: int) -> str:
    """Markdown.

    Args:
        metrics: an evaluation report as plain values (`coco`, `per_class`, `voc_ap50`, ...), or nothing.
    """
    spec, training = manifest.input, manifest.training
    rows = {
        "Finds": ", ".join(manifest.class_names),
        "Network": f"Faster R-CNN, {manifest.architecture}",
        "Input": f"short side {spec.short_side}, long side at most {spec.long_side}; padded to "
        + ", ".join(f"{height}x{width}" for height, width in spec.buckets),
        "File": f"{file_bytes / 1e6:.1f} MB, opset {manifest.opset}, NMS: {manifest.nms}",
        "Precision": _precision(manifest),
        "Trained on": training.dataset,
        "Data licence": facts.data_licence or "not stated; ask whoever trained it",
        "Weights' licence": facts.licence or "not stated; ask whoever trained it",
        "Training": f"`{training.command}`" + (f" at commit {training.commit}" if training.commit else ""),
        "Time": facts.training_time or "not stated",
        "Exported": f"{manifest.created:%Y-%m-%d}, `{export_command}`",
    }
    parts = [
        f"# {manifest.name}, version {manifest.version}",
        facts.description or f"Finds {_joined(manifest.class_names)} in a picture.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Accuracy",
        _accuracy(metrics),
        "## Known failures",
        _failures(facts, metrics),
        "## Agreement with the network it came from",
        _parity(manifest.parity),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy(metrics: Mapping[str, Any]) -> str:
    if not metrics.get("coco"):
        return (
            "Not measured: the checkpoint holds no evaluation. `python -m export.evaluate model.onnx --data PATH --split test` measures it."
        )
    head = (
        f"On {metrics['dataset']} ({metrics['images']} pictures): COCO AP {metrics['coco']['AP']:.3f}, "
        f"AP50 {metrics['coco']['AP50']:.3f}, VOC AP50 {_number(metrics['voc_ap50'])}."
    )
    lines = ["| class | AP | AP50 | VOC AP50 | boxes |", "|---|--:|--:|--:|--:|"]
    for name, row in metrics["per_class"].items():
        lines.append(f"| {name} | {_number(row['AP'])} | {_number(row['AP50'])} | {_number(row['voc_ap50'])} | {row['ground_truth']} |")
    return head + "\n\n" + "\n".join(lines)


def _precision(manifest: Manifest) -> str:
    plan, accuracy = described(manifest.precision), manifest.parity.get("accuracy")
    if "calibration_pictures" in manifest.parity:
        plan += f"; calibrated on {manifest.parity['calibration_pictures']} pictures"
    return plan if accuracy is None else f"{plan}. {accuracy_in_words(accuracy)}"


def _failures(facts: CardFacts, metrics: Mapping[str, Any]) -> str:
    sentences = list(facts.known_failures)
    for name, row in metrics.get("per_class", {}).items():
        if row["AP50"] is not None and row["AP50"] < WEAK_AP50 and row["ground_truth"]:
            sentences.append(f"{name}: AP50 is only {row['AP50']:.2f}; expect misses and doubtful boxes.")
    return "\n".join(f"- {sentence}" for sentence in sentences) or "None recorded."


def _parity(parity: Mapping[str, Any]) -> str:
    if "max_box_px" not in parity:
        return "Not recorded."
    return (
        f"{parity['matched']} of {parity['detections']} detections in {parity['pictures']} pictures matched {parity['reference']}; "
        f"largest difference {parity['max_box_px']:.1e} px and {parity['max_score']:.1e} in score; "
        f"{parity['missed']} missed, {parity['extra']} extra{_fullest(parity)} (parity.md has every case)."
    )


def _fullest(parity: Mapping[str, Any]) -> str:
    if "fullest_picture" not in parity:
        return ""  # of an older export
    floor = ", seen without the score floor" if parity["without_floor"] else ""
    return f"; up to {parity['fullest_picture']} in one picture{floor}; on {parity['provider']}"


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
