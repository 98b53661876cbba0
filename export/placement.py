"""Where ONNX Runtime's CUDA provider puts every node of a file, and what it copies between host and device: read off the graph alone.

The rule is the runtime's own. Kernels of Shape and Size answer on the host; a node all of whose inputs lie there, or are small constants,
or inputs of the graph, is computed there as well, unless its CUDA kernel wants the input on the host (the limits of a Range, say) or it is
of half precision. So the arithmetic of shapes stays on the CPU, and wherever its result meets a kernel that reads device memory, or a
kernel wants on the host what the device computed, a node that copies is put in between. One such node is enough to forbid CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from export.cuda_kernels import element_types, problem_of_each
from export.model_file import required_inputs

HOST, DEVICE = "CPUExecutionProvider", "CUDAExecutionProvider"
HOST_OUTPUTS = frozenset({"Shape", "Size"})
HOST_INPUTS: dict[str, frozenset[int]] = {
    **dict.fromkeys(("Clip", "Pad", "Resize", "Slice"), frozenset(range(1, 5))),
    **dict.fromkeys(("CumSum", "Expand", "OneHot", "Reshape", "Split", "Squeeze", "Tile", "TopK", "Unsqueeze"), frozenset({1})),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), frozenset({1})),
    "ConstantOfShape": frozenset({0}),
    "NonMaxSuppression": frozenset({2, 3, 4}),
    "Range": frozenset({0, 1, 2}),
}
"""Inputs that the CUDA kernels take from host memory: sizes, axes and limits."""
SMALL_CONSTANT = 100
"""Elements up to which a constant does not keep a node on the device."""
NEVER_ON_HOST = frozenset({"float16", "bfloat16"})


@dataclass(frozen=True)
class Copy:
    """A tensor that is copied in every run. `to_host` waits for the device as well."""

    value: str
    producer: str
    consumers: tuple[str, ...]
    to_host: bool

    def __str__(self) -> str:
        where = "device to host" if self.to_host else "host to device"
        return f"{self.value}, from {self.producer} to {', '.join(self.consumers)}: {where}"


@dataclass(frozen=True)
class Placement:
    """Attributes: the provider of every node in the file's order; why nodes have no CUDA kernel, by place; the copies."""

    providers: tuple[str, ...]
    problems: dict[int, str]
    copies: tuple[Copy, ...]


def place(model: onnx.ModelProto) -> Placement:
    """What the CUDA provider would do with a file whose constants are folded, as those of the exporter are."""
    problems = {index: problem for index, problem in enumerate(problem_of_each(model)) if problem is not None}
    on_host = _host_nodes(model, set(problems))
    providers = tuple(HOST if index in on_host else DEVICE for index in range(len(model.graph.node)))
    return Placement(providers, problems, tuple(_copies(model, on_host)))


def _host_nodes(model: onnx.ModelProto, without_kernel: set[int]) -> set[int]:
    """Indices of the nodes that the CPU computes; the file's order is topological."""
    types = element_types(model)
    free = {"", *required_inputs(model), *_small_constants(model)}
    host_values: set[str] = set()
    nodes = set()
    for index, node in enumerate(model.graph.node):
        if node.op_type in HOST_OUTPUTS:
            host_values.update(node.output)
            continue
        wanted = HOST_INPUTS.get(node.op_type, frozenset())
        follows = any(name in host_values for name in node.input) and all(
            types.get(name) not in NEVER_ON_HOST and (name in free or (name in host_values and place not in wanted))
            for place, name in enumerate(node.input)
        )
        if follows or index in without_kernel:
            nodes.add(index)
            host_values.update(node.output)
    return nodes


def _small_constants(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL_CONSTANT:
            yield tensor.name
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from node.output


def _copies(model: onnx.ModelProto, on_host: set[int]) -> Iterator[Copy]:
    made_by = {name: index for index, node in enumerate(model.graph.node) for name in node.output if node.op_type != "Constant"}
    inputs = required_inputs(model)
    readers: dict[str, dict[bool, list[str]]] = {}
    for index, node in enumerate(model.graph.node):
        for position, name in enumerate(node.input):
            if name in made_by or name in inputs:
                reads_host = index in on_host or position in HOST_INPUTS.get(node.op_type, ())
                readers.setdefault(name, {True: [], False: []})[reads_host].append(f"{node.name} ({node.op_type})")
    for name, by_side in readers.items():
        if name in inputs:
            if by_side[True] and by_side[False]:
                yield Copy(name, "the graph's input", tuple(by_side[False]), to_host=False)
            continue
        producer = model.graph.node[made_by[name]]
        from_host = made_by[name] in on_host or producer.op_type in HOST_OUTPUTS
        crossing = by_side[not from_host]
        if crossing:
            yield Copy(name, f"{producer.name} ({producer.op_type})", tuple(crossing), to_host=not from_host)
