"""Who takes part in the runtime benchmark: each a function from a sample to an answer, or a sentence why it cannot take part."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.runtime_networks import Pair, Sample
from export.engines import build
from export.graph import GraphOptions, build_graph, save
from export.job import Job, first_manifest
from model.checkpoint import Checkpoint
from service.providers import PROVIDER_NAMES, provider_candidates, provider_stack, session_options, strict_session
from service.runtime import OUTPUTS, OnnxRuntime

EAGER = "torchvision eager"
COMPILED = "torchvision, torch.compile"
THEIR_ONNX = "torchvision's own ONNX export"
OURS_EAGER = "ours, eager"
OURS = "ours, ONNX Runtime"
SERVED = "ours, as the service runs it"
GRAPHS = "ours, in the service with CUDA graphs"
TENSORRT = "ours, in the service on TensorRT"
INT8 = "ours, int8 on ONNX Runtime"
THEIR_OPSET = 17
BLAMED_LINES = 1
"""Of a library's message about why it cannot do something, this many lines say enough."""

Run = Callable[[Sample], object]


@dataclass(frozen=True)
class Device:
    """Where everybody runs.

    Attributes:
        provider: "cpu" or "cuda".
        fp16: both sides in half precision: torch by autocast, our export with `--precision fp16`.
        threads: of every contender on a CPU.
    """

    provider: str = "cpu"
    fp16: bool = False
    threads: int = 1

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.provider)


class CannotTakePart(RuntimeError):
    """This contender does not work here; the message says why."""


def open_session(model: bytes | Path, device: Device) -> ort.InferenceSession:
    """ONNX Runtime with the options of the service.

    Raises:
        CannotTakePart: the provider is not there, or does not load.
    """
    wanted = PROVIDER_NAMES[device.provider]
    if wanted not in ort.get_available_providers():
        raise CannotTakePart(f"this build of ONNX Runtime has no {wanted}")
    options = session_options(device.provider, device.threads)
    session = strict_session(model, options, provider_stack(device.provider))
    if session.get_providers()[0] != wanted:
        raise CannotTakePart(f"{wanted} did not load its libraries")
    return session


def our_options(device: Device) -> GraphOptions:
    """How we export for the device: NonMaxSuppression on a CPU, the matrix form on a GPU."""
    return GraphOptions(nms="onnx" if device.provider == "cpu" else "dense", precision="fp16" if device.fp16 else "fp32")


def our_graph(pair: Pair, device: Device) -> onnx.ModelProto:
    """Our export for the device."""
    return build_graph(pair.ours, our_options(device))


def write_version(model: onnx.ModelProto, pair: Pair, device: Device, example: Sample, folder: Path) -> Path:
    """A file that the service takes, with the buckets of the network and that of the example."""
    job = Job(checkpoint=Path(), name="measured", repository=folder, graph=our_options(device))
    manifest = first_manifest(job, Checkpoint(detector={}, config=pair.ours.config, training={}), 1)
    height, width = example.images.shape[1:3]
    buckets = sorted({*manifest.input.buckets, (height, width)})
    path = folder / "model.onnx"
    save(model, manifest.model_copy(update={"input": manifest.input.model_copy(update={"buckets": buckets})}), path)
    return path


def served(path: Path, device: Device, provider: str | None = None, *, cuda_graphs: bool = False) -> Run:
    """The service's own runtime: its session, its buffers on the host and on the device.

    Args:
        provider: where it is not the device's own.
    """
    runtime = OnnxRuntime(path, provider=provider or device.provider, intra_op_threads=device.threads, cuda_graphs=cuda_graphs)

    def run(sample: Sample) -> object:
        images = runtime.input_buffer(sample.images.shape)
        images[:] = sample.images  # the service builds a batch in place
        return runtime.run(images, sample.image_sizes_hw)

    return run


def on_tensorrt(path: Path, device: Device) -> Run:
    """The same on engines that are built first, for single pictures.

    Raises:
        ProviderMissing, BuildError: no TensorRT here, or it refuses the graph.
    """
    provider_candidates("tensorrt")
    build(path, device_id=0, max_batch_size=1, console=Console(quiet=True))
    return served(path, device, "tensorrt")


def exported(model: bytes | Path, device: Device) -> Run:
    """Any file that keeps the graph contract."""
    session = open_session(model, device)

    def run(sample: Sample) -> object:
        return session.run(OUTPUTS, {"images": sample.images, "image_sizes_hw": sample.image_sizes_hw})

    return run


def our_eager(pair: Pair, device: Device) -> Run:
    """The network itself in PyTorch."""
    detector = pair.ours.to(device.torch_device)

    @torch.inference_mode()
    def run(sample: Sample) -> object:
        with torch.autocast(device.provider, torch.float16, enabled=device.fp16):
            answer = detector(*(torch.from_numpy(part).to(device.torch_device) for part in (sample.images, sample.image_sizes_hw)))
        return [part.cpu() for part in answer]

    return run


def their_eager(pair: Pair, device: Device) -> Run:
    """torchvision as its documentation calls it."""
    return _torch(pair.theirs.to(device.torch_device), device)


def compiled(pair: Pair, device: Device) -> Run:
    """torch.compile on what is dense: body and pyramid, RPN head, box head, each compiled anew for every size of picture.

    Between them lie lists whose length depends on the data, at which the compiler breaks off anyway; with dynamic shapes it fails.
    """
    network = copy.deepcopy(pair.theirs).to(device.torch_device)
    for part in ("backbone", "rpn.head", "roi_heads.box_head"):
        network.get_submodule(part).compile(dynamic=False)
    return _torch(network, device)


def _torch(network: Callable[..., Any], device: Device) -> Run:
    @torch.inference_mode()
    def run(sample: Sample) -> object:
        with torch.autocast(device.provider, torch.float16, enabled=device.fp16):
            answers = network([sample.float_picture.to(device.torch_device)])
        return [{name: part.cpu() for name, part in answer.items()} for answer in answers]

    return run


def their_export(pair: Pair, device: Device, example: Sample) -> Run:
    """torchvision's network through torch's TorchScript exporter, the one that its documentation supports; batch 1.

    Raises:
        CannotTakePart: the exporter or the runtime refuses it.
    """
    network = _Tensors(pair.theirs.cpu()).eval()
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        file = Path(folder) / "theirs.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter warns of every constant that it makes
                torch.onnx.export(
                    network,
                    (example.float_picture,),
                    file,
                    dynamo=False,
                    opset_version=THEIR_OPSET,
                    input_names=["picture"],
                    dynamic_axes={"picture": {1: "height", 2: "width"}},
                )
        except Exception as error:
            raise CannotTakePart(f"torch.onnx.export: {first_lines(error)}") from error
        session = open_session(file, device)

    def run(sample: Sample) -> object:
        return session.run(None, {"picture": sample.float_picture.numpy()})

    return run


class _Tensors(nn.Module):
    """One picture in, tensors out: an exporter knows no dictionaries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answer = self.network([picture])[0]
        return answer["boxes"], answer["scores"], answer["labels"]


def gather(
    pair: Pair,
    device: Device,
    example: Sample,
    *,
    folder: Path,
    files: dict[str, Path],
    without: frozenset[str] = frozenset(),
    to_int8: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Run], dict[str, str], onnx.ModelProto]:
    """Everybody who can take part, warmed by the example; who cannot, with the reason; and our graph.

    Args:
        folder: for our file, needed as long as they run.
        files: further files with the graph contract, by the name to show.
        without: names to leave out.
        to_int8: makes an int8 graph of ours; None leaves that contender out.
    """
    progress(f"exporting {pair.name}")
    graph = our_graph(pair, device)

    @cache
    def version() -> Path:
        return write_version(graph, pair, device, example, folder)

    on_gpu: dict[str, Callable[[], Run]] = {
        GRAPHS: lambda: served(version(), device, cuda_graphs=True),
        TENSORRT: lambda: on_tensorrt(version(), device),
    }
    makers: dict[str, Callable[[], Run]] = {
        EAGER: lambda: their_eager(pair, device),
        COMPILED: lambda: compiled(pair, device),
        THEIR_ONNX: lambda: their_export(pair, device, example),
        OURS_EAGER: lambda: our_eager(pair, device),
        OURS: lambda: exported(graph.SerializeToString(), device),
        SERVED: lambda: served(version(), device),
        **({} if device.provider == "cpu" else on_gpu),
        **({} if to_int8 is None else {INT8: lambda: exported(to_int8(graph).SerializeToString(), device)}),
        **{name: lambda path=path: exported(path, device) for name, path in files.items()},  # type: ignore[misc]  # mypy cannot infer it
    }
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        if name in without:
            continue
        progress(f"preparing {name}")
        try:
            run = make()
            run(example)
            runs[name] = run
        except Exception as error:  # a contender that fails is a result of the comparison, not its end
            reasons[name] = first_lines(error)
    return runs, reasons, graph


def first_lines(error: BaseException) -> str:
    """The beginning of a message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:BLAMED_LINES])[:300] or type(error).__name__
