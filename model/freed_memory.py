"""Keeps freed memory in the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names and numbers of glibc's mallopt(3)."""
LARGEST = 2**31 - 1
PAD_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Ask glibc not to hand freed blocks back to the kernel; True if it will.

    A training step frees and asks for the same hundreds of megabytes again and again. By default glibc maps each large block anew,
    and every page of it is cleared and faulted in: a tenth of a step's time on a CPU. The peak stays what it is. Nothing happens on
    systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, PAD_BYTES)))
