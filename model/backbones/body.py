"""What every body (the classification network under a detector) answers to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from model.config import BackboneConfig

NormLayer = Callable[[int], nn.Module]


class Body(Protocol):
    """A module whose state dict uses torchvision's classification names."""

    channels: list[int]
    """Depth of each map that `forward` gives, finest first."""

    def stages(self) -> list[nn.Module]:
        """Parts in order, stem first, for freezing."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Maps `[B, C_l, H_l, W_l]` of a normalised batch `[B, 3, H, W]`, finest first."""


def norm_layer(config: BackboneConfig) -> NormLayer:
    """The normalisation that the config asks for, as torchvision's builders take it."""
    if config.norm == "batch":
        return nn.BatchNorm2d
    return partial(FrozenBatchNorm2d, eps=config.norm_eps)
