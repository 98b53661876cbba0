"""Non-maximum suppression with ONNX's own operator, as an NMS strategy of the detector.

S scenes, N boxes of a scene, M selected by the operator, G groups (levels or classes).

The operator answers with a list of indices whose length depends on the data. Here that list never leaves this file: it is scattered
into a mask `[S, N]` at once, and a far-away dummy box in every scene keeps the list from ever being empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor

from model.nms import INVALID_SCORE, greedy_nms

op: Any = opset18  # typed as graph values, while plain lists become constants

GroupedNMS = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]

FAR_AWAY = (-4.0, -4.0, -2.0, -2.0)  # boxes are clipped to the image, so none ever meets this one


@torch.library.custom_op("detector::nms_keep", mutates_args=())
def nms_keep(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float, num_groups: int) -> Tensor:
    """Greedy NMS; in an export, one NonMaxSuppression for all scenes.

    Args:
        boxes: float32 [S, N, 4], inside the image.
        scores: float32 [S, N], descending; INVALID_SCORE and below is padding.
        groups: int64 [S, N], 0 <= group < num_groups; only boxes of one group suppress each other.

    Returns:
        bool [S, N], the kept ones.
    """
    return greedy_nms(boxes, scores, groups if num_groups > 1 else None, iou_thresh)


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float, num_groups: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def onnx_nms(num_groups: int) -> GroupedNMS:
    """The strategy for `FasterRCNN.nms`; groups, where given, must be below `num_groups`."""

    def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
        of_one = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
        keep: Tensor = nms_keep(boxes, scores, of_one, iou_thresh, 1 if groups is None else num_groups)
        return keep

    return nms


def translate_nms_keep(boxes: Any, scores: Any, groups: Any, iou_thresh: float, num_groups: int) -> Any:
    """The standard ONNX operators for `detector::nms_keep`.

    The scores are replaced by ranks (N, N-1, ...): the boxes come sorted, so ties are broken by position on every runtime.
    """
    shape = op.Shape(scores)
    count = op.Slice(shape, [1], [2])  # [1]: N
    rank = op.Cast(op.Range(op.Squeeze(count), op.Constant(value_int=0), op.Constant(value_int=-1)), to=1)
    valid = op.Greater(scores, op.Constant(value_float=float(INVALID_SCORE)))
    ranked = op.Where(valid, rank, op.Constant(value_float=-1.0))  # [S, N]
    if num_groups > 1:
        ids = op.Constant(value_ints=list(range(num_groups)))
        member = op.Equal(op.Unsqueeze(groups, [1]), op.Unsqueeze(ids, [0, 2]))  # [S, G, N]
        ranked = op.Where(member, op.Unsqueeze(ranked, [1]), op.Constant(value_float=-1.0))
    else:
        ranked = op.Unsqueeze(ranked, [1])
    ranked = op.Pad(ranked, [0, 0, 0, 0, 0, 1], op.Constant(value_float=0.5))  # the dummy is selected in every group
    dummy = op.Expand(
        op.Constant(value_floats=list(FAR_AWAY)), op.Concat(op.Slice(shape, [0], [1]), op.Constant(value_ints=[1, 4]), axis=0)
    )
    padded = op.Concat(boxes, dummy, axis=1)  # [S, N + 1, 4]
    selected = op.NonMaxSuppression(
        padded, ranked, op.Add(count, op.Constant(value_ints=[1])), [float(iou_thresh)], [0.0]
    )  # [M, 3] scene, group, box
    indices = op.Gather(selected, [0, 2], axis=1)
    zeros = op.Expand(op.Constant(value_int=0), op.Add(shape, op.Constant(value_ints=[0, 1])))
    ones = op.Expand(op.Constant(value_int=1), op.Slice(op.Shape(selected), [0], [1]))
    mask = op.ScatterND(zeros, indices, ones)
    return op.Cast(op.Slice(mask, [0], count, [1]), to=9)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.detector.nms_keep.default: translate_nms_keep}
"""For `torch.onnx.export(custom_translation_table=...)`."""
