"""Which part of the network a node of a profile belongs to, what the part costs, and how near it comes to the machine's roofline.

Parts are found by data flow, not by names that an exporter happens to give: a node stands between the weights that it sees and those
that will see its result.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from export.inspect import ELEMENT_BYTES, multiplications, part_of
from export.profiling import NodeRun

PARTS = ("backbone", "FPN", "RPN", "proposals", "RoIAlign", "head", "final NMS")
POST_PROCESSING = ("proposals", "RoIAlign", "final NMS")
WEIGHTED = {"backbone": 0, "fpn": 1, "rpn": 2, "head": 3}
BACKBONE, FPN, RPN, HEAD = range(4)
NONE_AFTER = 9
FUSED_NAMES = re.compile(r"^fused |_nchwc$|/GatherSliceToSplitFusion$|_token_\d+$")
"""What ONNX Runtime's optimiser adds to the names of nodes that it changes."""

PEAK_PRODUCTS = ((1024, 1024, 1024), (1024, 8192, 1024))
"""(rows, inner, columns) of matrix products by a weight, which ONNX Runtime reorders once as it does a layer's."""
STREAM_BYTES = 2**28
GPU_PEAKS = {"H100": (989.0, 3.35), "H200": (989.0, 4.8), "A100": (312.0, 2.0), "L4": (121.0, 0.3), "T4": (65.0, 0.32)}
"""Dense fp16 TFLOP/s and TB/s of memory, from the makers' data sheets."""


@dataclass(frozen=True)
class Peak:
    """What the machine could do: multiply-accumulates and bytes a second."""

    macs_per_s: float
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class PartCost:
    """One row: seconds measured, arithmetic and traffic of the tensors that its nodes read and write.

    Attributes:
        roofline: time that the machine would need at its peaks, over the time that was measured. Traffic is reckoned at main memory's
            peak, so a part whose tensors stay in the caches comes out above 1.
    """

    part: str
    nodes: int
    seconds: float
    share: float
    gmac: float
    megabytes: float
    roofline: float


def label(model: onnx.ModelProto) -> dict[str, str]:
    """Part of every node and of every value, by name."""
    nodes = list(model.graph.node)
    weights = {tensor.name for tensor in model.graph.initializer}
    own = [WEIGHTED.get(part_of([name for name in node.input if name in weights]) or "") for node in nodes]
    before, after, around = _flow(model, own)
    names: dict[str, str] = {}
    for index, node in enumerate(nodes):
        part = _part(own[index], before[index], after[index], around[index])
        names.update(dict.fromkeys([node.name, *node.output], part))
    return names


def _flow(model: onnx.ModelProto, own: Sequence[int | None]) -> tuple[list[int], list[int], list[bool]]:
    """For every node: the last weights before it, the first behind it, and whether its result gets out without passing the head."""
    nodes = list(model.graph.node)
    stage: dict[str, int] = {}
    before = []
    for node, weighted in zip(nodes, own, strict=True):
        seen = max((stage.get(name, -1) for name in node.input), default=-1)
        before.append(seen)
        stage.update(dict.fromkeys(node.output, max(seen, -1 if weighted is None else weighted)))
    first: dict[str, int] = {}
    free = {value.name for value in model.graph.output}
    after, around = [NONE_AFTER] * len(nodes), [False] * len(nodes)
    for index in reversed(range(len(nodes))):
        node, weighted = nodes[index], own[index]
        after[index] = min((first.get(name, NONE_AFTER) for name in node.output), default=NONE_AFTER)
        around[index] = any(name in free for name in node.output)
        nearest = after[index] if weighted is None else min(weighted, after[index])
        for name in node.input:
            first[name] = min(first.get(name, NONE_AFTER), nearest)
            if around[index] and weighted != HEAD:
                free.add(name)
    return before, after, around


def _part(own: int | None, before: int, after: int, around: bool) -> str:
    if own is not None:
        return {BACKBONE: "backbone", FPN: "FPN", RPN: "RPN", HEAD: "head"}[own]
    if after == NONE_AFTER:
        return "final NMS"
    if after == HEAD:  # between the maps and the head: what also leads around the head are the proposals themselves
        return "head" if before == HEAD else "proposals" if around else "RoIAlign"
    return "RPN" if after == RPN and before == RPN else "FPN" if before == FPN else "backbone"


def parts_of(model: onnx.ModelProto, ran: Sequence[NodeRun], peak: Peak) -> list[PartCost]:
    """Sum a profile by part, in the order of PARTS; nodes that the runtime made up count to the node before them."""
    names = label(model)
    grouped: dict[str, list[NodeRun]] = {part: [] for part in PARTS}
    current = PARTS[0]
    for node in ran:
        current = names.get(node.name) or names.get(FUSED_NAMES.sub("", FUSED_NAMES.sub("", node.name))) or current
        grouped[current].append(node)
    total = sum(node.seconds for node in ran)
    return [_cost(part, nodes, total, peak) for part, nodes in grouped.items()]


def _cost(part: str, nodes: Sequence[NodeRun], total: float, peak: Peak) -> PartCost:
    seconds = sum(node.seconds for node in nodes)
    ideal = sum(max(_macs(node) / peak.macs_per_s, _bytes(node) / peak.bytes_per_s) for node in nodes)
    macs, moved = sum(map(_macs, nodes)), sum(map(_bytes, nodes))
    return PartCost(
        part, len(nodes), seconds, seconds / total if total else 0.0, macs / 1e9, moved / 1e6, ideal / seconds if seconds else 0.0
    )


def _macs(node: NodeRun) -> int:
    plain = {"FusedGemm": "Gemm", "FusedMatMul": "MatMul", "FusedConv": "Conv"}.get(node.op, node.op)
    return multiplications(NodeRun(node.name, plain, node.provider, node.seconds, node.inputs, node.outputs))


def _bytes(node: NodeRun) -> int:
    return sum(ELEMENT_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in (*node.inputs, *node.outputs))


def post_processing_share(costs: Iterable[PartCost]) -> float:
    """Share of proposals, RoIAlign and final NMS in the whole, 0..1."""
    return sum(cost.share for cost in costs if cost.part in POST_PROCESSING)


def cpu_peak(threads: int) -> Peak:
    """Measured: the fastest large fp32 matrix product of ONNX Runtime, and the fastest copy."""
    source = np.ones(STREAM_BYTES, np.uint8)
    target = np.empty_like(source)
    copy_s = _fastest(lambda: np.copyto(target, source), 4)
    products = {f"{rows} x {inner} x {columns}": _product_peak(rows, inner, columns, threads) for rows, inner, columns in PEAK_PRODUCTS}
    best = max(products, key=lambda name: products[name])
    return Peak(products[best], 2 * STREAM_BYTES / copy_s, f"measured: {best} product, copy of {STREAM_BYTES >> 20} MB")


def _product_peak(rows: int, inner: int, columns: int, threads: int) -> float:
    """Multiply-accumulates a second."""
    value = onnx.helper.make_tensor_value_info
    ends = [value("a", onnx.TensorProto.FLOAT, [rows, inner]), value("c", onnx.TensorProto.FLOAT, [rows, columns])]
    draw = np.random.default_rng(0).standard_normal
    weight = onnx.numpy_helper.from_array(draw((inner, columns), dtype=np.float32), "b")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["c"])], "peak", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {"a": draw((rows, inner), dtype=np.float32)}
    return rows * inner * columns / _fastest(lambda: session.run(None, values), 8)


def gpu_peak(name: str) -> Peak | None:
    """From the data sheet, where the device is known."""
    for known, (tflops, terabytes) in GPU_PEAKS.items():
        if known in name:
            return Peak(tflops * 1e12 / 2, terabytes * 1e12, f"data sheet of {known}, dense fp16")
    return None


def _fastest(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
