"""One profiled run of a file: which node ran where, for how long, on which shapes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export import pictures
from service.device_errors import first_line
from service.manifest import Bucket
from service.providers import (
    PROVIDER_NAMES,
    ProviderMissing,
    RuntimeLoadError,
    missing_sentence,
    open_session,
    provider_candidates,
    provider_stack,
    session_options,
)
from service.runtime import OUTPUTS
from service.tensorrt import require_engines

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
    """Nodes in the order in which they ran, in the session that the service would open.

    Args:
        optimise: False keeps the file's own nodes and names.
        threads: 0: as many as the service would take.

    Raises:
        RuntimeLoadError: the provider is not here (ProviderMissing), TensorRT has no engines for the file, it cannot be opened, or the
            batch does not run.
    """
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        options = session_options(provider, threads or None)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = _open(path, provider, options, (batch_size, *bucket, 3))
        _run(session, path, bucket, batch_size, WARM_RUNS + runs)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _averaged(events, WARM_RUNS, runs)


def _open(path: Path, provider: str, options: ort.SessionOptions, shape: Sequence[int]) -> ort.InferenceSession:
    provider_candidates(provider)
    engines = None
    if provider == "tensorrt":
        plan = require_engines(path, 0)
        plan.check_shape(shape)
        engines = plan.provider_options(0)
    session = open_session(path, provider, provider_stack(provider, tensorrt=engines), options=options)
    if session.get_providers()[0] != PROVIDER_NAMES[provider]:
        raise ProviderMissing(missing_sentence(provider, "its libraries or its device did not load"))
    return session


def _run(session: ort.InferenceSession, path: Path, bucket: Bucket, batch_size: int, times: int) -> None:
    try:
        images = np.stack([pictures.smear(bucket, seed) for seed in range(batch_size)])
        feed = {"images": images, "image_sizes_hw": np.array([bucket] * batch_size, dtype=np.int64)}
        for _ in range(times):
            session.run(OUTPUTS, feed)
    except Exception as error:  # ONNX Runtime's have no common class, and either side may run out of memory
        height, width = bucket
        raise RuntimeLoadError(f"{path}: a batch of {batch_size} at {height}x{width} does not run: {first_line(error)}") from error


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
