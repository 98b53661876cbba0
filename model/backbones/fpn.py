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
        batch_norm: follow every convolution by batch norm instead of a bias.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, extra_level: bool, batch_norm: bool = False) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_conv(channels, out_channels, 1, batch_norm) for channels in in_channels)
        self.outputs = nn.ModuleList(_conv(out_channels, out_channels, 3, batch_norm) for _ in in_channels)
        self.extra_level = extra_level

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


def _conv(in_channels: int, out_channels: int, kernel: int, batch_norm: bool) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=not batch_norm)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if batch_norm:
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
    return conv
