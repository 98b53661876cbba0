"""What is in a model file: inputs, outputs, classes, precision, cost and memory at every bucket, proof and provenance."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from export.console import Parser, error_console, interrupted, interruptible, wide_console
from export.model_file import read, required_inputs
from export.precision import described
from export.profiling import NodeRun, profile
from export.report import accuracy_in_words
from export.target import add_version_arguments, find_version
from service.manifest import Bucket, Manifest, ManifestError, dump_manifest
from service.providers import RuntimeLoadError

BEFORE_USE = frozenset({"DequantizeLinear", "Cast"})
"""Operators that hand a stored weight on to the node that multiplies by it."""
QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})
PARTS = ("backbone", "fpn", "rpn", "head")
ELEMENT_BYTES = {"float": 4, "int64": 8, "bool": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1}

EXAMPLES = """examples:
  python -m export inspect blood-cells@1
  python -m export inspect model_repository/blood-cells/1
  python -m export inspect runs/before/model.onnx --manifest

The cost is measured: the file runs once at every bucket, on the CPU. Where it cannot run there (bf16), the rest is shown.
Exit status: 0 shown, 1 an error, 64 a mistake on the command line, 130 interrupted.
"""
KNOWN = (ManifestError, RuntimeLoadError, ValueError, OSError)
"""What ends with one sentence instead of a traceback."""


@dataclass(frozen=True)
class Cost:
    """What one image of a bucket costs.

    Attributes:
        gmac: billions of multiplications and additions by part.
        peak_bytes: activations alive at once, if the file's nodes run in order and free what nobody needs any more. What only turns
            int8 back into numbers is fused into the node behind it and holds nothing of its own.
    """

    gmac: dict[str, float]
    peak_bytes: int


def part_of(names: Sequence[str]) -> str | None:
    """The part that a node's weights belong to, by their names."""
    for name in names:
        if name.startswith("backbone.fpn"):
            return "fpn"
        if name.split(".")[0] in PARTS:
            return name.split(".")[0]
    return None


def parameters(model: onnx.ModelProto) -> Counter[str]:
    """Weights stored for each part, without the scales of quantised ones; what belongs to no part is geometry, or a mask of dense NMS."""
    count: Counter[str] = Counter()
    scales = {name for node in model.graph.node if node.op_type in QUANTISING for name in node.input[1:]}
    for tensor in model.graph.initializer:
        part = part_of([tensor.name])
        if part is not None and tensor.name not in scales:
            count[part] += math.prod(tensor.dims)
    return count


def cost(path: Path, model: onnx.ModelProto, bucket: Bucket) -> Cost:
    """Measured on real shapes: the file is run once, node by node."""
    ran = profile(path, bucket, runs=1, optimise=False)
    weights = {tensor.name: tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in BEFORE_USE and node.input[0] in weights:
            weights |= dict.fromkeys(node.output, weights[node.input[0]])
    owners = {node.name: [weights[name] for name in node.input if name in weights] for node in model.graph.node}
    gmac = dict.fromkeys(PARTS, 0.0)
    for node in ran:
        part = part_of(owners.get(node.name, []))
        if part is not None:
            gmac[part] += multiplications(node) / 1e9
    return Cost(gmac, _peak(model, ran))


def multiplications(node: NodeRun) -> int:
    """Multiply-accumulates of a convolution or a matrix product, 0 of anything else."""
    if node.op == "Conv":
        return math.prod(node.outputs[0][1]) * math.prod(node.inputs[1][1][1:])
    if node.op in ("Gemm", "MatMul"):
        return math.prod(node.outputs[0][1]) * node.inputs[0][1][-1]
    return 0


def weight_bytes(model: onnx.ModelProto) -> int:
    """What the file's stored numbers take in memory."""
    return sum(
        math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) for tensor in model.graph.initializer
    )


def _peak(model: onnx.ModelProto, ran: Sequence[NodeRun]) -> int:
    stored = {tensor.name for tensor in model.graph.initializer}
    sizes = {node.name: [_held(node, kind) * math.prod(shape) for kind, shape in node.outputs] for node in ran}
    for node in model.graph.node:
        if node.op_type in BEFORE_USE and node.input[0] in stored:
            sizes[node.name] = [0]
    last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(model.graph.node):
        alive.update(zip(node.output, sizes.get(node.name, []), strict=False))
        peak = max(peak, sum(alive.values()))
        for name in [name for name in alive if last_use.get(name, math.inf) <= index]:
            del alive[name]
    return peak


def _held(node: NodeRun, kind: str) -> int:
    return 1 if node.op == "DequantizeLinear" else ELEMENT_BYTES.get(kind, 4)


def show(path: Path, console: Console) -> None:
    """Print everything."""
    model, manifest = read(path)
    console.print(_facts(manifest, path, model))
    console.print(_interface(model))
    counted, stored = parameters(model), weight_bytes(model)
    table = Table(title="cost of one image")
    for name in ("bucket", *(f"{part} GMAC" for part in PARTS), "all GMAC", "activations MB", "with weights MB"):
        table.add_column(name, justify="right")
    unknown = None
    for bucket in manifest.input.buckets:
        try:
            price = cost(path, model, bucket)
        except RuntimeLoadError as error:
            unknown = error
            break
        numbers = [f"{value:.3f}" for value in (*(price.gmac[part] for part in PARTS), sum(price.gmac.values()))]
        sizes = [f"{size / 1e6:.0f}" for size in (price.peak_bytes, price.peak_bytes + stored)]
        table.add_row(f"{bucket[0]}x{bucket[1]}", *numbers, *sizes)
    table.add_section()
    table.add_row("parameters", *(f"{counted[part]:,}" for part in PARTS), f"{sum(counted.values()):,}", "", f"{stored / 1e6:.0f}")
    console.print(table)
    if unknown is not None:
        console.print(f"GMAC and activations were not measured, since the file does not run on this machine's CPU: {unknown}")


def _facts(manifest: Manifest, path: Path, model: onnx.ModelProto) -> Table:
    spec, parity = manifest.input, manifest.parity
    rows = {
        "model": f"{manifest.name}, version {manifest.version}, {manifest.architecture}",
        "classes": ", ".join(f"{label} {name}" for label, name in enumerate(manifest.class_names, start=1)),
        "file": f"{path.stat().st_size / 1e6:.1f} MB, {len(model.graph.node)} nodes, opset {manifest.opset}, NMS: {manifest.nms}",
        "precision": described(manifest.precision),
        "input": f"short side {spec.short_side}, long side at most {spec.long_side}, {spec.interpolation}",
        "trained": f"{manifest.training.dataset}; {manifest.training.command}; commit {manifest.training.commit or 'unknown'}",
        "exported": f"{manifest.created:%Y-%m-%d %H:%M} UTC by {model.producer_name}",
        "parity": ", ".join(
            f"{key} {parity[key]}"
            for key in ("passed", "provider", "matched", "missed", "extra", "fullest_picture", "max_box_px", "max_score")
            if key in parity
        )
        or "not recorded",
        "accuracy": accuracy_in_words(parity.get("accuracy")),
        "golden images": f"{len(manifest.golden)}, {sum(len(golden.detections) for golden in manifest.golden)} detections",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _interface(model: onnx.ModelProto) -> Table:
    table = Table(title="inputs and outputs")
    for name in ("name", "type", "shape"):
        table.add_column(name)
    optional = {value.name for value in model.graph.input} - {*required_inputs(model)}
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        shape = ", ".join(str(dim.dim_value or dim.dim_param) for dim in kind.shape.dim)
        name = f"{value.name} (optional)" if value.name in optional else value.name
        table.add_row(name, str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))), f"[{shape}]")
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export inspect", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version_arguments(parser)
    parser.add_argument("--manifest", action="store_true", help="print the manifest's JSON alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console = wide_console()
    try:
        with interruptible():
            path = find_version(options.file, options.repository)
            if options.manifest:
                console.print_json(dump_manifest(read(path)[1]))
            else:
                show(path, console)
    except KNOWN as error:
        error_console().print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return interrupted("the file was not shown to the end")
    return 0
