"""Fixed-size selection of the best rows. k never depends on the data, so shapes stay static in an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.sizes import size_tensor

PADDING = torch.finfo(torch.float32).min
"""Value of a row that is none: below every logit, and below INVALID_SCORE."""


def top_rows(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each set, descending, padded where there are fewer.

    Args:
        values: `[B, N]`; N may be smaller than k.

    Returns:
        values `[B, k]` (PADDING where padded) and row indices `[B, k]` (0 where padded).
    """
    padded = F.pad(values, (0, k), value=PADDING)
    best = padded.topk(k, dim=1, sorted=True)
    inside = best.indices < size_tensor(values.shape[1], best.indices)
    return torch.where(inside, best.values, PADDING), torch.where(inside, best.indices, 0)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows at `index` `[B, k]`, of each image's own `values` `[B, N, C, ...]` or of `[N, C]` that all images share: `[B, k, C, ...]`."""
    if values.dim() == 2:
        return values[index]
    expanded = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand(*index.shape, *values.shape[2:])
    return values.gather(1, expanded)
