"""Memory that was freed goes back to the system, so that a process which loads versions for weeks stays as small as it began."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim(3); None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


_trim = _find_trim()


def release_freed_memory() -> bool:
    """Hand freed pages back to the system; True where the C library can.

    glibc keeps what a model's session and its arena freed, in pieces between blocks that live on: a hundred megabytes and more after a
    few loads. Takes some tens of milliseconds, during which allocations of other threads may wait: call it after a load or a close, on a
    worker's thread, not after a batch.
    """
    if _trim is None:
        return False
    _trim(0)
    return True
