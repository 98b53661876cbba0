"""Pictures as people have them to upright RGB: limits before decoding, orientation, colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import BadImage, BodyTooLarge, EmptyBody, TooManyPixels, UnsupportedType

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may be at most.

    Attributes:
        max_bytes: of the encoded picture.
        max_pixels: width times height that the header claims.
        min_side: pixels of the shorter side.
        max_aspect: longer side over shorter side.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    min_side: int = 2
    max_aspect: float = 50.0


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says. `stored_hw` is before orientation."""

    format: str
    mode: str
    stored_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Opened:
    """A picture whose header was read and found within the limits."""

    image: Image.Image
    info: ImageInfo


@dataclass(frozen=True, slots=True)
class Decoded:
    """Upright RGB, perhaps smaller than the original, with the original's upright size."""

    image: Image.Image
    original_hw: tuple[int, int]


@contextmanager
def open_checked(data: bytes, limits: ImageLimits) -> Iterator[Opened]:
    """Open lazily and hold the header against the limits."""
    if not data:
        raise EmptyBody("expected the bytes of a picture, got none")
    if len(data) > limits.max_bytes:
        raise BodyTooLarge(f"a picture may have {limits.max_bytes} bytes, got {len(data)}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UnsupportedType("expected JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"more than {limits.max_pixels} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(f"cannot be opened: {error}") from error
    with image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise TooManyPixels(f"a picture may have {limits.max_pixels} pixels, the header says {width} x {height}")
        if min(width, height) < limits.min_side:
            raise BadImage(f"both sides must be at least {limits.min_side} pixels, got {width} x {height}")
        if max(width, height) > limits.max_aspect * min(width, height):
            raise BadImage(f"the longer side may be {limits.max_aspect:g} times the shorter, got {width} x {height}")
        yield Opened(image, ImageInfo(str(image.format), image.mode, (height, width)))


def decode_rgb(data: bytes, limits: ImageLimits, target: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> Decoded:
    """Decode to upright RGB; resize to `target(upright_hw)` if given."""
    with open_checked(data, limits) as opened:
        try:
            image = ImageOps.exif_transpose(opened.image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(f"cannot be decoded: {error}") from error
    original_hw = (image.height, image.width)
    if target is not None:
        height, width = target(original_hw)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return Decoded(image, original_hw)
