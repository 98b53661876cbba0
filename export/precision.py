"""Which part of the network runs in which type, for every precision, as one table; and the table applied to a network before it is traced.

The casts are part of the traced program: nothing is patched into the ONNX file afterwards. int8 is traced in fp32; `export.quantize` then
adds the quantisation to the parts that the same table names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from model.faster_rcnn import FasterRCNN
from service.manifest import Precision

Kind = Literal["fp32", "fp16", "bf16", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#                 part                            fp32    fp16    bf16    int8    why an island stays fp32
_TABLE: tuple[tuple[str, Kind, Kind, Kind, Kind, str], ...] = (
    ("normalisation", "fp32", "fp32", "fp32", "fp32", "the first numbers; their rounding would reach everything"),
    ("stem", "fp32", "fp16", "bf16", "fp32", "colours fill no vector of 8-bit products; the thin first block cost most AP"),
    ("backbone", "fp32", "fp16", "bf16", "int8", ""),
    ("FPN", "fp32", "fp16", "bf16", "int8", ""),
    ("RPN convolutions", "fp32", "fp16", "bf16", "int8", ""),
    ("RPN outputs", "fp32", "fp16", "fp32", "fp32", "scores are ranked and deltas scaled by anchors of up to 512 px"),
    ("proposals", "fp32", "fp32", "fp32", "fp32", "anchors, decoding, IoU, NMS: fp16 knows coordinates above 1024 to 1 px only"),
    ("RoI pooling", "fp32", "fp32", "fp32", "fp32", "RoIs are coordinates, and RoiAlign has one type for features and RoIs"),
    ("box head", "fp32", "fp16", "bf16", "int8", ""),
    ("head outputs", "fp32", "fp16", "fp32", "fp32", "what people see: class scores and the last refinement of boxes"),
    ("detections", "fp32", "fp32", "fp32", "fp32", "softmax, decoding and the final NMS"),
)
PLANS: Mapping[Kind, Mapping[str, Kind]] = {kind: {row[0]: row[1:5][index] for row in _TABLE} for index, kind in enumerate(KINDS)}
"""Precision -> part -> type, parts in the order in which a picture passes them."""
REASONS: Mapping[str, str] = {row[0]: row[5] for row in _TABLE if row[5]}
"""Part -> why it may have to stay in fp32."""

MAX_AP_DROP: Mapping[Kind, float] = {"fp32": 0.005, "fp16": 0.001, "bf16": 0.001, "int8": 0.003}
"""How much AP (0..1) an export may lose against the network in fp32."""

FIRST_OPSET: Mapping[Kind, int] = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 17}
"""From which operator set on the standard's convolutions know the type."""

WEIGHTS: tuple[tuple[str, str], ...] = (
    ("backbone.fpn.", "FPN"),
    ("backbone.body.conv1.", "stem"),
    ("backbone.body.features.0.", "stem"),
    ("backbone.body.features.1.", "stem"),
    ("backbone.", "backbone"),
    ("rpn.convs.", "RPN convolutions"),
    ("rpn.", "RPN outputs"),
    ("head.body.", "box head"),
    ("head.", "head outputs"),
)
"""Prefix of a weight's name -> the part that it belongs to; the first that fits counts."""

_TORCH_TYPES: Mapping[Kind, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def islands(kind: Kind) -> list[str]:
    """Parts that stay in fp32 although the default is another type."""
    return [part for part, own in PLANS[kind].items() if own == "fp32" and kind != "fp32"]


def recorded(kind: Kind) -> Precision:
    """What the manifest keeps of the plan."""
    return Precision(default=kind, islands=islands(kind))


def described(precision: Precision) -> str:
    """The plan in one line, for people: `fp16; in fp32: normalisation, proposals, ...`."""
    return precision.default + (f"; in fp32: {', '.join(precision.islands)}" if precision.islands else "")


def weight_part(name: str) -> str | None:
    """The part that a weight of the detector belongs to; None for geometry and for what is no weight."""
    return next((part for prefix, part in WEIGHTS if name.startswith(prefix)), None)


def set_types(detector: FasterRCNN, kind: Kind) -> None:
    """Cast every part to the type of the plan, in place; each layer then takes what the part before it gives, whatever its type."""
    if kind in ("fp32", "int8"):
        return  # traced as it is
    for part, modules in _modules(detector).items():
        dtype = _TORCH_TYPES[PLANS[kind][part]]
        for module in modules:
            module.to(dtype)
            module.register_forward_pre_hook(_casting(dtype))


def _modules(detector: FasterRCNN) -> dict[str, Iterable[nn.Module]]:
    fpn = detector.backbone.fpn
    return {
        "backbone": [detector.backbone.body],  # and the stem, which has the same type in every precision that is cast
        "FPN": [] if fpn is None else [fpn],
        "RPN convolutions": detector.rpn.convs,
        "RPN outputs": [detector.rpn.cls_logits, detector.rpn.bbox_pred],
        "box head": [detector.head.body],
        "head outputs": [detector.head.cls_score, detector.head.bbox_pred],
    }


def _casting(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def cast(value: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(value, Tensor):
            return value if value.dtype == dtype else value.to(dtype)
        return [item if item.dtype == dtype else item.to(dtype) for item in value]

    return lambda _module, inputs: tuple(cast(value) for value in inputs)
