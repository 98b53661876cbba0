"""What the Open Inference Protocol says of a model: its two faces, metadata, configuration, statistics.

Every detector has two: `name` takes encoded pictures (BYTES) and gives boxes in pixels of the picture as a person sees it; `name_tensor`
takes pixels that were resized and padded by the client and gives boxes in that frame. D detections a row can hold.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.manifest import Manifest
from service.repository import Repository, ServedVersion
from service.v2_codec import TensorSpec

PLATFORM = "onnxruntime_onnx"
TENSOR_SUFFIX = "_tensor"
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}

PICTURE_INPUTS = (TensorSpec("IMAGE", "BYTES", (-1, 1)),)
TENSOR_INPUTS = (TensorSpec("images", "UINT8", (-1, -1, -1, 3)), TensorSpec("image_sizes_hw", "INT64", (-1, 2)))


@dataclass(frozen=True, slots=True)
class Face:
    """A model under one of its two names."""

    name: str
    served: ServedVersion
    takes_tensors: bool

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a request must hold."""
        return TENSOR_INPUTS if self.takes_tensors else PICTURE_INPUTS

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What an answer can hold."""
        return output_specs(self.served.manifest)


def output_specs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    """The same for both faces."""
    rows = manifest.detections_per_image
    return (
        TensorSpec("boxes", "FP32", (-1, rows, 4)),
        TensorSpec("scores", "FP32", (-1, rows)),
        TensorSpec("labels", "INT64", (-1, rows)),
        TensorSpec("num_detections", "INT64", (-1,)),
    )


def base_name(names: Collection[str], name: str) -> tuple[str, bool]:
    """The detector of some names that a name means, and whether it is the tensor face. A detector that is really called so comes first."""
    if name not in names and name.endswith(TENSOR_SUFFIX) and name.removesuffix(TENSOR_SUFFIX) in names:
        return name.removesuffix(TENSOR_SUFFIX), True
    return name, False


def find_face(repository: Repository, name: str, version: str | None) -> Face:
    """The model that a URL names.

    Raises:
        ModelNotFound: says what is served. NotReady: nothing is, yet.
    """
    base, takes_tensors = base_name({served.name for served in repository.served}, name)
    return Face(name, repository.resolve(f"{base}@{version}" if version is not None else base), takes_tensors)


def faces_of(repository: Repository) -> list[Face]:
    """Everything that is served, under both names."""
    return [
        Face(served.name + suffix, served, takes_tensors)
        for served in repository.served
        for suffix, takes_tensors in (("", False), (TENSOR_SUFFIX, True))
    ]


def metadata(face: Face, repository: Repository) -> dict[str, Any]:
    """The answer of GET /v2/models/{name}."""
    versions = [served.version for served in repository.served if served.name == face.served.name]
    return {
        "name": face.name,
        "versions": sorted(set(versions), key=int),
        "platform": PLATFORM,
        "inputs": [_describe(spec) for spec in face.inputs],
        "outputs": [_describe(spec) for spec in face.outputs],
    }


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def config(face: Face, max_batch: int) -> dict[str, Any]:
    """The answer of GET /v2/models/{name}/config. Dimensions are without the batch, as max_batch_size says that there is one."""
    on_cpu = "CPU" in face.served.loaded.provider.upper()
    return {
        "name": face.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [int(face.served.version)]}},
        "max_batch_size": max_batch,
        "input": [_configure(spec) for spec in face.inputs],
        "output": [_configure(spec) for spec in face.outputs],
        "instance_group": [{"name": face.name, "kind": "KIND_CPU" if on_cpu else "KIND_GPU", "count": len(face.served.loaded.runtimes)}],
        "dynamic_batching": {"preferred_batch_size": [], "max_queue_delay_microseconds": 0, "preserve_ordering": False},
        "model_transaction_policy": {"decoupled": False},
        "response_cache": {"enable": False},
    }


def _configure(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": CONFIG_TYPES[spec.datatype], "dims": list(spec.shape[1:])}


def index(repository: Repository, *, ready_only: bool) -> list[dict[str, str]]:
    """The answer of POST /v2/repository/index: what is served, and what lies in the repository besides."""
    entries = {(face.name, face.served.version): ("READY", "") for face in faces_of(repository)}
    if not ready_only:
        for name, versions in repository.on_disk().items():
            reason = "unloaded" if repository.was_unloaded(name) else "not loaded"
            for version in versions:
                for suffix in ("", TENSOR_SUFFIX):
                    entries.setdefault((name + suffix, version), ("UNAVAILABLE", reason))
    return [{"name": name, "version": version, "state": state, "reason": reason} for (name, version), (state, reason) in entries.items()]


STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@dataclass(slots=True)
class _Counts:
    inferences: int = 0
    executions: float = 0.0
    last_ms: int = 0
    stages: dict[str, list[int]] = field(default_factory=lambda: {stage: [0, 0] for stage in STAGES})  # count, nanoseconds


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds of one request, of its slowest image where it has several."""

    total_s: float
    queue_s: float
    input_s: float
    infer_s: float
    output_s: float


class Statistics:
    """Cumulative counts of the requests that came by this protocol, by name and version. Belongs to the event loop."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = defaultdict(_Counts)

    def succeeded(self, face: Face, batch_sizes: Sequence[int], times: RequestTimes) -> None:
        """Count an answered request.

        Args:
            batch_sizes: for each of its images, how many shared the device's batch; so shares of a batch add up to one execution.
        """
        counts = self._counts[face.name, face.served.version]
        counts.inferences += len(batch_sizes)
        counts.executions += sum(1 / size for size in batch_sizes)
        counts.last_ms = int(time.time() * 1e3)
        seconds = {
            "success": times.total_s,
            "queue": times.queue_s,
            "compute_input": times.input_s,
            "compute_infer": times.infer_s,
            "compute_output": times.output_s,
        }
        for stage, spent in seconds.items():
            _add(counts.stages[stage], spent)

    def failed(self, face: Face, total_s: float) -> None:
        """Count a request that got an error."""
        _add(self._counts[face.name, face.served.version].stages["fail"], total_s)

    def describe(self, faces: Sequence[Face]) -> dict[str, Any]:
        """The answer of GET /v2/models/.../stats."""
        return {"model_stats": [self._describe(face) for face in faces]}

    def _describe(self, face: Face) -> dict[str, Any]:
        counts = self._counts.get((face.name, face.served.version), _Counts())
        return {
            "name": face.name,
            "version": face.served.version,
            "last_inference": counts.last_ms,
            "inference_count": counts.inferences,
            "execution_count": round(counts.executions),
            "inference_stats": {stage: {"count": count, "ns": ns} for stage, (count, ns) in counts.stages.items()},
            "batch_stats": [],
        }


def _add(stage: list[int], seconds: float) -> None:
    stage[0] += 1
    stage[1] += int(seconds * 1e9)
