import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from model import boxes as box_ops


def random_boxes(count: int, seed: int, height: int = 60, width: int = 90) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 2, 2), generator=generator) * torch.tensor([width, height])
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, high + 0.5], dim=1)


def test_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 4.0]])
    b = torch.tensor([[5.0, 0.0, 15.0, 4.0], [0.0, 0.0, 10.0, 4.0], [20.0, 20.0, 30.0, 21.0], [0.0, 0.0, 10.0, 2.0]])
    assert box_ops.iou(a, b)[0].tolist() == pytest.approx([20 / 60, 1.0, 0.0, 0.5])


def test_iou_of_empty_boxes_is_zero() -> None:
    empty = torch.zeros((2, 3, 4))
    assert box_ops.iou(empty, empty).abs().max() == 0


def test_iou_equals_torchvision() -> None:
    a, b = random_boxes(40, 1), random_boxes(30, 2)
    torch.testing.assert_close(box_ops.iou(a, b), box_iou(a, b))


def test_clip_uses_each_images_own_height_and_width() -> None:
    boxes = torch.tensor([[[-5.0, -5.0, 100.0, 100.0]], [[-5.0, 3.0, 100.0, 100.0]]])
    clipped = box_ops.clip(boxes, torch.tensor([[20, 30], [50, 40]]))
    assert clipped.tolist() == [[[0, 0, 30, 20]], [[0, 3, 40, 50]]]
    torch.testing.assert_close(clipped[0], clip_boxes_to_image(boxes[0], (20, 30)))


def test_encode_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[5.0, 0.0, 25.0, 20.0]])  # centre moves by 10 px = 1 width, width doubles
    assert box_ops.encode_deltas(box, reference)[0].tolist() == pytest.approx([1.0, 0.0, math.log(2), 0.0])
    weighted = box_ops.encode_deltas(box, reference, (10.0, 10.0, 5.0, 5.0))
    assert weighted[0].tolist() == pytest.approx([10.0, 0.0, 5 * math.log(2), 0.0])


@given(st.integers(0, 1000))
def test_decode_inverts_encode(seed: int) -> None:
    widen = torch.tensor([0.0, 0.0, 3.0, 3.0])  # sides differ by less than the 62.5 times that decoding allows
    boxes, references = random_boxes(8, seed) + widen, random_boxes(8, seed + 1) + widen
    weights = (10.0, 10.0, 5.0, 5.0)
    decoded = box_ops.decode_deltas(box_ops.encode_deltas(boxes, references, weights), references, weights)
    torch.testing.assert_close(decoded, boxes, atol=2e-3, rtol=1e-4)


def test_coding_equals_torchvision() -> None:
    boxes, references = random_boxes(20, 3), random_boxes(20, 4)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    ours = box_ops.encode_deltas(boxes, references, (10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(ours, coder.encode_single(boxes, references))
    deltas = torch.randn((20, 4), generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(
        box_ops.decode_deltas(deltas, references, (10.0, 10.0, 5.0, 5.0)), coder.decode_single(deltas, references), rtol=1e-4, atol=1e-2
    )


def test_decode_stays_finite() -> None:
    decoded = box_ops.decode_deltas(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
    assert torch.isfinite(decoded).all()


def test_wider_than_needs_both_sides() -> None:
    boxes = torch.tensor([[0.0, 0.0, 5.0, 0.5], [0.0, 0.0, 5.0, 2.0], [3.0, 3.0, 3.0, 9.0]])
    assert box_ops.wider_than(boxes, 1.0).tolist() == [False, True, False]
    assert box_ops.wider_than(boxes, 0.0).tolist() == [True, True, False]
