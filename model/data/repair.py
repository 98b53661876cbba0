"""Writes repaired annotations beside the originals, which stay untouched.

Mended: boxes over the border are cut, corners in the wrong order swapped, stated sizes corrected, repeated boxes and those of zero area
or outside dropped, pictures that cannot be read left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from model.data.check import read_facts
from model.data.csv_folder import COLUMNS
from model.data.records import DataError, RawBox, RawImage, RawSplit, box_fault

MendedImage = tuple[RawImage, tuple[int, int]]


def repair(raws: Sequence[RawSplit], class_names: Sequence[str], out: Path) -> list[str]:
    """Writes a data set of the same format into `out` and returns what was changed, a line each.

    Pictures are linked, not copied.

    Raises:
        DataError: `out` already holds something, or lies in the source.
    """
    roots = {raw.root.resolve() for raw in raws}
    if (out.exists() and any(out.iterdir())) or out.resolve() in roots or any(root in out.resolve().parents for root in roots):
        raise DataError(f"--fix {out}: expected an empty folder outside the data set; the source is never changed")
    changes: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    for raw in raws:
        changes += [str(fault) + " -> left out" for fault in raw.faults]
        images = [mended for image in raw.images if (mended := _mend(image, class_names, changes)) is not None]
        WRITERS[raw.format](out, raw, images, class_names)
    return changes


def _mend(image: RawImage, class_names: Sequence[str], changes: list[str]) -> MendedImage | None:
    facts = read_facts(image)
    if facts.size_hw is None:
        changes.append(f"{facts.faults[0]} -> picture left out")
        return None
    if facts.faults:
        changes.append(f"{facts.faults[0]} -> corrected")
    boxes: list[RawBox] = []
    for position, box in enumerate(image.boxes):
        mended, change = mend_box(box, facts.size_hw)
        fault = box_fault(image.image_id, position, mended, facts.size_hw, set(class_names).__contains__)
        if fault is not None:
            changes.append(f"{fault} -> dropped")
            continue
        if mended.xyxy in [kept.xyxy for kept in boxes if kept.name == mended.name]:
            changes.append(f"image '{image.image_id}', box {position}: repeats an earlier one -> dropped")
            continue
        if change:
            changes.append(f"image '{image.image_id}', box {position}: {change}")
        boxes.append(mended)
    return replace(image, boxes=tuple(boxes), size_hw=facts.size_hw), facts.size_hw


def mend_box(box: RawBox, size_hw: tuple[int, int]) -> tuple[RawBox, str]:
    """A box with corners in order and cut at the border, and what was done in words ("" for nothing)."""
    x1, y1, x2, y2 = box.xyxy
    height, width = size_hw
    ordered = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    cut = (max(ordered[0], 0.0), max(ordered[1], 0.0), min(ordered[2], float(width)), min(ordered[3], float(height)))
    words = [*(["corners swapped"] if ordered != box.xyxy else []), *(["cut at the border"] if cut != ordered else [])]
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        return box, ""
    area = box.area if cut == box.xyxy else None
    return replace(box, xyxy=cut, area=area), " and ".join(words)


def _link(target: Path, source: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(source.resolve())


def _write_voc(out: Path, raw: RawSplit, images: Sequence[MendedImage], class_names: Sequence[str]) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for image, (height, width) in images:
        _link(out / "JPEGImages" / image.path.name, image.path)
        objects = "".join(_voc_object(box) for box in image.boxes)
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        name = f"<filename>{escape(image.path.name)}</filename>"
        (out / "Annotations" / f"{image.image_id}.xml").write_text(f"<annotation>{name}{size}{objects}</annotation>\n")
    (out / "ImageSets" / "Main" / f"{raw.split}.txt").write_text("".join(f"{image.image_id}\n" for image, _ in images))


def _voc_object(box: RawBox) -> str:
    corners = "".join(f"<{key}>{value:g}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box.xyxy, strict=True))
    flags = f"<truncated>{int(box.truncated)}</truncated><difficult>{int(box.difficult)}</difficult>"
    return f"<object><name>{escape(box.name)}</name>{flags}<bndbox>{corners}</bndbox></object>"


def _write_coco(out: Path, raw: RawSplit, images: Sequence[MendedImage], class_names: Sequence[str]) -> None:
    ids = {name: k for k, name in enumerate(class_names, start=1)}
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, (height, width) in images:
        _link(out / raw.split / image.path.name, image.path)
        entries.append({"id": int(image.image_id), "file_name": image.path.name, "height": height, "width": width})
        for box in image.boxes:
            x1, y1, x2, y2 = box.xyxy
            area = (x2 - x1) * (y2 - y1) if box.area is None else box.area
            flags = {"iscrowd": int(box.crowd), **({"ignore": 1} if box.difficult else {})}
            row = {"id": len(annotations) + 1, "image_id": int(image.image_id), "category_id": ids[box.name]}
            annotations.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, **flags})
    content = {"images": entries, "annotations": annotations, "categories": [{"id": k, "name": name} for name, k in ids.items()]}
    (out / "annotations").mkdir(exist_ok=True)
    (out / "annotations" / f"instances_{raw.split}.json").write_text(json.dumps(content))


def _write_csv(out: Path, raw: RawSplit, images: Sequence[MendedImage], class_names: Sequence[str]) -> None:
    with (out / f"{raw.split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for image, _ in images:
            _link(out / "images" / image.image_id, image.path)
            writer.writerows([image.image_id, *(f"{v:g}" for v in box.xyxy), box.name] for box in image.boxes)
            if not image.boxes:
                writer.writerow([image.image_id, "", "", "", "", ""])


WRITERS = {"voc": _write_voc, "coco": _write_coco, "csv": _write_csv}
