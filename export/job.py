"""One export from beginning to end: checkpoint -> graph -> proof -> version folder. Nothing is published before the proof."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.progress import Progress

from export.accuracy import GateFailed, compare_accuracy, countable_boxes, unmeasured
from export.calibration import calibrate, check_pictures, read_pictures
from export.card import CardFacts, model_card
from export.certificate import state_width
from export.crowd import with_a_full_answer
from export.golden import golden_images
from export.graph import ExportError, GraphOptions, build_graph, graph_problems, save
from export.pictures import Picture
from export.precision import MAX_AP_DROP, recorded
from export.quantize import chosen_nodes, quantise
from export.report import markdown, table
from export.triton import continue_config, triton_config
from export.verify import FREE, Gates, Report, verify
from export.version import check_free, check_writable, next_version, publish, sha256, staged
from model.checkpoint import Checkpoint, load_checkpoint, restore_detector
from model.config import DetectorConfig
from model.data.records import DetectionSet
from model.faster_rcnn import FasterRCNN
from service.manifest import NAME_PATTERN, GoldenImage, InputSpec, Manifest, Training
from service.runtime import OnnxRuntime, provider_candidates


@dataclass(frozen=True)
class Job:
    """What to export, and to where.

    Attributes:
        loaded: the checkpoint, where it was read already, with the settings applied.
        version: None takes the next free number.
        settings: KEY=VALUE changes of the checkpoint's configuration, such as detector.roi.nms_thresh=0.6.
        pictures: further RGB pictures to verify on.
        gates: of the comparison with eager PyTorch; None takes those of the precision.
        dataset: measures AP of both sides on it, and holds them against each other; below fp32 it decides.
        calibration: files of pictures for int8.
        verify_on: execution provider that the file is verified on; None takes the CPU, which runs every precision but bf16.
        allow_unmeasured: publish a precision below fp32 without a data set; the manifest says so.
        command: as the user typed it.
        training_command: stands for the checkpoint's own, where given.
    """

    checkpoint: Path
    name: str
    repository: Path
    version: int | None = None
    settings: Sequence[str] = ()
    graph: GraphOptions = field(default_factory=GraphOptions)
    facts: CardFacts = field(default_factory=CardFacts)
    gates: Gates | None = None
    pictures: Sequence[Picture] = ()
    dataset: DetectionSet | None = None
    calibration: Sequence[Path] = ()
    verify_on: str | None = None
    allow_unmeasured: bool = False
    command: str = "python -m export"
    training_command: str = ""
    loaded: Checkpoint | None = None

    @property
    def provider(self) -> str:
        """Where the file is verified."""
        return self.verify_on or ("cuda" if self.graph.precision == "bf16" else "cpu")


def export(job: Job, console: Console) -> Path:
    """Run the job.

    Returns:
        The folder of the new version.

    Raises:
        GateFailed: too large a difference; nothing was left behind.
        ExportError, CheckpointError, VersionExistsError, ValueError: sentences for the user.
    """
    check_request(job)
    version = job.version or next_version(job.repository, job.name)
    target = check_free(job.repository, job.name, version)
    checkpoint = job.loaded or load_checkpoint(job.checkpoint, job.settings)
    detector = restore_detector(checkpoint, str(job.checkpoint))
    manifest = first_manifest(job, checkpoint, version)
    with staged(job.repository) as folder:
        path = folder / "model.onnx"
        graph = job.graph
        console.print(
            f"tracing {checkpoint.config.architecture} (opset {graph.opset}, NMS: {graph.nms}, {graph.precision}); a minute or so"
        )
        model = build_graph(detector, graph)
        if graph.precision == "int8":
            model = to_int8(model, job, manifest.input, console)
        save(model, manifest, path)
        console.print(f"graph: {len(model.graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB")
        report, parity, metrics, golden = prove(job, detector, path, manifest, checkpoint.training.get("metrics") or {}, console)
        metrics_for_manifest = {"metrics": flat(metrics)}
        training = manifest.training.model_copy(update=metrics_for_manifest)
        manifest = manifest.model_copy(update={"parity": parity, "golden": golden, "training": training})
        save(model, manifest, path)
        OnnxRuntime(path, provider=job.provider).close()  # the final bytes, through the door that the service uses
        write_companions(folder, manifest, report, job, metrics, state_width(model))
        digest = sha256(path)
        publish(folder, target)
    console.print(f"published {target}\nsha256 {digest}  model.onnx", highlight=False)
    return target


def check_request(job: Job) -> None:
    """Refuse before any work what could not be proven in the end.

    Raises:
        ExportError, CalibrationError, ProviderMissing, OSError: with what is missing.
    """
    kind = job.graph.precision
    if re.fullmatch(NAME_PATTERN, job.name) is None:
        raise ExportError(
            f"{job.name!r} can be no model's name: lower case letters, digits, '.', '_' and '-' are allowed, a letter or digit comes first"
        )
    for folder in (job.repository, job.repository / job.name):  # the scratch folder goes to the first, the version to the second
        check_writable(folder)
    provider_candidates(job.provider)
    if kind == "bf16" and job.provider == "cpu":
        raise ExportError("ONNX Runtime's CPU provider has no kernels for bf16: verify it with --provider cuda, on a machine with a GPU")
    if job.dataset is not None and not countable_boxes(job.dataset):
        raise ExportError(f"{job.dataset.name} has no box that counts, so that it can show no AP: choose another --data or --split")
    if kind == "fp32":
        return
    if kind == "int8" and not job.calibration:
        raise ExportError("int8 needs pictures like those it will see, to measure its ranges on: --calibrate FOLDER_OR_DATASET")
    if job.dataset is None and not job.allow_unmeasured:
        raise ExportError(
            f"{kind} may cost at most {100 * MAX_AP_DROP[kind]:g} points of AP, which only a data set can show: give --data PATH "
            "(and --split), or publish it unproven with --allow-unmeasured"
        )
    check_pictures(job.calibration)


def to_int8(model: onnx.ModelProto, job: Job, spec: InputSpec, console: Console) -> onnx.ModelProto:
    """The traced graph, calibrated and quantised."""
    nodes = chosen_nodes(model)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("calibrating", total=len(job.calibration))
        ranges = calibrate(model, nodes, read_pictures(job.calibration), spec, progress=lambda done: bar.update(task, completed=done))
    console.print(f"quantising {len(nodes)} nodes, calibrated on {ranges.pictures} pictures")
    quantised = quantise(model, nodes, ranges)
    problems = graph_problems(quantised)
    if problems:
        raise ExportError("; ".join(problems))
    return quantised


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
        precision=recorded(job.graph.precision),
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
    job: Job, detector: FasterRCNN, path: Path, manifest: Manifest, known_metrics: dict[str, Any], console: Console
) -> tuple[Report, dict[str, Any], dict[str, Any], list[GoldenImage]]:
    """Verification report, what the manifest keeps of it, metrics for the card, golden images.

    Raises:
        GateFailed: with every broken gate.
    """
    kind = job.graph.precision
    gates = job.gates or (Gates() if kind == "fp32" else FREE)
    runtime = OnnxRuntime(path, provider=job.provider)
    try:
        console.print(f"comparing with eager PyTorch, case by case, on {runtime.provider}")
        with console.status("") as status:  # on a terminal alone
            report = verify(detector, runtime, gates=gates, extra_pictures=job.pictures, progress=status.update)
            report = with_a_full_answer(
                report, detector, path, manifest, provider=job.provider, extra_pictures=job.pictures, progress=status.update
            )
        console.print(table(report))
        if report.failures:
            raise GateFailed("\n".join(report.failures))
        parity, metrics = report.summary(), known_metrics
        if job.dataset is not None:
            parity["accuracy"], metrics = compare_accuracy(detector, runtime, job.dataset, console, kind)
        elif kind != "fp32":
            parity["accuracy"], metrics = unmeasured(kind), {}  # the checkpoint's own figures are those of fp32
        if kind == "int8":
            parity["calibration_pictures"] = len(job.calibration)
        return report, parity, metrics, golden_images(runtime)
    finally:
        runtime.close()


def write_companions(folder: Path, manifest: Manifest, report: Report, job: Job, metrics: Mapping[str, Any], width: int | None) -> None:
    """Model card, verification report and Triton's configuration; `width` is that of a dense NMS's masks."""
    size = (folder / "model.onnx").stat().st_size
    (folder / "README.md").write_text(model_card(manifest, job.facts, metrics, job.command, size))
    (folder / "parity.md").write_text(markdown(report, manifest.parity.get("accuracy")))
    (folder / "config.pbtxt").write_text(triton_config(manifest, state_width=width))
    if width is not None:
        (folder / "config-continue.pbtxt").write_text(continue_config(manifest, width))


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
