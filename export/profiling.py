"""One profiled run of a file: which node ran where, for how long, on which shapes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export import pictures
from service.manifest import Bucket
from service.runtime import OUTPUTS, PROVIDER_NAMES

WARM_RUNS = 2


@dataclass(frozen=True)
class NodeRun:
    """One node of the session's graph, which the runtime may have fused from several of the file's.

    Attributes:
        seconds: mean over the runs.
        inputs, outputs: (element type, shape) of every tensor.
    """

    name: str
    op: str
    provider: str
    seconds: float
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]


def profile(
    path: Path, bucket: Bucket, *, batch_size: int = 1, provider: str = "cpu", runs: int = 5, optimise: bool = True, threads: int = 0
) -> list[NodeRun]:
    """Nodes in the order in which they ran.

    Args:
        provider: one that this build of ONNX Runtime holds; what it cannot run falls to the CPU, and shows.
        optimise: False keeps the file's own nodes and names.
        threads: 0 leaves the choice to the runtime.
    """
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        wanted = [PROVIDER_NAMES[provider]] if provider == "cpu" else [PROVIDER_NAMES[provider], PROVIDER_NAMES["cpu"]]
        session = ort.InferenceSession(str(path), options, providers=wanted)
        images = np.stack([pictures.smear(bucket, seed) for seed in range(batch_size)])
        feed = {"images": images, "image_sizes_hw": np.array([bucket] * batch_size, dtype=np.int64)}
        for _ in range(WARM_RUNS + runs):
            session.run(OUTPUTS, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _averaged(events, WARM_RUNS, runs)


def _averaged(events: Iterable[dict[str, Any]], skipped: int, runs: int) -> list[NodeRun]:
    seen: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seen.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
    result = []
    for name, all_runs in seen.items():
        last = all_runs[-1]["args"]
        seconds = sum(event["dur"] for event in all_runs[skipped:]) / runs / 1e6
        inputs, outputs = _tensors(last.get("input_type_shape", [])), _tensors(last.get("output_type_shape", []))
        result.append(NodeRun(name, last["op_name"], last.get("provider", ""), seconds, inputs, outputs))
    return result


def _tensors(described: list[dict[str, list[int]]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, tuple(shape)) for entry in described for kind, shape in entry.items())
