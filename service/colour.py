"""Any colour model to RGB: first to one that can be resized band by band, then, cheaply because small, to sRGB over white.

Modes are Pillow's: L grey, LA and RGBA with alpha, P palette, I;16 and I and F numbers of more than 8 bits.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms

MAX_PROFILE_BYTES = 4 * 1024 * 1024
"""Larger ICC profiles are ignored; those of presses have up to 2.6 MB."""
STRIP_ROWS = 256
SAME_COLOUR_LEVELS = 2
"""A profile that moves no colour by more than this many of 255 levels is sRGB under another name."""

_PLAIN = {"L", "RGB", "RGBA", "CMYK", "LAB"}


def to_resizable(image: Image.Image) -> Image.Image:
    """A loaded picture in one of the modes L, RGB, RGBA, CMYK, LAB, whose values may be averaged."""
    if image.mode.startswith(("I", "F")):
        return _numbers_to_grey(image)
    if _has_colour_key(image) or image.mode in ("LA", "La", "PA", "RGBa") or (image.mode == "P" and _palette_has_alpha(image)):
        return image.convert("RGBA")
    if image.mode in _PLAIN:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A resizable picture as sRGB; what is transparent shows white.

    Args:
        image: as `to_resizable` returns it.
        profile: the file's ICC profile; a broken or mismatched one is ignored.
    """
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if alpha is not None:
        image = image.convert("RGB")
    transform = _transform(profile or b"", image.mode)
    if transform is not None:
        image = _apply(image, transform)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None:
        rgb.paste((255, 255, 255), mask=ImageChops.invert(alpha))
    return rgb


def _palette_has_alpha(image: Image.Image) -> bool:
    return image.palette is not None and image.palette.mode == "RGBA"


def _has_colour_key(image: Image.Image) -> bool:
    """A transparent colour or palette entry. A 16-bit key cannot be compared with values already cut to 8 bits."""
    key: Any = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "P", "RGB"):
        return False
    return image.mode == "P" or max(key if isinstance(key, tuple) else (key,)) <= 255


def _numbers_to_grey(image: Image.Image) -> Image.Image:
    """Scale, never clip: 16 bits and 12 bits by their range, wider numbers and floats by what the picture holds."""
    low, high = _range(image)
    grey = Image.new("L", image.size)
    factor = 255 / (high - low) if high > low else 0.0
    for top in range(0, image.height, STRIP_ROWS):
        box = (0, top, image.width, min(top + STRIP_ROWS, image.height))
        values = np.nan_to_num(_values(image, box), nan=low, posinf=high, neginf=low)
        grey.paste(Image.fromarray(np.clip((values - low) * factor + 0.5, 0, 255).astype(np.uint8)), box)
    return grey


def _values(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    return np.asarray(image.crop(box)).astype(np.float64)


def _range(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
        return 0.0, float((1 << min(bits, 16)) - 1)
    low, high = np.inf, -np.inf
    for top in range(0, image.height, STRIP_ROWS):
        values = _values(image, (0, top, image.width, min(top + STRIP_ROWS, image.height)))
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    usual = 1.0 if image.mode == "F" else 65_535.0  # 0..1 in floats, 16 bits kept in 32
    if low >= 0 and high <= usual:
        return 0.0, usual
    return (low, high) if np.isfinite(low) else (0.0, usual)


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """In strips, so that the profile's working memory does not grow with the picture."""
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        box = (0, top, image.width, min(top + STRIP_ROWS, image.height))
        rgb.paste(transform.apply(image.crop(box)), box)
    return rgb


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None where there is nothing to do. A transform may be used by several threads at once."""
    if len(profile) > MAX_PROFILE_BYTES or (not profile and mode != "LAB"):
        return None
    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode in ("L", "RGB") and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # broken, or made for another colour model
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    probe = Image.fromarray(cube).convert(mode)
    before = np.asarray(probe.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(probe), dtype=np.int16)
    return int(np.abs(after - before).max()) <= SAME_COLOUR_LEVELS
