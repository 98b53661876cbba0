"""How much of a score is luck: `python -m model.seeds A/best.pt B/best.pt C/best.pt --data PATH --split test`.

Evaluates checkpoints of the same recipe trained from different seeds, and gives mean and spread (sample standard deviation) of every
number. Which of them to ship is chosen on another split than the one that is reported: --choose-on names it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import CheckpointError, load_detector
from model.data.images import ImageError
from model.data.records import DataError
from model.evaluation import add_data_arguments, open_data, progress_bar
from model.inference import predict
from model.metrics.report import Report, evaluate_detections
from model.overrides import add_detector_settings
from model.processes import start_processes

SHOWN = ("AP", "AP50", "AP75", "voc_ap50")

EXAMPLES = """examples:
  python -m model.seeds runs/seed0/best.pt runs/seed1/best.pt runs/seed2/best.pt --data VOC_FOLDER --split test --choose-on val

Exit status: 0 evaluated, 1 an error.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.seeds", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="best.pt of each run")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder of the data set")
    add_data_arguments(parser, split="test")
    add_detector_settings(parser)
    parser.add_argument("--choose-on", metavar="SPLIT", help="also evaluate on this split, and name the checkpoint with the best AP there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        values = compare_seeds(options)
    except (DataError, ImageError, CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(to_markdown(values))
    if options.json is not None:
        options.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0


def compare_seeds(options: argparse.Namespace) -> dict[str, Any]:
    """Numbers of every checkpoint, their mean and spread, and which is best on the split to choose on."""
    rows = [
        {"run": path.parent.name, "seed": _seed(path), **numbers(_evaluate(path, options, options.split))} for path in options.checkpoints
    ]
    values: dict[str, Any] = {"split": options.split, "settings": options.settings, "runs": rows, **mean_and_spread(rows)}
    if options.choose_on:
        for row, path in zip(rows, options.checkpoints, strict=True):
            row[f"AP on {options.choose_on}"] = _evaluate(path, options, options.choose_on).ap
        values["chosen_on"] = options.choose_on
        values["chosen"] = max(rows, key=lambda row: float(row[f"AP on {options.choose_on}"]))["run"]
    return values


def numbers(report: Report) -> dict[str, float]:
    """The twelve of COCO, VOC's, and AP of every class."""
    per_class = {f"AP50 {name}": float(row["AP50"]) for name, row in report.coco.per_class.items()}
    return {**{name: float(value) for name, value in report.coco.stats.items()}, "voc_ap50": report.voc_ap50, **per_class}


def mean_and_spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (0 for a single run) of every number."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    columns = {name: [float(row[name]) for row in rows] for name in names}
    spread = {name: statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in columns.items()}
    return {"mean": {name: statistics.fmean(column) for name, column in columns.items()}, "spread": spread}


def to_markdown(values: Mapping[str, Any]) -> str:
    """One row a run, then mean and spread."""
    extra = [name for name in values["runs"][0] if name.startswith("AP on ")]
    names = [*SHOWN, *(name for name in values["mean"] if name.startswith("AP50 ")), *extra]
    lines = ["| run | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {row['run']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for row in values["runs"]]
    middle = [f"{values['mean'][n]:.4f} ± {values['spread'][n]:.4f}" if n in values["mean"] else "" for n in names]
    lines.append(f"| mean ± spread on {values['split']} | " + " | ".join(middle) + " |")
    if "chosen" in values:
        lines.append(f"\nBest on {values['chosen_on']}: {values['chosen']}")
    return "\n".join(lines)


def _seed(path: Path) -> int | None:
    run = path.parent / "config.json"
    if not run.is_file():
        return None
    seed: int = json.loads(run.read_text())["training"]["seed"]
    return seed


def _evaluate(path: Path, options: argparse.Namespace, split: str) -> Report:
    detector = load_detector(path, options.settings).to(start_processes(options.device).device)
    chosen = argparse.Namespace(**{**vars(options), "split": split})
    dataset = open_data(chosen, detector.config.class_names)
    with progress_bar(len(dataset), f"{path.parent.name} on {split}") as progress:
        return evaluate_detections(dataset, predict(detector, dataset, progress=progress))


if __name__ == "__main__":
    raise SystemExit(main())
