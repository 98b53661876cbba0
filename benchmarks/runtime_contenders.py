"""Who takes part in the runtime benchmark: each a function from a sample to an answer, or a sentence why it cannot take part."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from benchmarks.runtime_networks import Pair, Sample
from export.graph import GraphOptions, build_graph
from service.runtime import OUTPUTS, PROVIDER_NAMES

EAGER = "torchvision eager"
COMPILED = "torchvision, torch.compile"
THEIR_ONNX = "torchvision's own ONNX export"
OURS_EAGER = "ours, eager"
OURS = "ours, ONNX Runtime"
SERVED = "ours, as the service runs it"
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
        fp16: torch's sides in half precision; ours as its file holds it.
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


def open_session(model: bytes | str, device: Device, *, spinning: bool = True) -> ort.InferenceSession:
    """ONNX Runtime with its own defaults, but for the number of threads and the search of algorithms.

    Args:
        spinning: whether idle threads wait in a loop; the service's do not, since pictures are decoded beside them.

    Raises:
        CannotTakePart: the provider is not there, or does not load.
    """
    wanted = PROVIDER_NAMES[device.provider]
    if wanted not in ort.get_available_providers():
        raise CannotTakePart(f"this build of ONNX Runtime has no {wanted}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = device.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if device.provider != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    cuda = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    providers: list[Any] = [wanted] if device.provider == "cpu" else [(wanted, cuda), PROVIDER_NAMES["cpu"]]
    session = ort.InferenceSession(model, options, providers=providers)
    if session.get_providers()[0] != wanted:
        raise CannotTakePart(f"{wanted} did not load its libraries")
    return session


def our_graph(pair: Pair, device: Device) -> onnx.ModelProto:
    """Our export for the device: NonMaxSuppression on a CPU, the matrix form on a GPU."""
    return build_graph(pair.ours, GraphOptions(nms="onnx" if device.provider == "cpu" else "dense"))


def exported(model: bytes | str, device: Device, *, spinning: bool = True) -> Run:
    """Any file that keeps the graph contract."""
    session = open_session(model, device, spinning=spinning)

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
        session = open_session(str(file), device)

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
    files: dict[str, Path],
    without: frozenset[str] = frozenset(),
    to_int8: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Run], dict[str, str], onnx.ModelProto]:
    """Everybody who can take part, warmed by the example; who cannot, with the reason; and our graph.

    Args:
        files: further files with the graph contract, by the name to show.
        without: names to leave out.
        to_int8: makes an int8 graph of ours; None leaves that contender out.
    """
    progress(f"exporting {pair.name}")
    graph = our_graph(pair, device)
    makers: dict[str, Callable[[], Run]] = {
        EAGER: lambda: their_eager(pair, device),
        COMPILED: lambda: compiled(pair, device),
        THEIR_ONNX: lambda: their_export(pair, device, example),
        OURS_EAGER: lambda: our_eager(pair, device),
        OURS: lambda: exported(graph.SerializeToString(), device),
        SERVED: lambda: exported(graph.SerializeToString(), device, spinning=False),
        **({} if to_int8 is None else {INT8: lambda: exported(to_int8(graph).SerializeToString(), device)}),
        **{name: lambda path=path: exported(str(path), device) for name, path in files.items()},  # type: ignore[misc]  # mypy cannot infer it
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
