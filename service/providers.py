"""Execution providers of ONNX Runtime: which are here, with which options they are opened, in which order they are tried."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service.device_errors import first_line
from service.quota import cpu_quota

PROVIDER_NAMES = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

FP32_ONLY = ("NVIDIA_TF32_OVERRIDE", "0")
"""TF32, on by default, would round every fp32 product to ten bits; who wants speed exports fp16.

CUDA's provider has an option for it. TensorRT's has none, and NVIDIA's libraries read this variable once, when they are loaded.
"""

SPIN_US = 50


class RuntimeLoadError(RuntimeError):
    """A file or a provider that cannot be used, as a sentence for the operator."""


class ProviderMissing(RuntimeLoadError):
    """The execution provider that was asked for does not work here."""


OTHERWISE = "or take another provider: DETECTOR_PROVIDER=auto or cpu for the service, --provider cpu for a command"


def provider_candidates(provider: str, otherwise: str = OTHERWISE) -> list[str]:
    """Providers to try, best first. TensorRT only when asked for: it needs engines that were built before.

    Args:
        otherwise: what to do instead, for the message.

    Raises:
        ProviderMissing: the one that was asked for is not in this build of ONNX Runtime.
    """
    available = ort.get_available_providers()
    if provider == "auto":
        return [name for name in ("cuda", "cpu") if PROVIDER_NAMES[name] in available]
    if PROVIDER_NAMES[provider] not in available:
        raise ProviderMissing(missing_sentence(provider, "this build of ONNX Runtime does not hold it", otherwise))
    return [provider]


def missing_sentence(provider: str, reason: str, otherwise: str = OTHERWISE) -> str:
    """Why a provider is not used, and what to do."""
    return (
        f"provider {provider!r} was asked for, but {reason} (available: {', '.join(ort.get_available_providers())}); "
        f"install NVIDIA's driver (containers: --gpus all) and the requirements for GPUs (every verb of make takes DEVICE=gpu), {otherwise}"
    )


def provider_stack(
    provider: str,
    *,
    device_id: int = 0,
    memory_limit: int | None = None,
    cuda_graphs: bool = False,
    tensorrt: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `InferenceSession(providers=...)` takes: the provider and what catches the nodes that it leaves.

    Args:
        memory_limit: bytes of the CUDA arena.
        cuda_graphs: record each shape's kernels once and replay them.
        tensorrt: options of the TensorRT provider (`service.tensorrt.provider_options`).
    """
    cuda: dict[str, Any] = {
        "device_id": device_id,
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE stalls at every new shape
        "arena_extend_strategy": "kSameAsRequested",  # few fixed shapes: growing by powers of two only wastes memory
        "use_tf32": "0",  # see FP32_ONLY
    }
    if memory_limit is not None:
        cuda["gpu_mem_limit"] = memory_limit
    if cuda_graphs:
        cuda["enable_cuda_graph"] = "1"
    cpu = PROVIDER_NAMES["cpu"]
    if provider == "cpu":
        return [cpu]
    if provider == "cuda":
        return [(PROVIDER_NAMES["cuda"], cuda), cpu]
    return [(PROVIDER_NAMES["tensorrt"], dict(tensorrt or {})), (PROVIDER_NAMES["cuda"], cuda), cpu]


def session_options(provider: str, intra_op_threads: int | None = None) -> ort.SessionOptions:
    """Options of a session that the service would open.

    Args:
        intra_op_threads: None: 1 on a GPU, the container's quota on a CPU.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = intra_op_threads or (cpu_quota() if provider == "cpu" else 1)
    options.inter_op_num_threads = 1
    if provider == "tensorrt":  # it optimises its parts itself, and the plan of its engines names the file's own tensors
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Between two nodes of a run, threads wait in a loop, since waking them takes longer: a tenth of the time with small layers. Longer
    # loops win no more, and take the CPU from whoever shares it. After the run it is the decoders'.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def strict_session(model: Path | bytes, options: ort.SessionOptions, stack: list[Any]) -> ort.InferenceSession:
    """A session on the providers of a stack, or the provider's own exception.

    Left to itself, ONNX Runtime's Python class opens the session anew without a provider that fails, at opening and in a run as well:
    an engine that cannot be built would look like one that was.
    """
    if stack != [PROVIDER_NAMES["cpu"]]:
        os.environ.setdefault(*FP32_ONLY)
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN out of the nvidia-* wheels
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=stack, enable_fallback=0)


def open_session(
    path: Path, provider: str, stack: list[Any], intra_op_threads: int | None = None, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """A session of a model file as the service runs it.

    Args:
        stack: from `provider_stack`.
        intra_op_threads: see `session_options`.
        options: in place of the service's own.

    Raises:
        RuntimeLoadError: the file cannot be opened, or not by this provider; caused by the runtime's own exception.
    """
    try:
        return strict_session(path, options or session_options(provider, intra_op_threads), stack)
    except Exception as error:
        where = "" if provider == "cpu" else f" with the provider {provider!r}"
        raise RuntimeLoadError(f"{path}: ONNX Runtime cannot open it{where}: {first_line(error)}; is it a complete model.onnx?") from error
