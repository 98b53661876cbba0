"""MobileNets as bodies; `features.*` names are torchvision's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large

from model.backbones.body import norm_layer
from model.backbones.frozen_norm import fuse_frozen_norms
from model.config import BackboneConfig


class MobileNet(nn.Module):
    """A chain of blocks with some of its maps tapped.

    Args:
        features: torchvision's blocks.
        taps: index of the blocks whose output is given, finest first.
        channels: their depths.
        stage_starts: first block of each stage, stem first.
    """

    def __init__(self, features: nn.Sequential, taps: Sequence[int], channels: list[int], stage_starts: Sequence[int]) -> None:
        super().__init__()
        self.features = features[: taps[-1] + 1]
        fuse_frozen_norms(self.features)
        self.taps = list(taps)
        self.channels = channels
        self._stage_bounds = [*stage_starts, len(self.features)]

    def stages(self) -> list[nn.Module]:
        return [self.features[start:end] for start, end in itertools.pairwise(self._stage_bounds)]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.taps:
                maps.append(x)
        return maps


def mobilenet_v2_body(config: BackboneConfig) -> MobileNet:
    """Strides 8, 16 and 32; the 1280-channel convolution behind them serves classification alone."""
    features = mobilenet_v2(norm_layer=norm_layer(config)).features
    return MobileNet(features, taps=(6, 13, 17), channels=[32, 96, 320], stage_starts=(0, 2, 4, 7, 14))


def mobilenet_v2_c4_body(config: BackboneConfig) -> MobileNet:
    """Stride 16 alone, as the paper's networks have it."""
    features = mobilenet_v2(norm_layer=norm_layer(config)).features
    return MobileNet(features, taps=(13,), channels=[96], stage_starts=(0, 2, 4, 7))


def mobilenet_v3_large_body(config: BackboneConfig) -> MobileNet:
    """The two maps that torchvision's detectors use, both at stride 32: the last stage's first block and the last convolution."""
    features = mobilenet_v3_large(norm_layer=norm_layer(config)).features
    return MobileNet(features, taps=(13, 16), channels=[160, 960], stage_starts=(0, 2, 4, 7, 13, 16))
