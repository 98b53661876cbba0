"""Looks after data sets: `python -m model.data check PATH`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.data.check import (
    RARE_SHARE,
    REACH_IOU,
    SplitReport,
    anchor_reach,
    anchor_shapes,
    check_split,
    duplicates,
    read_all,
)
from model.data.formats import READERS
from model.data.images import read_rgb
from model.data.records import DataError, Fault, RawSplit
from model.data.repair import repair
from model.metrics.predictions import Prediction
from model.presets import PRESETS
from model.visualize import draw_detections

SHOWN = 10
WORST_PICTURES = 12
SIDE_BINS = (0, 8, 16, 32, 64, 96, 128, 256, 512, float("inf"))

EXAMPLES = """examples:
  python -m model.data check VOC_FOLDER
  python -m model.data check COCO_FOLDER --preset resnet50_fpn --pictures worst --json report.json
  python -m model.data check VOC_FOLDER --fix VOC_FOLDER_repaired
exit status: 0 nothing that training would stop at, 1 faults, 2 no data set
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.data", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser(
        "check", help="find what would spoil a training", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check.add_argument("path", type=Path, help="folder of the data set")
    check.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    check.add_argument("--split", action="append", default=[], help="only this split; may be repeated (default: all)")
    check.add_argument("--classes", metavar="A,B,...", help="the classes there should be (default: those found)")
    check.add_argument(
        "--preset", choices=sorted(PRESETS), default="mobilenet_v2_fpn", help="whose input size and anchors to check against"
    )
    check.add_argument("--fix", type=Path, metavar="OUT", help="write repaired annotations there; the source is not touched")
    check.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the worst pictures there")
    check.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return check(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> int:
    """Prints what was found; 1 if training would stop at it."""
    raws = read_all(options.path, options.split, options.format)
    names = options.classes.split(",") if options.classes else _class_names(raws)
    detector = PRESETS[options.preset](tuple(names)).detector
    reports = [check_split(raw, names, detector.input.short_side, detector.input.long_side) for raw in raws]
    shapes = anchor_shapes(detector.anchors.sizes, detector.anchors.ratios)
    for report in reports:
        report.reach = anchor_reach(report.sides, shapes)
        _print_split(report, options.preset)
    twins = duplicates(reports)
    _print_faults("duplicates", twins)
    if options.json is not None:
        options.json.write_text(json.dumps(_to_dict(reports, twins), indent=2) + "\n")
    if options.pictures is not None:
        _draw_worst(raws, reports, options.pictures)
    if options.fix is not None:
        changes = repair(raws, names, options.fix)
        print(f"\nrepaired into {options.fix}, {len(changes)} changes:", *(f"  {change}" for change in changes), sep="\n")
    faults = sum(len(report.faults) for report in reports)
    across = sum(fault.kind == "duplicate across splits" for fault in twins)
    print(f"\n{faults} faults that training stops at, {across} duplicates across splits" if faults or across else "\nno faults")
    return 1 if faults or across else 0


def _class_names(raws: Sequence[RawSplit]) -> list[str]:
    listed = [name for raw in raws for name in raw.class_names or ()]
    return list(dict.fromkeys(listed)) or sorted({box.name for raw in raws for image in raw.images for box in image.boxes})


def _print_split(report: SplitReport, preset: str) -> None:
    total = sum(report.boxes.values())
    print(f"\n{report.split}: {report.images} pictures, {total} good boxes")
    for name, count in report.boxes.most_common(2 * SHOWN):
        share = count / max(total, 1)
        print(f"  {name:<20} {count:7d}  {share:6.1%}{'  rare: consider training.repeat_threshold' if share < RARE_SHARE else ''}")
    if len(report.boxes) > 2 * SHOWN:
        print(f"  ... and {len(report.boxes) - 2 * SHOWN} more classes")
    print("  side of the boxes, sqrt(area) in px of the input frame:")
    counts, _ = np.histogram(np.sqrt(report.sides.prod(axis=1)), bins=SIDE_BINS)
    for low, high, count in zip(SIDE_BINS, SIDE_BINS[1:], counts, strict=False):
        if count:
            print(f"    {low:>4g} to {high:<4g} {count:7d} {'#' * max(1, round(50 * count / counts.max()))}")
    far = int((report.reach < REACH_IOU).sum())
    print(f"  {far} boxes ({far / max(len(report.reach), 1):.1%}) that no anchor of {preset} can reach IoU {REACH_IOU:g} with")
    _print_faults("faults", report.faults)
    _print_faults("notes", report.notes)


def _print_faults(title: str, faults: Sequence[Fault]) -> None:
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        of_kind = [fault for fault in faults if fault.kind == kind]
        print(f"  {title}: {count} {kind}")
        for fault in of_kind[:SHOWN]:
            print(f"    {fault}")
        if count > SHOWN:
            print(f"    ... and {count - SHOWN} more")


def _to_dict(reports: Sequence[SplitReport], twins: Sequence[Fault]) -> dict[str, Any]:
    def plain(faults: Sequence[Fault]) -> list[dict[str, Any]]:
        return [{"kind": fault.kind, "image": fault.image_id, "box": fault.box, "sentence": fault.sentence} for fault in faults]

    splits = {
        report.split: {
            "images": report.images,
            "boxes": dict(report.boxes),
            "unreachable_boxes": int((report.reach < REACH_IOU).sum()),
            "faults": plain(report.faults),
            "notes": plain(report.notes),
        }
        for report in reports
    }
    return {"splits": splits, "duplicates": plain(twins)}


def _draw_worst(raws: Sequence[RawSplit], reports: Sequence[SplitReport], folder: Path) -> None:
    """Pictures with most faults, then most notes, with every annotated box that can be drawn; the faulty ones with their fault."""
    folder.mkdir(parents=True, exist_ok=True)
    ranked = []
    for raw, report in zip(raws, reports, strict=True):
        marks = Counter({fault.image_id: 0 for fault in report.notes})
        marks.update({fault.image_id: 100 for fault in report.faults})
        marks.update(fault.image_id for fault in report.notes)
        ranked += [(marks[image.image_id], raw.split, image, report) for image in raw.images if image.image_id in marks]
    for _, split, image, report in sorted(ranked, key=lambda row: -row[0])[:WORST_PICTURES]:
        if not any(f.image_id == image.image_id and f.box is None for f in report.faults):
            marked = {f.box: f.kind for f in (*report.notes, *report.faults) if f.image_id == image.image_id and f.box is not None}
            good = [box.xyxy for i, box in enumerate(image.boxes) if i not in marked]
            shown = [i for i in marked if np.isfinite(image.boxes[i].xyxy).all()]
            boxes = np.sort(np.array([image.boxes[i].xyxy for i in shown]).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
            rows = Prediction(boxes=boxes, scores=np.ones(len(shown)), labels=np.arange(1, len(shown) + 1))
            truth = np.array(good, np.float64).reshape(-1, 4)
            picture = draw_detections(read_rgb(image.path), rows, [marked[i] for i in shown], truth=truth)
            picture.save(folder / f"{split}_{Path(image.image_id).stem}.png")


if __name__ == "__main__":
    raise SystemExit(main())
