"""A tiny but valid model file: the same answer as service_fakes.detect_colours, computed by ONNX Runtime."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from service_fakes import make_manifest, picture

from service.manifest import METADATA_KEY, GoldenDetection, GoldenImage, Tolerance, dump_manifest

OPSET = 18


def write_model(
    root: Path,
    name: str = "blobs",
    version: str = "1",
    *,
    score: float = 0.6,
    golden_score: float | None = None,
    runs: bool = True,
    **manifest: Any,
) -> Path:
    """Write root/name/version/model.onnx.

    Args:
        score: base of the first detection's score, so that versions can be told apart.
        golden_score: what the golden image expects; None: the truth.
        runs: False makes a file that opens like any other and fails in every run.
    """
    path = root / name / version / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = colour_graph(score)
    if not runs:
        spoil_runs(graph)
    expected = (score if golden_score is None else golden_score) + 0.3 * 220 / 255
    metadata = dump_manifest(make_manifest(name=name, version=version, golden=[golden(expected)], **manifest))
    helper.set_model_props(graph, {METADATA_KEY: metadata})
    onnx.save(graph, path)
    return path


def spoil_runs(graph: onnx.ModelProto) -> None:
    """Reshape the counts, [B] and far fewer than 1009, to rows of 1009: opening does not know B, so only a run can notice."""
    for name, shape in (("rows", [-1, 1009]), ("flat", [-1])):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    *_, counts = (node for node in graph.graph.node if "num_detections" in node.output)
    counts.output[:] = ["true_counts"]
    graph.graph.node.append(helper.make_node("Reshape", ["true_counts", "rows"], ["rows_of_counts"]))
    graph.graph.node.append(helper.make_node("Reshape", ["rows_of_counts", "flat"], ["num_detections"]))


def golden(score: float) -> GoldenImage:
    """A red picture, 96 x 60, and its one detection above 0.5."""
    image = base64.b64encode(picture(96, 60)).decode()
    expected = GoldenDetection(box=(48.0, 0.0, 96.0, 60.0), label=1, score=score)
    return GoldenImage(image=image, detections=[expected], min_score=0.5, tolerance=Tolerance(box_px=0.5, score=0.01))


def colour_graph(score: float = 0.6) -> onnx.ModelProto:
    """images uint8 [B, H, W, 3], image_sizes_hw int64 [B, 2] -> boxes, scores, labels, num_detections with D = 4."""
    constants = {
        "axes_hw": np.array([1, 2], np.int64),
        "axis_1": np.array([1], np.int64),
        "index_h": np.array([0], np.int64),
        "index_w": np.array([1], np.int64),
        "half": np.array(0.5, np.float32),
        "quarter": np.array(0.25, np.float32),
        "none": np.array(0.0, np.float32),
        "no_label": np.array(0, np.int64),
        "one_label": np.array(1, np.int64),
        "two": np.array(2, np.int64),
        "slope": np.array(0.3 / 255, np.float32),
        "base": np.array(score, np.float32),
        "low_score": np.array(0.2, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("ReduceMax", ["pixels", "axes_hw"], ["colour"], keepdims=0),  # [B, 3]; zero padding never wins
        node("ReduceMax", ["colour", "axis_1"], ["brightest"], keepdims=1),  # [B, 1]
        node("Mul", ["brightest", "slope"], ["bonus"]),
        node("Add", ["bonus", "base"], ["score_0"]),
        node("Mul", ["score_0", "none"], ["zero"]),
        node("Add", ["zero", "low_score"], ["score_1"]),
        node("Concat", ["score_0", "score_1", "zero", "zero"], ["scores"], axis=1),
        node("ArgMax", ["colour"], ["channel"], axis=1, keepdims=1),  # [B, 1]
        node("Add", ["channel", "one_label"], ["label_0"]),
        node("Mul", ["label_0", "no_label"], ["label_none"]),
        node("Add", ["label_none", "one_label"], ["label_1"]),
        node("Concat", ["label_0", "label_1", "label_none", "label_none"], ["labels"], axis=1),
        node("Add", ["label_none", "two"], ["counts"]),
        node("Squeeze", ["counts", "axis_1"], ["num_detections"]),
        node("Cast", ["image_sizes_hw"], ["sizes"], to=TensorProto.FLOAT),
        node("Gather", ["sizes", "index_h"], ["height"], axis=1),
        node("Gather", ["sizes", "index_w"], ["width"], axis=1),
        node("Mul", ["width", "half"], ["half_width"]),
        node("Concat", ["half_width", "zero", "width", "height"], ["box_0"], axis=1),  # [B, 4]
        node("Mul", ["height", "quarter"], ["quarter_height"]),
        node("Mul", ["width", "quarter"], ["quarter_width"]),
        node("Concat", ["zero", "zero", "quarter_width", "quarter_height"], ["box_1"], axis=1),
        node("Mul", ["box_0", "none"], ["box_none"]),
        *(node("Unsqueeze", [name, "axis_1"], [f"{name}_row"]) for name in ("box_0", "box_1", "box_none")),
        node("Concat", ["box_0_row", "box_1_row", "box_none_row", "box_none_row"], ["boxes"], axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "colours",
        [value("images", TensorProto.UINT8, ["B", "H", "W", 3]), value("image_sizes_hw", TensorProto.INT64, ["B", 2])],
        [
            value("boxes", TensorProto.FLOAT, ["B", 4, 4]),
            value("scores", TensorProto.FLOAT, ["B", 4]),
            value("labels", TensorProto.INT64, ["B", 4]),
            value("num_detections", TensorProto.INT64, ["B"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model
