"""Inspection and placement audit of a real file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from tiny_detector import BUCKETS, Exported

from export import audit as audit_module
from export import inspect
from export.__main__ import main
from export.profiling import NodeRun, profile

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


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


def test_inspect_manifest_is_json(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(exported.file), "--manifest"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_inspect_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.onnx")]) == 1
    assert "there is no file" in capsys.readouterr().out


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


def test_audit_on_the_cpu_passes_and_shares_add_up(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "audit.json"
    assert audit_module.main([str(exported.file), "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert (found["measured"], found["passed"], found["misplaced"]) == (True, True, [])
    assert {entry["provider"] for entry in found["nodes"]} == {CPU}
    assert "Conv" in capsys.readouterr().out


def test_audit_without_the_provider_reads_the_table(exported: Exported) -> None:
    model = onnx.load(exported.file)
    found = audit_module._on_paper(model, "cuda", [])
    assert found.passed
    assert not found.measured
    model.graph.node[0].op_type = "MaxRoiPool"
    assert audit_module._on_paper(model, "cuda", []).misplaced == ["1 x MaxRoiPool: no CUDA kernel in ONNX Runtime 1.31.1"]


def test_audit_finds_nodes_and_copies_off_the_device() -> None:
    indices = (("int64", (3,)),)
    good = [
        run("Conv", CUDA),
        run("Shape", CPU, outputs=indices),
        run("Gather", CPU, outputs=indices),
        run("MemcpyToHost", CUDA, outputs=indices),
    ]
    assert audit_module.judge(good, "cuda").passed
    stray = audit_module.judge([*good, run("RoiAlign", CPU)], "cuda")
    assert stray.misplaced == ["node_RoiAlign (RoiAlign) ran on CPUExecutionProvider"]
    copied = audit_module.judge([*good, run("MemcpyToHost", CUDA)], "cuda")
    assert copied.copies == ["node_MemcpyToHost (MemcpyToHost)"]
    assert not copied.passed
    assert audit_module.judge([run("Conv", CUDA)], "tensorrt").passed  # CUDA beside TensorRT is no detour


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
