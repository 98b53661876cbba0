"""int8: a traced fp32 graph with 8-bit weights and activations where the plan says so, as pairs of QuantizeLinear and DequantizeLinear.

Weights are symmetric with one scale a channel, activations asymmetric uint8 with the range that they had on given pictures: the types that
CPUs with VNNI multiply fastest. The boxes' arithmetic, the softmax and both NMS stay as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from export.calibration import Calibration, activations
from export.precision import PLANS, weight_part

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
FOLLOWERS = frozenset({"Relu", "Clip", "Add", "MaxPool", "Resize"})
"""Quantised where all that they take comes from quantised nodes: they then cost no step between the types."""


def chosen_nodes(model: onnx.ModelProto) -> list[NodeProto]:
    """The nodes to quantise, in the graph's order.

    Raises:
        ValueError: the graph has no layer that the plan names.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    plan = PLANS["int8"]
    quantised: set[str] = set()
    chosen = []
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            wanted = _is_weighted(node, constants, plan)
        else:
            data = activations(node, constants)
            wanted = node.op_type in FOLLOWERS and bool(data) and quantised.issuperset(data)
        if wanted:
            chosen.append(node)
            quantised.update(node.output)
    if not chosen:
        raise ValueError("no weight of the graph has a name that the int8 plan knows; int8 takes graphs that `build_graph` made")
    return chosen


def _is_weighted(node: NodeProto, constants: Mapping[str, onnx.TensorProto], plan: Mapping[str, str]) -> bool:
    weight = constants.get(node.input[1])
    part = None if weight is None else weight_part(weight.name)
    return part is not None and plan[part] == "int8"


def quantise(model: onnx.ModelProto, nodes: Sequence[NodeProto], calibration: Calibration) -> onnx.ModelProto:
    """The graph with `nodes` in int8.

    Args:
        model: in fp32; left as it is.
        nodes: as `chosen_nodes` gives them.
    """
    # imported late: the package configures logging and loads slowly, and only int8 needs it
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    ranges = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in calibration.ranges.items()}
    work = onnx.ModelProto()
    work.CopyFrom(model)
    quantiser: Any = QDQQuantizer(
        work,
        True,  # one scale a channel
        False,  # all eight bits: without VNNI a CPU may saturate its 16-bit sums, and be slow
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, ranges),
        [node.name for node in nodes],
        [],
        sorted({node.op_type for node in nodes}),
        {},
    )
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it explains every scale that it adjusts
    try:
        quantiser.quantize_model()
        quantiser.model.topological_sort()
    finally:
        root.setLevel(level)
    result: onnx.ModelProto = quantiser.model.model
    result.producer_name = model.producer_name
    return result
