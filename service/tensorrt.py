"""TensorRT engines: where they lie, what they are keyed by, for which shapes they were built. The service only ever reads them.

Engines take minutes to build, so `python -m export build-engines` builds them offline, into a folder beside the model file. Its name
holds everything that makes an engine unusable elsewhere: the GPU, driver, TensorRT, ONNX Runtime, and the model file itself (ONNX Runtime
names engines after the graph's topology, so new weights would find the old engines). The plan in it is written last: without it nothing
was built to the end, and the service says so in a sentence instead of building in a request.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service.errors import InferenceFailed
from service.manifest import Bucket
from service.providers import ProviderMissing, RuntimeLoadError

EXCLUDED_OPS = ("NonMaxSuppression", "NonZero", "RoiAlign")
"""Left to CUDA: sizes that depend on data split or rebuild an engine, and RoiAlign runs slower there."""
ENGINE_FOLDER = "engines"
PLAN_FILE = "plan.json"
PLAN_FORMAT = 2
NVINFER_NAMES = ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so")
BUILD_HINT = "build them with `python -m export build-engines {path} --device {device}`, or set DETECTOR_PROVIDER=cuda"

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
Ranges = Mapping[str, Range]
"""Tensor -> (min, opt, max): one optimisation profile, since ONNX Runtime's provider builds several but only ever runs the first."""


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on."""

    gpu: str
    driver: str
    tensorrt: str
    onnxruntime: str
    sha256: str

    @property
    def folder_name(self) -> str:
        """Readable at the front, unique at the end."""
        readable = re.sub(r"[^a-z0-9]+", "-", f"{self.gpu} trt {self.tensorrt}".lower()).strip("-")
        return f"{readable}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class EnginePlan:
    """What was built: the folder and the shapes.

    Attributes:
        folder: holds engines and timing cache.
        ranges: of the graph's inputs and of every tensor at which TensorRT's parts begin.
    """

    folder: Path
    buckets: tuple[Bucket, ...]
    max_batch_size: int
    ranges: Ranges

    def provider_options(self, device_id: int) -> dict[str, str]:
        """Options of ONNX Runtime's TensorRT provider; the same for building and serving, or the engines are not found.

        None asks for a precision: without one, TensorRT keeps every tensor in the type that the file gives it. `trt_fp16_enable` and its
        like would let it compute in half precision what the exporter left in fp32 on purpose.
        """
        return {
            "device_id": str(device_id),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(self.folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(self.folder),
            "trt_op_types_to_exclude": ",".join(EXCLUDED_OPS),
            **profile_options(self.ranges),
        }

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a batch that no engine was built for: TensorRT would build one now.

        Raises:
            InferenceFailed: with the batch size and buckets that were built.
        """
        batch, height, width = shape[:3]
        if batch > self.max_batch_size or (height, width) not in self.buckets:
            built = ", ".join(f"{h}x{w}" for h, w in self.buckets)
            raise InferenceFailed(
                f"{batch} images of {height}x{width}: the TensorRT engines were built for up to {self.max_batch_size} images of {built}; "
                "lower DETECTOR_MAX_BATCH_SIZE or build the engines again"
            )

    def save(self) -> None:
        """Write the plan: from now on the engines count as built."""
        text = json.dumps(
            {
                "format": PLAN_FORMAT,
                "buckets": self.buckets,
                "max_batch_size": self.max_batch_size,
                "ranges": self.ranges,
            }
        )
        partial = self.folder / f"{PLAN_FILE}.part"
        partial.write_text(text)
        partial.replace(self.folder / PLAN_FILE)


def load_plan(folder: Path) -> EnginePlan | None:
    """The plan of a folder, or None where engines were not built to the end."""
    try:
        found = json.loads((folder / PLAN_FILE).read_text())
        if found["format"] != PLAN_FORMAT:
            return None
        ranges = {name: _triple(shapes) for name, shapes in found["ranges"].items()}
        buckets = tuple((int(height), int(width)) for height, width in found["buckets"])
        return EnginePlan(folder, buckets, int(found["max_batch_size"]), ranges)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _triple(values: Sequence[Sequence[int]]) -> Range:
    low, usual, high = (tuple(int(side) for side in shape) for shape in values)
    return low, usual, high


def corners(buckets: Sequence[Bucket], max_batch_size: int) -> list[tuple[Bucket, int]]:
    """(height and width, images) at which a profile is smallest, best and largest; every bucket and batch lies between the outer two.

    Best is the largest bucket with half the images. The outer two need not be buckets: the least and the greatest of heights and of widths.
    """
    heights, widths = zip(*buckets, strict=True)
    usual = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
    return [((min(heights), min(widths)), 1), (usual, max(1, max_batch_size // 2)), ((max(heights), max(widths)), max_batch_size)]


def input_ranges(buckets: Sequence[Bucket], max_batch_size: int) -> dict[str, Range]:
    """The profile of the graph's inputs, for every bucket and 1 to `max_batch_size` images."""
    at = corners(buckets, max_batch_size)
    return {"images": _triple([(size, *hw, 3) for hw, size in at]), "image_sizes_hw": _triple([(size, 2) for _, size in at])}


def profile_options(ranges: Ranges) -> dict[str, str]:
    """The three profile options, `name:1x320x448x3,...`."""
    if not ranges:
        return {}
    options = {}
    for place, option in enumerate(("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")):
        options[option] = ",".join(f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in ranges.items())
    return options


def engine_folder(path: Path, key: EngineKey) -> Path:
    """Where the engines of a model file lie."""
    return path.parent / ENGINE_FOLDER / key.folder_name


def engine_key(path: Path, device_id: int) -> EngineKey:
    """The key on this machine.

    Raises:
        ProviderMissing: there is no NVIDIA driver or no TensorRT, in a sentence.
    """
    gpu, driver = gpu_and_driver(device_id)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return EngineKey(gpu, driver, tensorrt_version(), ort.__version__, digest)


def gpu_and_driver(device_id: int, command: Sequence[str] = ("nvidia-smi",)) -> tuple[str, str]:
    """Name of a GPU and version of its driver.

    Raises:
        ProviderMissing: no driver, or no such device.
    """
    query = [*command, f"--id={device_id}", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603  (fixed words)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProviderMissing(f"TensorRT was asked for, but there is no NVIDIA driver here ({command[0]}: {error})") from error
    name, comma, driver = done.stdout.strip().partition(", ")
    if done.returncode != 0 or not comma:
        said = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        raise ProviderMissing(f"TensorRT was asked for on device {device_id}, but {command[0]} does not find it: {said}")
    return name, driver


def tensorrt_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Version of TensorRT's library, for instance 10.13.3.

    Raises:
        ProviderMissing: the library is not here.
    """
    for name in NVINFER_NAMES:
        try:
            number = int(load(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    raise ProviderMissing(
        f"TensorRT was asked for, but its library is not found ({', '.join(NVINFER_NAMES)}); "
        "install TensorRT, or put its folder into LD_LIBRARY_PATH"
    )


def require_engines(path: Path, device_id: int) -> EnginePlan:
    """The engines that were built for this file on this machine.

    Raises:
        ProviderMissing: no GPU or TensorRT. RuntimeLoadError: nothing was built, or for something else.
    """
    key = engine_key(path, device_id)
    folder = engine_folder(path, key)
    plan = load_plan(folder)
    if plan is not None:
        return plan
    others = sorted(other.name for other in folder.parent.iterdir()) if folder.parent.is_dir() else []
    beside = f" (there are engines for {', '.join(others)})" if others else ""
    raise RuntimeLoadError(
        f"{path}: no TensorRT engines for {key.gpu}, driver {key.driver}, TensorRT {key.tensorrt}, ONNX Runtime {key.onnxruntime} "
        f"and this file{beside}; " + BUILD_HINT.format(path=path, device=device_id)
    )
