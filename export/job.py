"""One export from beginning to end: checkpoint -> graph -> proof -> version folder. Nothing is published before the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from export.card import CardFacts, model_card
from export.evaluate import evaluate_file
from export.golden import golden_images
from export.graph import GraphOptions, build_graph, save
from export.pictures import Picture
from export.report import markdown, table
from export.triton import triton_config
from export.verify import Gates, Report, verify
from export.version import check_free, next_version, publish, sha256, staged
from model.checkpoint import Checkpoint, load_checkpoint
from model.config import DetectorConfig
from model.data.records import DetectionSet
from model.faster_rcnn import FasterRCNN, build_detector
from model.inference import predict
from model.metrics.report import evaluate_detections
from service.manifest import GoldenImage, InputSpec, Manifest, Training
from service.runtime import OnnxRuntime

AP_GATE = 0.005
PADDING_AP_GATE = 0.001


class GateFailed(RuntimeError):
    """The file does not answer as the network does; no version was written."""


@dataclass(frozen=True)
class Job:
    """What to export, and to where.

    Attributes:
        version: None takes the next free number.
        pictures: further RGB pictures to verify on.
        dataset: measures AP of both sides on it, and holds them against each other.
        command: as the user typed it.
        training_command: stands for the checkpoint's own, where given.
    """

    checkpoint: Path
    name: str
    repository: Path
    version: int | None = None
    graph: GraphOptions = field(default_factory=GraphOptions)
    facts: CardFacts = field(default_factory=CardFacts)
    gates: Gates = field(default_factory=Gates)
    pictures: Sequence[Picture] = ()
    dataset: DetectionSet | None = None
    command: str = "python -m export"
    training_command: str = ""


def export(job: Job, console: Console) -> Path:
    """Run the job.

    Returns:
        The folder of the new version.

    Raises:
        GateFailed: too large a difference; nothing was left behind.
        ExportError, CheckpointError, VersionExistsError, ValueError: sentences for the user.
    """
    version = job.version or next_version(job.repository, job.name)
    target = check_free(job.repository, job.name, version)
    checkpoint = load_checkpoint(job.checkpoint)
    detector = restore(checkpoint)
    manifest = first_manifest(job, checkpoint, version)
    with staged(job.repository) as folder:
        path = folder / "model.onnx"
        console.print(f"tracing {checkpoint.config.architecture} (opset {job.graph.opset}, NMS: {job.graph.nms}); a minute or so")
        model = build_graph(detector, job.graph)
        save(model, manifest, path)
        console.print(f"graph: {len(model.graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB")
        report, parity, metrics, golden = prove(job, detector, path, checkpoint.training.get("metrics") or {}, console)
        metrics_for_manifest = {"metrics": flat(metrics)}
        training = manifest.training.model_copy(update=metrics_for_manifest)
        manifest = manifest.model_copy(update={"parity": parity, "golden": golden, "training": training})
        save(model, manifest, path)
        OnnxRuntime(path, provider="cpu").close()  # the final bytes, through the door that the service uses
        write_companions(folder, manifest, report, job, metrics)
        digest = sha256(path)
        publish(folder, target)
    console.print(f"published {target}\nsha256 {digest}  model.onnx", highlight=False)
    return target


def restore(checkpoint: Checkpoint) -> FasterRCNN:
    """The checkpoint's detector in eval mode, on the CPU."""
    detector = build_detector(checkpoint.config)
    detector.load_state_dict(checkpoint.detector)
    return detector.eval()


def first_manifest(job: Job, checkpoint: Checkpoint, version: int) -> Manifest:
    """The manifest before anything was measured: enough to load the file."""
    config, training = checkpoint.config, checkpoint.training
    return Manifest(
        name=job.name,
        version=str(version),
        class_names=list(config.class_names),
        input=input_spec(config),
        score_floor=config.roi.score_thresh,
        detections_per_image=config.roi.detections_per_image,
        architecture=config.architecture,
        opset=job.graph.opset,
        nms=job.graph.nms,
        training=Training(
            dataset=str(training.get("dataset") or "unknown"),
            commit=str(training.get("commit") or ""),
            command=job.training_command or str(training.get("command") or "unknown"),
        ),
        parity={},
        created=datetime.now(UTC).replace(microsecond=0),
    )


def input_spec(config: DetectorConfig) -> InputSpec:
    """The service's view of the checkpoint's input."""
    return InputSpec(short_side=config.input.short_side, long_side=config.input.long_side, buckets=list(config.input.buckets))


def prove(
    job: Job, detector: FasterRCNN, path: Path, known_metrics: dict[str, Any], console: Console
) -> tuple[Report, dict[str, Any], dict[str, Any], list[GoldenImage]]:
    """Verification report, what the manifest keeps of it, metrics for the card, golden images.

    Raises:
        GateFailed: with every broken gate.
    """
    runtime = OnnxRuntime(path, provider="cpu")
    try:
        console.print("comparing with eager PyTorch, case by case")
        with console.status("") as status:  # on a terminal alone
            report = verify(detector, runtime, gates=job.gates, extra_pictures=job.pictures, progress=status.update)
        console.print(table(report))
        if report.failures:
            raise GateFailed("\n".join(report.failures))
        parity, metrics = report.summary(), known_metrics
        if job.dataset is not None:
            accuracy, metrics = compare_accuracy(detector, runtime, job.dataset, console)
            parity["accuracy"] = accuracy
        return report, parity, metrics, golden_images(runtime)
    finally:
        runtime.close()


def compare_accuracy(
    detector: FasterRCNN, runtime: OnnxRuntime, dataset: DetectionSet, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """AP of the file, of the network, and of the file without the bucket's padding, held against each other.

    Returns:
        The numbers for the manifest, and the file's whole report as plain values.

    Raises:
        GateFailed: they differ by more than they may.
    """
    console.print(f"measuring AP on {dataset.name}, {len(dataset)} pictures, three times")
    mine = evaluate_file(runtime, dataset)
    reference = evaluate_detections(dataset, predict(detector, dataset, batch_size=1))
    tight = evaluate_file(runtime, dataset, exact_padding=True)
    pairs = {"ap": (mine.ap, reference.ap, tight.ap), "voc_ap50": (mine.voc_ap50, reference.voc_ap50, tight.voc_ap50)}
    for name, (file, network, exact) in pairs.items():
        console.print(f"{name}: file {file:.4f}, network {network:.4f}, file with exact padding {exact:.4f}")
        if abs(file - network) > AP_GATE:
            raise GateFailed(f"{name} of the file is {file:.4f}, of the network {network:.4f}; they may differ by {AP_GATE}")
    if abs(mine.ap - tight.ap) > PADDING_AP_GATE:
        console.print(f"[yellow]padding to buckets moves AP by {abs(mine.ap - tight.ap):.4f}, aimed at {PADDING_AP_GATE}[/yellow]")
    numbers = {name: {"file": file, "network": network, "exact_padding": exact} for name, (file, network, exact) in pairs.items()}
    return {"dataset": dataset.name, "pictures": len(dataset), **numbers}, mine.to_dict()


def write_companions(folder: Path, manifest: Manifest, report: Report, job: Job, metrics: Mapping[str, Any]) -> None:
    """Model card, verification report and Triton's configuration."""
    size = (folder / "model.onnx").stat().st_size
    (folder / "README.md").write_text(model_card(manifest, job.facts, metrics, job.command, size))
    (folder / "parity.md").write_text(markdown(report))
    (folder / "config.pbtxt").write_text(triton_config(manifest))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | str | None]:
    """Nested numbers as one level, keys joined with a slash; NaN, which JSON does not know, becomes None."""
    result: dict[str, float | str | None] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | str) or value is None:
            number = float(value) if isinstance(value, int | float) else value
            result[f"{prefix}{key}"] = None if number != number else number
    return result
