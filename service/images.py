"""From the bytes a client sent to pixels in the input frame, and boxes back to the client's frame.

N boxes, H and W the bucket, h and w the resized picture inside it. Sizes are (height, width).
Input frame: the resized picture, padded right and bottom. Original frame: the picture as a person sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.decoding import ImageInfo, ImageLimits, decode_rgb, open_checked
from service.errors import BadImage
from service.manifest import Bucket, InputSpec
from service.resampling import resize

__all__ = [
    "ImageInfo",
    "ImageLimits",
    "Prepared",
    "assemble",
    "choose_bucket",
    "decode",
    "prepare",
    "prepare_pixels",
    "probe",
    "resized_hw",
    "to_original_frame",
]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One picture, ready for a batch.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, resized into the input frame, not padded.
        bucket: (H, W) of the padded input it belongs to.
        original_hw: (height, width) of the upright picture.
    """

    pixels: NDArray[np.uint8]
    bucket: Bucket
    original_hw: tuple[int, int]

    @property
    def h(self) -> int:
        """Rows of the resized picture."""
        return int(self.pixels.shape[0])

    @property
    def w(self) -> int:
        """Columns of the resized picture."""
        return int(self.pixels.shape[1])


def probe(data: bytes, limits: ImageLimits) -> ImageInfo:
    """Read the header only: what the picture is, and whether it may be decoded.

    Raises:
        EmptyBody, BodyTooLarge, UnsupportedType, TooManyPixels, BadImage: as `prepare`.
    """
    with open_checked(data, limits) as (_image, info):
        return info


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """The whole picture, upright, mode RGB, in its original size: what boxes are drawn on."""
    return decode_rgb(data, limits).image


def prepare(data: bytes, spec: InputSpec, limits: ImageLimits) -> Prepared:
    """Decode, turn upright, convert to RGB and resize into the input frame.

    Raises:
        EmptyBody: no bytes.
        BodyTooLarge: more bytes than `limits.max_bytes`.
        UnsupportedType: not one of the formats that are decoded.
        TooManyPixels: the header claims more pixels than `limits.max_pixels`; nothing was decoded.
        BadImage: truncated, corrupt, too thin, or too elongated for every bucket.
    """
    decoded = decode_rgb(data, limits, lambda upright_hw: resized_hw(upright_hw, spec))
    pixels = decoded.pixels
    return Prepared(pixels, choose_bucket((pixels.shape[0], pixels.shape[1]), spec), decoded.original_hw)


def prepare_pixels(rgb: NDArray[np.uint8], spec: InputSpec) -> Prepared:
    """The same for an upright picture that is already decoded, uint8 [height, width, 3]."""
    original_hw = (int(rgb.shape[0]), int(rgb.shape[1]))
    target_hw = resized_hw(original_hw, spec)
    return Prepared(resize(np.ascontiguousarray(rgb), target_hw), choose_bucket(target_hw, spec), original_hw)


def resized_hw(original_hw: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    """The resize rule: aspect kept, until the picture touches short_side or long_side from below; halves round up.

    Returns:
        (h, w) in the input frame, each at least 1.
    """
    height, width = original_hw
    scale = min(spec.short_side / min(height, width), spec.long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def choose_bucket(hw: tuple[int, int], spec: InputSpec) -> Bucket:
    """The bucket of least area that holds (h, w).

    Raises:
        BadImage: none does.
    """
    h, w = hw
    fitting = [bucket for bucket in spec.buckets if bucket[0] >= h and bucket[1] >= w]
    if not fitting:
        offered = ", ".join(f"{height}x{width}" for height, width in spec.buckets)
        raise BadImage(
            f"resized to {h}x{w} (height x width) the picture fits none of this model's inputs ({offered}); crop it to such a shape"
        )
    return min(fitting, key=lambda bucket: bucket[0] * bucket[1])


def assemble(
    batch: Sequence[Prepared], allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Join pictures of one bucket, padded right and bottom with zeros.

    Args:
        allocate: gives an array of a shape, with anything in it; None makes a new one.

    Returns:
        images uint8 [B, H, W, 3], image_sizes_hw int64 [B, 2].

    Raises:
        ValueError: an empty batch, or pictures of different buckets.
    """
    buckets = {prepared.bucket for prepared in batch}
    if len(buckets) != 1:
        raise ValueError(f"a batch holds pictures of one bucket, got {sorted(buckets) or 'no picture'}")
    height, width = buckets.pop()
    shape = (len(batch), height, width, 3)
    images = allocate(shape) if allocate is not None else np.empty(shape, dtype=np.uint8)
    for row, prepared in zip(images, batch, strict=True):
        h, w, _ = prepared.pixels.shape
        row[:h, :w] = prepared.pixels
        row[:h, w:] = 0
        row[h:] = 0
    return images, np.array([(prepared.h, prepared.w) for prepared in batch], dtype=np.int64)


def to_original_frame(boxes: NDArray[np.float32], prepared: Prepared) -> NDArray[np.float32]:
    """Boxes [N, 4], xyxy, from the input frame to the original frame, clipped to the picture."""
    (height, width), (h, w, _) = prepared.original_hw, prepared.pixels.shape
    scale = np.array((width / w, height / h, width / w, height / h), dtype=np.float32)
    limit = np.array((width, height, width, height), dtype=np.float32)
    original: NDArray[np.float32] = np.multiply(boxes, scale, dtype=np.float32)
    np.minimum(original, limit, out=original)  # clip takes longer than both
    np.maximum(original, 0, out=original)
    return original
