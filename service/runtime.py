"""Runtimes: what turns a batch of pixels into detections. `OnnxRuntime` is the real one; tests bring their own.

B images, H W a bucket's size, D detections of an image.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.errors import InferenceFailed
from service.manifest import Bucket, Manifest, parse_manifest
from service.quota import cpu_quota

INPUTS = ("images", "image_sizes_hw")
OUTPUTS = ("boxes", "scores", "labels", "num_detections")
BOUND_SHAPES = 32
"""Input buffers kept on a device: one a (bucket, batch size)."""

PROVIDER_NAMES = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
TENSORRT_EXCLUDED_OPS = "NonMaxSuppression,NonZero,RoiAlign"  # they split the graph or run slower there

OUT_OF_MEMORY_WORDS = ("out of memory", "failed to allocate memory", "available memory of", "alloc_failed", "bad_alloc", "bfcarena")
DEVICE_LOST_WORDS = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable ecc",
    "cuda failure 700",
    "cuda failure 719",
    "cudnn_status_execution_failed",
)

CostTable = dict[tuple[Bucket, int], float]
"""Seconds of one inference by (bucket, batch size)."""

logger = logging.getLogger(__name__)


class RuntimeLoadError(RuntimeError):
    """A file or a provider that cannot be used, as a sentence for the operator."""


class ProviderMissing(RuntimeLoadError):
    """The execution provider that was asked for does not work here."""


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
        provider: "auto" takes CUDA where it works, else the CPU; TensorRT only when asked for.
        intra_op_threads: threads of one inference; None: 1 on a GPU, the container's quota on a CPU.
        gpu_memory_limit_bytes: bound of the CUDA arena.
        device_id: which CUDA device.

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
    ) -> None:
        self.provider = "cpu"
        self._session: ort.InferenceSession | None = None
        for name in provider_candidates(provider):
            session = _open_session(path, name, intra_op_threads, gpu_memory_limit_bytes, device_id)
            if session.get_providers()[0] == PROVIDER_NAMES[name]:
                self._session, self.provider = session, name
                break
            if provider != "auto":
                raise ProviderMissing(_provider_sentence(name, "its libraries did not load"))
            logger.warning("provider %s did not load, trying the next", name)
        if self._session is None:
            raise ProviderMissing(f"no execution provider of {provider_candidates(provider)} works here")
        _check_interface(self._session, path)
        self._manifest = parse_manifest(self._session.get_modelmeta().custom_metadata_map, str(path))
        self._bound = _BoundInputs(self._session, "cuda", device_id) if self.provider != "cpu" else None

    @property
    def manifest(self) -> Manifest:
        """What the file says of itself."""
        return self._manifest

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        """See Runtime.run."""
        if self._session is None:
            raise InferenceFailed(f"model {self._manifest.name} version {self._manifest.version} is closed")
        try:
            if self._bound is not None:
                outputs = self._bound.run(images, image_sizes_hw)
            else:
                outputs = self._session.run(OUTPUTS, {"images": images, "image_sizes_hw": image_sizes_hw})
        except Exception as error:
            raise classify_device_error(error) from error
        return Detections(*outputs)

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
        self._bound = None
        self._session = None


def provider_candidates(provider: str) -> list[str]:
    """Providers to try, best first.

    Raises:
        ProviderMissing: the one that was asked for is not in this build of ONNX Runtime.
    """
    available = ort.get_available_providers()
    if provider == "auto":
        return [name for name in ("cuda", "cpu") if PROVIDER_NAMES[name] in available]
    if PROVIDER_NAMES[provider] not in available:
        raise ProviderMissing(_provider_sentence(provider, "this build of ONNX Runtime does not hold it"))
    return [provider]


def _provider_sentence(provider: str, reason: str) -> str:
    return (
        f"provider {provider!r} was asked for, but {reason} (available: {', '.join(ort.get_available_providers())}); "
        "install the requirements for GPUs, or set DETECTOR_PROVIDER=auto or cpu"
    )


def _open_session(
    path: Path, provider: str, intra_op_threads: int | None, memory_limit: int | None, device_id: int
) -> ort.InferenceSession:
    on_cpu = provider == "cpu"
    if not on_cpu and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN out of the nvidia-* wheels
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = intra_op_threads or (cpu_quota() if on_cpu else 1)
    options.inter_op_num_threads = 1
    # A spinning pool takes the CPU that the decoders need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=_provider_options(provider, memory_limit, device_id))
    except Exception as error:
        raise RuntimeLoadError(f"{path}: ONNX Runtime cannot open it: {_first_line(error)}; is it a complete model.onnx?") from error


def _provider_options(provider: str, memory_limit: int | None, device_id: int) -> list[Any]:
    cuda: dict[str, Any] = {
        "device_id": device_id,
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE stalls at every new shape
        "arena_extend_strategy": "kSameAsRequested",  # few fixed shapes: growing by powers of two only wastes memory
    }
    if memory_limit is not None:
        cuda["gpu_mem_limit"] = memory_limit
    tensorrt = {
        "device_id": device_id,
        "trt_engine_cache_enable": True,
        "trt_timing_cache_enable": True,
        "trt_op_types_to_exclude": TENSORRT_EXCLUDED_OPS,
    }
    stacks: dict[str, list[Any]] = {
        "cpu": ["CPUExecutionProvider"],
        "cuda": [(PROVIDER_NAMES["cuda"], cuda), "CPUExecutionProvider"],
        "tensorrt": [(PROVIDER_NAMES["tensorrt"], tensorrt), (PROVIDER_NAMES["cuda"], cuda), "CPUExecutionProvider"],
    }
    return stacks[provider]


def _check_interface(session: ort.InferenceSession, path: Path) -> None:
    inputs, outputs = {i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()}
    if inputs != set(INPUTS) or not outputs.issuperset(OUTPUTS):
        raise RuntimeLoadError(
            f"{path}: expected inputs {sorted(INPUTS)} and outputs {sorted(OUTPUTS)}, found {sorted(inputs)} and {sorted(outputs)}; "
            "export the checkpoint with `python -m export CHECKPOINT`"
        )


class _BoundInputs:
    """Input buffers that stay on the device between runs, one binding a shape, the least used dropped."""

    def __init__(self, session: ort.InferenceSession, device_type: str, device_id: int) -> None:
        self._session = session
        self._device = (device_type, device_id)
        self._shapes: OrderedDict[tuple[int, ...], tuple[Any, ort.OrtValue, ort.OrtValue]] = OrderedDict()

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> list[NDArray[Any]]:
        if images.shape not in self._shapes:
            self._shapes[images.shape] = self._bind(images.shape)
            if len(self._shapes) > BOUND_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(images.shape)
        binding, device_images, device_sizes = self._shapes[images.shape]
        device_images.update_inplace(np.ascontiguousarray(images))
        device_sizes.update_inplace(np.ascontiguousarray(image_sizes_hw))
        self._session.run_with_iobinding(binding)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def _bind(self, shape: tuple[int, ...]) -> tuple[Any, ort.OrtValue, ort.OrtValue]:
        device_type, device_id = self._device
        images = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.uint8, device_type, device_id)
        sizes = ort.OrtValue.ortvalue_from_shape_and_type([shape[0], 2], np.int64, device_type, device_id)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", images)
        binding.bind_ortvalue_input("image_sizes_hw", sizes)
        for name in OUTPUTS:
            binding.bind_output(name, device_type, device_id)
        return binding, images, sizes


def classify_device_error(error: Exception) -> Exception:
    """Which kind of failure a runtime's exception tells of, by the words that the libraries use."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY_WORDS):
        return DeviceOutOfMemory(_first_line(error))
    if any(word in text for word in DEVICE_LOST_WORDS):
        return DeviceLost(_first_line(error))
    logger.warning("inference failed: %s", _first_line(error))  # the library's words may hold paths, so they stay here
    return InferenceFailed("the device failed on this image; send it once more, and report its request id if it fails again")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_sha256(path: Path) -> str:
    """Digest of a model file, lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
