"""What ONNX Runtime's CUDA provider leaves on the CPU and copies: its rule on graphs by hand, and on what our own geometry exports to."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from export.placement import DEVICE, HOST, place
from export.roi_pool import table_pooling
from model.anchors import AnchorGenerator
from model.config import RoIConfig
from model.ranking import take_rows, top_rows
from model.roi_pool import pool_on_canvas

Edge = tuple[str, list[str], str]


def graph(*edges: Edge, kind: int = TensorProto.FLOAT, constants: dict[str, list[int]] | None = None) -> onnx.ModelProto:
    """From an input `x` of a kind to the last edge's output."""
    nodes = [helper.make_node(op, inputs, [output], name=f"node_{output}", **_attributes(op)) for op, inputs, output in edges]
    stored = [helper.make_tensor(name, TensorProto.INT64, [len(values)], values) for name, values in (constants or {}).items()]
    given = [helper.make_tensor_value_info("x", kind, ["rows", 4])]
    wanted = [helper.make_tensor_value_info(edges[-1][2], TensorProto.UNDEFINED, None)]
    return helper.make_model(helper.make_graph(nodes, "by hand", given, wanted, stored), opset_imports=[helper.make_opsetid("", 18)])


def _attributes(op: str) -> dict[str, int]:
    return {"Cast": {"to": TensorProto.FLOAT}, "Concat": {"axis": 0}}.get(op, {})


def host_nodes(model: onnx.ModelProto) -> list[str]:
    return [node.name for node, where in zip(model.graph.node, place(model).providers, strict=True) if where == HOST]


def test_arithmetic_of_shapes_stays_on_the_host_and_a_wanted_size_is_no_copy() -> None:
    model = graph(("Shape", ["x"], "shape"), ("Mul", ["shape", "two"], "twice"), ("Expand", ["x", "twice"], "y"), constants={"two": [2]})
    assert host_nodes(model) == ["node_twice"]
    assert place(model).copies == ()


def test_a_size_that_meets_a_kernel_is_copied_to_the_device() -> None:
    model = graph(("Shape", ["x"], "shape"), ("Cast", ["shape"], "number"), ("Relu", ["x"], "r"), ("Mul", ["r", "number"], "y"))
    assert host_nodes(model) == ["node_number"]
    (copy,) = place(model).copies
    assert (copy.value, copy.to_host) == ("number", False)
    assert str(copy) == "number, from node_number (Cast) to node_y (Mul): host to device"


def test_a_size_that_the_device_computed_is_copied_to_the_host() -> None:
    model = graph(("Neg", ["x"], "counts"), ("Expand", ["x", "counts"], "y"), kind=TensorProto.INT64)
    (copy,) = place(model).copies
    assert (copy.value, copy.to_host) == ("counts", True)
    assert place(model).providers == (DEVICE, DEVICE)


def test_a_range_is_written_on_the_device() -> None:
    edges: list[Edge] = [
        ("Shape", ["x"], "n"),
        ("Add", ["n", "one"], "m"),
        ("Range", ["n", "m", "one"], "range"),
        ("Mul", ["x", "range"], "y"),
    ]
    model = graph(*edges, kind=TensorProto.INT64, constants={"one": [1]})
    assert host_nodes(model) == ["node_m"]
    assert place(model).copies == ()


def test_half_precision_and_large_constants_keep_a_node_on_the_device() -> None:
    long = {"long": [1] * 101}
    many = graph(("Shape", ["x"], "shape"), ("Mul", ["shape", "long"], "y"), constants=long)
    assert host_nodes(many) == []
    assert [copy.value for copy in place(many).copies] == ["shape"]


def test_an_operator_without_kernel_runs_on_the_host_between_two_copies() -> None:
    model = graph(("Relu", ["x"], "before"), ("Det", ["before"], "middle"), ("Add", ["before", "middle"], "y"))
    placed = place(model)
    assert placed.providers == (DEVICE, HOST, DEVICE)
    assert [(copy.value, copy.to_host) for copy in placed.copies] == [("before", True), ("middle", False)]
    assert "Det: no CUDA kernel" in placed.problems[1]


class Geometry(nn.Module):
    """Every place of the detector that computes with the size of a tensor: anchors, selection, pooling; no weights."""

    def __init__(self, config: RoIConfig) -> None:
        super().__init__()
        self.config = config
        self.pool = table_pooling(1024, 16) if config.pool == "max" else pool_on_canvas
        self.anchors = AnchorGenerator([[16.0]] * 4, [1.0])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        levels = [F.avg_pool2d(images, stride) for stride in (8, 16, 32)]
        levels.append(F.max_pool2d(levels[-1], 1, 2))  # the pyramid's extra level, whose stride is no constant
        padded_hw = (images.shape[2], images.shape[3])
        anchors = torch.cat(self.anchors(levels, padded_hw))
        scores = torch.cat([level[:, 0].flatten(1) for level in levels], dim=1)
        best, index = top_rows(scores, 20)
        features = levels[1:2] if self.config.pool == "max" else levels[:-1]
        return best, self.pool(features, take_rows(anchors, index), padded_hw, self.config)


@pytest.mark.parametrize("pool", ["align", "align_legacy", "max"])
def test_sizes_in_our_geometry_are_computed_where_they_are_used(pool: str) -> None:
    config = RoIConfig(pool=pool, canonical_size=64.0, canonical_level=1)  # type: ignore[arg-type]
    dims = {0: torch.export.Dim("batch"), 2: 32 * torch.export.Dim("rows"), 3: 32 * torch.export.Dim("columns")}
    program = torch.onnx.export(
        Geometry(config).eval(), (torch.rand(2, 3, 96, 224),), dynamo=True, opset_version=18, dynamic_shapes=(dims,), verbose=False
    )
    assert program is not None
    placed = place(program.model_proto)
    assert placed.providers.count(HOST) > 10, "sizes are computed, on the host"
    assert placed.problems == {}
    assert [str(copy) for copy in placed.copies] == []
