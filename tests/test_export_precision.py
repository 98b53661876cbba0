"""Precisions below fp32: the plan as data, the casts in torch, int8 on a small graph, operator set 17, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_detector import save_tiny, tiny_detector

from export import pictures
from export.__main__ import main
from export.accuracy import Scores, broken_gate, unmeasured
from export.calibration import Calibration, CalibrationError, calibration_files
from export.graph import GraphOptions, build_graph, save
from export.job import Job, first_manifest
from export.opset import OpsetError, lower_to_17
from export.precision import KINDS, MAX_AP_DROP, PLANS, described, islands, recorded, set_types, weight_part
from export.quantize import chosen_nodes, quantise
from export.report import accuracy_in_words
from export.verify import Case, Gates, Report, against_eager, in_bucket
from model.checkpoint import load_checkpoint
from service.runtime import OnnxRuntime


def test_every_plan_names_the_same_parts_and_keeps_coordinates_in_fp32() -> None:
    assert {tuple(plan) for plan in PLANS.values()} == {tuple(PLANS["fp32"])}
    for kind in KINDS:
        assert all(PLANS[kind][part] == "fp32" for part in ("normalisation", "proposals", "RoI pooling", "detections"))
    assert {"RPN outputs", "head outputs"} <= set(islands("int8"))
    assert islands("fp32") == []
    assert described(recorded("int8")).startswith("int8; in fp32: normalisation")


def test_every_weight_has_a_part() -> None:
    assert {weight_part(name) for name, _ in tiny_detector().named_parameters()} <= set(PLANS["int8"])
    assert weight_part("head.cls_score.weight") == "head outputs"
    assert weight_part("anchors.base_0") is None


def test_int8_keeps_the_first_layers_of_every_body_in_fp32() -> None:
    assert PLANS["int8"]["stem"] == "fp32"
    detector = tiny_detector()
    first = next(name for name, _ in detector.backbone.body.named_parameters())
    assert weight_part(f"backbone.body.{first}") == "stem"
    block = ("features.1.conv.0.0", "features.1.block.1.0", "conv1")
    assert {weight_part(f"backbone.body.{name}.weight") for name in block} == {"stem"}
    assert {weight_part(f"backbone.body.{name}.weight") for name in ("features.10.conv.0.0", "layer1.0.conv1")} == {"backbone"}


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision_in_torch_stays_near_and_answers_in_fp32(kind: str) -> None:
    exact, half = tiny_detector(), tiny_detector()
    set_types(half, kind)
    assert half.backbone.body.features[0][0].weight.dtype == (torch.float16 if kind == "fp16" else torch.bfloat16)
    images = torch.from_numpy(pictures.smear((128, 160), 3)[None].copy())
    with torch.inference_mode():
        expected, answer = exact(images, torch.tensor([[128, 160]])), half(images, torch.tensor([[128, 160]]))
    assert answer.boxes.dtype == answer.scores.dtype == torch.float32
    assert abs(int(answer.num_detections[0]) - int(expected.num_detections[0])) <= 5
    assert (answer.scores[0, 0] - expected.scores[0, 0]).abs() < 0.1


def small_graph() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "backbone.body.weight": rng.normal(size=(8, 4, 3, 3)),
        "backbone.body.bias": rng.normal(size=8),
        "rpn.cls_logits.weight": rng.normal(size=(2, 8, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "backbone.body.weight", "backbone.body.bias"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "rpn.cls_logits.weight"], ["y"], name="logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 6, 9])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_int8_quantises_the_plan_s_parts_alone_and_stays_near() -> None:
    model = small_graph()
    nodes = chosen_nodes(model)
    assert [node.name for node in nodes] == ["conv", "relu"]  # the output convolution stays
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 9)).astype(np.float32)
    quantised = quantise(model, nodes, Calibration({"x": (-4.0, 4.0), "a": (-20.0, 20.0), "b": (0.0, 20.0)}, 1))
    onnx.checker.check_model(quantised)
    assert {"rpn.cls_logits.weight", "backbone.body.weight_quantized"} <= {tensor.name for tensor in quantised.graph.initializer}
    expected, answer = (ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (model, quantised))
    assert not np.array_equal(expected, answer)
    assert np.abs(expected - answer).max() < 0.05 * np.abs(expected).max()


def test_operator_set_17_gives_the_same_numbers() -> None:
    model = small_graph()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    model.graph.node.append(helper.make_node("ReduceMean", ["y", "axes"], ["z"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 6, 9]))
    lowered = lower_to_17(model)
    onnx.checker.check_model(lowered, full_check=True)
    assert lowered.opset_import[0].version == 17
    x = np.ones((1, 4, 6, 9), np.float32)
    for a, b in zip(*(ort.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (model, lowered)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_operator_set_19_gives_the_network_s_answer(tmp_path: Path) -> None:
    """Of the whole exporter: 17 and 18 share a trace, 19 has one of its own."""
    checkpoint = save_tiny(tmp_path / "best.pt")
    detector, job = tiny_detector(), Job(checkpoint, "tiny", tmp_path, graph=GraphOptions(opset=19))
    model = build_graph(detector, job.graph)
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [19]
    onnx.checker.check_model(model, full_check=True)
    save(model, first_manifest(job, load_checkpoint(checkpoint), 1), tmp_path / "model.onnx")
    runtime = OnnxRuntime(tmp_path / "model.onnx", provider="cpu")
    case = Case("opset 19", (in_bucket(pictures.street((120, 150), 3), (128, 160)),))
    row = against_eager(detector, runtime, case, Gates(), shake=False)
    runtime.close()
    assert row.tally.matched > 20
    assert Report(Gates(full_share=0.2), (row,)).failures == []


def test_what_17_cannot_say_is_refused() -> None:
    model = small_graph()
    model.graph.node.append(helper.make_node("Mish", ["y"], ["z"], name="new"))
    with pytest.raises(OpsetError, match="new: Mish"):
        lower_to_17(model)


def test_gates_by_precision() -> None:
    lost = {"ap": Scores(0.600, 0.602, 0.6)}
    assert "allowed 0.1" in str(broken_gate("fp16", lost))
    assert broken_gate("int8", lost) is None
    assert broken_gate("fp16", {"ap": Scores(0.61, 0.60, 0.61)}) is None
    assert broken_gate("fp32", {"voc_ap50": Scores(0.61, 0.60, 0.61)}) is not None
    assert MAX_AP_DROP["int8"] == 0.003
    for unknown in (-1.0, float("nan")):
        for kind in KINDS:
            assert "unknown" in str(broken_gate(kind, {"ap": Scores(unknown, unknown, unknown)}))
            assert "unknown" in str(broken_gate(kind, {"ap": Scores(0.6, unknown, 0.6)}))
    assert "Not checked" in accuracy_in_words(unmeasured("int8"))


@pytest.mark.parametrize(("options", "sentence"), [(["fp16"], "--data"), (["int8"], "--calibrate")])
def test_a_precision_that_cannot_be_proven_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    command = [str(save_tiny(tmp_path / "best.pt")), "--name", "tiny", "--repository", str(tmp_path / "models"), "--precision", *options]
    assert main(command) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_missing_calibration_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no"):
        calibration_files(tmp_path / "none", 5, class_names=("a",))
