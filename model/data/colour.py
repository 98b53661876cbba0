"""Any picture as 8-bit sRGB, as serving sees it: colour profiles applied, numbers of more bits scaled, transparency over white."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 1024 * 1024
"""Larger profiles are ignored."""

LEAST_CHANGE = 2
"""A profile that moves no colour by more than this many of 255 levels is sRGB under another name."""

ALPHA_MODES = ("RGBA", "LA", "La", "RGBa", "PA")


def to_srgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as sRGB; a broken or unfitting profile is ignored."""
    profile = image.info.get("icc_profile") or b""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    alpha = None
    if image.mode in ALPHA_MODES or _has_transparent_colour(image):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(bytes(profile), image.mode)
    rgb = image.convert("RGB") if transform is None else transform.apply(image)
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, (255, 255, 255)), alpha)


def _has_transparent_colour(image: Image.Image) -> bool:
    """A colour key or a palette with alpha. A 16-bit key cannot be held against values that were cut to 8 bits."""
    if image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        return True
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "P", "RGB"):
        return False
    return image.mode == "P" or max(key if isinstance(key, tuple) else (key,)) <= 255


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits, scaled and not clipped: by the range of its type, or by its values where they leave that range."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
        low, high = 0.0, float((1 << min(bits, 16)) - 1)
    else:
        finite = values[np.isfinite(values)]
        low, high = 0.0, 1.0 if image.mode == "F" else 65_535.0
        if finite.size and (finite.min() < low or finite.max() > high):
            low, high = float(finite.min()), float(finite.max())
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray((scaled + 0.5).clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where nothing is to be done."""
    if len(profile) > MAX_PROFILE_BYTES or (not profile and mode != "LAB"):
        return None
    try:
        source = ImageCms.createProfile("LAB") if mode == "LAB" else ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return transform if mode not in ("L", "RGB") or _changes_something(transform, mode) else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # broken, or made for another colour model
        return None


def _changes_something(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    probe = Image.fromarray(cube).convert(mode)
    before, after = np.asarray(probe.convert("RGB"), dtype=np.int16), np.asarray(transform.apply(probe), dtype=np.int16)
    return int(np.abs(after - before).max()) > LEAST_CHANGE
