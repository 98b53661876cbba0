"""A linter for data sets: finds what would spoil a training before hours are spent on it.

Every record is read in full: annotations against the pictures, pictures against their names and against each other, boxes against
the anchors of a preset.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.data.formats import VERIFY_THREADS, list_splits, read_split
from model.data.images import ImageError, open_image, read_rgb, resized_hw
from model.data.records import DataError, Fault, RawImage, RawSplit, box_fault

SUFFIXES = {
    "JPEG": {".jpg", ".jpeg"}, "PNG": {".png"}, "BMP": {".bmp"}, "WEBP": {".webp"}, "TIFF": {".tif", ".tiff"}, "GIF": {".gif"},
}  # fmt: skip
TINY_SIDE_PX = 4.0
"""Boxes narrower or lower than this in the original picture are named: nobody can tell what is in them."""

RARE_SHARE = 0.01
REACH_IOU = 0.5
DUPLICATE_BOX_IOU = 0.95


@dataclass(frozen=True)
class PictureFacts:
    """What reading one picture gives: its upright size and a digest of its pixels, or a fault; notes that stop nobody."""

    size_hw: tuple[int, int] | None
    digest: str
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...]


@dataclass
class SplitReport:
    """Faults (training stops at them) and notes (worth a look) of one split, and its numbers."""

    split: str
    images: int
    boxes: Counter[str]
    faults: list[Fault]
    notes: list[Fault]
    sides: NDArray[np.float64]  # [N, 2], height and width of good boxes in the input frame
    digests: dict[str, str]
    reach: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # [N], best IoU that an anchor can have


def check_split(raw: RawSplit, class_names: Sequence[str], short_side: float, long_side: float) -> SplitReport:
    """Reads every picture of a split and every box against it."""
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        facts = list(pool.map(read_facts, raw.images))
    report = SplitReport(raw.split, len(raw.images), Counter(), list(raw.faults), [], np.zeros((0, 2)), {})
    sides = [np.zeros((0, 2))]
    for image, seen in zip(raw.images, facts, strict=True):
        report.faults += seen.faults
        report.notes += seen.notes
        report.digests[image.image_id] = seen.digest
        size_hw = seen.size_hw or image.size_hw
        if size_hw is not None:
            sides.append(_check_boxes(image, size_hw, class_names, (short_side, long_side), report))
    report.sides = np.concatenate(sides)
    report.notes += _repeated_ids(raw)
    return report


def read_facts(image: RawImage) -> PictureFacts:
    """Decodes a picture in full and compares it with its name and annotation."""
    notes = []
    try:
        with open_image(image.path) as opened:
            kind = opened.format or ""
        if image.path.suffix.lower() not in SUFFIXES.get(kind, {image.path.suffix.lower()}):
            notes.append(
                Fault("mistyped image", image.image_id, f"{image.path.name} holds a {kind}; rename it, other readers may refuse it")
            )
        pixels = read_rgb(image.path)
    except ImageError as error:
        return PictureFacts(None, "", (Fault(error.kind, image.image_id, error.sentence),), tuple(notes))
    size_hw = (pixels.shape[0], pixels.shape[1])
    digest = hashlib.sha256(repr(size_hw).encode() + pixels.tobytes()).hexdigest()
    if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 1], pixels[..., 2]):
        notes.append(Fault("grey picture", image.image_id, "has no colour"))
    if not image.boxes:
        notes.append(Fault("no objects", image.image_id, "has no annotated box; it trains as background"))
    faults: tuple[Fault, ...] = ()
    if image.size_hw is not None and image.size_hw != size_hw:
        stated, real = image.size_hw, size_hw
        faults = (Fault("wrong size", image.image_id, f"is {real[1]} x {real[0]}, annotated as {stated[1]} x {stated[0]}; correct it"),)
    return PictureFacts(size_hw, digest, faults, tuple(notes))


def _check_boxes(
    image: RawImage, size_hw: tuple[int, int], class_names: Sequence[str], sides: tuple[float, float], report: SplitReport
) -> NDArray[np.float64]:
    """Adds the faults and notes of a picture's boxes; returns the good ones' sides in the input frame, [N, 2]."""
    scale = resized_hw(size_hw, *sides)[0] / size_hw[0]
    good = []
    for position, box in enumerate(image.boxes):
        fault = box_fault(image.image_id, position, box, size_hw, set(class_names).__contains__)
        if fault is not None:
            report.faults.append(fault)
            continue
        report.boxes[box.name] += 1
        height, width = box.xyxy[3] - box.xyxy[1], box.xyxy[2] - box.xyxy[0]
        for kind, marked in (("difficult", box.difficult), ("crowd", box.crowd)):
            if marked:
                report.notes.append(Fault(kind, image.image_id, f"{box.name} is left out of training and ignored in evaluation", position))
        if box.truncated:
            report.notes.append(
                Fault("truncated box", image.image_id, f"{box.name} goes on outside the picture or behind something", position)
            )
        if not box.crowd:
            good.append((height * scale, width * scale))
        if min(height, width) < TINY_SIDE_PX:
            report.notes.append(Fault("tiny box", image.image_id, f"{box.name} of {width:g} x {height:g} px", position))
    report.notes += _repeated_boxes(image)
    return np.array(good, dtype=np.float64).reshape(-1, 2)


def _repeated_boxes(image: RawImage) -> list[Fault]:
    by_name = defaultdict(list)
    for position, box in enumerate(image.boxes):
        by_name[box.name].append((position, box.xyxy))
    return [
        Fault("repeated box", image.image_id, f"nearly the same as box {first} of class {name}", second)
        for name, boxes in by_name.items()
        for i, (first, a) in enumerate(boxes)
        for second, b in boxes[i + 1 :]
        if _iou(a, b) > DUPLICATE_BOX_IOU
    ]


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def _repeated_ids(raw: RawSplit) -> list[Fault]:
    counts = Counter(image.image_id for image in raw.images)
    return [Fault("listed twice", name, f"stands {count} times in split '{raw.split}'") for name, count in counts.items() if count > 1]


def anchor_reach(sides: NDArray[np.float64], anchor_hw: NDArray[np.float64]) -> NDArray[np.float64]:
    """The IoU of each box with its best anchor if that one were centred on it: an upper bound, since anchors sit on a grid.

    Args:
        sides: float64 [N, 2], height and width in the input frame.  anchor_hw: float64 [A, 2].
    """
    shared = np.minimum(sides[:, None, :], anchor_hw[None, :, :]).prod(axis=-1)
    union = sides.prod(axis=1)[:, None] + anchor_hw.prod(axis=1)[None, :] - shared
    return (shared / union).max(axis=1) if len(sides) else np.zeros(0)


def anchor_shapes(sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> NDArray[np.float64]:
    """Height and width of every anchor shape: [A, 2]; ratios are height / width."""
    return np.array([[size * r**0.5, size / r**0.5] for level in sizes for size in level for r in ratios])


def duplicates(reports: Sequence[SplitReport]) -> list[Fault]:
    """Pictures with the same pixels, within a split and, worse, across splits; a split that holds another whole (trainval) is none."""
    contents = {report.split: set(report.digests) for report in reports}
    where: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for report in reports:
        for image_id, digest in report.digests.items():
            if digest:
                where[digest].append((report.split, image_id))
    found = []
    for places in where.values():
        (split, image_id), *others = places
        for other_split, other_id in others:
            nested = contents[split] <= contents[other_split] or contents[other_split] <= contents[split]
            if other_split != split and other_id == image_id and nested:
                continue
            kind = "duplicate in a split" if other_split == split else "duplicate across splits"
            found.append(Fault(kind, other_id, f"of split '{other_split}' has the same pixels as '{image_id}' of split '{split}'"))
    return found


def read_all(root: Path, splits: Sequence[str], data_format: str | None) -> list[RawSplit]:
    """All splits of a data set.

    Raises:
        DataError: there is none, or one cannot be read at all.
    """
    names = list(splits) or list(list_splits(root, data_format))
    if not names:
        raise DataError(f"{root} has no split to check")
    return [read_split(root, name, data_format) for name in names]
