"""Runtimes: what turns a batch of pixels into detections. `OnnxRuntime` is the real one; tests bring their own.

B images, H W a bucket's size, D detections of an image, C boxes that NMS looks at.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.binding import GRAPH_ID, NO_GRAPH, BoundSession, HostBuffer, pinned_buffer
from service.capture_gate import CAPTURES
from service.device_errors import DeviceLost, DeviceOutOfMemory, classify_device_error, first_line
from service.errors import InferenceFailed
from service.manifest import Bucket, Manifest, parse_manifest
from service.providers import (
    PROVIDER_NAMES,
    ProviderMissing,
    RuntimeLoadError,
    missing_sentence,
    open_session,
    provider_candidates,
    provider_stack,
)
from service.tensorrt import EnginePlan, require_engines
from service.unsettled import NMS_CONVERGED, NMS_START, NMS_STATE, finish

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "PROVIDER_NAMES",
    "CostTable",
    "Detections",
    "DeviceLost",
    "DeviceOutOfMemory",
    "OnnxRuntime",
    "ProviderMissing",
    "Runtime",
    "RuntimeLoadError",
    "file_sha256",
    "provider_candidates",
]

INPUTS = ("images", "image_sizes_hw")
OUTPUTS = ("boxes", "scores", "labels", "num_detections")

CostTable = dict[tuple[Bucket, int], float]
"""Seconds of one inference by (bucket, batch size)."""

logger = logging.getLogger(__name__)


class Detections(NamedTuple):
    """The graph's outputs, boxes xyxy in pixels of the input frame."""

    boxes: NDArray[np.float32]  # [B, D, 4]
    scores: NDArray[np.float32]  # [B, D], descending, 0 beyond the count
    labels: NDArray[np.int64]  # [B, D], 1..K, 0 beyond the count
    num_detections: NDArray[np.int64]  # [B]


class Runtime(Protocol):
    """One loaded model on one device. `run` is called by one thread at a time."""

    provider: str

    @property
    def manifest(self) -> Manifest:
        """What the model says of itself."""
        ...

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        """Detect on images [B, H, W, 3] uint8 RGB padded right and bottom, with true sizes [B, 2].

        Raises:
            DeviceOutOfMemory: a smaller batch may fit.
            DeviceLost: nothing will ever run here again.
            InferenceFailed: anything else; the images of the batch are to blame until shown otherwise.
        """
        ...

    def close(self) -> None:
        """Give the memory back. No run may follow."""
        ...


class OnnxRuntime:
    """A model file on ONNX Runtime. The provider in use is the one that was asked for, or the constructor raises.

    Args:
        path: model.onnx with a manifest in its metadata.
        provider: "auto" takes CUDA where it works, else the CPU; TensorRT only when asked for, with engines that were built before.
        intra_op_threads: threads of one inference; None: 1 on a GPU, the container's quota on a CPU.
        gpu_memory_limit_bytes: bound of the CUDA arena.
        device_id: which CUDA device.
        cuda_graphs: on CUDA, record each shape once and replay it; for files with dense NMS.
        largest_batch: on a GPU, fill batches up to a few sizes not beyond this one (`full_size`); None runs them as they come.
        on_unsettled: told how many images of a batch had no certificate of their NMS and were finished by further runs.

    Raises:
        ProviderMissing, RuntimeLoadError, ManifestError.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: str = "auto",
        intra_op_threads: int | None = None,
        gpu_memory_limit_bytes: int | None = None,
        device_id: int = 0,
        cuda_graphs: bool = False,
        largest_batch: int | None = None,
        on_unsettled: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.provider = "cpu"
        self._on_unsettled = on_unsettled
        self._session: ort.InferenceSession | None = None
        self._plan: EnginePlan | None = None
        self._cpu_session: ort.InferenceSession | None = None
        """Only beside TensorRT and a file with certificates: an engine may hold the default masks of NMS as constants."""
        for name in provider_candidates(provider):
            self._plan = require_engines(path, device_id) if name == "tensorrt" else None
            stack = provider_stack(
                name,
                device_id=device_id,
                memory_limit=gpu_memory_limit_bytes,
                cuda_graphs=cuda_graphs and name == "cuda",
                tensorrt=self._plan.provider_options(device_id) if self._plan is not None else None,
            )
            try:
                session = _open(path, name, stack, intra_op_threads)
            except RuntimeLoadError as error:
                if provider != "auto" or name == "cpu":
                    raise
                logger.warning("%s; trying the next provider", error)
                continue
            if session.get_providers()[0] == PROVIDER_NAMES[name]:
                self._session, self.provider = session, name
                break
            if provider != "auto":
                raise ProviderMissing(missing_sentence(name, "its libraries or its device did not load"))
            logger.warning("provider %s did not load, trying the next", name)
        if self._session is None:
            raise ProviderMissing(f"no execution provider of {provider_candidates(provider)} works here")
        self._outputs = _checked_outputs(self._session, path)
        self._manifest = parse_manifest(self._session.get_modelmeta().custom_metadata_map, str(path))
        self.graphs = cuda_graphs and self.provider == "cuda"
        """Whether shapes are recorded: then every run, the first one too, belongs on one and the same thread."""
        if self.graphs and self._manifest.nms != "dense":
            raise RuntimeLoadError(
                f"{path}: CUDA graphs need a file with dense NMS, this one waits for the host inside; "
                "export it with `--nms dense`, or unset DETECTOR_CUDA_GRAPHS"
            )
        if self.provider == "tensorrt" and len(self._outputs) > len(OUTPUTS):
            # For images without their certificate. Later, it would hold the device up, and the file might be another by then.
            self._cpu_session = open_session(path, "cpu", provider_stack("cpu"), intra_op_threads)
        on_cpu = self.provider == "cpu"
        self._host = HostBuffer() if on_cpu else pinned_buffer(device_id)
        self._bound = (
            None
            if on_cpu
            else BoundSession(
                self._session, self._outputs, "cuda", device_id, graphs=self.graphs, largest_batch=largest_batch, host=self._host
            )
        )

    @property
    def manifest(self) -> Manifest:
        """What the file says of itself."""
        return self._manifest

    def input_buffer(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """An array to build the next batch in, valid until that batch was run. What it holds is left from the batch before."""
        return self._host.view(shape)

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        """See Runtime.run."""
        if self._session is None:
            raise InferenceFailed(f"model {self._manifest.name} version {self._manifest.version} is closed")
        if self._plan is not None:
            self._plan.check_shape(images.shape)
        try:
            outputs: Sequence[NDArray[Any]]
            with self._turn(images.shape):
                if self._bound is not None:
                    outputs = self._bound.run(images, image_sizes_hw)
                else:
                    outputs = self._session.run(self._outputs, {"images": images, "image_sizes_hw": image_sizes_hw})
                if len(outputs) > len(OUTPUTS):
                    outputs = self._certified(outputs, images, image_sizes_hw)
        except InferenceFailed:
            raise
        except Exception as error:
            raise classify_device_error(error) from error
        return Detections(*outputs)

    def _turn(self, shape: Sequence[int]) -> AbstractContextManager[None]:
        """On a GPU, a pass through the process's gate: alone for a run that records."""
        if self._bound is None:
            return nullcontext()
        return CAPTURES.alone() if self._bound.records(shape) else CAPTURES.beside()

    def _certified(
        self, outputs: Sequence[NDArray[Any]], images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]
    ) -> Sequence[NDArray[Any]]:
        """The four outputs, exact for every image: nearly always at once, else after further runs."""
        unsettled = int(np.count_nonzero(~outputs[len(OUTPUTS)]))
        if not unsettled:
            return outputs[: len(OUTPUTS)]
        self._on_unsettled(unsettled)
        logger.info("dense NMS of %d of %d images is not settled; they are run on", unsettled, len(images))
        return finish(outputs, images, image_sizes_hw, self._run_from)

    def _run_from(self, image: NDArray[np.uint8], size_hw: NDArray[np.int64], state: NDArray[np.bool_]) -> Sequence[NDArray[Any]]:
        session = self._cpu_session or self._session
        assert session is not None  # run looked
        options = ort.RunOptions()
        if self.graphs:
            options.add_run_config_entry(GRAPH_ID, NO_GRAPH)
        feed = {"images": image, "image_sizes_hw": size_hw, NMS_START: state}
        outputs: Sequence[NDArray[Any]] = session.run(self._outputs, feed, options)
        return outputs

    def trim(self) -> None:
        """Give back what the arena holds beyond one image: after a warm-up of large batches that is most of the process.

        The arena grows again with the batches that really come. On a GPU it is kept: growing there costs a synchronisation.
        """
        if self.provider != "cpu" or self._session is None:
            return
        height, width = min(self._manifest.input.buckets)
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        image = {"images": np.zeros((1, height, width, 3), np.uint8), "image_sizes_hw": np.array([[height, width]], np.int64)}
        self._session.run(OUTPUTS, image, options)

    def close(self) -> None:
        """Drop the session: ONNX Runtime frees its arena with it."""
        with CAPTURES.beside():
            self._bound = None
            self._host.close()
            self._session = self._cpu_session = None


def _open(path: Path, provider: str, stack: list[Any], intra_op_threads: int | None) -> ort.InferenceSession:
    """A session; where the runtime cannot record this graph it says so at once, and then the file itself is whole."""
    try:
        with CAPTURES.beside():
            return open_session(path, provider, stack, intra_op_threads)
    except RuntimeLoadError as error:
        if "graph capture" not in str(error).lower():
            raise
        reason = first_line(error.__cause__ or error)
        raise RuntimeLoadError(
            f"{path}: CUDA graphs cannot record this file, a part of it would run on the CPU or copy to it ({reason}); "
            "export it again with `--nms dense`, or unset DETECTOR_CUDA_GRAPHS"
        ) from error


def _checked_outputs(session: ort.InferenceSession, path: Path) -> list[str]:
    """Names of the outputs to fetch: the four, and the certificate of dense NMS where the file has it.

    Raises:
        RuntimeLoadError: the file maps other inputs to other outputs.
    """
    inputs, outputs = {i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()}
    if inputs != set(INPUTS) or not outputs.issuperset(OUTPUTS):
        raise RuntimeLoadError(
            f"{path}: expected inputs {sorted(INPUTS)} and outputs {sorted(OUTPUTS)}, found {sorted(inputs)} and {sorted(outputs)}; "
            "export the checkpoint with `python -m export CHECKPOINT`"
        )
    optional = {value.name for value in session.get_overridable_initializers()}
    certified = outputs.issuperset({NMS_CONVERGED, NMS_STATE}) and NMS_START in optional
    return [*OUTPUTS, NMS_CONVERGED, NMS_STATE] if certified else list(OUTPUTS)


def file_sha256(path: Path) -> str:
    """Digest of a model file, lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
