"""RoI pooling over a pyramid with fixed shapes: every RoI in, one fixed-size map out, no split by level.

B images, R RoIs an image, L levels, (H_l, W_l) a level's size, C channels, s the pooled size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from model import boxes as box_ops
from model.config import RoIConfig

BORDER = 1
"""Replicated cells around each level on the canvas: bilinear samples at a level's edge see what clamping would give."""

RoIPooling = Callable[[Sequence[Tensor], Tensor, tuple[int, int], RoIConfig], Tensor]
"""(features, rois [B, R, 4] in the input frame, padded_hw, config) -> [B * R, C, s, s]."""


def assign_levels(rois: Tensor, num_levels: int, config: RoIConfig) -> Tensor:
    """Pyramid level of each RoI as an index 0..num_levels-1 (FPN, eq. 1); `rois` is `[B, R, 4]`, the result `[B, R]`.

    Level 0 is the finest map that the head sees.
    """
    size = box_ops.area(rois).clamp(min=1e-6).sqrt()
    level = torch.floor(config.canonical_level + torch.log2(size / config.canonical_size) + 1e-6)
    return level.clamp(0, num_levels - 1).to(torch.int64)


def _strides(features: Sequence[Tensor], padded_hw: tuple[int, int]) -> list[int]:
    return [padded_hw[0] // feature.shape[2] for feature in features]


def _with_batch_index(rois: Tensor) -> Tensor:
    """`[B, R, 4]` -> `[B * R, 5]`, the form that roi_align takes."""
    index = torch.arange(rois.shape[0], device=rois.device, dtype=rois.dtype)[:, None, None].expand(-1, rois.shape[1], 1)
    return torch.cat([index, rois], dim=2).reshape(-1, 5)


def pool_on_canvas(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """One roi_align over all levels, packed below each other on one canvas.

    Exact for `align`. For `align_legacy` it differs from per-level pooling only for RoIs thinner than one cell at the far border,
    whose forced width of one cell reaches past the map.
    """
    width = features[0].shape[3]
    tiles = [F.pad(f, (BORDER, width - f.shape[3] + BORDER, BORDER, BORDER), mode="replicate") for f in features]
    canvas = torch.cat(tiles, dim=2)  # [B, C, sum of H_l + 2, W_0 + 2]
    offsets, top = [], BORDER
    for feature in features:
        offsets.append(top)
        top = top + feature.shape[2] + 2 * BORDER
    levels = assign_levels(rois, len(features), config)
    scale = _per_level([1.0 / s for s in _strides(features, padded_hw)], levels, rois)
    shift_y = _per_level(offsets, levels, rois)
    shift = torch.stack([torch.full_like(shift_y, BORDER), shift_y], dim=-1).repeat(1, 1, 2)  # [B, R, 4]
    return _align(canvas, rois * scale[..., None] + shift, 1.0, config)


def pool_and_select(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """Every RoI on every level, then a selection: exact for both alignments, L times the pooling."""
    levels = assign_levels(rois, len(features), config).reshape(-1, 1, 1, 1)
    pooled: Tensor | None = None
    for level, (feature, stride) in enumerate(zip(features, _strides(features, padded_hw), strict=True)):
        here = _align(feature, rois, 1.0 / stride, config)
        pooled = here if pooled is None else torch.where(levels == level, here, pooled)
    if pooled is None:
        raise ValueError("RoI pooling needs at least one feature map")
    return pooled


def _per_level(values: Sequence[float], levels: Tensor, like: Tensor) -> Tensor:
    """`values[levels]`, written as a sum of comparisons so that values may be symbolic sizes."""
    result = torch.zeros_like(levels, dtype=like.dtype)
    for level, value in enumerate(values):
        result = result + (levels == level).to(like.dtype) * value
    return result


def _align(feature: Tensor, rois: Tensor, scale: float, config: RoIConfig) -> Tensor:
    pooled: Tensor = roi_align(
        feature,
        _with_batch_index(rois).to(feature.dtype),
        config.pool_size,
        spatial_scale=scale,
        sampling_ratio=config.sampling_ratio,
        aligned=config.pool == "align",
    )
    return pooled
