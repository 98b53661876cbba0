"""Fixed-size selection of the best rows. k never depends on the data, so shapes stay static in an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.nms import INVALID_SCORE
from model.sizes import size_tensor


def top_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each set, descending, padded where there are fewer.

    Args:
        scores: `[B, N]`; N may be smaller than k.

    Returns:
        scores `[B, k]` (INVALID_SCORE where padded) and row indices `[B, k]` (0 where padded).
    """
    padded = F.pad(scores, (0, k), value=INVALID_SCORE)
    best = padded.topk(k, dim=1, sorted=True)
    inside = best.indices < size_tensor(scores.shape[1], best.indices)
    return torch.where(inside, best.values, INVALID_SCORE), torch.where(inside, best.indices, 0)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows at `index` `[B, k]`, of each image's own `values` `[B, N, C, ...]` or of `[N, C]` that all images share: `[B, k, C, ...]`."""
    if values.dim() == 2:
        return values[index]
    expanded = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand(*index.shape, *values.shape[2:])
    return values.gather(1, expanded)
