"""A file and its network without their score floor: they fill every answer, so that a full one can be compared.

A trained network finds in a drawn picture what looks like its objects, which may be a few or none. Everything behind the floor, however,
works the same for a score of 0.01: the final NMS, the order, the cut at D detections.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from export import pictures
from export.graph import ExportError, save
from export.pictures import Picture
from export.verify import Case, Report, against_eager, usual_hw
from model.faster_rcnn import FasterRCNN
from service.images import prepare_pixels
from service.manifest import InputSpec, Manifest
from service.runtime import OnnxRuntime, Runtime

NO_FLOOR = "no_floor"
LEAST = 20
"""Detections in one picture without which nothing is proven; a network with few proposals may not give many more, even without a floor."""


def without_floor(detector: FasterRCNN) -> FasterRCNN:
    """The same modules, keeping every detection."""
    other = copy.copy(detector)
    other.config = replace(detector.config, roi=replace(detector.config.roi, score_thresh=0.0))
    return other


def remove_floor(model: onnx.ModelProto, floor: float) -> None:
    """Let the graph keep every detection, in place: the same graph with 0 in the floor's place.

    Raises:
        ExportError: no comparison, or more than one, is with `floor`.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def holds_floor(node: NodeProto) -> bool:
        bound = constants.get(node.input[1]) if node.op_type == "Greater" else None
        return bound is not None and not bound.dims and numpy_helper.to_array(bound).item() == np.float32(floor)

    found = [node for node in model.graph.node if holds_floor(node)]
    if len(found) != 1:
        raise ExportError(f"expected one comparison with the score floor {floor:g} in the graph, found {len(found)}")
    found[0].input[1] = NO_FLOOR
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), NO_FLOOR))


def with_a_full_answer(
    report: Report,
    detector: FasterRCNN,
    path: Path,
    manifest: Manifest,
    *,
    provider: str,
    extra_pictures: Sequence[Picture] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report, with rows on a copy without a floor where the file itself filled no answer; one more session, mostly one picture."""
    if report.is_full or report.differences:
        return report
    with _opened_without_floor(path, manifest, provider) as runtime:
        return full_answer(report, without_floor(detector), runtime, extra_pictures, progress=progress)


def full_answer(
    report: Report, detector: FasterRCNN, runtime: Runtime, extra_pictures: Sequence[Picture] = (), *, progress: Callable[[str], None]
) -> Report:
    """The report with further rows, until one of them shows a full answer, or what the network gives at most.

    Args:
        detector, runtime: both without a score floor.
    """
    # without the floor nothing slips over it, so that whatever is alone is wrong, unless it ties at the cut or rounding decides it
    gates = replace(report.gates, unmatched_score=None if report.gates.unmatched_score is None else 0.0)
    for case in crowded_cases(runtime.manifest.input, extra_pictures):
        progress(case.name)
        row = replace(against_eager(detector, runtime, case, gates, shake=True), gates=gates)
        report = replace(report, rows=(*report.rows, row), without_floor=True)
        if report.is_full or report.failed_rows:
            return report
    most = max(row.tally.matched + row.tally.missed for row in report.rows if row.batch_size == 1)
    return replace(report, full_answer=min(report.full_answer, max(most, LEAST)))


def crowded_cases(spec: InputSpec, extra_pictures: Sequence[Picture] = ()) -> Iterator[Case]:
    """Pictures on which a network without a score floor fills its answer."""
    hw = usual_hw(spec)
    drawn = (pictures.smear(hw, seed=6, cells=160), pictures.street(hw, seed=7, blocks=90), pictures.noise(hw, seed=5))
    for name, picture in zip(("many objects", "many blocks", "noise"), drawn, strict=True):
        yield Case(f"{name}, no score floor", (prepare_pixels(picture, spec),))
    for index, picture in enumerate(extra_pictures, start=1):
        yield Case(f"given picture {index}, no score floor", (prepare_pixels(picture, spec),))


@contextmanager
def _opened_without_floor(path: Path, manifest: Manifest, provider: str) -> Iterator[OnnxRuntime]:
    model = onnx.load(path)
    if manifest.score_floor > 0:
        remove_floor(model, manifest.score_floor)
    with tempfile.TemporaryDirectory(prefix="no-floor-") as folder:
        copied = Path(folder) / "model.onnx"
        save(model, manifest.model_copy(update={"score_floor": 0.0}), copied)
        runtime = OnnxRuntime(copied, provider=provider)
        try:
            yield runtime
        finally:
            runtime.close()
