"""Graphs for runtimes that know operator set 17 only; the exporter writes 18 and later.

Between 17 and 18 our operators changed in where an argument comes from, not in what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import NodeProto, helper, numpy_helper

OLDEST, TRACED = 17, 18
IR_OF_OLDEST = 8
"""The file format of operator set 17's time; runtimes of that time refuse later ones."""

REDUCTIONS = frozenset({"ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2"})
"""Take their axes as an attribute up to 17 and as an input from 18 on; ReduceSum changed long before."""
NEW_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Pad": {},
    "ScatterND": {},
    "ScatterElements": {},
}
"""Operators whose 18 equals their 17 while these attributes, which are new, say this."""
MOST_INPUTS = {"Pad": 3}
"""Of the operators above, where 18 allows one more."""


class OpsetError(ValueError):
    """A node that operator set 17 cannot express."""


def lower_to_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in operator set 17.

    Args:
        model: in operator set 18; left as it is.

    Raises:
        OpsetError: a node needs 18.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in lowered.graph.initializer}
    for node in lowered.graph.node:
        _lower(node, constants)
        del node.metadata_props[:]  # newer than the file format
    for entry in lowered.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = OLDEST
    lowered.ir_version = IR_OF_OLDEST
    return lowered


def _lower(node: NodeProto, constants: Mapping[str, onnx.TensorProto]) -> None:
    if not _changed(node.op_type):
        return
    if node.op_type in REDUCTIONS:
        _axes_to_attribute(node, constants)
    elif node.op_type in NEW_DEFAULTS:
        _drop_defaults(node, NEW_DEFAULTS[node.op_type])
    elif node.op_type == "Split":
        _keep_attributes(node, {"axis"})  # equal parts, as many as outputs, are what 17 gives where no sizes are named
    else:
        raise OpsetError(f"{node.name}: {node.op_type} of operator set {TRACED} has no equal in {OLDEST}")


def _changed(op_type: str) -> bool:
    return int(onnx.defs.get_schema(op_type, TRACED).since_version) > OLDEST


def _axes_to_attribute(node: NodeProto, constants: Mapping[str, onnx.TensorProto]) -> None:
    if any(attribute.name == "noop_with_empty_axes" and attribute.i for attribute in node.attribute):
        raise OpsetError(f"{node.name}: {node.op_type} that may leave all axes alone needs operator set {TRACED}")
    _keep_attributes(node, {"keepdims"})
    if len(node.input) < 2 or not node.input[1]:
        return  # over all axes, in both
    if node.input[1] not in constants:
        raise OpsetError(f"{node.name}: {node.op_type} over axes that are computed needs operator set {TRACED}")
    axes: list[int] = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", axes))


def _drop_defaults(node: NodeProto, defaults: Mapping[str, object]) -> None:
    if len(node.input) > MOST_INPUTS.get(node.op_type, len(node.input)) and node.input[-1]:
        raise OpsetError(f"{node.name}: {node.op_type} over chosen axes needs operator set {TRACED}")
    for attribute in list(node.attribute):
        if attribute.name in defaults:
            if helper.get_attribute_value(attribute) != defaults[attribute.name]:
                raise OpsetError(f"{node.name}: {node.op_type} uses {attribute.name}, which operator set {OLDEST} does not know")
            node.attribute.remove(attribute)


def _keep_attributes(node: NodeProto, names: set[str]) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name not in names]:
        node.attribute.remove(attribute)
