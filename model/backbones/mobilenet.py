"""MobileNetV2 as a backbone: maps at strides 8, 16 and 32 (or 4 to 32)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.ops.misc import FrozenBatchNorm2d

from model.backbones.frozen_norm import fuse_frozen_norms

LAST_BLOCK = 17
"""The 1280-channel convolution behind it serves classification alone."""
_STAGE_ENDS = {4: 3, 8: 6, 16: 13, 32: LAST_BLOCK}
_CHANNELS = {4: 24, 8: 32, 16: 96, 32: 320}


class MobileNetV2(nn.Module):
    """Torchvision's MobileNetV2 features with frozen batch norm; `features.*` names are torchvision's.

    Args:
        strides: which maps to give, finest first.
    """

    def __init__(self, strides: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        self.features = mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[: LAST_BLOCK + 1]
        fuse_frozen_norms(self.features)
        self.taps = [_STAGE_ENDS[stride] for stride in strides]
        self.channels = [_CHANNELS[stride] for stride in strides]

    def stages(self) -> list[nn.Module]:
        """Five stages, stem first, for freezing: those that end at strides 2, 4, 8, 16 and 32."""
        bounds = [0, 2, 4, 7, 14, LAST_BLOCK + 1]
        return [self.features[a:b] for a, b in itertools.pairwise(bounds)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps `[B, C_l, H / stride, W / stride]`, finest first."""
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.taps:
                maps.append(x)
        return maps
