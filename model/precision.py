"""Where half precision is not enough: scores, coordinates and losses are computed in fp32, or in fp64 if the network is."""

from __future__ import annotations

from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; wider types stay."""
    return x.float() if x.element_size() < 4 else x
