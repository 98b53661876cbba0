"""Where every node of a file runs: `python -m export.audit FILE --provider cpu|cuda|tensorrt`.

Fails where a compute node leaves the device. Without that provider here, it says so and checks the file against the registry of CUDA
kernels that `cuda_kernels.json` holds, by operator, version and element type.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from rich.table import Table

from export import cuda_kernels
from export.console import wide_console
from export.profiling import NodeRun, profile
from service.manifest import Bucket, ManifestError, parse_manifest
from service.runtime import PROVIDER_NAMES

HOST_SYNC = {
    "NonMaxSuppression": "copies a count to the host for every image and class; export with --nms dense to avoid it",
    "NonZero": "the size of its output is known only on the host",
    "If": "its condition is read on the host",
    "Loop": "its condition is read on the host",
}
SHAPE_OPS = frozenset({"Shape", "Constant", "ConstantOfShape", "Range", "Size"})
SMALL_ELEMENTS = 64
"""Integer tensors up to this size are shapes and indices, which the runtime computes on the CPU on purpose."""


@dataclass(frozen=True)
class Audit:
    """What was found. `misplaced` and `copies` are the failures."""

    provider: str
    measured: bool
    by_op: dict[tuple[str, str], tuple[int, float]]
    misplaced: list[str]
    copies: list[str]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether all computing happens on the device."""
        return not self.misplaced and not self.copies

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        nodes = [{"op": op, "provider": where, "nodes": count, "ms": seconds * 1e3} for (op, where), (count, seconds) in self.by_op.items()]
        return {
            "provider": self.provider,
            "measured": self.measured,
            "passed": self.passed,
            "nodes": nodes,
            "misplaced": self.misplaced,
            "copies": self.copies,
            "warnings": self.warnings,
        }


def audit(path: Path, provider: str, bucket: Bucket, *, batch_size: int = 1) -> Audit:
    """Profile the file where the provider is there, else check it on paper."""
    model = onnx.load(path)
    warnings = [f"{op}: {why}" for op, why in HOST_SYNC.items() if provider != "cpu" and any(n.op_type == op for n in model.graph.node)]
    if PROVIDER_NAMES[provider] in ort.get_available_providers():
        return judge(profile(path, bucket, batch_size=batch_size, provider=provider), provider, warnings)
    return _on_paper(model, provider, warnings)


def judge(ran: Sequence[NodeRun], provider: str, warnings: Sequence[str] = ()) -> Audit:
    """Sum a profile by operator and place, and name what left the device."""
    by_op: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for node in ran:
        count, seconds = by_op[node.op, node.provider]
        by_op[node.op, node.provider] = (count + 1, seconds + node.seconds)
    device = PROVIDER_NAMES[provider]
    accepted = {device} if provider != "tensorrt" else {device, PROVIDER_NAMES["cuda"]}
    misplaced = [f"{n.name} ({n.op}) ran on {n.provider}" for n in ran if n.provider not in accepted and not _is_bookkeeping(n)]
    copies = [f"{n.name} ({n.op})" for n in ran if n.op.startswith("Memcpy") and not _is_small(n) and provider != "cpu"]
    return Audit(provider, True, dict(by_op), misplaced, copies, list(warnings))


def _is_bookkeeping(node: NodeRun) -> bool:
    return node.op in SHAPE_OPS or node.op.startswith("Memcpy") or _is_small(node)


def _is_small(node: NodeRun) -> bool:
    return all(kind in ("int64", "int32", "bool") and _elements(shape) <= SMALL_ELEMENTS for kind, shape in node.outputs)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _on_paper(model: onnx.ModelProto, provider: str, warnings: Sequence[str]) -> Audit:
    used = Counter(node.op_type for node in model.graph.node)
    missing = cuda_kernels.without_kernel(model) if provider != "cpu" else []
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    late = (
        [f"RoiAlign of opset {opset}: on CUDA since ONNX Runtime 1.25, before that it falls to the CPU"]
        if used["RoiAlign"] and opset >= 16
        else []
    )
    by_op = {(op, "not measured"): (count, 0.0) for op, count in used.most_common()}
    return Audit(provider, False, by_op, missing, [], [*warnings, *late])


def table(found: Audit) -> Table:
    """Operators by time, as rich draws them."""
    whole = sum(seconds for _, seconds in found.by_op.values())
    drawn = Table(title=f"placement for {found.provider}" + ("" if found.measured else " (on paper: that provider is not in this build)"))
    for name in ("operator", "provider", "nodes", "ms", "share"):
        drawn.add_column(name, justify="left" if name in ("operator", "provider") else "right")
    for (op, where), (count, seconds) in sorted(found.by_op.items(), key=lambda item: (-item[1][1], -item[1][0])):
        share = f"{seconds / whole:.1%}" if whole else "-"
        drawn.add_row(op, where, str(count), f"{seconds * 1e3:.2f}" if found.measured else "-", share)
    return drawn


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="model.onnx of an exported version")
    parser.add_argument("--provider", choices=sorted(PROVIDER_NAMES), default="cpu", help="where it should run (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=1, help="images of the profiled batch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console = wide_console()
    try:
        properties = {entry.key: entry.value for entry in onnx.load(options.file).metadata_props}
        bucket = parse_manifest(properties, str(options.file)).input.buckets[0]
    except (OSError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = audit(options.file, options.provider, bucket, batch_size=options.batch_size)
    console.print(table(found))
    for sentence in [*found.misplaced, *(f"copy between host and device: {copy}" for copy in found.copies)]:
        console.print(f"off the device: {sentence}", markup=False)
    for sentence in found.warnings:
        console.print(f"note: {sentence}", markup=False)
    console.print("passed" if found.passed else "failed", "" if found.measured else "(on paper)")
    if options.json is not None:
        options.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    return 0 if found.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
