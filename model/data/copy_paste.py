"""Copy-paste: objects of another picture put into this one (Ghiasi et al. 2021), cut out by their boxes: most data sets have no masks.

Only objects that stand free in their picture are taken, classes alike however rare, and the seam around them is blended.
G boxes of a picture.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from model.data.records import DetectionSet
from model.data.transforms import Example, apply_geometry, draw_geometry, jitter_colour
from model.training import AugmentConfig

MOST_OBJECTS = 3
"""Pasted into a picture at most."""

MOST_COVERED = 0.2
"""Of an object's area, by one other: in the source it counts as free, in the target as still visible."""

SEAM = 0.1
"""Width of the blended seam outside the box, as a part of each side."""

PLACEMENT_TRIES = 20

Boxes = NDArray[np.float32]


def pasted_example(
    dataset: DetectionSet,
    index: int,
    config: AugmentConfig,
    sides: tuple[float, float],
    rng: np.random.Generator,
    *,
    sideways: bool = False,
) -> Example:
    """Picture `index`, augmented as ever, with objects of another picture in it.

    Args:
        sides: short and long side of the resize rule.
        sideways: as for `augmented_example`.
    """
    record = dataset.records[index]
    geometry = draw_geometry(record.size_hw, config, *sides, rng, sideways=sideways)
    target = apply_geometry(record, geometry, min_visible=config.min_visible)
    donor_record = dataset.records[int(rng.integers(len(dataset)))]
    whole = dataclasses.replace(config, crop=0.0, rot90=0.0, crop_to_input=False)
    donor = apply_geometry(donor_record, draw_geometry(donor_record.size_hw, whole, *sides, rng), min_visible=config.min_visible)
    pasted = paste_objects(target, donor, rng)
    return Example(jitter_colour(pasted.image, config, rng), pasted.boxes, pasted.labels)


def paste_objects(target: Example, donor: Example, rng: np.random.Generator) -> Example:
    """Puts one to `MOST_OBJECTS` of the donor's free objects where they hide little of the target's; fewer where there is no room."""
    image, boxes, labels = target.image.copy(), target.boxes, target.labels
    for row in _choose(donor, int(rng.integers(1, MOST_OBJECTS + 1)), rng):
        source = donor.boxes[row].round().astype(int)
        place = _place((source[3] - source[1], source[2] - source[0]), (image.shape[0], image.shape[1]), boxes, rng)
        if place is None:
            continue
        _blend(image, donor.image, source, place)
        moved = donor.boxes[row] + np.tile([place[1] - source[0], place[0] - source[1]], 2).astype(np.float32)
        inside = moved.clip(0, [image.shape[1], image.shape[0]] * 2).astype(np.float32)  # rounding may move it by half a pixel
        boxes, labels = np.concatenate([boxes, inside[None]]), np.append(labels, donor.labels[row])
    return Example(image, boxes, labels)


def _choose(donor: Example, count: int, rng: np.random.Generator) -> list[int]:
    """Different free objects; a class is drawn first, then one of its objects."""
    free = [row for row in range(len(donor.boxes)) if _most_covered(donor.boxes[row], np.delete(donor.boxes, row, axis=0)) <= MOST_COVERED]
    chosen: list[int] = []
    while free and len(chosen) < count:
        present = np.unique(donor.labels[free])
        label = present[rng.integers(len(present))]
        of_class = [row for row in free if donor.labels[row] == label]
        chosen.append(of_class[int(rng.integers(len(of_class)))])
        free.remove(chosen[-1])
    return chosen


def _most_covered(box: Boxes, others: Boxes) -> float:
    """The largest part of a box that one of the others covers."""
    return float((_intersections(box, others) / max(float(np.prod(box[2:] - box[:2])), 1e-6)).max(initial=0.0))


def _intersections(box: Boxes, others: Boxes) -> NDArray[np.floating]:
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return np.asarray(sides.clip(min=0).prod(axis=1))


def _place(side_hw: tuple[int, int], frame_hw: tuple[int, int], boxes: Boxes, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top and left of a place where no box of the target, nor the pasted one, is covered too much; None where none was found."""
    height, width = side_hw
    if not (2 <= height <= frame_hw[0] and 2 <= width <= frame_hw[1]):
        return None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for _ in range(PLACEMENT_TRIES):
        top, left = int(rng.integers(frame_hw[0] - height + 1)), int(rng.integers(frame_hw[1] - width + 1))
        shared = _intersections(np.array([left, top, left + width, top + height], dtype=np.float32), boxes)
        if (shared <= MOST_COVERED * np.minimum(areas, height * width)).all():
            return top, left
    return None


def _blend(image: NDArray[np.uint8], donor: NDArray[np.uint8], source: NDArray[np.int_], place: tuple[int, int]) -> None:
    """Copies the box `source` of the donor to `place`; around it the donor fades out."""
    x1, y1, x2, y2 = source.tolist()
    top, left = place
    seam_y, seam_x = round(SEAM * (y2 - y1)), round(SEAM * (x2 - x1))
    above, below = min(seam_y, y1, top), min(seam_y, donor.shape[0] - y2, image.shape[0] - top - (y2 - y1))
    before, after = min(seam_x, x1, left), min(seam_x, donor.shape[1] - x2, image.shape[1] - left - (x2 - x1))
    patch = donor[y1 - above : y2 + below, x1 - before : x2 + after].astype(np.float32)
    part = image[top - above : top + (y2 - y1) + below, left - before : left + (x2 - x1) + after]
    weight = _ramp(above, y2 - y1, below, seam_y)[:, None, None] * _ramp(before, x2 - x1, after, seam_x)[None, :, None]
    part[...] = (part + weight * (patch - part)).round().astype(np.uint8)


def _ramp(before: int, inside: int, after: int, seam: int) -> NDArray[np.float32]:
    """1 over the box, falling to 0 at the end of the seam on both sides."""
    up = 1 - np.arange(before, 0, -1) / (seam + 1)
    down = 1 - np.arange(1, after + 1) / (seam + 1)
    return np.concatenate([up, np.ones(inside), down]).astype(np.float32)
