"""Scenes of coloured shapes with exact boxes, the same for the same seed: for tests, examples and a first try without data.

G shapes of a scene.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASS_NAMES = ("disc", "square", "triangle")
COLOURS = ((214, 60, 55), (58, 120, 214), (240, 190, 40))
"""One a class, so that a small network learns them in a few steps."""

COLOUR_NOISE = 25
BACKGROUND = (150, 235)
MAX_OVERLAP = 0.1
"""Largest IoU between two shapes of a scene."""

PLACEMENT_TRIES = 50


@dataclass(frozen=True, slots=True)
class Scene:
    """image uint8 [H, W, 3]; boxes float32 [G, 4], tight around the drawn pixels; labels int64 [G], 1..3 in CLASS_NAMES."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def draw_scene(
    seed: int, size_hw: tuple[int, int] = (96, 128), *, shapes: tuple[int, int] = (1, 4), sides: tuple[int, int] = (16, 48)
) -> Scene:
    """Draws one scene.

    Args:
        shapes: least and most shapes; fewer if they do not fit apart.
        sides: least and most side of a shape in pixels.
    """
    rng = np.random.default_rng([seed, *size_hw])
    image = _background(rng, size_hw)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(shapes[0], shapes[1] + 1))):
        box = _place(rng, size_hw, sides, boxes)
        if box is None:
            break
        kind = int(rng.integers(len(CLASS_NAMES)))
        boxes.append(_paint(image, box, kind, rng))
        labels.append(kind + 1)
    return Scene(image, np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64))


def _background(rng: np.random.Generator, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    base = rng.integers(*BACKGROUND)
    noise = rng.normal(0, 6, (*size_hw, 3))
    return (base + noise).clip(0, 255).astype(np.uint8)


def _place(
    rng: np.random.Generator, size_hw: tuple[int, int], sides: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    for _ in range(PLACEMENT_TRIES):
        most = min(sides[1], *size_hw)
        height, width = (int(side) for side in rng.integers(min(sides[0], most), most + 1, 2))
        y, x = int(rng.integers(0, size_hw[0] - height + 1)), int(rng.integers(0, size_hw[1] - width + 1))
        box = (x, y, x + width, y + height)
        if all(_overlap(box, other) <= MAX_OVERLAP for other in taken):
            return box
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _paint(image: NDArray[np.uint8], box: tuple[int, int, int, int], kind: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Paints a shape into its box and returns the box of the pixels that it really covers."""
    x1, y1, x2, y2 = box
    v, u = np.mgrid[0 : y2 - y1, 0 : x2 - x1] + 0.5
    v, u = v / (y2 - y1), u / (x2 - x1)
    inside = ((u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25, np.ones_like(u, dtype=bool), np.abs(u - 0.5) <= v / 2)[kind]
    colour = np.array(COLOURS[kind]) + rng.integers(-COLOUR_NOISE, COLOUR_NOISE + 1, 3)
    image[y1:y2, x1:x2][inside] = colour.clip(0, 255)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return x1 + int(columns[0]), y1 + int(rows[0]), x1 + int(columns[-1]) + 1, y1 + int(rows[-1]) + 1


def write_voc(root: Path, splits: Mapping[str, int], size_hw: tuple[int, int] = (96, 128)) -> Path:
    """Writes scenes as a VOC folder; every third picture stands upright. Returns `root`."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, scenes in _scenes(splits, size_hw):
        for name, scene in scenes:
            Image.fromarray(scene.image).save(root / "JPEGImages" / f"{name}.png")
            (root / "Annotations" / f"{name}.xml").write_text(voc_xml(scene))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in scenes))
    return root


def voc_xml(scene: Scene) -> str:
    """The VOC annotation of a scene."""
    height, width = scene.image.shape[:2]
    objects = "".join(
        f"<object><name>{escape(CLASS_NAMES[label - 1])}</name><difficult>0</difficult><bndbox>"
        + "".join(f"<{key}>{value:g}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>\n"


def write_coco(root: Path, splits: Mapping[str, int], size_hw: tuple[int, int] = (96, 128)) -> Path:
    """Writes scenes as a COCO folder, with gaps in the category ids as the real one has. Returns `root`."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, scenes in _scenes(splits, size_hw):
        (root / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, (name, scene) in enumerate(scenes, start=1):
            Image.fromarray(scene.image).save(root / split / f"{name}.png")
            height, width = scene.image.shape[:2]
            images.append({"id": image_id, "file_name": f"{name}.png", "height": height, "width": width})
            for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 10 * label, **box})
        categories = [{"id": 10 * k, "name": name} for k, name in enumerate(CLASS_NAMES, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_csv(root: Path, splits: Mapping[str, int], size_hw: tuple[int, int] = (96, 128)) -> Path:
    """Writes scenes as a folder with one CSV a split. Returns `root`."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for split, scenes in _scenes(splits, size_hw):
        lines = ["image,xmin,ymin,xmax,ymax,class"]
        for name, scene in scenes:
            Image.fromarray(scene.image).save(root / "images" / f"{name}.png")
            for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                lines.append(",".join([f"{name}.png", *(f"{value:g}" for value in box), CLASS_NAMES[label - 1]]))
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def _scenes(splits: Mapping[str, int], size_hw: tuple[int, int]) -> Iterator[tuple[str, list[tuple[str, Scene]]]]:
    seed = 0
    for split, count in splits.items():
        scenes = []
        for i in range(count):
            scenes.append((f"{split}_{i:03d}", draw_scene(seed, size_hw if i % 3 != 2 else size_hw[::-1])))
            seed += 1
        yield split, scenes
