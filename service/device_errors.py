"""What a device may do to a batch, told apart because each calls for another answer. Any other exception is taken for a bad image."""

from __future__ import annotations

import logging

from service.errors import InferenceFailed

OUT_OF_MEMORY_WORDS = ("out of memory", "failed to allocate memory", "available memory of", "alloc_failed", "bad_alloc", "bfcarena")
DEVICE_LOST_WORDS = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable ecc",
    "cuda failure 700",
    "cuda failure 719",
    "cudnn_status_execution_failed",
)

logger = logging.getLogger(__name__)


class DeviceOutOfMemory(RuntimeError):  # an event of the device, and the name that operators search for
    """The batch did not fit into the device's memory; a smaller one may. The device itself is well."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more (a sticky CUDA error, a card off the bus). Only a new process helps."""


def classify_device_error(error: Exception) -> Exception:
    """Which kind of failure a runtime's exception tells of, by the words that the libraries use."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY_WORDS):
        return DeviceOutOfMemory(first_line(error))
    if any(word in text for word in DEVICE_LOST_WORDS):
        return DeviceLost(first_line(error))
    logger.warning("inference failed: %s", first_line(error))  # the library's words may hold paths, so they stay here
    return InferenceFailed("the device failed on this image; send it once more, and report its request id if it fails again")


def first_line(error: BaseException) -> str:
    """An exception's first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
