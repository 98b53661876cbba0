"""RoI pooling over a pyramid with fixed shapes: every RoI in, one fixed-size map out, no split by level.

B images, R RoIs an image, L levels, (H_l, W_l) a level's size, C channels, s the pooled size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align, roi_pool

from model import boxes as box_ops
from model.config import RoIConfig
from model.precision import at_least_fp32
from model.sizes import size_tensor
from model.sparse_roi_align import sparse_roi_align

BORDER = 1
"""Replicated cells above and left of each level on the canvas: bilinear samples at its edge see what clamping would give."""
FAR_BORDER = 2
"""The same below and right, where a legacy RoI that is thinner than one cell is forced to a whole one and reaches a cell further."""

LARGEST_SIDE_PX = 2**16
"""No RoI is longer: inputs of this size fit no machine."""

RoIPooling = Callable[[Sequence[Tensor], Tensor, tuple[int, int], RoIConfig], Tensor]
"""(features, rois [B, R, 4] in the input frame, padded_hw, config) -> [B * R, C, s, s]."""


def assign_levels(rois: Tensor, num_levels: int, config: RoIConfig) -> Tensor:
    """Pyramid level of each RoI as an index 0..num_levels-1 (FPN, eq. 1); `rois` is `[B, R, 4]`, the result `[B, R]`.

    Level 0 is the finest map that the head sees.
    """
    size = box_ops.area(rois).clamp(min=1e-6).sqrt()
    level = torch.floor(config.canonical_level + torch.log2(size / config.canonical_size) + 1e-6)
    return level.clamp(0, num_levels - 1).to(torch.int64)


def first_level_alone(num_levels: int, config: RoIConfig) -> bool:
    """Whether every RoI is pooled from the finest map, as where the canonical level lies far below it."""
    return num_levels == 1 or config.canonical_level + math.log2(LARGEST_SIDE_PX / config.canonical_size) < 0


def _strides(features: Sequence[Tensor], padded_hw: tuple[int, int]) -> list[int]:
    return [padded_hw[0] // feature.shape[2] for feature in features]


def _with_batch_index(rois: Tensor) -> Tensor:
    """`[B, R, 4]` -> `[B * R, 5]`, the form that roi_align takes."""
    index = torch.arange(rois.shape[0], device=rois.device, dtype=rois.dtype)[:, None, None].expand(-1, rois.shape[1], 1)
    return torch.cat([index, rois], dim=2).reshape(-1, 5)


def pool_on_canvas(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """One roi_align over all levels, packed below each other on one canvas: exact, and a single pass whatever the number of levels."""
    if first_level_alone(len(features), config):
        return _align(features[0], rois, 1.0 / _strides(features[:1], padded_hw)[0], config)
    width = features[0].shape[3]
    tiles = [F.pad(f, (BORDER, width - f.shape[3] + FAR_BORDER, BORDER, FAR_BORDER), mode="replicate") for f in features]
    canvas = torch.cat(tiles, dim=2)  # [B, C, sum of H_l + 3, W_0 + 3]
    offsets, top = [], BORDER
    for feature in features:
        offsets.append(top)
        top = top + feature.shape[2] + BORDER + FAR_BORDER
    levels = assign_levels(rois, len(features), config)
    scale = _per_level([1.0 / s for s in _strides(features, padded_hw)], levels, rois)
    shift_y = _per_level(offsets, levels, rois)
    shift = torch.stack([torch.full_like(shift_y, BORDER), shift_y], dim=-1).repeat(1, 1, 2)  # [B, R, 4]
    scaled = rois * scale[..., None]
    pooled = _align(canvas, scaled + shift, 1.0, config)
    if config.pool == "align":
        return pooled
    map_h, map_w = (_per_level([feature.shape[axis] for feature in features], levels, rois) for axis in (2, 3))
    rows = _share_inside(scaled[..., 1], scaled[..., 3], map_h, config)
    columns = _share_inside(scaled[..., 0], scaled[..., 2], map_w, config)
    if _eager_on_cpu(pooled) and bool((rows == 1).all() & (columns == 1).all()):  # nearly always; a GPU would have to wait for the answer
        return pooled
    return pooled * (rows[:, :, None, :, None] * columns[:, :, None, None, :]).flatten(0, 1)


def _share_inside(start: Tensor, end: Tensor, size: Tensor, config: RoIConfig) -> Tensor:
    """Share of each bin's samples along one axis that lie on the map, `[B, R, s]`; all arguments `[B, R]` in cells.

    Legacy alignment counts samples beyond the map as 0. Only the forced width of a sliver in the last cell gets there, and in that cell
    clamping makes the map constant along the axis, so the bin's mean is the constant times this share.
    """
    samples = config.pool_size * config.sampling_ratio
    centres = (torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5) / samples
    at = start[..., None] + (end - start).clamp(min=1.0)[..., None] * centres  # [B, R, s * ratio]
    inside = (at <= size[..., None]).to(start.dtype)
    return inside.reshape(*start.shape, config.pool_size, config.sampling_ratio).mean(dim=-1)


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


def _per_level(values: Sequence[float | int], levels: Tensor, like: Tensor) -> Tensor:
    """`values[levels]`, written as a sum of comparisons so that values may be symbolic sizes."""
    result = torch.zeros_like(levels, dtype=like.dtype)
    for level, value in enumerate(values):
        factor = value if isinstance(value, float) else size_tensor(value, like)
        result = result + (levels == level).to(like.dtype) * factor
    return result


def _align(feature: Tensor, rois: Tensor, scale: float, config: RoIConfig) -> Tensor:
    """RoIAlign in at least fp32: a coordinate of 300 is only known to 2 pixels in bf16."""
    exact = at_least_fp32(feature)
    align = sparse_roi_align if _eager_on_cpu(exact) else roi_align
    indexed = _with_batch_index(rois).to(exact.dtype)
    pooled: Tensor = align(exact, indexed, config.pool_size, scale, config.sampling_ratio, config.pool == "align")
    return pooled.to(feature.dtype)


def _eager_on_cpu(values: Tensor) -> bool:
    """Not while an export traces: the graph holds the operators themselves and may not depend on values."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def pool_by_max(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """RoIPool (Fast R-CNN, section 2.1): corners rounded to cells, then the maximum of each bin; one level only."""
    if len(features) != 1:
        raise ValueError(f"RoIPool is defined on one feature map, but {len(features)} came; choose pool 'align'")
    scale = 1.0 / _strides(features, padded_hw)[0]
    exact = at_least_fp32(features[0])
    pooled: Tensor = roi_pool(exact, _with_batch_index(rois).to(exact.dtype), config.pool_size, spatial_scale=scale)
    return pooled.to(features[0].dtype)


def default_pooling(config: RoIConfig) -> RoIPooling:
    """The strategy for a kind of pooling."""
    return {"align": pool_on_canvas, "align_legacy": pool_on_canvas, "max": pool_by_max}[config.pool]
