"""One ONNX graph out of a detector: standard operators only, dynamic batch, height and width, nothing left to fold.

B images, H and W the padded input, multiples of 32.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxslim
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export import certificate, trim
from export.certificate import CertifiedDetector
from export.model_file import required_inputs
from export.nms import TRANSLATIONS, onnx_nms
from export.opset import OLDEST, TRACED, OpsetError, lower_to_17
from export.precision import FIRST_OPSET, Kind, set_types
from export.roi_pool import pool_by_products, products_pay, table_pooling
from model.backbones.frozen_norm import NormalisedConv2d
from model.faster_rcnn import FasterRCNN
from model.nms import dense_nms
from service.manifest import METADATA_KEY, Manifest, dump_manifest
from service.runtime import INPUTS, OUTPUTS
from service.unsettled import NMS_CONVERGED, NMS_START, NMS_STATE

STRIDE = 32
OPSETS = (17, 18, 19, 22)
DEFAULT_OPSET = 18
TRACED_BATCH, TRACED_ROWS, TRACED_COLUMNS = 2, 3, 7  # small, not square, and no bucket

REFUSED_OPS = frozenset({"If", "Loop", "Scan", "NonZero", "MaxRoiPool"})
"""Control flow and data-dependent shapes block CUDA graphs and wait for the host; MaxRoiPool has no CUDA kernel."""

NMSChoice = Literal["onnx", "dense"]


class ExportError(RuntimeError):
    """The network cannot become a graph that keeps the contract; the message says why."""


@dataclass(frozen=True)
class GraphOptions:
    """Choices that change the graph but not what it means.

    Attributes:
        opset: operator set of the file; bf16 needs 22.
        precision: see `export.precision`; int8 is traced in fp32 and quantised afterwards.
    """

    nms: NMSChoice = "onnx"
    opset: int = DEFAULT_OPSET
    precision: Kind = "fp32"


def build_graph(detector: FasterRCNN, options: GraphOptions) -> onnx.ModelProto:
    """Trace, translate and simplify.

    Args:
        detector: in eval mode, on the CPU; left as it is.

    Raises:
        ExportError: the result breaks the graph contract.
    """
    if options.opset < FIRST_OPSET[options.precision]:
        raise ExportError(
            f"{options.precision} needs operator set {FIRST_OPSET[options.precision]} or later, not {options.opset}: "
            "before that no standard convolution knows the type"
        )
    ready = inference_copy(detector, options.nms)
    set_types(ready, options.precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        traced = CertifiedDetector(ready) if options.nms == "dense" else ready
        program = _trace(traced, max(options.opset, TRACED))
        model: onnx.ModelProto = onnxslim.slim(
            program.model_proto, no_shape_infer=True
        )  # its inference hangs on VGG-16 and finds nothing else
    if isinstance(traced, CertifiedDetector):
        certificate.name_weights_as_alone(model)
        certificate.make_start_optional(model, traced.state_width)
    if options.opset == OLDEST:
        model = _lowered(model)
    model.producer_name = "faster-rcnn-service"
    model.graph.name = detector.config.architecture
    problems = graph_problems(model)
    if problems:
        raise ExportError("; ".join(problems))
    return model


def _lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return lower_to_17(model)
    except OpsetError as error:
        raise ExportError(f"{error}; export with --opset {TRACED}") from error


def inference_copy(detector: FasterRCNN, nms: NMSChoice) -> FasterRCNN:
    """A copy with its norms folded into the convolutions and the strategies for an export."""
    ready = copy.deepcopy(detector).eval().requires_grad_(False)
    for parent in list(ready.modules()):
        previous: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, NormalisedConv2d):
                setattr(parent, name, _folded(child))
            elif isinstance(child, nn.BatchNorm2d) and previous is not None and isinstance(previous[1], nn.Conv2d):
                setattr(parent, previous[0], fuse_conv_bn_eval(previous[1], child))
                setattr(parent, name, nn.Identity())
            previous = (name, child)
    ready.nms = onnx_nms(detector.config.num_classes + 1) if nms == "onnx" else dense_nms
    if nms == "onnx":  # made for CPUs, and its list depends on the data anyway
        ready.trim = trim.trim
        if products_pay(ready, _stride(ready)):
            pool_by_products(ready)
    if detector.config.roi.pool == "max":
        ready.pool = table_pooling(max(max(bucket) for bucket in detector.config.input.buckets), _stride(ready))
    return ready


@torch.inference_mode()
def _stride(detector: FasterRCNN) -> int:
    """Of the finest feature map."""
    side = 4 * STRIDE
    return side // int(detector.backbone(torch.zeros(1, 3, side, side))[0].shape[2])


def _folded(conv: NormalisedConv2d) -> nn.Conv2d:
    scale, shift = conv.norm[0].affine()
    shape: Any = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = nn.Conv2d(*shape)
    plain.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    plain.bias = nn.Parameter(shift, requires_grad=False)
    return plain


def _trace(detector: FasterRCNN | CertifiedDetector, opset: int) -> Any:
    height, width = STRIDE * TRACED_ROWS, STRIDE * TRACED_COLUMNS
    images = torch.zeros(TRACED_BATCH, height, width, 3, dtype=torch.uint8)
    sizes_hw = torch.tensor([[height - 6, width - 24], [height - 19, width - 4]])
    batch = Dim("batch")
    inputs: dict[str, Any] = {"images": images, "image_sizes_hw": sizes_hw}
    shapes: dict[str, Any] = {"images": {0: batch, 1: STRIDE * Dim("rows"), 2: STRIDE * Dim("columns")}, "image_sizes_hw": {0: batch}}
    outputs = list(OUTPUTS)
    if isinstance(detector, CertifiedDetector):
        inputs[NMS_START] = torch.ones(TRACED_BATCH, detector.state_width, dtype=torch.bool)
        shapes[NMS_START] = {0: Dim("start")}
        outputs += [NMS_CONVERGED, NMS_STATE]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return torch.onnx.export(
            detector,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=outputs,
            custom_translation_table=TRANSLATIONS | certificate.TRANSLATIONS | trim.TRANSLATIONS,
            verbose=False,
        )
    except Exception as error:
        raise ExportError(f"torch.onnx.export failed: {str(error).strip().splitlines()[0]}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def graph_problems(model: onnx.ModelProto) -> list[str]:
    """What in a graph breaks the contract that any ONNX Runtime build can serve it; empty if nothing does."""
    problems = []
    inputs, outputs = required_inputs(model), tuple(value.name for value in model.graph.output)
    if inputs != INPUTS or outputs not in (OUTPUTS, (*OUTPUTS, NMS_CONVERGED, NMS_STATE)):
        problems.append(f"the graph maps {inputs} to {outputs}, expected {INPUTS} to {OUTPUTS}")
    used = Counter(node.op_type for node in model.graph.node)
    refused = sorted(REFUSED_OPS & used.keys())
    if refused:
        problems.append(f"operators that may not be used: {refused}")
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        problems.append(f"operators outside the standard: {foreign or [function.name for function in model.functions]}")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        problems.append(f"onnx.checker: {error}")
    return problems


def save(model: onnx.ModelProto, manifest: Manifest, path: Path) -> None:
    """Write the file with the manifest in its metadata."""
    onnx.helper.set_model_props(model, {METADATA_KEY: dump_manifest(manifest)})
    onnx.save(model, str(path))
