"""Only the slots that hold a proposal reach the head: where few pass the RPN's threshold, most of the head's work falls away.

B images, P proposals an image, U the most that any image of the batch filled (at least 1).
U depends on the data, as the list of NonMaxSuppression does, so this goes with that operator; a graph without either has no such shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor

from model.rpn import Proposals

op: Any = opset18  # typed as graph values, while plain lists become constants


@torch.library.custom_op("detector::filled_slots", mutates_args=())
def filled_slots(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The first U of `boxes` `[B, P, 4]` and `valid` bool `[B, P]`; an image's filled slots come first."""
    used = max(1, int(valid.sum(dim=1).max()))
    return boxes[:, :used].clone(), valid[:, :used].clone()


@filled_slots.register_fake
def _(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    used = torch.library.get_ctx().new_dynamic_size(min=1)
    return boxes.new_empty(boxes.shape[0], used, 4), valid.new_empty(valid.shape[0], used)


def trim(proposals: Proposals) -> Proposals:
    """The strategy for `FasterRCNN.trim`."""
    return Proposals(*filled_slots(proposals.boxes, proposals.valid))


def translate_filled_slots(boxes: Any, valid: Any) -> Any:
    """The standard ONNX operators for `detector::filled_slots`."""
    counts = op.ReduceSum(op.Cast(valid, to=7), [1], keepdims=1)
    used = op.Max(op.ReduceMax(counts, keepdims=0), op.Constant(value_int=1))
    end = op.Unsqueeze(used, [0])
    return op.Slice(boxes, [0], end, [1]), op.Slice(valid, [0], end, [1])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.detector.filled_slots.default: translate_filled_slots}
"""For `torch.onnx.export(custom_translation_table=...)`."""
