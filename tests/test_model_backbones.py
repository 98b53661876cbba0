import copy

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops.misc import FrozenBatchNorm2d

from model.backbones import Backbone
from model.backbones.fpn import FPN
from model.backbones.frozen_norm import fuse_frozen_norms
from model.config import BackboneConfig


def randomise_norms(root: nn.Module) -> None:
    for name, buffer in root.named_buffers():
        if "running_var" in name or name.endswith("weight"):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0, 0.1)


def test_fused_norm_changes_no_value_and_no_name() -> None:
    torch.manual_seed(0)
    plain = mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:8]
    randomise_norms(plain)
    fused = copy.deepcopy(plain)
    fuse_frozen_norms(fused)
    x = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(fused(x), plain(x), atol=1e-4, rtol=1e-4)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())


def test_norm_without_convolution_is_said() -> None:
    with pytest.raises(ValueError, match="does not follow a convolution"):
        fuse_frozen_norms(nn.Sequential(nn.ReLU(), FrozenBatchNorm2d(3)))


def test_pyramid_levels_and_strides() -> None:
    backbone = Backbone(BackboneConfig("mobilenet_v2", fpn_channels=16)).eval()
    levels = backbone(torch.zeros(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [(2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3), (2, 16, 1, 2)]


def test_pyramid_adds_the_upsampled_top_down_path() -> None:
    fpn = FPN([1, 1], 1, extra_level=False)
    for lateral, output in zip(fpn.laterals, fpn.outputs, strict=True):
        nn.init.ones_(lateral.weight)
        nn.init.dirac_(output.weight)
    fine, coarse = torch.arange(8.0).reshape(1, 1, 2, 4), torch.tensor([[[[10.0, 20.0]]]])
    low, high = fpn([fine, coarse])
    assert low.flatten().tolist() == [10, 11, 22, 23, 14, 15, 26, 27]
    assert high.flatten().tolist() == [10, 20]


def test_frozen_stages_do_not_learn() -> None:
    backbone = Backbone(BackboneConfig("mobilenet_v2", fpn_channels=8, trainable_stages=3))
    frozen = {name.split(".")[2] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"0", "1", "2", "3"}


def test_unknown_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="unknown backbone 'resnet'"):
        Backbone(BackboneConfig("resnet", fpn_channels=8))
