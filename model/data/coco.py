"""COCO JSON: instances with crowd regions, any numbering of the categories.

Where the files lie: annotations/instances_<split>.json, annotations/<split>.json, <split>/_annotations.coco.json or <split>.json;
pictures in <split>/, images/<split>/, images/ or beside the annotations.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from model.data.records import DataError, Fault, RawBox, RawImage, RawSplit


def read_coco(root: Path, split: str) -> RawSplit:
    """Reads one split. Labels follow the category ids in ascending order, whatever gaps they have.

    Raises:
        DataError: no annotation file, or one that is not COCO's.
    """
    path = next((path for path in _candidates(root, split) if path.is_file()), None)
    if path is None:
        tried = ", ".join(str(path.relative_to(root)) for path in _candidates(root, split))
        raise DataError(
            f"{root}: no COCO annotations of split '{split}'; looked for {tried}; splits here: {', '.join(coco_splits(root)) or 'none'}"
        )
    return _parse(root, split, path)


def coco_splits(root: Path) -> tuple[str, ...]:
    """Names of the splits that have an annotation file."""
    found = {path.stem.removeprefix("instances_") for path in (root / "annotations").glob("*.json")}
    found |= {path.parent.name for path in root.glob("*/_annotations.coco.json")}
    return tuple(sorted(found))


def _candidates(root: Path, split: str) -> list[Path]:
    annotations = root / "annotations"
    return [
        annotations / f"instances_{split}.json",
        annotations / f"{split}.json",
        root / split / "_annotations.coco.json",
        root / f"{split}.json",
    ]


def _parse(root: Path, split: str, path: Path) -> RawSplit:
    try:
        content = json.loads(path.read_text())
        categories = {int(entry["id"]): str(entry["name"]) for entry in sorted(content["categories"], key=lambda entry: int(entry["id"]))}
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for entry in content.get("annotations", []):
            by_image[int(entry["image_id"])].append(entry)
        # by id, as pycocotools orders them: ties in score between pictures fall as they do there
        entries = {int(entry["id"]): entry for entry in sorted(content["images"], key=lambda entry: int(entry["id"]))}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a COCO annotation file: {type(error).__name__} {error}") from None
    faults: list[Fault] = []
    images = []
    for image_id, entry in entries.items():
        boxes = _boxes(str(image_id), by_image.pop(image_id, []), categories, faults)
        size_hw = (int(entry["height"]), int(entry["width"])) if entry.get("height") and entry.get("width") else None
        images.append(RawImage(str(image_id), _find_image(root, split, path, str(entry["file_name"])), size_hw, boxes))
    for image_id, orphans in by_image.items():
        faults.append(Fault("bad annotation", str(image_id), f"{len(orphans)} annotations of a picture that the file does not list"))
    return RawSplit(root, "coco", split, tuple(images), tuple(categories.values()), tuple(faults))


def _boxes(image_id: str, entries: list[dict[str, Any]], categories: dict[int, str], faults: list[Fault]) -> tuple[RawBox, ...]:
    boxes = []
    for position, entry in enumerate(entries):
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
            name = categories.get(int(entry["category_id"]), f"category {entry['category_id']}")
        except (KeyError, TypeError, ValueError) as error:
            faults.append(Fault("bad annotation", image_id, f"annotation {entry.get('id')} cannot be used: {error!r}", position))
            continue
        area = float(entry["area"]) if "area" in entry else None
        boxes.append(
            RawBox(
                name,
                (x, y, x + width, y + height),
                difficult=bool(entry.get("ignore", 0)),
                crowd=bool(entry.get("iscrowd", 0)),
                area=area,
            )
        )
    return tuple(boxes)


def _find_image(root: Path, split: str, annotations: Path, file_name: str) -> Path:
    folders = (root / split, root / "images" / split, root / "images", annotations.parent, root)
    return next((path for folder in folders if (path := folder / file_name).is_file()), root / split / file_name)
