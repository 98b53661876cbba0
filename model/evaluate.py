"""Evaluates a checkpoint on a split: `python -m model.evaluate CHECKPOINT --data PATH --split test`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import CheckpointError, load_detector
from model.data.formats import READERS, open_dataset
from model.data.images import ImageError
from model.data.records import DataError
from model.inference import predict
from model.metrics.report import Report, evaluate_detections
from model.processes import start_processes
from model.visualize import save_samples, worst_pictures

WORST_PICTURES = 8

EXAMPLES = """examples:
  python -m model.evaluate runs/cells/best.pt --data VOC_FOLDER --split test
  python -m model.evaluate runs/coco/best.pt --data COCO_FOLDER --split val2017 --json report.json --report report
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt or last.pt of a run")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder of the data set")
    parser.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out and list them, instead of stopping at them")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures a batch; changes nothing but the speed (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write report.md, report.json, plots and the worst pictures there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        report, images_per_s = evaluate(options)
        print(report.to_text())
        print(f"  {images_per_s:.1f} pictures a second, reading included")
        if options.json is not None:
            values = {"checkpoint": str(options.checkpoint), "split": options.split, "images_per_s": images_per_s, **report.to_dict()}
            options.json.write_text(json.dumps(values, indent=2) + "\n")
    except (DataError, ImageError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(options: argparse.Namespace) -> tuple[Report, float]:
    """The report and the speed in pictures a second."""
    if options.threads:
        torch.set_num_threads(options.threads)
    detector = load_detector(options.checkpoint).to(start_processes(options.device).device)
    names = detector.config.class_names
    dataset = open_dataset(options.data, options.split, data_format=options.format, class_names=names, skip_bad=options.skip_bad)
    for fault in dataset.skipped:
        print(f"skipped {fault}")
    started = time.perf_counter()
    predictions = predict(detector, dataset, batch_size=options.batch_size)
    images_per_s = len(dataset) / (time.perf_counter() - started)
    report = evaluate_detections(dataset, predictions)
    if options.report is not None:
        report.write(options.report)
        save_samples(options.report, dataset, predictions, worst_pictures(dataset, predictions, WORST_PICTURES))
    return report, images_per_s


if __name__ == "__main__":
    raise SystemExit(main())
