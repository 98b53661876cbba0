"""The proof on a network that finds nothing in drawn pictures, and what it must not let pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_detector import Exported

from export.agreement import Tally
from export.crowd import LEAST, NO_FLOOR, remove_floor, with_a_full_answer
from export.graph import ExportError, save
from export.report import markdown
from export.verify import FREE, CaseResult, Gates, Report, batch_against_singles, mixed_batch
from model.checkpoint import load_detector
from model.faster_rcnn import FasterRCNN
from service.manifest import Manifest, parse_manifest
from service.runtime import Detections, OnnxRuntime

SHY = 9.0
"""Added to the background's logit: every score falls under the floor."""
NOTHING_SEEN = Report(Gates(), (CaseResult("many objects", (128, 160), 1, 0, Tally()),))


@pytest.fixture
def shy(exported: Exported, tmp_path: Path) -> tuple[FasterRCNN, onnx.ModelProto, Manifest]:
    """The tiny detector and its graph, both of which see background everywhere."""
    detector, model = load_detector(exported.checkpoint), onnx.load(exported.file)
    with torch.no_grad():
        detector.head.cls_score.bias[0] += SHY
    shift(model, "head.cls_score.bias", np.array([SHY, 0, 0, 0], np.float32))
    return detector, model, parse_manifest({entry.key: entry.value for entry in model.metadata_props}, "file")


def shift(model: onnx.ModelProto, name: str, by: np.ndarray) -> None:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + by, name))


def prove(detector: FasterRCNN, model: onnx.ModelProto, manifest: Manifest, folder: Path) -> Report:
    save(model, manifest, folder / "model.onnx")
    return with_a_full_answer(NOTHING_SEEN, detector, folder / "model.onnx", manifest, provider="cpu")


def test_without_its_floor_a_shy_network_shows_a_full_answer(
    shy: tuple[FasterRCNN, onnx.ModelProto, Manifest], exported: Exported, tmp_path: Path
) -> None:
    assert NOTHING_SEEN.failures
    found = prove(*shy, tmp_path)
    assert found.failures == []
    assert found.fullest == 100
    assert found.without_floor
    assert found.summary()["without_floor"] is True
    assert "many objects, no score floor" in markdown(found)
    assert "a copy of it without its score floor" in markdown(found)
    assert shy[0].config.roi.score_thresh == exported.detector.config.roi.score_thresh  # the network itself keeps it


def test_more_than_the_network_gives_is_not_asked_for(shy: tuple[FasterRCNN, onnx.ModelProto, Manifest], tmp_path: Path) -> None:
    """A final NMS that lets hardly any two boxes overlap never fills an answer; what it gives must agree all the same."""
    detector, model, manifest = shy
    detector.config = replace(detector.config, roi=replace(detector.config.roi, nms_thresh=0.05))
    last = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"][-1]
    last.input[3] = "strict"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.05], np.float32), "strict"))
    found = prove(detector, model, manifest, tmp_path)
    assert LEAST <= found.fullest == found.full_answer < 100
    assert found.failures == []
    assert len(found.rows) == 1 + 3  # none of the drawn pictures was enough to stop
    shift(model, "head.bbox_pred.bias", np.float32(0.1))
    assert prove(detector, model, manifest, tmp_path).failures


def test_half_an_answer_is_not_full(shy: tuple[FasterRCNN, onnx.ModelProto, Manifest], tmp_path: Path) -> None:
    """Below fp32 half of a full answer has to agree, but a full one is looked for."""
    detector, model, manifest = shy
    half = Report(FREE, (CaseResult("many objects", (128, 160), 1, 60, Tally(matched=60)),))
    assert half.is_seen
    save(model, manifest, tmp_path / "model.onnx")
    found = with_a_full_answer(half, detector, tmp_path / "model.onnx", manifest, provider="cpu")
    assert (found.fullest, found.without_floor, found.failures) == (100, True, [])


def test_a_wrong_file_that_answers_nothing_is_found(shy: tuple[FasterRCNN, onnx.ModelProto, Manifest], tmp_path: Path) -> None:
    detector, model, manifest = shy
    shift(model, "head.bbox_pred.bias", np.float32(0.1))
    found = prove(detector, model, manifest, tmp_path)
    assert any("no score floor" in sentence and "a box moved by" in sentence for sentence in found.failures)


def test_what_was_seen_already_costs_nothing_more(shy: tuple[FasterRCNN, onnx.ModelProto, Manifest]) -> None:
    seen = Report(Gates(), (CaseResult("many objects", (128, 160), 1, 100, Tally(matched=100)),))
    assert with_a_full_answer(seen, shy[0], Path("none"), shy[2], provider="cpu") is seen


def test_the_floor_must_be_found_once(exported: Exported) -> None:
    model = onnx.load(exported.file)
    with pytest.raises(ExportError, match=r"one comparison with the score floor 0\.3 in the graph, found 0"):
        remove_floor(model, 0.3)
    remove_floor(model, 0.05)
    assert [node.op_type for node in model.graph.node if NO_FLOOR in node.input] == ["Greater"]


class Leaky:
    """A runtime whose answers depend on the company: alone they are those of the file, in a batch boxes are `by` px further right."""

    provider = "cpu"

    def __init__(self, runtime: OnnxRuntime, by: float) -> None:
        self.runtime, self.by = runtime, by
        self.manifest = runtime.manifest

    def run(self, images: np.ndarray, sizes_hw: np.ndarray) -> Detections:
        found = self.runtime.run(images, sizes_hw)
        if len(images) == 1:
            return found
        used = np.arange(found.scores.shape[1])[None, :, None] < found.num_detections[:, None, None]
        moved = np.where(used, found.boxes - np.array([self.by, 0, 0, 0], np.float32), 0)
        return found._replace(boxes=np.clip(moved, 0, None).astype(np.float32))

    def close(self) -> None:
        self.runtime.close()


@pytest.mark.parametrize(("gates", "by", "broken"), [(FREE, 5.0, True), (FREE, 0.5, False), (Gates(), 0.5, True), (FREE, 0.0, False)])
def test_a_batch_must_answer_as_its_pictures_do_in_every_precision(exported: Exported, gates: Gates, by: float, broken: bool) -> None:
    leaky = Leaky(OnnxRuntime(exported.file, provider="cpu"), by)
    row = batch_against_singles(leaky, mixed_batch(leaky.manifest.input, 3), gates)
    leaky.close()
    full = CaseResult("full", (128, 160), 1, 100, Tally(matched=100))
    assert bool(Report(gates, (row, full)).failures) is broken
