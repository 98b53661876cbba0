"""What every reader gives: pictures with annotated boxes, and the faults found on the way.

Boxes are xyxy in pixels of the original frame (the picture upright, as a person sees it), continuous coordinates: a box from 10 to
20 is 10 wide. G boxes of a picture, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.data.images import ImageError, upright_hw

BORDER_TOLERANCE_PX = 1.0
"""Annotation tools round: a box may leave the picture by this much and is cut at the border without a word."""

SHOWN_FAULTS = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a data set. `box` is the position within the picture's annotations, from 0."""

    kind: str
    image_id: str
    sentence: str
    box: int | None = None

    def __str__(self) -> str:
        where = f"image '{self.image_id}'" + (f", box {self.box}" if self.box is not None else "")
        return f"{where}: {self.sentence}"


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says which record and what to do."""


@dataclass(frozen=True, slots=True)
class RawBox:
    """A box as the annotation file has it, unchecked."""

    name: str
    xyxy: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False
    area: float | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class RawImage:
    """A picture as the annotation file has it. `size_hw` is the annotation's claim, None where it makes none."""

    image_id: str
    path: Path
    size_hw: tuple[int, int] | None
    boxes: tuple[RawBox, ...]


@dataclass(frozen=True)
class RawSplit:
    """One split of a data set before any check. `class_names` is None where the format has no list of classes."""

    root: Path
    format: str
    split: str
    images: tuple[RawImage, ...]
    class_names: tuple[str, ...] | None = None
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A checked picture.

    Attributes:
        size_hw: upright height and width of the picture.
        boxes: float64 [G, 4]; labels: int64 [G], 1..K; areas: float64 [G], of the object (COCO: of its outline), for AP by size.
        difficult, crowd: bool [G]; such boxes are left out of training and ignored, not punished, in evaluation.
    """

    image_id: str
    path: Path
    size_hw: tuple[int, int]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]

    @property
    def plain(self) -> NDArray[np.bool_]:
        """Which boxes are neither difficult nor crowds: bool [G]."""
        return ~(self.difficult | self.crowd)


@dataclass(frozen=True)
class DetectionSet:
    """A split that training or evaluation can use. `skipped` lists what `skip_bad` left out."""

    name: str
    class_names: tuple[str, ...]
    records: tuple[Record, ...]
    skipped: tuple[Fault, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.records)

    def with_records(self, records: Iterable[Record], skipped: Iterable[Fault] = ()) -> DetectionSet:
        return DetectionSet(self.name, self.class_names, tuple(records), (*self.skipped, *skipped))


def box_fault(image_id: str, position: int, box: RawBox, size_hw: tuple[int, int], known: Callable[[str], bool]) -> Fault | None:
    """The first thing wrong with one box, or None."""
    x1, y1, x2, y2 = box.xyxy
    height, width = size_hw
    if not known(box.name):
        return Fault(
            "unknown class", image_id, f"class '{box.name}' is not one of the classes; fix the name or drop the annotation", position
        )
    if not all(np.isfinite(box.xyxy)):
        return Fault("not a number", image_id, f"coordinates are {box.xyxy}; fix or drop the annotation", position)
    if x2 <= x1 or y2 <= y1:
        return Fault("zero area", image_id, f"width is {x2 - x1:g} and height {y2 - y1:g}; fix or drop the annotation", position)
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return Fault("outside", image_id, f"{_shown(box)} lies outside the picture of {width} x {height}; fix or drop it", position)
    over = max(-x1, -y1, x2 - width, y2 - height)
    if over > BORDER_TOLERANCE_PX:
        return Fault("over the border", image_id, f"{_shown(box)} is {over:g} px over the border of {width} x {height}; cut it", position)
    return None


def _shown(box: RawBox) -> str:
    return "box ({:g}, {:g}, {:g}, {:g})".format(*box.xyxy)


def build(raw: RawSplit, class_names: Sequence[str] | None, *, skip_bad: bool) -> DetectionSet:
    """Checks a split and gives it labels.

    Args:
        class_names: the classes in label order; None takes the format's own list, else every name found, sorted.
        skip_bad: leave faulty boxes and pictures out and list them in `skipped`; otherwise they are an error.

    Raises:
        DataError: no picture at all, or faults without `skip_bad`.
    """
    names = tuple(class_names) if class_names is not None else _class_names(raw)
    label_of = {name: k for k, name in enumerate(names, start=1)}
    faults = list(raw.faults)
    records = [record for image in raw.images if (record := _record(image, label_of, faults)) is not None]
    if faults and not skip_bad:
        raise DataError(describe_faults(raw, faults))
    if not records:
        raise DataError(f"{raw.root}: split '{raw.split}' holds no usable picture; check the path and the split's name")
    return DetectionSet(f"{raw.root.name}/{raw.split}", names, tuple(records), tuple(faults))


def _class_names(raw: RawSplit) -> tuple[str, ...]:
    names = raw.class_names or tuple(sorted({box.name for image in raw.images for box in image.boxes}))
    if not names:
        raise DataError(f"{raw.root}: split '{raw.split}' has no annotated box, so no class is known; name them with --classes")
    return names


def _record(image: RawImage, label_of: dict[str, int], faults: list[Fault]) -> Record | None:
    try:
        size_hw = image.size_hw or upright_hw(image.path)
        if not image.path.is_file():
            raise ImageError("missing image", f"there is no file {image.path}")
    except ImageError as fault:
        faults.append(Fault(fault.kind, image.image_id, fault.sentence))
        return None
    found = [box_fault(image.image_id, i, box, size_hw, label_of.__contains__) for i, box in enumerate(image.boxes)]
    faults.extend(fault for fault in found if fault is not None)
    good = [box for box, fault in zip(image.boxes, found, strict=True) if fault is None]
    height, width = size_hw
    boxes = np.array([box.xyxy for box in good], dtype=np.float64).reshape(-1, 4)
    boxes = boxes.clip(0, [width, height, width, height])
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = [float(w * h) if box.area is None else box.area for box, (w, h) in zip(good, sides, strict=True)]
    return Record(
        image_id=image.image_id,
        path=image.path,
        size_hw=size_hw,
        boxes=boxes,
        labels=np.array([label_of[box.name] for box in good], dtype=np.int64),
        areas=np.array(areas, dtype=np.float64),
        difficult=np.array([box.difficult for box in good], dtype=np.bool_),
        crowd=np.array([box.crowd for box in good], dtype=np.bool_),
    )


def describe_faults(raw: RawSplit, faults: Sequence[Fault]) -> str:
    """The error message of a faulty split: how many of what, the first few, and what to do."""
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(fault.kind for fault in faults).most_common())
    lines = [f"{raw.root}: split '{raw.split}' has {len(faults)} faulty records ({counts}):"]
    lines += [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"  ... and {len(faults) - SHOWN_FAULTS} more")
    lines.append(
        f"See them all with `python -m model.data check {raw.root}`, repair a copy with its --fix OUT, or leave them out with --skip-bad."
    )
    return "\n".join(lines)
