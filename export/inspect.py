"""What is in a model file: `python -m export inspect FILE`."""

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
from rich.markup import escape
from rich.table import Table

from export.console import wide_console
from export.precision import described
from export.profiling import NodeRun, profile
from export.report import accuracy_in_words
from service.manifest import METADATA_KEY, Bucket, Manifest, parse_manifest

PARTS = ("backbone", "fpn", "rpn", "head")
ELEMENT_BYTES = {"float": 4, "int64": 8, "bool": 1, "uint8": 1, "float16": 2, "int32": 4, "int8": 1}


@dataclass(frozen=True)
class Cost:
    """What one image of a bucket costs.

    Attributes:
        gmac: billions of multiplications and additions by part.
        peak_bytes: activations alive at once, if the file's nodes run in order and free what nobody needs any more.
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
    """Numbers stored for each part; what belongs to none is geometry."""
    count: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        count[part_of([tensor.name]) or "other"] += math.prod(tensor.dims)
    return count


def cost(path: Path, model: onnx.ModelProto, bucket: Bucket) -> Cost:
    """Measured on real shapes: the file is run once, node by node."""
    ran = profile(path, bucket, runs=1, optimise=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    owners = {node.name: [name for name in node.input if name in weights] for node in model.graph.node}
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


def _peak(model: onnx.ModelProto, ran: Sequence[NodeRun]) -> int:
    sizes = {node.name: [ELEMENT_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in node.outputs] for node in ran}
    last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(model.graph.node):
        alive.update(zip(node.output, sizes.get(node.name, []), strict=False))
        peak = max(peak, sum(alive.values()))
        for name in [name for name in alive if last_use.get(name, math.inf) <= index]:
            del alive[name]
    return peak


def show(path: Path, console: Console) -> None:
    """Print everything."""
    model = onnx.load(path)
    manifest = parse_manifest({entry.key: entry.value for entry in model.metadata_props}, str(path))
    console.print(_facts(manifest, path, model))
    console.print(_interface(model))
    counted = parameters(model)
    table = Table(title="cost of one image")
    for name in ("bucket", *(f"{part} GMAC" for part in PARTS), "all GMAC", "activations MB"):
        table.add_column(name, justify="right")
    for bucket in manifest.input.buckets:
        price = cost(path, model, bucket)
        numbers = [f"{price.gmac[part]:.3f}" for part in PARTS]
        table.add_row(f"{bucket[0]}x{bucket[1]}", *numbers, f"{sum(price.gmac.values()):.3f}", f"{price.peak_bytes / 1e6:.0f}")
    table.add_section()
    table.add_row("parameters", *(f"{counted[part]:,}" for part in PARTS), f"{sum(counted.values()):,}", "")
    console.print(table)


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
            f"{key} {parity[key]}" for key in ("passed", "matched", "missed", "extra", "max_box_px", "max_score") if key in parity
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
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        shape = ", ".join(str(dim.dim_value or dim.dim_param) for dim in kind.shape.dim)
        table.add_row(value.name, str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))), escape(f"[{shape}]"))
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export inspect", description=__doc__)
    parser.add_argument("file", type=Path, help="model.onnx of an exported version")
    parser.add_argument("--manifest", action="store_true", help="print the manifest's JSON alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console = wide_console()
    if not options.file.is_file():
        console.print(f"error: there is no file {options.file}", markup=False)
        return 1
    if options.manifest:
        properties = {entry.key: entry.value for entry in onnx.load(options.file).metadata_props}
        console.print_json(properties.get(METADATA_KEY, "null"))
        return 0
    show(options.file, console)
    return 0
