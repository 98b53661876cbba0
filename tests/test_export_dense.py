"""A file with dense NMS goes through everything that the default one does: the job, int8's choice of nodes, inspection, the parts table."""

from __future__ import annotations

import onnx
import pytest
from tiny_detector import Exported

from benchmarks.runtime_parts import PARTS, label
from export.audit import on_paper
from export.inspect import parameters
from export.quantize import chosen_nodes


@pytest.fixture(scope="module")
def default(exported: Exported) -> onnx.ModelProto:
    return onnx.load(str(exported.file))


def test_weights_have_the_names_that_the_parts_are_known_by(dense_graph: onnx.ModelProto, default: onnx.ModelProto) -> None:
    of_parts = {part: count for part, count in parameters(default).items() if part != "other"}
    assert len(of_parts) == 4
    assert {part: parameters(dense_graph)[part] for part in of_parts} == of_parts


def test_int8_refuses_a_graph_whose_weights_it_does_not_know(dense_graph: onnx.ModelProto) -> None:
    renamed = onnx.ModelProto()
    renamed.CopyFrom(dense_graph)
    for node in renamed.graph.node:
        node.input[:] = [f"wrapped.{name}" if name else "" for name in node.input]
    for tensor in renamed.graph.initializer:
        tensor.name = f"wrapped.{tensor.name}"
    with pytest.raises(ValueError, match="no weight of the graph"):
        chosen_nodes(renamed)


def test_int8_chooses_the_same_layers(dense_graph: onnx.ModelProto, default: onnx.ModelProto) -> None:
    def layers(model: onnx.ModelProto) -> list[str]:
        weights = {tensor.name for tensor in model.graph.initializer}
        return [name for node in chosen_nodes(model) for name in node.input if name in weights and name.endswith(".weight")]

    assert len(layers(default)) > 10
    assert layers(dense_graph) == layers(default)


def test_every_part_of_the_graph_has_nodes(dense_graph: onnx.ModelProto) -> None:
    assert set(label(dense_graph).values()) == set(PARTS)


def test_on_cuda_nothing_is_copied_between_host_and_device_and_nothing_waits(
    dense_graph: onnx.ModelProto, default: onnx.ModelProto
) -> None:
    """One such copy would forbid CUDA graphs."""
    found = on_paper(dense_graph, "cuda", "no GPU needed")
    assert (found.misplaced, found.copies, found.waits) == ((), (), ())
    assert not on_paper(default, "cuda", "no GPU needed").passed
