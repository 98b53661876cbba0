"""Augmentation: where each output pixel comes from, drawn first and carried out in one resampling; then turns and colour on uint8.

A picture is cut to a window of the original frame and resized to the input frame in one step; mirroring and quarter turns move whole
pixels and cost nothing. Boxes follow the same geometry exactly. Colour changes go through look-up tables where they can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.data.images import Window, read_rgb, resized_hw
from model.data.records import Record
from model.training import AugmentConfig

MIN_BOX_SIDE_PX = 1.0
"""Boxes that augmentation makes smaller than this in the input frame are dropped: nothing can be learnt from them."""

SIDEWAYS_TURNS = 2 / 3
"""Part of the three turns (quarter, half, three quarters) that swap height and width."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601, as Pillow's greyscale has it."""


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and its targets in the input frame: image uint8 [h, w, 3], boxes float32 [G, 4], labels int64 [G]."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Window of the original frame, size before any turn, then quarter turns (counter-clockwise) and mirroring."""

    window: Window
    size_hw: tuple[int, int]
    quarter_turns: int = 0
    hflip: bool = False
    vflip: bool = False


def plain_example(record: Record, short_side: float, long_side: float) -> Example:
    """The picture as evaluation and serving see it: resized, nothing else. Boxes and labels are the non-difficult ones."""
    height, width = record.size_hw
    geometry = Geometry((0.0, 0.0, float(width), float(height)), resized_hw(record.size_hw, short_side, long_side))
    return apply_geometry(record, geometry, min_visible=0.0)


def augmented_example(
    record: Record, config: AugmentConfig, short_side: float, long_side: float, rng: np.random.Generator, *, sideways: bool = False
) -> Example:
    """A training picture, the same for the same state of `rng`.

    Args:
        sideways: turn it by one or three quarters, as its whole batch is.
    """
    geometry = draw_geometry(record.size_hw, config, short_side, long_side, rng, sideways=sideways)
    example = apply_geometry(record, geometry, min_visible=config.min_visible)
    return Example(jitter_colour(example.image, config, rng), example.boxes, example.labels)


def draw_geometry(
    original_hw: tuple[int, int],
    config: AugmentConfig,
    short_side: float,
    long_side: float,
    rng: np.random.Generator,
    *,
    sideways: bool = False,
) -> Geometry:
    """Draws crop, scale, turn and mirroring. The same number of draws is taken whatever the configuration."""
    chance = rng.random(5)
    x1, y1, x2, y2 = _draw_crop(original_hw, config.crop_min if chance[0] < config.crop else 1.0, rng)
    factor = math.exp(rng.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    part_hw = (round(y2 - y1), round(x2 - x1))
    frame_hw = resized_hw(part_hw, short_side, long_side)
    size_hw = (max(1, round(frame_hw[0] * factor)), max(1, round(frame_hw[1] * factor)))
    window: Window = (x1, y1, x2, y2)
    corner = rng.random(2)
    if config.crop_to_input and factor > 1:
        window, size_hw = _cut_to_frame(window, size_hw, frame_hw, corner)
    return Geometry(
        window,
        size_hw,
        quarter_turns=_quarter_turns(chance[1], chance[4], config.rot90, sideways=sideways),
        hflip=bool(chance[2] < config.hflip),
        vflip=bool(chance[3] < config.vflip),
    )


def _quarter_turns(chance: float, choice: float, rot90: float, *, sideways: bool) -> int:
    """All three turns are as likely over many batches, given that `sideways` comes with SIDEWAYS_TURNS * rot90."""
    if sideways:
        return 1 if choice < 0.5 else 3
    half = (1 - SIDEWAYS_TURNS) * rot90 / (1 - SIDEWAYS_TURNS * rot90)
    return 2 if chance < half else 0


def _draw_crop(original_hw: tuple[int, int], least: float, rng: np.random.Generator) -> Window:
    parts = rng.uniform(least, 1.0, 2)
    corner = rng.random(2)
    height, width = (max(2, round(side * part)) for side, part in zip(original_hw, parts, strict=True))
    y1 = math.floor(corner[0] * (original_hw[0] - height + 1))
    x1 = math.floor(corner[1] * (original_hw[1] - width + 1))
    return float(max(x1, 0)), float(max(y1, 0)), float(min(x1 + width, original_hw[1])), float(min(y1 + height, original_hw[0]))


def _cut_to_frame(
    window: Window, size_hw: tuple[int, int], frame_hw: tuple[int, int], corner: NDArray[np.float64]
) -> tuple[Window, tuple[int, int]]:
    x1, y1, x2, y2 = window
    height, width = min(size_hw[0], frame_hw[0]), min(size_hw[1], frame_hw[1])
    part_h, part_w = (y2 - y1) * height / size_hw[0], (x2 - x1) * width / size_hw[1]
    top, left = y1 + corner[0] * (y2 - y1 - part_h), x1 + corner[1] * (x2 - x1 - part_w)
    return (left, top, left + part_w, top + part_h), (height, width)


def apply_geometry(record: Record, geometry: Geometry, *, min_visible: float) -> Example:
    """Reads a picture through a geometry, with the boxes that stay visible.

    Args:
        min_visible: the least part of a box's area that must lie in the window.

    Raises:
        ImageError: the file is missing, broken or not of the annotated size.
    """
    image = read_rgb(record.path, size_hw=geometry.size_hw, window=geometry.window, expected_hw=record.size_hw)
    boxes, kept = window_boxes(record.boxes[record.plain], geometry, min_visible)
    labels = record.labels[record.plain][kept]
    height, width = geometry.size_hw
    for _ in range(geometry.quarter_turns):
        image, boxes = np.rot90(image), turn_boxes(boxes, width)
        height, width = width, height
    if geometry.hflip:
        image, boxes = image[:, ::-1], mirror_boxes(boxes, width, axis=0)
    if geometry.vflip:
        image, boxes = image[::-1], mirror_boxes(boxes, height, axis=1)
    inside = boxes.clip(0, [width, height, width, height])  # rounding leaves -1e-14
    return Example(np.ascontiguousarray(image), inside.astype(np.float32), labels)


def window_boxes(boxes: NDArray[np.float64], geometry: Geometry, min_visible: float) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Boxes [G, 4] of the original frame, cut at the window and in the resized frame, and which of them were kept."""
    x1, y1, x2, y2 = geometry.window
    height, width = geometry.size_hw
    cut = np.stack([boxes[:, 0::2].clip(x1, x2) - x1, boxes[:, 1::2].clip(y1, y2) - y1], axis=-1).reshape(-1, 4)
    visible = np.prod(cut[:, 2:] - cut[:, :2], axis=1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    moved = cut * np.tile([width / (x2 - x1), height / (y2 - y1)], 2)
    sides = moved[:, 2:] - moved[:, :2]
    kept = np.flatnonzero((visible >= min_visible) & (sides >= MIN_BOX_SIDE_PX).all(axis=1))
    return moved[kept], kept


def mirror_boxes(boxes: NDArray[np.float64], side: float, *, axis: int) -> NDArray[np.float64]:
    """Boxes in a mirrored picture; axis 0 mirrors x in a picture of width `side`, axis 1 mirrors y in one of height `side`."""
    mirrored = boxes.copy()
    mirrored[:, axis] = side - boxes[:, axis + 2]
    mirrored[:, axis + 2] = side - boxes[:, axis]
    return mirrored


def turn_boxes(boxes: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Boxes after a quarter turn counter-clockwise (`numpy.rot90`) of a picture of this width: (x, y) -> (y, width - x)."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([y1, width - x2, y2, width - x1], axis=1)


def jitter_colour(image: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness and contrast by one look-up table, then saturation, then hue. Four draws whatever the configuration."""
    b, c, s, h = rng.uniform(-1, 1, 4)
    if config.brightness or config.contrast:
        brightness, contrast = 1 + config.brightness * b, 1 + config.contrast * c
        grey = float(image[::8, ::8].mean()) * brightness
        table = (np.arange(256) * brightness - grey) * contrast + grey
        image = np.asarray(Image.fromarray(image).point([int(v) for v in table.round().clip(0, 255)] * 3))
    if config.saturation:
        factor = 1 + config.saturation * s
        luma = (image @ LUMA)[..., None]
        image = (luma + (image - luma) * np.float32(factor)).round().clip(0, 255).astype(np.uint8)
    if config.hue:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.uint8(round(config.hue * h * 255) % 256)  # uint8 wraps as the colour circle does
        image = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return image
