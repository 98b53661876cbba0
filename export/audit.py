"""Where every node of a file runs: `python -m export.audit FILE --provider cpu|cuda|tensorrt`.

Fails where a compute node leaves the device, where anything is copied between host and device inside the graph, and where an operator
makes the device wait for the host. The arithmetic of shapes may stay on the CPU: it reads nothing that the device computed. Where the
provider works, a run of the service's session is measured; elsewhere the file is read against the registry of CUDA kernels that
`cuda_kernels.json` holds, by operator, version and element type, and against ONNX Runtime's rule of what it leaves on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.table import Table

from export.console import Parser, error_console, interrupted, interruptible, positive, wide_console
from export.cuda_kernels import counted
from export.model_file import operator_set, read
from export.placement import HOST, HOST_OUTPUTS, Placement, place
from export.profiling import NodeRun, profile
from export.target import add_version_arguments, find_version
from service.manifest import Bucket
from service.providers import PROVIDER_NAMES, RuntimeLoadError
from service.tensorrt import EXCLUDED_OPS

STATUSES = "Exit status: 0 passed, 1 an error, 2 the audit failed, 64 a mistake on the command line, 130 interrupted."
HOST_SYNC = {
    "NonMaxSuppression": "copies a count to the host for every image and class; export with --nms dense to avoid it",
    "NonZero": "the size of its output is known only on the host",
    "If": "its condition is read on the host",
    "Loop": "its condition is read on the host",
}
SMALL_ELEMENTS = 64
"""Integer tensors up to this size are shapes and indices, which the runtime computes on the CPU on purpose."""


@dataclass(frozen=True)
class PlacedNode:
    """One node and where it runs; `seconds` is None on paper."""

    name: str
    op: str
    provider: str
    seconds: float | None = None


@dataclass(frozen=True)
class Audit:
    """What was found. `misplaced`, `copies` and `waits` are the failures.

    Attributes:
        unmeasured: why the file was only read; None where it ran.
    """

    provider: str
    nodes: tuple[PlacedNode, ...]
    misplaced: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unmeasured: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the device computes everything without waiting for the host."""
        return not (self.misplaced or self.copies or self.waits)

    @property
    def by_op(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Number of nodes and seconds by operator and provider."""
        sums: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for node in self.nodes:
            count, seconds = sums[node.op, node.provider]
            sums[node.op, node.provider] = (count + 1, seconds + (node.seconds or 0.0))
        return dict(sums)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "measured": self.unmeasured is None, "passed": self.passed}


def audit(path: Path, provider: str, bucket: Bucket, *, batch_size: int = 1) -> Audit:
    """Profile the file where the provider works, else check it on paper.

    Raises:
        RuntimeLoadError: the CPU cannot open it.
    """
    model = onnx.load(path)
    try:
        return judge(model, profile(path, bucket, batch_size=batch_size, provider=provider), provider)
    except RuntimeLoadError as error:
        if provider == "cpu":
            raise
        return on_paper(model, provider, str(error).partition("; ")[0])


def judge(model: onnx.ModelProto, ran: Sequence[NodeRun], provider: str) -> Audit:
    """Name what left the device in a profiled run."""
    nodes = tuple(PlacedNode(node.name, node.op, node.provider, node.seconds) for node in ran)
    if provider == "cpu":
        return Audit(provider, nodes, tuple(_sentence(node) for node in ran if node.provider != HOST))
    shapes = {node.name for node, where in zip(model.graph.node, place(model).providers, strict=True) if where == HOST}
    accepted = {PROVIDER_NAMES[provider], PROVIDER_NAMES["cuda"]}
    elsewhere = [node for node in ran if node.provider not in accepted and not node.op.startswith("Memcpy")]
    misplaced = tuple(_sentence(node) for node in elsewhere if node.name not in shapes and not _is_bookkeeping(node))
    copies = tuple(f"{node.name} ({node.op})" for node in ran if node.op.startswith("Memcpy"))
    return Audit(provider, nodes, misplaced, copies, _waits(node.op for node in ran))


def _sentence(node: NodeRun) -> str:
    return f"{node.name} ({node.op}) ran on {node.provider}"


def _is_bookkeeping(node: NodeRun) -> bool:
    """Of nodes that the runtime made up: shapes, indices, and what answers with them."""
    small = all(kind in ("int64", "int32", "bool") and math.prod(shape) <= SMALL_ELEMENTS for kind, shape in node.outputs)
    return node.op in HOST_OUTPUTS or (small and bool(node.outputs))


def _waits(ops: Any) -> tuple[str, ...]:
    used = Counter(ops)
    return tuple(f"{used[op]} x {op}: {why}" for op, why in HOST_SYNC.items() if used[op])


def on_paper(model: onnx.ModelProto, provider: str, reason: str) -> Audit:
    """What the CUDA provider would do with the file; under TensorRT, with the operators that are kept out of its engines.

    Args:
        reason: why it does not run here.
    """
    placed = place(model)
    nodes = tuple(
        PlacedNode(node.name, node.op_type, _under(provider, node.op_type, where))
        for node, where in zip(model.graph.node, placed.providers, strict=True)
    )
    misplaced = tuple(counted(placed.problems.values()))
    copies = tuple(str(copy) for copy in placed.copies)
    waits = _waits(node.op_type for node in model.graph.node)
    return Audit(provider, nodes, misplaced, copies, waits, _notes(model, provider, placed), reason)


def _under(provider: str, op: str, where: str) -> str:
    """TensorRT is offered every node but those kept from it, shapes included."""
    return PROVIDER_NAMES["tensorrt"] if provider == "tensorrt" and where != HOST and op not in EXCLUDED_OPS else where


def _notes(model: onnx.ModelProto, provider: str, placed: Placement) -> tuple[str, ...]:
    used = Counter(node.op_type for node in model.graph.node)
    opset = operator_set(model)
    notes = []
    if used["RoiAlign"] and opset >= 16:
        notes.append(f"RoiAlign of opset {opset}: on CUDA since ONNX Runtime 1.25, before that it falls to the CPU")
    if provider == "tensorrt":
        kept = ", ".join(f"{used[op]} x {op}" for op in EXCLUDED_OPS if used[op]) or "nothing in this file"
        notes.append(f"kept out of TensorRT's engines and left to CUDA: {kept}; what TensorRT declines goes there too, a run tells")
    shapes = sum(where == HOST for where in placed.providers)
    if shapes:
        notes.append(f"{shapes} nodes that compute shapes stay on the CPU")
    return tuple(notes)


def table(found: Audit) -> Table:
    """Operators by time, as rich draws them."""
    by_op = found.by_op
    whole = sum(seconds for _, seconds in by_op.values())
    measured = found.unmeasured is None
    drawn = Table(title=f"placement for {found.provider}" + ("" if measured else " (on paper)"))
    for name in ("operator", "provider", "nodes", "ms", "share"):
        drawn.add_column(name, justify="left" if name in ("operator", "provider") else "right")
    for (op, where), (count, seconds) in sorted(by_op.items(), key=lambda item: (-item[1][1], -item[1][0])):
        share = f"{seconds / whole:.1%}" if whole else "-"
        drawn.add_row(op, where, str(count), f"{seconds * 1e3:.2f}" if measured else "-", share)
    return drawn


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export.audit", description=__doc__, epilog=STATUSES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version_arguments(parser)
    parser.add_argument("--provider", choices=sorted(PROVIDER_NAMES), default="cpu", help="where it should run (default: cpu)")
    parser.add_argument("--batch-size", type=positive, default=1, help="images of the profiled batch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, node by node")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console = wide_console()
    try:
        with interruptible():
            path = find_version(options.file, options.repository)
            bucket = read(path)[1].input.buckets[0]
            found = audit(path, options.provider, bucket, batch_size=options.batch_size)
            if options.json is not None:
                options.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    except (OSError, ValueError, RuntimeLoadError) as error:
        error_console().print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return interrupted("nothing was judged")
    console.print(table(found))
    named = (
        ("off the device", found.misplaced),
        ("copied in every run", found.copies),
        ("waits for the host", found.waits),
        ("note", found.notes),
    )
    for words, sentences in named:
        for sentence in sentences:
            console.print(f"{words}: {sentence}")
    if found.unmeasured is not None:
        console.print(f"nothing was run: {found.unmeasured}")
    console.print("passed" if found.passed else "failed", "" if found.unmeasured is None else "(on paper)")
    return 0 if found.passed else 2


if __name__ == "__main__":
    raise SystemExit(main())
