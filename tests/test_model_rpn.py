"""The RPN at some anchors alone, against the RPN on whole maps; which anchors become proposals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import rpn as rpn_module
from model.config import RPNConfig
from model.nms import greedy_nms
from model.rpn import RPN, Proposals, RPNOutput, cell_patches, propose

SIZES_HW = ((7, 5), (4, 3), (1, 1))
CHANNELS, PER_CELL, IMAGES = 6, 3, 2


def pyramid(*, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(IMAGES, CHANNELS, *hw, dtype=torch.float64, generator=generator) for hw in SIZES_HW]
    return [one.requires_grad_(grad) for one in maps]


def some_rows() -> Tensor:
    """Of every level, corners and repeated ones among them, `[B, S]`."""
    total = PER_CELL * sum(height * width for height, width in SIZES_HW)
    drawn = torch.randint(total, (IMAGES, 20), generator=torch.Generator().manual_seed(1))
    corners = torch.tensor([0, PER_CELL * 4, PER_CELL * 30, PER_CELL * 35 - 1, PER_CELL * 35, total - 1, total - 1])
    return torch.cat([drawn, corners.expand(IMAGES, -1)], dim=1)


def drawn_rpn(depth: int) -> RPN:
    torch.manual_seed(2)
    rpn = RPN(CHANNELS, PER_CELL, RPNConfig(conv_depth=depth)).double()
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return rpn


@pytest.fixture(autouse=True, params=["from the cells around", "on small maps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "from the cells around":
        monkeypatch.setattr(rpn_module, "WORTH_CELLS", 0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_some_anchors_score_as_on_whole_maps(depth: int) -> None:
    rpn, maps, rows = drawn_rpn(depth), pyramid(), some_rows()
    whole = rpn(maps)
    logits, deltas = rpn.at(maps, rows)
    torch.testing.assert_close(logits, torch.cat(whole.logits, dim=1).gather(1, rows))
    torch.testing.assert_close(deltas, torch.cat(whole.deltas, dim=1).gather(1, rows[..., None].expand(-1, -1, 4)))


@pytest.mark.parametrize("depth", [1, 2])
def test_their_gradients_are_those_of_whole_maps(depth: int) -> None:
    rpn, maps, rows = drawn_rpn(depth), pyramid(grad=True), some_rows()
    leaves = [*maps, *rpn.parameters()]
    whole = rpn(maps)
    picked = torch.cat(whole.logits, dim=1).gather(1, rows), torch.cat(whole.deltas, dim=1).gather(1, rows[..., None].expand(-1, -1, 4))
    expected = torch.autograd.grad(picked[0].sin().sum() + picked[1].cos().sum(), leaves)
    logits, deltas = rpn.at(maps, rows)
    found = torch.autograd.grad(logits.sin().sum() + deltas.cos().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_patches_by_hand() -> None:
    """A map of 2 x 3 and one of 1 x 1: the cell in the corner, and the only one of the other."""
    maps = [torch.arange(1.0, 7.0).reshape(1, 1, 2, 3), torch.full((1, 1, 1, 1), 9.0)]
    patches, on_map = cell_patches(maps, torch.tensor([[0, 6]]), reach=1)
    assert patches[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert patches[1, 0].tolist() == [[0, 0, 0], [0, 9, 0], [0, 0, 0]]
    torch.testing.assert_close(on_map.float(), (patches > 0).float())


def test_a_pyramid_without_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        cell_patches([], torch.zeros(1, 1, dtype=torch.int64), reach=1)


def apart(count: int) -> Tensor:
    """Anchors of which none overlaps another, `[N, 4]`."""
    left = torch.arange(count) * 20.0
    return torch.stack([left, torch.zeros(count), left + 10, torch.full((count,), 10.0)], dim=1)


def proposed(logits: Tensor, anchors: Tensor, config: RPNConfig) -> Proposals:
    output = RPNOutput([logits[None]], [torch.zeros(1, *anchors.shape)])
    return propose(output, [anchors], torch.tensor([[50, 5000]]), config, greedy_nms, training=False)


def test_sure_anchors_are_ranked_by_their_logits() -> None:
    logits = 20 + torch.randperm(40, generator=torch.Generator().manual_seed(4)) / 10.0
    assert (logits.sigmoid() == 1).all(), "as scores they would all tie"
    anchors = apart(40)
    found = proposed(logits, anchors, RPNConfig(pre_nms_top_n_test=10, post_nms_top_n_test=10))
    assert found.valid.all()
    assert found.boxes[0].tolist() == anchors[logits.argsort(descending=True)[:10]].tolist()


def test_no_slot_is_lost_to_padding_however_unsure_the_anchors() -> None:
    logits, anchors = torch.tensor([-30.0, -1.0, -50.0]), apart(3)
    found = proposed(logits, anchors, RPNConfig(pre_nms_top_n_test=8, post_nms_top_n_test=8))
    assert found.valid[0].tolist() == [True] * 3 + [False] * 5
    assert found.boxes[0, :3].tolist() == anchors[[1, 0, 2]].tolist()
    assert not found.boxes[0, 3:].any()
