"""Reading pictures: upright RGB, the resize rule that serving uses too, and padding.

The resize rule: scale = min(short_side / min(h, w), long_side / max(h, w)); new sides rounded half up, at least 1; bilinear with
anti-aliasing (Pillow). A JPEG is decoded at a reduced scale only where that leaves at least twice the wanted size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.data.colour import to_srgb

STRIDE = 32
EXIF_ORIENTATION = 0x0112
PNG_XMP = "XML:com.adobe.xmp"
SIDEWAYS = frozenset({5, 6, 7, 8})
"""EXIF orientations whose stored width is the upright height."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright."""

Window = tuple[float, float, float, float]


class ImageError(ValueError):
    """A picture that cannot be used: `kind` in a word or two, `sentence` for a person."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.sentence = sentence


def open_image(path: Path) -> Image.Image:
    """Opens a picture without decoding it.

    Raises:
        ImageError: no such file, or not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path)
    except FileNotFoundError:
        raise ImageError("missing image", f"there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError("unreadable image", f"{path.name} cannot be opened: {error}") from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation as the header has it, 1 where there is none or it cannot be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns it while it loads
    if image.format == "PNG" and not {"exif", PNG_XMP} & image.info.keys():
        return 1  # Pillow would decode the whole picture to look for EXIF behind the pixels
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # malformed EXIF blocks raise anything from struct.error to SyntaxError; the pixels are fine
        return 1


def upright_hw(path: Path) -> tuple[int, int]:
    """Height and width as a person sees the picture, from its header."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if orientation(image) in SIDEWAYS else (height, width)


def read_rgb(
    path: Path, *, size_hw: tuple[int, int] | None = None, window: Window | None = None, expected_hw: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decodes a picture, upright.

    Args:
        size_hw: resize to this height and width.
        window: only this part, (x1, y1, x2, y2) in the original frame, is resized; one resampling does crop and scale.
        expected_hw: the size that the annotation states.

    Returns:
        uint8 [H, W, 3], sRGB.

    Raises:
        ImageError: missing, unreadable or truncated, or not of `expected_hw`.
    """
    with open_image(path) as image:
        stored = orientation(image)
        turned = stored in SIDEWAYS
        original_hw = (image.width, image.height) if turned else (image.height, image.width)
        if expected_hw is not None and original_hw != expected_hw:
            raise ImageError(
                "wrong size", f"{path.name} is {original_hw[1]} x {original_hw[0]}, annotated as {expected_hw[1]} x {expected_hw[0]}"
            )
        x1, y1, x2, y2 = window or (0.0, 0.0, float(original_hw[1]), float(original_hw[0]))
        if size_hw is not None:
            _reduce(image, size_hw, (y2 - y1, x2 - x1), original_hw, turned=turned)
        rgb = _decode(image, path, TURNS.get(stored))
        if size_hw is None and window is None:
            return np.asarray(rgb)
        sx, sy = rgb.width / original_hw[1], rgb.height / original_hw[0]
        height, width = size_hw or (round(y2 - y1), round(x2 - x1))
        box = (max(x1 * sx, 0.0), max(y1 * sy, 0.0), min(x2 * sx, rgb.width), min(y2 * sy, rgb.height))
        return np.asarray(rgb.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _reduce(
    image: Image.Image, size_hw: tuple[int, int], part_hw: tuple[float, float], original_hw: tuple[int, int], *, turned: bool
) -> None:
    """Lets the JPEG decoder skip detail that the resize would average away anyway."""
    height, width = (math.ceil(2 * size * whole / part) for size, whole, part in zip(size_hw, original_hw, part_hw, strict=True))
    image.draft("RGB", (height, width) if turned else (width, height))


def _decode(image: Image.Image, path: Path, turn: Image.Transpose | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            rgb = to_srgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise ImageError("truncated image", f"{path.name} cannot be decoded: {error}") from None


def resized_hw(original_hw: tuple[int, int], short_side: float, long_side: float) -> tuple[int, int]:
    """The size that a picture has in the input frame: (height, width)."""
    scale = min(short_side / min(original_hw), long_side / max(original_hw))
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in original_hw)
    return height, width


def choose_bucket(size_hw: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest bucket that holds a picture, else the smallest multiple of the stride."""
    holding = [bucket for bucket in buckets if bucket[0] >= size_hw[0] and bucket[1] >= size_hw[1]]
    if holding:
        return min(holding, key=lambda bucket: bucket[0] * bucket[1])
    return padded_hw([size_hw])


def padded_hw(sizes_hw: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The smallest multiples of the stride that hold all these sizes."""
    height, width = (math.ceil(max(sides) / STRIDE) * STRIDE for sides in zip(*sizes_hw, strict=True))
    return height, width


def pad_batch(images: Sequence[NDArray[np.uint8]], frame_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Stacks pictures [h, w, 3] into one zero-padded [B, H, W, 3]."""
    batch = np.zeros((len(images), *frame_hw, 3), dtype=np.uint8)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return batch
