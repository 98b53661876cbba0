"""Execution providers of ONNX Runtime: which are here, with which options they are opened, in which order they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service.device_errors import first_line
from service.quota import cpu_quota

PROVIDER_NAMES = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class RuntimeLoadError(RuntimeError):
    """A file or a provider that cannot be used, as a sentence for the operator."""


class ProviderMissing(RuntimeLoadError):
    """The execution provider that was asked for does not work here."""


def provider_candidates(provider: str) -> list[str]:
    """Providers to try, best first. TensorRT only when asked for: it needs engines that were built before.

    Raises:
        ProviderMissing: the one that was asked for is not in this build of ONNX Runtime.
    """
    available = ort.get_available_providers()
    if provider == "auto":
        return [name for name in ("cuda", "cpu") if PROVIDER_NAMES[name] in available]
    if PROVIDER_NAMES[provider] not in available:
        raise ProviderMissing(missing_sentence(provider, "this build of ONNX Runtime does not hold it"))
    return [provider]


def missing_sentence(provider: str, reason: str) -> str:
    """Why a provider is not used, and what to do."""
    return (
        f"provider {provider!r} was asked for, but {reason} (available: {', '.join(ort.get_available_providers())}); "
        "install NVIDIA's driver (containers: --gpus all) and the requirements for GPUs, or set DETECTOR_PROVIDER=auto or cpu"
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


def open_session(path: Path, provider: str, stack: list[Any], intra_op_threads: int | None = None) -> ort.InferenceSession:
    """A session of a model file.

    Args:
        stack: from `provider_stack`.
        intra_op_threads: None: 1 on a GPU, the container's quota on a CPU.

    Raises:
        RuntimeLoadError: the file cannot be opened.
    """
    on_cpu = provider == "cpu"
    if not on_cpu and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN out of the nvidia-* wheels
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = intra_op_threads or (cpu_quota() if on_cpu else 1)
    options.inter_op_num_threads = 1
    if provider == "tensorrt":  # it optimises its parts itself, and the plan of its engines names the file's own tensors
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A spinning pool takes the CPU that the decoders need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=stack)
    except Exception as error:
        raise RuntimeLoadError(f"{path}: ONNX Runtime cannot open it: {first_line(error)}; is it a complete model.onnx?") from error
