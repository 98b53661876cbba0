"""Which nodes of a graph have a kernel in ONNX Runtime's CUDA provider, by operator, version and element type.

`cuda_kernels.json` beside this file is the registry of onnxruntime-gpu itself, of the version that it names, written out by
`get_all_opkernel_def()` of its Python module: operator -> [first opset, last opset or null, {type parameter: element types}].
A node whose version or types have no row there is computed on the CPU without a word, with a copy on either side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from export.model_file import operator_set

REGISTRY = Path(__file__).with_name("cuda_kernels.json")
FOLDED = frozenset({"Constant"})
"""Turned into initialisers before anything runs."""

Row = tuple[int, int | None, dict[str, str]]


@cache
def registry() -> tuple[str, dict[str, list[Row]]]:
    """Version of ONNX Runtime, and its CUDA kernels of the standard operators."""
    found = json.loads(REGISTRY.read_text())
    return str(found["onnxruntime"]), {op: [(first, last, types) for first, last, types in rows] for op, rows in found["kernels"].items()}


def counted(problems: Iterable[str | None]) -> list[str]:
    """One sentence for every kind of problem, with the number of nodes that have it."""
    counts = Counter(problem for problem in problems if problem is not None)
    return [f"{count} x {problem}" for problem, count in sorted(counts.items())]


def problem_of_each(model: onnx.ModelProto) -> list[str | None]:
    """For every node, in the order of the file: why CUDA cannot run it, or None."""
    opset = operator_set(model)
    types = element_types(model)
    return [None if node.op_type in FOLDED else _problem(node, opset, types) for node in model.graph.node]


def _problem(node: onnx.NodeProto, opset: int, types: dict[str, str]) -> str | None:
    schema: Any = onnx.defs.get_schema(node.op_type, opset)
    version, kernels = registry()
    rows = kernels.get(node.op_type, [])
    if not rows:
        return None if schema.has_function else f"{node.op_type}: no CUDA kernel in ONNX Runtime {version}"
    fitting = [row for row in rows if _covers(row, schema.since_version)]
    if not fitting:
        return f"{node.op_type} of opset {schema.since_version}: the CUDA kernels of ONNX Runtime {version} are for other versions"
    used = _type_parameters(node, schema, types)
    if any(all(kind in row[2].get(name, kind).split() for name, kind in used.items()) for row in fitting):
        return None
    return f"{node.op_type} on {', '.join(sorted(set(used.values())))}: no CUDA kernel for these types in ONNX Runtime {version}"


def _covers(row: Row, since_version: int) -> bool:
    """ONNX Runtime's rule: a kernel without a last version serves the one version that it was registered for."""
    first, last, _ = row
    return first == since_version if last is None else first <= since_version <= last


def _type_parameters(node: onnx.NodeProto, schema: Any, types: dict[str, str]) -> dict[str, str]:
    """Type parameter of the operator (T, T1, ...) -> element type of this node's inputs, where it is known."""
    used = {}
    for place, name in enumerate(node.input):
        formal = schema.inputs[min(place, len(schema.inputs) - 1)]  # the last one may stand for many
        if name in types:
            used[formal.type_str] = types[name]
    return used


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> element type, as far as inference tells; of a graph that it rejects, what the graph says itself."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:
        graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    kinds |= {initializer.name: initializer.data_type for initializer in graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(kind).lower() for name, kind in kinds.items() if kind}
