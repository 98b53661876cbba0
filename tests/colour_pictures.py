"""A data set that the colour models of service_onnx answer well: pictures of one colour, the truth is their right half."""

from __future__ import annotations

import csv
from pathlib import Path

from service_fakes import CLASS_NAMES, picture

COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (200, 10, 10), (10, 180, 10))


def write_colours(root: Path, *, sizes: tuple[tuple[int, int], ...] = ((90, 60), (60, 90), (100, 70), (90, 60), (150, 90))) -> Path:
    """<root>/test.csv and one PNG (width, height) for each of the sizes."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "xmin", "ymin", "xmax", "ymax", "class"])
        for index, (width, height) in enumerate(sizes):
            colour = COLOURS[index % len(COLOURS)]
            (root / f"{index}.png").write_bytes(picture(width, height, colour))
            rows.writerow([f"{index}.png", width / 2, 0, width, height, CLASS_NAMES[colour.index(max(colour))]])
    return root
