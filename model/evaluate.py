"""Evaluates a checkpoint on a split: `python -m model.evaluate CHECKPOINT --data PATH --split test`.

An exported file and a running service are evaluated by the same code: `python -m export.evaluate FILE_OR_URL --data PATH`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import CheckpointError, load_detector
from model.data.images import ImageError
from model.data.records import DataError
from model.evaluation import Evaluation, add_data_arguments, add_result_arguments, check_results, open_data, progress_bar, publish
from model.inference import predict
from model.overrides import add_detector_settings
from model.processes import start_processes
from model.stopping import INTERRUPTED

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
    add_data_arguments(parser, split="val")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures a batch; changes nothing but the speed (default: 4)")
    add_result_arguments(parser)
    add_detector_settings(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        publish(evaluate(options), options)
    except (DataError, ImageError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no result was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def evaluate(options: argparse.Namespace) -> Evaluation:
    """Runs the checkpoint over the data set."""
    check_results(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    detector = load_detector(options.checkpoint, options.settings).to(start_processes(options.device).device)
    dataset = open_data(options, detector.config.class_names)
    started = time.perf_counter()
    with progress_bar(len(dataset), "evaluating") as progress:
        predictions = predict(detector, dataset, batch_size=options.batch_size, progress=progress)
    speed = {"images_per_s": len(dataset) / (time.perf_counter() - started)}
    return Evaluation.of({"checkpoint": str(options.checkpoint)}, dataset, predictions, speed, "reading included")


if __name__ == "__main__":
    raise SystemExit(main())
