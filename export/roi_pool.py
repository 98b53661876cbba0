"""RoI pooling with standard operators, where an export does better than with the operator that is there.

B images, R RoIs an image, C channels, (H, W) the feature map, s the pooled size, T levels of the table.

RoIPool: MaxRoiPool has no CUDA kernel, so its maxima are looked up in a sparse table. The maximum of any rectangle is the maximum of four
(overlapping) rectangles whose sides are powers of two; those maxima are computed once for every cell, by doubling.

RoIAlign: bilinear sampling on a grid is separable, rows @ map @ columns. On a small map two matrix products cost a CPU less than the
operator, which looks every sample up by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import RoIConfig
from model.faster_rcnn import FasterRCNN
from model.precision import at_least_fp32
from model.roi_heads import TwoFC
from model.roi_pool import RoIPooling, first_level_alone
from model.sizes import size_tensor

COARSE_STRIDE = 32
"""From here on a map has few enough cells for products: their cost grows with it, the operator's does not."""


def table_pooling(largest_side_px: int, stride: int, pool_size: int = 7) -> RoIPooling:
    """A strategy for `FasterRCNN.pool`, exact for inputs whose sides are at most `largest_side_px`; see `largest_exact_side`.

    The service sends nothing larger than the buckets that the manifest names; larger buckets in the configuration give a deeper table.

    Args:
        stride: of the one feature map.
    """
    depth = table_depth(largest_side_px, stride, pool_size)

    def pool(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
        return _pool(features[0], rois, 1.0 / stride, config.pool_size, depth)

    return pool


def pool_by_products(detector: FasterRCNN) -> None:
    """Set `pool`, in place, to RoIAlign as matrix products; the first layer of the head is given the order in which they leave the bins.

    Args:
        detector: as `products_pay` accepts it.
    """
    body, config = detector.head.body, detector.config.roi
    assert isinstance(body, TwoFC)
    size = config.pool_size
    columns = body.fc6.weight.reshape(body.fc6.out_features, -1, size, size)  # [hidden, C, y, x]
    body.fc6.weight = nn.Parameter(columns.permute(0, 3, 1, 2).flatten(1), requires_grad=False)  # [hidden, x * C * y]
    detector.pool = _product_pooling


def products_pay(detector: FasterRCNN, stride: int) -> bool:
    """Whether the head pools from one coarse map alone and only flattens what it gets.

    Args:
        stride: of the finest map.
    """
    config = detector.config
    levels = len(config.anchors.sizes) - detector.backbone.has_extra_level
    aligned = config.roi.pool in ("align", "align_legacy")
    return aligned and stride >= COARSE_STRIDE and first_level_alone(levels, config.roi) and isinstance(detector.head.body, TwoFC)


def _product_pooling(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """RoIAlign `[B * R, x, C, y]`: one product with the columns for all RoIs, then one with its rows for each."""
    feature = at_least_fp32(features[0])
    batch, channels, map_h, map_w = feature.shape
    scaled = rois * (1.0 / (padded_hw[0] // map_h))
    rows = _sampling(scaled[..., 1], scaled[..., 3], map_h, config)  # [B, R, s, H]
    columns = _sampling(scaled[..., 0], scaled[..., 2], map_w, config)  # [B, R, s, W]
    by_column = feature.permute(0, 3, 1, 2).reshape(batch, map_w, channels * map_h)
    squeezed = torch.matmul(columns.flatten(1, 2), by_column)  # [B, R * s, C * H]
    squeezed = squeezed.reshape(batch, rois.shape[1], config.pool_size * channels, map_h)
    pooled = torch.matmul(squeezed, rows.transpose(2, 3))  # [B, R, x * C, y]
    return pooled.reshape(-1, config.pool_size, channels, config.pool_size).to(features[0].dtype)


def _sampling(start: Tensor, end: Tensor, cells: int, config: RoIConfig) -> Tensor:
    """Weight of each cell of an axis in each bin, `[B, R, s, cells]`; all sides in cells, start and end `[B, R]`.

    A sample weighs the two cells around it, and the last one alone in the border; legacy ones beyond the map count as zero.
    """
    if config.pool == "align":
        start, length = start - 0.5, end - start
    else:
        length = (end - start).clamp(min=1.0)
    grid = torch.arange(cells, device=start.device, dtype=start.dtype)
    bins = torch.arange(config.pool_size, device=start.device, dtype=start.dtype)
    total = torch.zeros(())
    for sample in range(config.sampling_ratio):
        at = start[..., None] + length[..., None] * (bins + (sample + 0.5) / config.sampling_ratio) / config.pool_size  # [B, R, s]
        near = at.clamp(min=0).minimum(grid[-1])[..., None]
        total = total + (1.0 - (near - grid).abs()).clamp(min=0) * (at <= cells).to(at.dtype)[..., None]
    return total / config.sampling_ratio


def table_depth(largest_side_px: int, stride: int, pool_size: int) -> int:
    """How often sides are doubled, so that two rectangles of the largest power of two cover the longest bin."""
    return (math.ceil(largest_side_px / stride / pool_size) + 2).bit_length()


def largest_exact_side(depth: int, stride: int, pool_size: int) -> int:
    """Up to this many pixels along a side a table of this depth is exact; beyond, the middle cells of the longest bins would be missed.

    A bin of a RoI of n cells spans up to ceil(n / pool_size) + 1 cells, a RoI up to one cell more than its map.
    """
    longest_bin = 1 << depth  # two rectangles of half of it
    return ((longest_bin - 1) * pool_size - 1) * stride


def _pool(feature: Tensor, rois: Tensor, scale: float, size: int, depth: int) -> Tensor:
    map_h, map_w = feature.shape[2:]
    cells = torch.floor(rois * scale + 0.5).to(torch.int64)  # half away from zero, as C's round of these coordinates >= 0
    height, width = size_tensor(map_h, cells), size_tensor(map_w, cells)
    y0, y1 = _bins(cells[..., 1], cells[..., 3], height, size)  # [B, R, s]
    x0, x1 = _bins(cells[..., 0], cells[..., 2], width, size)
    i, j = _power(y1 - y0, depth), _power(x1 - x0, depth)
    powers = torch.tensor([2**k for k in range(depth)], device=feature.device)  # CUDA has no shift of bits
    tall, wide = powers[i], powers[j]
    rows, columns = (y0, (y1 - tall).clamp(min=0)), (x0, (x1 - wide).clamp(min=0))
    table = _table(feature, depth)  # [B * T * T * H * W, C]
    batch = torch.arange(feature.shape[0], device=feature.device)[:, None, None, None]
    plane = (batch * depth + i[..., :, None]) * depth + j[..., None, :]  # [B, R, s, s]
    corners = [table[((plane * height + y[..., :, None]) * width + x[..., None, :]).reshape(-1)] for y in rows for x in columns]
    best = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
    filled = ((y1 > y0)[..., :, None] & (x1 > x0)[..., None, :]).reshape(-1, 1)
    pooled = torch.where(filled, best, 0.0)  # an empty bin is 0
    return pooled.reshape(-1, size, size, feature.shape[1]).permute(0, 3, 1, 2)


def _bins(start: Tensor, end: Tensor, limit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First cell and one past the last of every bin along one axis, `[B, R, s]`, clipped to the map's `limit` `[1]` cells."""
    length = (end - start + 1).clamp(min=1)
    step = length.to(torch.float32)[..., None] / size
    index = torch.arange(size, device=start.device, dtype=torch.float32)
    first = torch.floor(index * step).to(torch.int64) + start[..., None]
    last = torch.ceil((index + 1) * step).to(torch.int64) + start[..., None]
    # a bin that begins past the map is empty; its cell must still be one to look up
    return first.clamp(min=0).minimum(limit - 1), torch.where(first < limit, last.clamp(min=0).minimum(limit), 0)


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
