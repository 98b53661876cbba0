"""Draw examples/blood_smear.jpg: a stained blood smear under the microscope, made of nothing but numbers.

    python examples/make_blood_smear.py [--seed 3] [--out examples/blood_smear.jpg]

Light is absorbed, not painted (Beer and Lambert): every cell adds its stain's absorbance, so cells that overlap look darker, as they do
on a slide. The same seed gives the same picture.

H and W the picture, [H, W, 3] absorbance of red, green and blue. Lengths are pixels, positions (x, y).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Map = NDArray[np.float64]

WIDTH, HEIGHT = 640, 480
LIGHT = np.array([204.0, 209.0, 200.0])
"""The empty slide."""
HAEMOGLOBIN = np.array([0.11, 0.38, 0.35])
CYTOPLASM = np.array([0.14, 0.33, 0.02])
NUCLEUS = np.array([0.80, 1.02, 0.02])
PLATELET = np.array([0.62, 0.55, 0.02])
"""Absorbance of a cell's full thickness in red, green and blue."""

RED_CELLS, PLATELETS = 20, 4
WHITE_CELLS = ((212.0, 226.0, 92.0),)
"""(x, y, radius)."""


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description="Draw a synthetic blood smear.")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("blood_smear.jpg"))
    arguments = parser.parse_args()
    draw_smear(arguments.seed).save(arguments.out, quality=90)


def draw_smear(seed: int) -> Image.Image:
    """The whole picture, RGB, 640 x 480."""
    rng = np.random.default_rng(seed)
    absorbed = np.zeros((HEIGHT, WIDTH, 3))
    occupied = [(x, y, radius) for x, y, radius in WHITE_CELLS]
    for x, y, radius in _scatter(rng, RED_CELLS, (46.0, 56.0), occupied, closeness=0.86):
        absorbed += _red_cell(rng, x, y, radius)
    for x, y, radius in WHITE_CELLS:
        absorbed += _white_cell(rng, x, y, radius)
    for x, y, radius in _scatter(rng, PLATELETS, (14.0, 19.0), occupied, closeness=1.0, margin=30.0):
        absorbed += _platelet(rng, x, y, radius)
    return _photograph(rng, absorbed)


def _scatter(
    rng: np.random.Generator,
    count: int,
    radii: tuple[float, float],
    occupied: list[tuple[float, float, float]],
    *,
    closeness: float,
    margin: float = -20.0,
) -> list[tuple[float, float, float]]:
    """Places that keep `closeness` times the touching distance from everything placed before; a negative margin lets cells be cut off."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(20_000):
        x, y = rng.uniform(margin, WIDTH - margin), rng.uniform(margin, HEIGHT - margin)
        radius = rng.uniform(*radii)
        if all(np.hypot(x - a, y - b) > closeness * (radius + c) for a, b, c in occupied):
            placed.append((x, y, radius))
            occupied.append((x, y, radius))
        if len(placed) == count:
            break
    return placed


def _polar(x: float, y: float) -> tuple[Map, Map]:
    """Distance and direction of every pixel from (x, y)."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.hypot(columns - x, rows - y), np.arctan2(rows - y, columns - x)


def _outline(rng: np.random.Generator, angle: Map, radius: float, wobble: float, orders: tuple[int, ...] = (2, 3, 4)) -> Map:
    """A closed curve: the radius in every direction."""
    curve = np.full_like(angle, radius)
    for order in orders:
        curve += radius * wobble / (order - 1) * rng.uniform(-1, 1) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return curve


def _inside(distance: Map, edge: Map, softness: float) -> Map:
    """1 inside, 0 outside, smooth over about `softness` pixels."""
    return 1 / (1 + np.exp(np.clip((distance - edge) / softness, -40, 40)))


def _red_cell(rng: np.random.Generator, x: float, y: float, radius: float) -> Map:
    """A disc, thick at the rim and thin in the middle, in some cells hardly so."""
    distance, angle = _polar(x, y)
    edge = _outline(rng, angle, radius, 0.09)
    pallor, size = rng.uniform(0.3, 0.9), rng.uniform(0.42, 0.62)
    thickness = _inside(distance, edge, 1.6) * (1 - pallor * _inside(distance, edge * size, radius * 0.07))
    rim = np.exp(-(((distance - edge * 0.94) / 3.0) ** 2)) * 0.30
    return (rng.uniform(0.78, 1.05) * thickness + rim)[..., None] * HAEMOGLOBIN


def _white_cell(rng: np.random.Generator, x: float, y: float, radius: float) -> Map:
    """Granular cytoplasm around a nucleus of four joined lobes."""
    distance, angle = _polar(x, y)
    body = _inside(distance, _outline(rng, angle, radius, 0.06), 3.0)
    absorbed = (body * (0.85 + 0.14 * _grain(rng, 2.2)))[..., None] * CYTOPLASM
    lobes = np.zeros_like(distance)
    start = rng.uniform(0, 2 * np.pi)
    for step in range(4):
        direction, reach = start + step * 1.25, radius * rng.uniform(0.42, 0.50)
        to_lobe, lobe_angle = _polar(x + reach * np.cos(direction), y + reach * np.sin(direction))
        lobes = np.maximum(lobes, _inside(to_lobe, _outline(rng, lobe_angle, radius * rng.uniform(0.29, 0.36), 0.16), 2.2))
    texture = 0.92 + 0.16 * _grain(rng, 4.0)
    return absorbed + (lobes * texture)[..., None] * (NUCLEUS - 0.5 * CYTOPLASM)


def _platelet(rng: np.random.Generator, x: float, y: float, radius: float) -> Map:
    """A small irregular speck, denser in the middle."""
    distance, angle = _polar(x, y)
    edge = _outline(rng, angle, radius, 0.22, (2, 3, 5))
    density = 0.45 * _inside(distance, edge, 2.0) + 0.55 * _inside(distance, edge * 0.6, 2.5)
    return (density * (0.9 + 0.15 * _grain(rng, 2.5)))[..., None] * PLATELET


def _grain(rng: np.random.Generator, size: float) -> Map:
    """Smooth noise around 0 with deviation 1, spots of about `size` pixels."""
    noise = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(size))
    smooth = np.asarray(noise, dtype=np.float64)
    return (smooth - smooth.mean()) / smooth.std()


def _photograph(rng: np.random.Generator, absorbed: Map) -> Image.Image:
    """Light through the slide, a lens that darkens the corners, a slightly soft focus, and the camera's noise."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    off_centre = np.hypot((columns - WIDTH / 2) / WIDTH, (rows - HEIGHT / 2) / HEIGHT)
    light = LIGHT * (1.03 - 0.16 * off_centre**2)[..., None] * (1 + 0.012 * _grain(rng, 40.0))[..., None]
    picture = Image.fromarray(np.clip(light * 10 ** (-absorbed * 0.43), 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.1))
    noisy = np.asarray(picture, dtype=np.float64) + rng.normal(0, 1.8, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
