"""Opens a data set by path, split and format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.data.coco import coco_splits, read_coco
from model.data.csv_folder import csv_splits, read_csv_folder
from model.data.images import ImageError, read_rgb
from model.data.records import DataError, DetectionSet, Fault, RawSplit, Record, build
from model.data.voc import read_voc, voc_splits

READERS: dict[str, tuple[Callable[[Path, str], RawSplit], Callable[[Path], tuple[str, ...]]]] = {
    "voc": (read_voc, voc_splits),
    "coco": (read_coco, coco_splits),
    "csv": (read_csv_folder, csv_splits),
}
VERIFY_THREADS = 8


def guess_format(root: Path) -> str:
    """The format of a folder by what lies in it.

    Raises:
        DataError: no such folder, or nothing that looks like a data set.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; pass the folder of a VOC, COCO or CSV data set with --data")
    if (root / "ImageSets" / "Main").is_dir():
        return "voc"
    if coco_splits(root):
        return "coco"
    if csv_splits(root):
        return "csv"
    known = "ImageSets/Main/*.txt (VOC), annotations/instances_*.json (COCO) or *.csv (image, xmin, ymin, xmax, ymax, class)"
    raise DataError(f"{root} is no data set that is known here; expected {known}")


def read_split(root: Path, split: str, data_format: str | None = None) -> RawSplit:
    """Reads a split, or several joined with "+", without checking it."""
    read, _ = READERS[data_format or guess_format(root)]
    parts = [read(root, name) for name in split.split("+")]
    if len(parts) == 1:
        return parts[0]
    listed = [name for part in parts for name in part.class_names or ()]
    return RawSplit(
        root,
        parts[0].format,
        split,
        tuple(image for part in parts for image in part.images),
        tuple(dict.fromkeys(listed)) or None,
        tuple(fault for part in parts for fault in part.faults),
    )


def list_splits(root: Path, data_format: str | None = None) -> tuple[str, ...]:
    _, splits = READERS[data_format or guess_format(root)]
    return splits(root)


def open_dataset(
    root: Path, split: str, *, data_format: str | None = None, class_names: Sequence[str] | None = None, skip_bad: bool = False
) -> DetectionSet:
    """Opens a split for training or evaluation.

    Args:
        split: a name, or several joined with "+" ("train+val").
        class_names: label order; a model's own classes when it is evaluated.
        skip_bad: decode every picture once now, and leave out whatever is faulty; otherwise faults are errors.

    Raises:
        DataError: nothing there, or faults without `skip_bad`.
    """
    dataset = build(read_split(root, split, data_format), class_names, skip_bad=skip_bad)
    return _without_unreadable(dataset) if skip_bad else dataset


def picture_fault(record: Record) -> Fault | None:
    """Decodes a picture fully and says what is wrong with it, if anything."""
    try:
        read_rgb(record.path, expected_hw=record.size_hw)
    except ImageError as fault:
        return Fault(fault.kind, record.image_id, fault.sentence)
    return None


def _without_unreadable(dataset: DetectionSet) -> DetectionSet:
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        faults = list(pool.map(picture_fault, dataset.records))
    good = [record for record, fault in zip(dataset.records, faults, strict=True) if fault is None]
    return dataset.with_records(good, [fault for fault in faults if fault is not None])
