from dataclasses import replace

import pytest
import torch
from test_model_boxes import random_boxes
from torchvision.ops import MultiScaleRoIAlign

from model.config import RoIConfig
from model.roi_pool import assign_levels, pool_and_select, pool_on_canvas

CONFIG = RoIConfig(canonical_size=40.0, canonical_level=1)
PADDED_HW = (64, 96)


def pyramid(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, 3, 64 // s, 96 // s), generator=generator) for s in (4, 8, 16)]


def rois(seed: int = 0) -> torch.Tensor:
    return torch.stack([random_boxes(30, seed, 64, 95), random_boxes(30, seed + 1, 64, 95)]).clamp(max=63.0)


@pytest.mark.parametrize("pool", [pool_on_canvas, pool_and_select])
def test_align_on_an_arange_by_hand(pool) -> None:  # type: ignore[no-untyped-def]
    """A 5 x 5 ramp, box (1, 1, 3, 3) to 4 x 4: 7.5 .. 16.5 unaligned, 4.5 .. 13.5 aligned."""
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5)
    box = torch.tensor([[[1.0, 1.0, 3.0, 3.0]]])
    config = replace(CONFIG, pool_size=4, sampling_ratio=2)
    aligned = pool([ramp], box, (5, 5), config)[0, 0]
    assert (aligned[0, 0].item(), aligned[-1, -1].item()) == pytest.approx((4.5, 13.5))
    legacy = pool([ramp], box, (5, 5), replace(config, pool="align_legacy"))[0, 0]
    assert (legacy[0, 0].item(), legacy[-1, -1].item()) == pytest.approx((7.5, 16.5))


def test_levels_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 40, 40], [0.0, 0, 39.9, 40], [0.0, 0, 80, 80], [0.0, 0, 0, 0]]])
    assert assign_levels(boxes, 3, CONFIG).tolist() == [[0, 1, 0, 2, 0]]


def test_canvas_equals_select_when_aligned() -> None:
    features, boxes = pyramid(), rois()
    torch.testing.assert_close(
        pool_on_canvas(features, boxes, PADDED_HW, CONFIG), pool_and_select(features, boxes, PADDED_HW, CONFIG), atol=1e-5, rtol=1e-5
    )


def test_legacy_equals_torchvisions_multi_scale_align() -> None:
    features, boxes = pyramid(), rois()
    config = RoIConfig(pool="align_legacy")  # torchvision's canonical 224 px at p4
    theirs = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2)
    expected = theirs(dict(zip("012", features, strict=True)), list(boxes), [PADDED_HW] * 2)
    torch.testing.assert_close(pool_and_select(features, boxes, PADDED_HW, config), expected, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_level() -> None:
    features = [f.requires_grad_() for f in pyramid()]
    boxes = torch.tensor([[[2.0, 2, 20, 12], [2.0, 2, 44, 44], [0.0, 0, 95, 63]]] * 2)
    pool_on_canvas(features, boxes, PADDED_HW, replace(CONFIG, canonical_size=30.0)).sum().backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in features)


@pytest.mark.parametrize("pool", [pool_on_canvas, pool_and_select])
def test_half_precision_maps_are_sampled_at_exact_coordinates(pool) -> None:  # type: ignore[no-untyped-def]
    """On a ramp the pooled values are the coordinates: in bf16 those near 300 would be off by up to a whole pixel."""
    ramp = torch.arange(320.0).expand(1, 1, 8, 320) / 320  # the gradient is too fine for bf16 near 1, so compare with the fp32 pooling
    box = torch.tensor([[[289.3, 0.0, 300.7, 8.0]]])
    halves = ramp.bfloat16()
    found = pool([halves], box, (8, 320), CONFIG)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, pool([halves.float()], box, (8, 320), CONFIG).bfloat16(), rtol=0, atol=0)


def test_learning_from_half_precision_maps_under_autocast() -> None:
    """Values are those without autocast, and the gradient comes back in the map's type."""
    halves = torch.rand((1, 2, 8, 20)).bfloat16().requires_grad_()
    box = torch.tensor([[[3.3, 0.0, 11.7, 8.0]]])
    with torch.autocast("cpu", torch.bfloat16):
        found = pool_on_canvas([halves], box, (8, 20), CONFIG)
    torch.testing.assert_close(found, pool_on_canvas([halves.detach().float()], box, (8, 20), CONFIG).bfloat16())
    found.float().sum().backward()
    assert halves.grad is not None
    assert halves.grad.dtype is torch.bfloat16
    assert halves.grad.float().sum().item() == pytest.approx(2 * CONFIG.pool_size**2, rel=0.02)  # each bin's weights add up to one
