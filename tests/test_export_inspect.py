"""Inspection and placement audit of a real file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console
from service_onnx import write_model
from tiny_detector import BUCKETS, Exported

from export import audit as audit_module
from export import inspect
from export.__main__ import main
from export.profiling import NodeRun, profile
from service.providers import RuntimeLoadError

CPU = "CPUExecutionProvider"


def run(
    op: str, provider: str, *, outputs: tuple[tuple[str, tuple[int, ...]], ...] = (("float", (1, 64, 8, 8)),), seconds: float = 0.001
) -> NodeRun:
    return NodeRun(f"node_{op}", op, provider, seconds, (), outputs)


def test_inspect_prints_what_an_operator_asks(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(exported.file)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "tiny, version 1",
        "1 red, 2 white, 3 platelet",
        "uint8",
        "[batch, 32*rows, 32*columns, 3]",
        "128x160",
        "GMAC",
        "drawn pictures",
        "passed True",
    ):
        assert expected in text


def test_names_are_shown_as_they_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets that look like markup, colons that look like emoji."""
    path = write_model(tmp_path / "[bold]", class_names=["RBC [old]", "[/x]", ":cat: [red]"])
    assert main(["inspect", str(path)]) == 0
    assert "1 RBC [old], 2 [/x], 3 :cat: [red]" in capsys.readouterr().out
    (tmp_path / "[bold]" / "bad.onnx").write_bytes(b"no protobuf at all")
    assert main(["inspect", str(tmp_path / "[bold]" / "bad.onnx")]) == 1
    assert "[bold]/bad.onnx is no ONNX file" in capsys.readouterr().err


def test_inspect_manifest_is_json(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(exported.file), "--manifest"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_inspect_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.onnx"), "--repository", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "is no model file, version folder or version" in told.err
    assert told.out == ""


def test_inspect_takes_what_compare_takes(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    repository = exported.folder.parent.parent
    for target in (str(exported.folder), str(exported.folder.parent), "tiny", "tiny@1"):
        assert main(["inspect", target, "--repository", str(repository), "--manifest"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == "tiny"


@pytest.mark.parametrize("options", [[], ["--manifest"]])
def test_inspect_of_a_foreign_file_is_a_sentence(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf at all")
    onnx.save(quantised_product(), tmp_path / "foreign.onnx")
    for name, sentence in {"bad.onnx": "is no ONNX file", "foreign.onnx": "no 'manifest' in the file's metadata"}.items():
        assert main(["inspect", str(tmp_path / name), *options]) == 1
        told = capsys.readouterr()
        assert sentence in told.err
        assert told.out == ""


def test_inspect_shows_the_rest_of_a_file_that_does_not_run_here(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> list[NodeRun]:
        raise RuntimeLoadError("no kernel for Conv in bf16")

    monkeypatch.setattr("export.inspect.profile", refuse)
    assert main(["inspect", str(exported.file)]) == 0
    text = capsys.readouterr().out
    for expected in ("tiny, version 1", "parameters", "were not measured", "no kernel for Conv in bf16"):
        assert expected in text


def quantised_product() -> onnx.ModelProto:
    """A product by a weight that is stored in int8, as quantisation writes it: 6 x 8 by 8 x 5."""
    stored = numpy_helper.from_array(np.ones((8, 5), np.int8), "head.body.fc6.weight_quantized")
    constants = [stored, numpy_helper.from_array(np.float32(0.5), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantise"),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantise"),
        onnx.helper.make_node("DequantizeLinear", [stored.name, "scale", "zero"], ["w"], name="weight"),
        onnx.helper.make_node("MatMul", ["d", "w"], ["y"], name="product"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [6, side]) for name, side in (("x", 8), ("y", 5))]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))


def test_cost_sees_weights_behind_their_quantisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(kind: str, *shape: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return ((kind, shape),)

    ran = [
        NodeRun("quantise", "QuantizeLinear", CPU, 0.0, tensor("float", 6, 8), tensor("int8", 6, 8)),
        NodeRun("dequantise", "DequantizeLinear", CPU, 0.0, tensor("int8", 6, 8), tensor("float", 6, 8)),
        NodeRun("weight", "DequantizeLinear", CPU, 0.0, tensor("int8", 8, 5), tensor("float", 8, 5)),
        NodeRun("product", "MatMul", CPU, 0.0, tensor("float", 6, 8) + tensor("float", 8, 5), tensor("float", 6, 5)),
    ]
    monkeypatch.setattr("export.inspect.profile", lambda *_, **__: ran)
    model = quantised_product()
    price = inspect.cost(tmp_path, model, (6, 8))
    assert price.gmac == {"backbone": 0, "fpn": 0, "rpn": 0, "head": 6 * 5 * 8 / 1e9}
    assert price.peak_bytes == 6 * 8 + 6 * 5 * 4  # the product beside its int8 input
    assert inspect.weight_bytes(model) == 8 * 5 + 4 + 1
    assert inspect.parameters(model) == {"head": 8 * 5}


def test_an_input_with_a_preset_value_is_optional(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = quantised_product()
    model.graph.input.append(onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, []))
    console = Console(width=150)
    console.print(inspect._interface(model))
    assert "scale (optional)" in capsys.readouterr().out


def test_multiplications_by_hand() -> None:
    conv = NodeRun("c", "Conv", CPU, 0.0, (("float", (1, 8, 10, 12)), ("float", (16, 8, 3, 3))), (("float", (1, 16, 10, 12)),))
    assert inspect.multiplications(conv) == 16 * 10 * 12 * 8 * 9
    gemm = NodeRun("g", "Gemm", CPU, 0.0, (("float", (30, 50)), ("float", (50, 7))), (("float", (30, 7)),))
    assert inspect.multiplications(gemm) == 30 * 50 * 7
    assert inspect.multiplications(run("Relu", CPU)) == 0


def test_cost_matches_the_network(exported: Exported) -> None:
    model = onnx.load(exported.file)
    price = inspect.cost(exported.file, model, BUCKETS[0])
    config = exported.detector.config
    rois, pooled = config.rpn.post_nms_top_n_test, config.backbone.fpn_channels * config.roi.pool_size**2
    hidden, outputs = config.roi.hidden, 5 * (config.num_classes + 1)
    assert price.gmac["head"] == pytest.approx(rois * (pooled * hidden + hidden * hidden + hidden * outputs) / 1e9)
    cells = sum((BUCKETS[0][0] // s) * (BUCKETS[0][1] // s) for s in (8, 16, 32)) + 2 * 3  # the extra level is 2 x 3
    channels, anchors = config.backbone.fpn_channels, 3
    assert price.gmac["rpn"] == pytest.approx(cells * channels * (9 * channels + 5 * anchors) / 1e9)
    assert 1e6 < price.peak_bytes < 1e8


def test_parameters_are_those_of_the_network(exported: Exported) -> None:
    counted = inspect.parameters(onnx.load(exported.file))
    assert counted["head"] == sum(p.numel() for p in exported.detector.head.parameters())
    assert counted["rpn"] == sum(p.numel() for p in exported.detector.rpn.parameters())


def test_both_kinds_of_nms_count_the_same_parameters(exported: Exported, dense_graph: onnx.ModelProto) -> None:
    model = onnx.load(exported.file)
    assert inspect.parameters(dense_graph) == inspect.parameters(model)
    assert inspect.weight_bytes(dense_graph) > inspect.weight_bytes(model)  # the masks take memory all the same


def test_audit_on_the_cpu_passes_and_shares_add_up(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "audit.json"
    assert audit_module.main([str(exported.file), "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert (found["measured"], found["passed"], found["misplaced"]) == (True, True, [])
    assert {entry["provider"] for entry in found["nodes"]} == {CPU}
    assert "Conv" in capsys.readouterr().out


def test_profile_has_times_and_shapes(exported: Exported) -> None:
    ran = profile(exported.file, BUCKETS[1], batch_size=2, runs=2)
    pooled = [node for node in ran if node.op == "RoiAlign"]
    assert len(pooled) == 1
    assert pooled[0].outputs == (("float", (2 * 60, 32, 7, 7)),)
    assert all(node.seconds >= 0 for node in ran)
    assert sum(node.seconds for node in ran) > 0


def test_audit_of_a_foreign_file_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "foreign.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])]
    )
    onnx.save(onnx.helper.make_model(graph), path)
    assert audit_module.main([str(path)]) == 1
    assert "no 'manifest'" in capsys.readouterr().err
