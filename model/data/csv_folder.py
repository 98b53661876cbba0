"""A plain folder with one CSV a split: <split>.csv with the columns image, xmin, ymin, xmax, ymax, class.

The header may be left out (then in this order). A row whose other columns are empty names a picture without objects. Pictures are
found relative to the folder, or in its images/.
"""

from __future__ import annotations

import csv
from pathlib import Path

from model.data.records import DataError, Fault, RawBox, RawImage, RawSplit

COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax", "class")


def read_csv_folder(root: Path, split: str) -> RawSplit:
    """Reads one split.

    Raises:
        DataError: no such file, or columns are missing.
    """
    path = root / f"{split}.csv"
    if not path.is_file():
        raise DataError(f"{path} is missing; splits here: {', '.join(csv_splits(root)) or 'none'}")
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    order = _column_order(path, rows)
    boxes: dict[str, list[RawBox]] = {}
    faults: list[Fault] = []
    for number, row in enumerate(rows if order is None else rows[1:], start=1 if order is None else 2):
        cells = [row[i].strip() if i < len(row) else "" for i in (order or range(len(COLUMNS)))]
        objects = boxes.setdefault(cells[0], [])
        if not any(cells[1:]):
            continue
        try:
            x1, y1, x2, y2 = (float(cell) for cell in cells[1:5])
            objects.append(RawBox(cells[5], (x1, y1, x2, y2)))
        except ValueError:
            faults.append(Fault("bad annotation", cells[0], f"line {number} of {path.name}: expected four numbers, got {cells[1:5]}"))
    images = tuple(RawImage(name, _find_image(root, name), None, tuple(objects)) for name, objects in boxes.items())
    return RawSplit(root, "csv", split, images, None, tuple(faults))


def csv_splits(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in root.glob("*.csv")))


def _column_order(path: Path, rows: list[list[str]]) -> list[int] | None:
    """Positions of COLUMNS by the header; None where the first row is data."""
    if not rows:
        raise DataError(f"{path} is empty; expected the columns {', '.join(COLUMNS)}")
    header = [cell.strip().lower() for cell in rows[0]]
    missing = [name for name in COLUMNS if name not in header]
    if not missing:
        return [header.index(name) for name in COLUMNS]
    if "image" in header or len(header) < len(COLUMNS):
        raise DataError(f"{path}: columns {missing} are missing; expected {', '.join(COLUMNS)}")
    return None


def _find_image(root: Path, name: str) -> Path:
    return next((path for folder in (root, root / "images") if (path := folder / name).is_file()), root / name)
