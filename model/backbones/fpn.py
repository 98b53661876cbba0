"""Feature pyramid (FPN, section 3): laterals, a top-down path and one 3x3 convolution a level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Maps of falling resolution in, as many maps of equal depth out, plus one coarser by max pooling where asked for.

    Args:
        in_channels: depth of each input map, finest first.
        out_channels: depth of every output map.
        extra_level: append a map at half the last resolution, for the largest anchors.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, extra_level: bool) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        self.extra_level = extra_level
        for layer in [*self.laterals, *self.outputs]:
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # these layers have a bias

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Pyramid levels, finest first: `[B, C, H_l, W_l]` each."""
        top = self.laterals[-1](features[-1])
        merged = [top]
        for lateral, feature in zip(reversed(self.laterals[:-1]), reversed(features[:-1]), strict=True):
            here = lateral(feature)
            top = here + F.interpolate(top, size=here.shape[-2:], mode="nearest")
            merged.append(top)
        levels = [output(m) for output, m in zip(self.outputs, reversed(merged), strict=True)]
        if self.extra_level:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels
