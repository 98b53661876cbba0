"""int8 against fp32: a graph for the side-by-side run, and what a trained network gains in time and loses in AP."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.runtime_contenders import Device, exported
from benchmarks.runtime_networks import samples_of
from benchmarks.runtime_sweeps import in_turns
from export.calibration import calibrate, calibration_files, read_pictures
from export.evaluate import evaluate_file
from export.graph import GraphOptions, build_graph, save
from export.job import Job, first_manifest, input_spec
from export.pictures import Picture
from export.quantize import chosen_nodes, quantise
from model.checkpoint import load_checkpoint, restore_detector
from model.config import DetectorConfig
from model.data.formats import open_dataset
from model.data.images import read_rgb
from model.data.records import DetectionSet
from service.manifest import Manifest
from service.runtime import OnnxRuntime

CALIBRATION_PICTURES = 64
TIMED_PICTURES = 3


def quantised(graph: onnx.ModelProto, config: DetectorConfig, pictures: Iterable[Picture]) -> onnx.ModelProto:
    """The graph as an export with `--precision int8` makes it."""
    nodes = chosen_nodes(graph)
    return quantise(graph, nodes, calibrate(graph, nodes, pictures, input_spec(config)))


def trained_in_int8(
    checkpoint: Path, data: Path, split: str, device: Device, rounds: int, limit: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both precisions of a trained network: seconds a picture in turns, and AP through the service's preprocessing.

    Args:
        data: calibrated on its "train", evaluated on `split`.
        limit: at most this many pictures of each.

    Returns:
        `{"pictures", "calibrated_on", "seconds": {"fp32", "int8"}, "times_fp32", "ap": {"fp32", "int8"}}`.
    """
    read = load_checkpoint(checkpoint)
    names = read.config.class_names
    say("exporting the trained network in fp32 and int8")
    graph = build_graph(restore_detector(read, str(checkpoint)), GraphOptions())
    files = calibration_files(data, min(limit, CALIBRATION_PICTURES), class_names=names, skip_bad=True)
    models = {"fp32": graph, "int8": quantised(graph, read.config, read_pictures(files))}
    dataset = open_dataset(data, split, class_names=names, skip_bad=True)
    dataset = dataset.with_records(dataset.records[:limit])
    samples = samples_of(read.config, [read_rgb(record.path) for record in dataset.records[:TIMED_PICTURES]])
    runs = {name: exported(model.SerializeToString(), device) for name, model in models.items()}
    seconds = {name: float(np.median(values)) for name, values in in_turns(runs, samples, rounds, say).items()}
    manifest = first_manifest(Job(checkpoint=checkpoint, name="measured", repository=Path()), read, 1)
    ap = {}
    for name, model in models.items():
        say(f"AP of the trained network in {name} on {len(dataset)} pictures")
        ap[name] = _average_precision(model, manifest, dataset, device)
    counts = {"pictures": len(dataset), "calibrated_on": len(files)}
    return counts | {"seconds": seconds, "times_fp32": seconds["fp32"] / seconds["int8"], "ap": ap}


def _average_precision(model: onnx.ModelProto, manifest: Manifest, dataset: DetectionSet, device: Device) -> float:
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, manifest, path)
        runtime = OnnxRuntime(path, provider=device.provider, intra_op_threads=device.threads)
        try:
            return float(evaluate_file(runtime, dataset).ap)
        finally:
            runtime.close()
