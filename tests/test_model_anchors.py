import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from model.anchors import AnchorGenerator, base_anchors


def test_base_anchors_by_hand() -> None:
    # a square of side 32, and the same area at half and double height / width: sides 45.25 and 22.6
    assert base_anchors([32.0], [0.5, 1.0, 2.0]).tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_grid_by_hand() -> None:
    """A 15 x 20 padded input on a 3 x 4 grid: stride 5, one 10 px anchor."""
    anchors = AnchorGenerator([[10.0]], [1.0])([torch.zeros(1, 1, 3, 4)], (15, 20))[0]
    assert anchors.shape == (12, 4)
    assert anchors[0].tolist() == [-5, -5, 5, 5]
    assert anchors[1].tolist() == [0, -5, 10, 5], "the column moves first"
    assert anchors[4].tolist() == [-5, 0, 5, 10], "then the row"
    assert anchors[11].tolist() == [10, 5, 20, 15]


def test_equals_torchvision_on_every_level() -> None:
    sizes, ratios = ((32.0,), (64.0,), (128.0,)), (0.5, 1.0, 2.0)
    features = [torch.zeros(2, 1, 12, 20), torch.zeros(2, 1, 6, 10), torch.zeros(2, 1, 3, 5)]
    ours = AnchorGenerator(sizes, ratios)(features, (96, 160))
    theirs = TorchvisionAnchors(sizes, (ratios,) * 3)(ImageList(torch.zeros(2, 3, 96, 160), [(96, 160)] * 2), features)
    torch.testing.assert_close(torch.cat(ours), theirs[0], rtol=0, atol=0)


def test_wrong_number_of_levels_is_said() -> None:
    with pytest.raises(ValueError, match="2 levels, but 1 feature maps"):
        AnchorGenerator([[8.0], [16.0]], [1.0])([torch.zeros(1, 1, 2, 3)], (16, 24))


def test_anchors_are_no_weights() -> None:
    assert not AnchorGenerator([[8.0]], [1.0]).state_dict()
