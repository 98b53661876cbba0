"""Anchors: reference boxes on a grid, one set of shapes a pyramid level.

A anchors per cell, (H_l, W_l) a level's grid, N = sum of H_l * W_l * A anchors of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.sizes import size_tensor


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Zero-centred anchors `[A, 4]`, ratio-major, rounded to whole pixels as torchvision's are.

    Args:
        sizes: square roots of the areas.
        ratios: height / width.
    """
    h_factors = torch.tensor(ratios, dtype=torch.float32).sqrt()
    scales = torch.tensor(sizes, dtype=torch.float32)
    widths = ((1.0 / h_factors)[:, None] * scales).reshape(-1)
    heights = (h_factors[:, None] * scales).reshape(-1)
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()


PAPER_WINDOW = 16
"""Side of the window, one cell of the shared map, from which the original release enumerates its anchors."""


def paper_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """The original release's anchors `[A, 4]`, ratio-major, around the centre of a 16 px window.

    There, corners are inclusive pixels (width = x2 - x1 + 1); here x2 and y2 are one larger, so the sides are the same.
    """
    anchors = []
    for ratio in ratios:
        width = round(math.sqrt(PAPER_WINDOW**2 / ratio))
        height = round(width * ratio)
        for size in sizes:
            scale = size / PAPER_WINDOW
            half_w, half_h = width * scale / 2, height * scale / 2
            anchors.append([PAPER_WINDOW / 2 - half_w, PAPER_WINDOW / 2 - half_h, PAPER_WINDOW / 2 + half_w, PAPER_WINDOW / 2 + half_h])
    return torch.tensor(anchors)


BASE_ANCHORS = {"centred": base_anchors, "paper": paper_anchors}
"""AnchorConfig.rule -> the anchors of one cell."""


class AnchorGenerator(nn.Module):
    """Places the base anchors of each level on that level's grid.

    The stride is padded size // grid size, as in torchvision, so it follows whatever the backbone does to the borders.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], rule: str = "centred") -> None:
        super().__init__()
        self.num_levels = len(sizes)
        self.anchors_per_cell = [len(level_sizes) * len(ratios) for level_sizes in sizes]
        for level, level_sizes in enumerate(sizes):
            # geometry, not weights: it belongs to the config and stays out of the state dict
            self.register_buffer(f"base_{level}", BASE_ANCHORS[rule](level_sizes, ratios), persistent=False)

    def forward(self, features: Sequence[Tensor], padded_hw: tuple[int, int]) -> list[Tensor]:
        """Anchors of every level in the input frame, cell by cell, row-major: `[H_l * W_l * A, 4]` each.

        Args:
            features: one map `[B, C, H_l, W_l]` a level.
            padded_hw: height and width of the padded input.
        """
        if len(features) != self.num_levels:
            raise ValueError(f"anchors are defined for {self.num_levels} levels, but {len(features)} feature maps came")
        return [self._level(level, feature, padded_hw) for level, feature in enumerate(features)]

    def _level(self, level: int, feature: Tensor, padded_hw: tuple[int, int]) -> Tensor:
        base = self.get_buffer(f"base_{level}")
        grid_h, grid_w = feature.shape[-2:]
        ys = torch.arange(grid_h, device=base.device, dtype=base.dtype) * size_tensor(padded_hw[0] // grid_h, base)
        xs = torch.arange(grid_w, device=base.device, dtype=base.dtype) * size_tensor(padded_hw[1] // grid_w, base)
        y, x = ys[:, None].expand(grid_h, grid_w), xs[None, :].expand(grid_h, grid_w)
        shifts = torch.stack([x, y, x, y], dim=-1)  # [H_l, W_l, 4]
        return (shifts[:, :, None, :] + base).reshape(-1, 4)
