"""What a device may do to a batch, told apart because each calls for another answer. Any other exception is taken for a bad image."""

from __future__ import annotations

import logging
import re

from service.errors import InferenceFailed

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "failed to allocate memory",
    "available memory of",
    "alloc_failed",  # of cuBLAS and cuDNN
    "allocation_failed",  # of cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "bad_alloc",
    "bfcarena",
)
DEVICE_LOST_CODES: dict[int, tuple[str, ...]] = {
    46: ("cudaerrordevicesunavailable", "device(s) is/are busy or unavailable"),
    100: ("cudaerrornodevice", "no cuda-capable device is detected"),
    214: ("cudaerroreccuncorrectable", "uncorrectable ecc"),
    220: ("cudaerrornvlinkuncorrectable", "uncorrectable nvlink"),
    226: ("cudaerrorcontained",),
    700: ("cudaerrorillegaladdress", "illegal memory access"),
    702: ("cudaerrorlaunchtimeout", "launch timed out"),
    709: ("cudaerrorcontextisdestroyed", "context is destroyed"),
    710: ("cudaerrorassert", "device-side assert"),
    714: ("cudaerrorhardwarestackerror", "hardware stack error"),
    715: ("cudaerrorillegalinstruction", "illegal instruction"),
    716: ("cudaerrormisalignedaddress", "misaligned address"),
    717: ("cudaerrorinvalidaddressspace", "operation not supported on global/shared address space"),
    718: ("cudaerrorinvalidpc", "invalid program counter"),
    719: ("cudaerrorlaunchfailure", "unspecified launch failure"),
    721: ("cudaerrortensormemoryleak",),
    999: ("cudaerrorunknown",),
}
"""CUDA's runtime errors after which nothing runs in this process any more: the code, and the name and words that libraries print for it."""
DEVICE_LOST_WORDS = (
    *(words for names in DEVICE_LOST_CODES.values() for words in names),
    "cudnn_status_execution_failed",
    "cublas_status_execution_failed",
    "fallen off the bus",
    "gpu is lost",
)
CUDA_FAILURE = re.compile(r"cuda (?:failure|error)\W{1,2}(\d+)", re.IGNORECASE)
"""As ONNX Runtime writes it, `CUDA failure 700: an illegal memory access ...`."""

logger = logging.getLogger(__name__)


class DeviceOutOfMemory(RuntimeError):  # an event of the device, and the name that operators search for
    """The batch did not fit into the device's memory; a smaller one may. The device itself is well."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more (a sticky CUDA error, a card off the bus). Only a new process helps."""


def classify_device_error(error: Exception) -> Exception:
    """Which kind of failure a runtime's exception tells of, by the codes and words that the libraries use."""
    text = str(error).lower()
    codes = {int(code) for code in CUDA_FAILURE.findall(text)}
    if codes & DEVICE_LOST_CODES.keys() or any(word in text for word in DEVICE_LOST_WORDS):
        return DeviceLost(first_line(error))
    if isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY_WORDS):
        return DeviceOutOfMemory(first_line(error))
    logger.warning("inference failed: %s", first_line(error))  # the library's words may hold paths, so they stay here
    return InferenceFailed("the device failed on this image; send it once more, and report its request id if it fails again")


def first_line(error: BaseException) -> str:
    """An exception's first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
