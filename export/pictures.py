"""Pictures that this project draws: deterministic, of any size, with many objects, few, one pixel, or none.

Every function answers with RGB `uint8 [H, W, 3]`. Scenes look enough like photographs (shading, grain, soft edges) for a trained network
to answer with boxes of every score, which is what a comparison of two runtimes needs. Without grain all places of a flat region score
alike, and rounding alone would choose among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Picture = NDArray[np.uint8]

GRAIN = 3
"""Levels of grey up and down, of each pixel."""


def smear(hw: tuple[int, int], seed: int, *, cells: int = 24) -> Picture:
    """A synthetic blood smear: pale discs with lighter centres, a few purple nuclei, small dots."""
    height, width = hw
    rng = np.random.default_rng(seed)
    canvas = Image.new("RGB", (width, height), (235, 225, 215))
    draw = ImageDraw.Draw(canvas)
    radius = 0.11 * min(hw)
    for _ in range(cells):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), radius * rng.uniform(0.85, 1.15)
        shade = int(rng.integers(-12, 12))
        _disc(draw, x, y, r, (214 + shade, 165 + shade, 160 + shade))
        _disc(draw, x, y, r * 0.45, (226 + shade, 190 + shade, 184 + shade))
    for _ in range(max(1, cells // 12)):
        x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height
        _disc(draw, x, y, radius * 1.7, (196, 178, 206))
        for _ in range(3):
            _disc(draw, x + rng.normal(0, radius * 0.4), y + rng.normal(0, radius * 0.4), radius * 0.8, (102, 62, 142))
    for _ in range(max(1, cells // 6)):
        _disc(draw, rng.uniform(0, width), rng.uniform(0, height), radius * 0.28, (142, 98, 172))
    return _grained(canvas.filter(ImageFilter.GaussianBlur(max(0.6, 0.004 * min(hw)))), rng)


def street(hw: tuple[int, int], seed: int, *, blocks: int = 16) -> Picture:
    """Rectangles with windows before a graded sky: straight edges, many colours, overlaps."""
    height, width = hw
    rng = np.random.default_rng(seed)
    sky = np.linspace((120, 160, 220), (225, 215, 200), height)[:, None, :].repeat(width, axis=1)
    canvas = Image.fromarray(sky.astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(canvas)
    for _ in range(blocks):
        w, h = rng.uniform(0.06, 0.3) * width, rng.uniform(0.1, 0.5) * height
        x, y = rng.uniform(-0.05, 0.95) * width, rng.uniform(0.2, 0.95) * height
        draw.rectangle((x, y, x + w, y + h), fill=_colour(rng), outline=_colour(rng))
        draw.rectangle((x + 0.2 * w, y + 0.2 * h, x + 0.45 * w, y + 0.5 * h), fill=_colour(rng))
    return _grained(canvas.filter(ImageFilter.GaussianBlur(0.6)), rng)


def noise(hw: tuple[int, int], seed: int) -> Picture:
    """Uniform noise in every channel."""
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def blank(hw: tuple[int, int], value: int) -> Picture:
    """One grey all over."""
    return np.full((*hw, 3), value, dtype=np.uint8)


def one_pixel(hw: tuple[int, int]) -> Picture:
    """A single white pixel on black, a third of the way in."""
    picture = blank(hw, 0)
    picture[hw[0] // 3, hw[1] // 3] = 255
    return picture


def _grained(canvas: Image.Image, rng: np.random.Generator) -> Picture:
    """The same grain in all three channels, as a sensor's noise looks after a camera has reduced its colour."""
    picture = np.asarray(canvas, dtype=np.int64)
    grain = rng.integers(-GRAIN, GRAIN + 1, (*picture.shape[:2], 1))
    grained: Picture = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return grained


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(20, 236, 3)
    return int(red), int(green), int(blue)
