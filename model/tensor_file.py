"""Files that `torch.save` wrote, read without running any code that they might hold, and refused in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

NOT_WHOLE = (
    "it is empty or cut short, or something other than tensors and plain values as torch.save writes them; "
    "a file with anything else in it, which could run code, is not read"
)
TORCH_ADVICE = "weights_only"
"""Whatever torch says about this switch of its reader ends with the advice to turn it off."""


def read_tensor_file(path: Path, refuse: Callable[[str], Exception]) -> object:
    """What a file holds, on the CPU.

    Args:
        refuse: from the reason, as half a sentence, to the exception to raise.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # random bytes pass for one
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader runs the file's instructions, so a broken file may end in any exception
        raise refuse(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What the disk, the memory and the archive say is repeated; what the unpickler says is about Python, or unsafe advice."""
    words = str(error).strip().partition("\n")[0]
    if isinstance(error, OSError | RuntimeError) and words and TORCH_ADVICE not in str(error):
        return words
    return NOT_WHOLE
