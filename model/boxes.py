"""Box geometry and the coding of boxes as deltas.

Boxes are float32 `[..., 4]` xyxy in pixels of the input frame; width = x2 - x1, no +1 anywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""dw and dh are clamped here before exp, so that a wild prediction stays finite (torchvision, detectron2)."""

UNIT_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def area(boxes: Tensor) -> Tensor:
    """Areas `[...]` of boxes `[..., 4]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        a: `[..., N, 4]`.
        b: `[..., M, 4]`, same leading axes.

    Returns:
        `[..., N, M]` in 0..1; two empty boxes have IoU 0.
    """
    # one coordinate at a time: a [..., N, M, 2] intermediate would double the peak memory
    width = torch.minimum(a[..., :, None, 2], b[..., None, :, 2]) - torch.maximum(a[..., :, None, 0], b[..., None, :, 0])
    height = torch.minimum(a[..., :, None, 3], b[..., None, :, 3]) - torch.maximum(a[..., :, None, 1], b[..., None, :, 1])
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = area(a)[..., :, None] + area(b)[..., None, :] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def clip(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """Clip boxes `[B, ..., 4]` to their image, 0 <= x <= width and 0 <= y <= height; `sizes_hw` is `[B, 2]`."""
    sizes = sizes_hw.to(boxes.dtype)
    limits = torch.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], dim=-1)  # [B, 4]
    limits = limits.reshape(limits.shape[0], *([1] * (boxes.dim() - 2)), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def encode_deltas(boxes: Tensor, references: Tensor, weights: tuple[float, float, float, float] = UNIT_WEIGHTS) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `references` onto `boxes` (R-CNN, appendix C), times `weights`.

    Args:
        boxes, references: `[..., 4]`; every reference has positive width and height.
    """
    ref_w, ref_h = references[..., 2] - references[..., 0], references[..., 3] - references[..., 1]
    box_w, box_h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    dx = ((boxes[..., 0] + 0.5 * box_w) - (references[..., 0] + 0.5 * ref_w)) / ref_w
    dy = ((boxes[..., 1] + 0.5 * box_h) - (references[..., 1] + 0.5 * ref_h)) / ref_h
    deltas = torch.stack([dx, dy, torch.log(box_w / ref_w), torch.log(box_h / ref_h)], dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode_deltas(deltas: Tensor, references: Tensor, weights: tuple[float, float, float, float] = UNIT_WEIGHTS) -> Tensor:
    """The inverse of `encode_deltas`: boxes `[..., 4]`, not clipped to any image."""
    dx, dy, dw, dh = (deltas[..., i] / weights[i] for i in range(4))
    ref_w, ref_h = references[..., 2] - references[..., 0], references[..., 3] - references[..., 1]
    center_x = references[..., 0] + 0.5 * ref_w + dx * ref_w
    center_y = references[..., 1] + 0.5 * ref_h + dy * ref_h
    half_w = 0.5 * ref_w * torch.exp(dw.clamp(max=MAX_LOG_SCALE))
    half_h = 0.5 * ref_h * torch.exp(dh.clamp(max=MAX_LOG_SCALE))
    return torch.stack([center_x - half_w, center_y - half_h, center_x + half_w, center_y + half_h], dim=-1)


def inside(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """Bool `[B, N]`: which of the boxes `[N, 4]` lie wholly inside each image of `sizes_hw` `[B, 2]`."""
    sizes = sizes_hw.to(boxes.dtype)
    from_origin = (boxes[:, 0] >= 0) & (boxes[:, 1] >= 0)
    return from_origin & (boxes[:, 2] <= sizes[:, 1:]) & (boxes[:, 3] <= sizes[:, :1])


def wider_than(boxes: Tensor, min_size: float) -> Tensor:
    """Boolean `[...]`: both sides of the box are at least `min_size` and positive."""
    sides = torch.minimum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
    return (sides >= min_size) & (sides > 0)
