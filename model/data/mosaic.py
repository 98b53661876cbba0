"""Mosaic: four pictures around a random centre, each filling its quarter (YOLOv4, Bochkovskiy et al. 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from model.data.images import resized_hw
from model.data.records import DetectionSet
from model.data.transforms import Example, apply_geometry, draw_geometry, jitter_colour
from model.training import AugmentConfig

CENTRE = (0.3, 0.7)
"""Where the four pictures meet, as a part of each side."""


def mosaic_example(
    dataset: DetectionSet, index: int, config: AugmentConfig, sides: tuple[float, float], rng: np.random.Generator
) -> Example:
    """Puts picture `index` and three others into one frame of the size that `index` would have alone.

    Args:
        sides: short and long side of the resize rule.
    """
    height, width = resized_hw(dataset.records[index].size_hw, *sides)
    cx, cy = round(width * rng.uniform(*CENTRE)), round(height * rng.uniform(*CENTRE))
    cells = [(0, 0, cx, cy), (cx, 0, width, cy), (0, cy, cx, height), (cx, cy, width, height)]
    chosen = [index, *(int(i) for i in rng.integers(0, len(dataset), 3))]
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    parts = [_cell_example(dataset, i, config, sides, cell, rng) for i, cell in zip(chosen, cells, strict=True)]
    for (x1, y1, x2, y2), part in zip(cells, parts, strict=True):
        canvas[y1:y2, x1:x2] = part.image
    boxes = np.concatenate(
        [part.boxes + np.tile([x1, y1], 2).astype(np.float32) for (x1, y1, _, _), part in zip(cells, parts, strict=True)]
    )
    return Example(jitter_colour(canvas, config, rng), boxes, np.concatenate([part.labels for part in parts]))


def _cell_example(
    dataset: DetectionSet,
    index: int,
    config: AugmentConfig,
    sides: Sequence[float],
    cell: tuple[int, int, int, int],
    rng: np.random.Generator,
) -> Example:
    """A part of a picture at its usual scale, or shrunk to fill the cell if it is too small."""
    record = dataset.records[index]
    still = dataclasses.replace(config, crop=0.0, rot90=0.0, crop_to_input=False)
    drawn = draw_geometry(record.size_hw, still, sides[0], sides[1], rng)
    corner = rng.random(2)
    want_h, want_w = cell[3] - cell[1], cell[2] - cell[0]
    grow = max(1.0, want_h / drawn.size_hw[0], want_w / drawn.size_hw[1])
    per_px_h, per_px_w = record.size_hw[0] / (drawn.size_hw[0] * grow), record.size_hw[1] / (drawn.size_hw[1] * grow)
    part_h, part_w = min(want_h * per_px_h, record.size_hw[0]), min(want_w * per_px_w, record.size_hw[1])
    top, left = corner[0] * (record.size_hw[0] - part_h), corner[1] * (record.size_hw[1] - part_w)
    window = (float(left), float(top), float(left + part_w), float(top + part_h))
    geometry = dataclasses.replace(drawn, window=window, size_hw=(want_h, want_w))
    return apply_geometry(record, geometry, min_visible=config.min_visible)
