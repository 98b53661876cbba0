"""RoIPool with standard operators: MaxRoiPool has no CUDA kernel, so its maxima are looked up in a sparse table.

B images, R RoIs an image, C channels, (H, W) the feature map, s the pooled size, T levels of the table.
The maximum of any rectangle is the maximum of four (overlapping) rectangles whose sides are powers of two; those maxima are computed
once for every cell, by doubling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import RoIConfig
from model.roi_pool import RoIPooling


def table_pooling(largest_side_px: int, stride: int, pool_size: int = 7) -> RoIPooling:
    """A strategy for `FasterRCNN.pool`, exact for inputs whose sides are at most `largest_side_px`.

    Args:
        stride: of the one feature map.
    """
    longest_bin = math.ceil(largest_side_px / stride / pool_size) + 2
    depth = longest_bin.bit_length()

    def pool(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
        return _pool(features[0], rois, 1.0 / stride, config.pool_size, depth)

    return pool


def _pool(feature: Tensor, rois: Tensor, scale: float, size: int, depth: int) -> Tensor:
    map_h, map_w = feature.shape[2:]
    cells = torch.floor(rois * scale + 0.5).to(torch.int64)  # half away from zero, as C's round of these coordinates >= 0
    y0, y1 = _bins(cells[..., 1], cells[..., 3], map_h, size)  # [B, R, s]
    x0, x1 = _bins(cells[..., 0], cells[..., 2], map_w, size)
    i, j = _power(y1 - y0, depth), _power(x1 - x0, depth)
    tall, wide = torch.bitwise_left_shift(torch.ones_like(i), i), torch.bitwise_left_shift(torch.ones_like(j), j)
    rows, columns = (y0, (y1 - tall).clamp(min=0)), (x0, (x1 - wide).clamp(min=0))
    table = _table(feature, depth)  # [B * T * T * H * W, C]
    batch = torch.arange(feature.shape[0], device=feature.device)[:, None, None, None]
    plane = (batch * depth + i[..., :, None]) * depth + j[..., None, :]  # [B, R, s, s]
    corners = [table[((plane * map_h + y[..., :, None]) * map_w + x[..., None, :]).reshape(-1)] for y in rows for x in columns]
    best = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
    filled = ((y1 > y0)[..., :, None] & (x1 > x0)[..., None, :]).reshape(-1, 1)
    pooled = torch.where(filled, best, 0.0)  # an empty bin is 0
    return pooled.reshape(-1, size, size, feature.shape[1]).permute(0, 3, 1, 2)


def _bins(start: Tensor, end: Tensor, limit: int, size: int) -> tuple[Tensor, Tensor]:
    """First cell and one past the last of every bin along one axis, `[B, R, s]`, clipped to the map."""
    length = (end - start + 1).clamp(min=1)
    step = length.to(torch.float32)[..., None] / size
    index = torch.arange(size, device=start.device, dtype=torch.float32)
    first = torch.floor(index * step).to(torch.int64) + start[..., None]
    last = torch.ceil((index + 1) * step).to(torch.int64) + start[..., None]
    # a bin that begins past the map is empty; its cell must still be one to look up
    return first.clamp(min=0, max=limit - 1), torch.where(first < limit, last.clamp(min=0, max=limit), 0)


def _power(length: Tensor, depth: int) -> Tensor:
    """floor(log2(length)) by comparisons, 0 for empty bins."""
    return sum(((length >= 2**k).to(torch.int64) for k in range(1, depth)), torch.zeros_like(length))


def _table(feature: Tensor, depth: int) -> Tensor:
    """Maxima over every rectangle with sides 2^i x 2^j, by its top left cell; what reaches past the map is never looked up."""
    planes = []
    tall = feature
    for i in range(depth):
        wide = tall
        for j in range(depth):
            planes.append(wide.permute(0, 2, 3, 1))
            wide = _doubled(wide, 2**j, axis=3)
        tall = _doubled(tall, 2**i, axis=2)
    return torch.stack(planes, dim=1).reshape(-1, feature.shape[1])


def _doubled(maxima: Tensor, by: int, *, axis: int) -> Tensor:
    """Rectangles twice as long: each joined with the one that begins `by` cells further."""
    padding = (0, 0, 0, by) if axis == 2 else (0, by, 0, 0)
    size = maxima.shape[axis]
    shifted = F.pad(maxima, padding).narrow(axis, by, size)
    return torch.maximum(maxima, shifted)
