"""Sizes of tensors as numbers that a network computes with."""

from __future__ import annotations

import torch
from torch import Tensor


def size_tensor(size: int, like: Tensor) -> Tensor:
    """A size as a tensor `[1]` of the device and element type of `like`.

    In an exported graph a size is a number of the host, and arithmetic with it would copy it to the device in every run, which also forbids
    recording the run as a CUDA graph. A range of one number is written on the device, from limits that runtimes keep on the host anyway.
    """
    return torch.arange(size, size + 1, device=like.device, dtype=like.dtype)
