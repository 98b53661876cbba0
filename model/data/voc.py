"""Pascal VOC folders: JPEGImages/, Annotations/*.xml, ImageSets/Main/<split>.txt.

The coordinates are taken as they stand, as continuous xyxy. Official VOC counts pixels from 1 and includes the last one, so its boxes
are half a pixel off and a pixel smaller here; that is far inside the annotators' own noise, and predictions are compared in the same
frame. The official evaluation's +1 is an option of `model.metrics.voc`.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from model.data.records import DataError, Fault, RawBox, RawImage, RawSplit

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")


def read_voc(root: Path, split: str) -> RawSplit:
    """Reads one split of a VOC folder.

    Raises:
        DataError: a folder or the split's list is missing.
    """
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{listing} is missing; splits of this data set: {', '.join(voc_splits(root)) or 'none'}")
    ids = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    images: list[RawImage] = []
    faults: list[Fault] = []
    for image_id in ids:
        try:
            images.append(_read_annotation(root, image_id))
        except (OSError, ElementTree.ParseError, ValueError) as error:
            faults.append(Fault("bad annotation", image_id, f"Annotations/{image_id}.xml cannot be used: {error}"))
    names = root / "classes.txt"
    listed = tuple(line.strip() for line in names.read_text().splitlines() if line.strip()) if names.is_file() else None
    return RawSplit(root, "voc", split, tuple(images), listed, tuple(faults))


def voc_splits(root: Path) -> tuple[str, ...]:
    """The splits of a VOC folder; per-class lists such as cat_train.txt are left out."""
    names = {path.stem for path in (root / "ImageSets" / "Main").glob("*.txt")}
    return tuple(sorted(name for name in names if name.rpartition("_")[2] not in names or "_" not in name))


def find_image(root: Path, image_id: str) -> Path:
    """The picture of an id, whatever its suffix; the .jpg path if there is none."""
    folder = root / "JPEGImages"
    return next((path for suffix in IMAGE_SUFFIXES if (path := folder / f"{image_id}{suffix}").is_file()), folder / f"{image_id}.jpg")


def _read_annotation(root: Path, image_id: str) -> RawImage:
    tree = ElementTree.parse(root / "Annotations" / f"{image_id}.xml").getroot()  # noqa: S314
    boxes = tuple(_read_object(node, position) for position, node in enumerate(tree.iter("object")))
    width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    size_hw = (height, width) if height > 0 and width > 0 else None
    return RawImage(image_id, find_image(root, image_id), size_hw, boxes)


def _read_object(node: ElementTree.Element, position: int) -> RawBox:
    values = [node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    name = (node.findtext("name") or "").strip()
    if not name or any(value is None for value in values):
        raise ValueError(f"object {position} lacks a name or one of xmin, ymin, xmax, ymax")
    x1, y1, x2, y2 = (float(value) for value in values if value is not None)
    difficult, truncated = ((node.findtext(key) or "0").strip() == "1" for key in ("difficult", "truncated"))
    return RawBox(name, (x1, y1, x2, y2), difficult=difficult, truncated=truncated)
