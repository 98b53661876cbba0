"""Pooling strategies of the exported graph against torchvision's kernels, slivers at the far border included."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from export.roi_pool import _product_pooling, largest_exact_side, pool_by_products, products_pay, table_depth, table_pooling
from model import presets
from model.config import RoIConfig
from model.faster_rcnn import FasterRCNN
from model.roi_pool import pool_on_canvas


def rois(hw: tuple[int, int], count: int = 300) -> Tensor:
    """Of all sizes, `[2, count, 4]`; many are cut to slivers at the right and bottom border."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([hw[1], hw[0]] * 2, dtype=torch.float32)
    corner = torch.rand(2, count, 2, generator=generator) * size[:2]
    boxes = torch.cat([corner, corner + torch.exp(7 * torch.rand(2, count, 2, generator=generator) - 1)], dim=2)
    for rows, axis in ((slice(0, 20), 0), (slice(10, 30), 1)):  # thinner than a cell, in the last one
        boxes[:, rows, axis] = size[axis] - 2 * torch.rand(2, 20, generator=generator)
        boxes[:, rows, axis + 2] = size[axis]
    return torch.minimum(boxes, size).clamp(min=0)


def with_index(boxes: Tensor) -> Tensor:
    index = torch.arange(2.0)[:, None, None].expand(2, boxes.shape[1], 1)
    return torch.cat([index, boxes], dim=2).reshape(-1, 5)


def test_legacy_canvas_equals_torchvision_even_for_slivers() -> None:
    hw = (256, 320)
    features = [torch.randn(2, 5, hw[0] // s, hw[1] // s, generator=torch.Generator().manual_seed(s)) for s in (4, 8, 16, 32)]
    boxes = rois(hw)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2)
    expected = theirs(dict(zip("0123", features, strict=True)), list(boxes), [hw] * 2)
    ours = pool_on_canvas(features, boxes, hw, RoIConfig(pool="align_legacy", canonical_level=2))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hw", [(32, 64), (256, 320), (608, 1024)])
def test_table_equals_roi_pool(hw: tuple[int, int]) -> None:
    feature = torch.randn(2, 3, hw[0] // 16, hw[1] // 16, generator=torch.Generator().manual_seed(1))
    boxes = rois(hw)
    ours = table_pooling(1024, 16)([feature], boxes, hw, RoIConfig(pool="max"))
    assert torch.equal(ours, roi_pool(feature, with_index(boxes), 7, spatial_scale=1 / 16))


@pytest.mark.parametrize("pool_size", [6, 7])
@pytest.mark.parametrize("largest", [608, 1024, 1456, 1472, 2048])
def test_table_is_exact_up_to_the_side_that_it_names_and_not_far_beyond(largest: int, pool_size: int) -> None:
    pool = table_pooling(largest, 16, pool_size)
    limit = largest_exact_side(table_depth(largest, 16, pool_size), 16, pool_size)
    assert limit >= largest
    for side, exact in ((largest, True), (limit // 32 * 32, True), (2 * limit, False)):
        feature = torch.randn(1, 6, 4, side // 16, generator=torch.Generator().manual_seed(side))
        starts = torch.arange(0.0, 120.0, 3.0)
        boxes = torch.stack([starts, starts * 0, torch.full_like(starts, float(side)), starts * 0 + 64], dim=1)
        indexed = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
        ours = pool([feature], boxes[None], (64, side), RoIConfig(pool="max", pool_size=pool_size))
        assert torch.equal(ours, roi_pool(feature, indexed, pool_size, spatial_scale=1 / 16)) == exact, (side, limit)


def test_table_by_hand() -> None:
    feature = torch.arange(12.0).reshape(1, 1, 3, 4)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11
    config = RoIConfig(pool="max", pool_size=2)
    whole = table_pooling(64, 16, 2)([feature], torch.tensor([[[0.0, 0.0, 48.0, 32.0]]]), (48, 64), config)
    assert whole[0, 0].tolist() == [[5, 7], [9, 11]]
    negative = table_pooling(64, 16, 2)([feature - 100], torch.tensor([[[0.0, 0.0, 48.0, 32.0]]]), (48, 64), config)
    assert negative[0, 0].tolist() == [[-95, -93], [-91, -89]]  # no padding shines through


@pytest.mark.parametrize("kind", ["align", "align_legacy"])
@pytest.mark.parametrize("hw", [(32, 64), (256, 320), (608, 1024)])
def test_products_equal_roi_align(kind: Literal["align", "align_legacy"], hw: tuple[int, int]) -> None:
    """Slivers, RoIs at the far border and of no size at all included."""
    feature = torch.randn(2, 3, hw[0] // 32, hw[1] // 32, generator=torch.Generator().manual_seed(1))
    boxes = rois(hw)
    boxes[:, :3] = 0.0
    config = RoIConfig(pool=kind, canonical_level=-99)
    expected = roi_align(feature, with_index(boxes), 7, spatial_scale=1 / 32, sampling_ratio=2, aligned=kind == "align")
    pooled = _product_pooling([feature, feature], boxes, hw, config).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    # the eager network sums in another order on a CPU: rounding of fp32 remains
    torch.testing.assert_close(pool_on_canvas([feature, feature], boxes, hw, config), expected, atol=2e-6, rtol=0)


def test_a_coarse_single_map_is_pooled_by_products_with_the_same_answers() -> None:
    torch.manual_seed(0)
    detector = FasterRCNN(presets.mobilenet_v3_large_320_fpn(("a", "b")).detector).eval().requires_grad_(False)
    assert products_pay(detector, 32)
    assert not products_pay(detector, 16)
    assert not products_pay(FasterRCNN(presets.mobilenet_v2_fpn(("a",)).detector), 32), "it pools from several maps"
    features = [torch.randn(1, 256, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    boxes, hw = rois((96, 160), 40)[:1], (96, 160)
    expected = detector.head(detector.pool(features, boxes, hw, detector.config.roi))
    pool_by_products(detector)
    for answer, wanted in zip(detector.head(detector.pool(features, boxes, hw, detector.config.roi)), expected, strict=True):
        torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-4)
