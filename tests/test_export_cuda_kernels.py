"""Operators, versions and types against the registry of ONNX Runtime's CUDA kernels."""

from __future__ import annotations

import re

import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT
from onnx import TensorProto, helper

from export.cuda_kernels import counted, problem_of_each, registry


def without_kernel(model: onnx.ModelProto) -> list[str]:
    return counted(problem_of_each(model))


def one_node(op: str, kind: int = TensorProto.FLOAT, *, opset: int = 18, inputs: int = 1, **attributes: object) -> onnx.ModelProto:
    names = [f"in_{i}" for i in range(inputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["out"], **attributes)],
        "one",
        [helper.make_tensor_value_info(name, kind, [4, 4]) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.UNDEFINED, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_the_registry_is_of_the_version_that_is_installed() -> None:
    version, kernels = registry()
    pinned = re.search(r"^onnxruntime-gpu==(\S+)", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert version == pinned[1], "write export/cuda_kernels.json anew from the registry of the pinned version"
    assert version.rsplit(".", 1)[0] == ort.__version__.rsplit(".", 1)[0]
    assert len(kernels) > 100


def test_known_facts_hold() -> None:
    kernels = registry()[1]
    assert "MaxRoiPool" not in kernels
    assert [(first, last) for first, last, _ in kernels["RoiAlign"]] == [(10, 15), (16, 21), (22, None)]
    assert "float16" in kernels["RoiAlign"][1][2]["T1"].split()
    assert "NonMaxSuppression" in kernels


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (one_node("MaxRoiPool", inputs=2, pooled_shape=[2, 2]), "MaxRoiPool: no CUDA kernel in ONNX Runtime"),
        (one_node("Pad", TensorProto.INT64, inputs=2), "Pad on int64: no CUDA kernel for these types"),
        (one_node("Tile", TensorProto.BOOL, inputs=2), "Tile on bool: no CUDA kernel for these types"),
        (one_node("Max", TensorProto.INT8, inputs=3), "Max on int8"),
        (one_node("Det"), "Det: no CUDA kernel"),
    ],
)
def test_what_cuda_lacks_is_named(model: onnx.ModelProto, sentence: str) -> None:
    (problem,) = without_kernel(model)
    assert problem.startswith(f"1 x {sentence}")


@pytest.mark.parametrize(
    "model",
    [
        one_node("Xor", TensorProto.BOOL, inputs=2),
        one_node("Max", TensorProto.FLOAT16, inputs=3),
        one_node("Conv", TensorProto.FLOAT16, inputs=2),
        one_node("HardSwish", opset=18),
        one_node("Sigmoid", TensorProto.BFLOAT16),
    ],
)
def test_what_cuda_has_passes(model: onnx.ModelProto) -> None:
    assert without_kernel(model) == []


def test_a_version_that_no_kernel_was_registered_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoiAlign before ONNX Runtime 1.25: registered for opset 10 alone, so opset 16 fell to the CPU."""
    monkeypatch.setattr("export.cuda_kernels.registry", lambda: ("1.24.0", {"RoiAlign": [(10, None, {"T1": "float double"})]}))
    (problem,) = without_kernel(one_node("RoiAlign", inputs=3))
    assert problem == "1 x RoiAlign of opset 16: the CUDA kernels of ONNX Runtime 1.24.0 are for other versions"
    assert without_kernel(one_node("RoiAlign", inputs=3, opset=11)) == []
