"""The tables of the Faster R-CNN paper, one command each: `python -m model.paper table2 VOC_FOLDER`.

Any data set will do; only VOC07 (Table 4: VOC12) with the full number of steps can be held against the published numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Shown

from model.alternate import PAPER_STEPS, detector_config
from model.checkpoint import CheckpointError
from model.data.formats import READERS, open_dataset
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet
from model.paper_lab import Lab, Sets, Setup
from model.paper_speed import STAGES, SpeedOptions, SpeedRow, ratios, speed_table
from model.paper_tables import TABLES, Row, Table
from model.paper_training import Recipe
from model.processes import start_processes
from model.proposals import SearchConfig
from model.run_folder import environment
from model.train import INTERRUPTED
from model.trainer import TrainingError
from model.weights import WeightsError

NETWORKS = ("zf", "vgg16")
RUN_TO_RUN = 0.8
"""Two standard deviations of five runs of the original release (59.9 60.4 59.5 60.1 59.5): a single run within it agrees."""

EXAMPLES = """examples:
  python -m model.paper table2 VOC2007 --weights zf=zf.pth --weights vgg16=vgg16.pth --work runs/table2 --json table2.json
  python -m model.paper table3 VOC2007 --second VOC2012 --second-split trainval --weights vgg16=vgg16.pth --seeds 5
  python -m model.paper table5 VOC2007 --weights vgg16=vgg16.pth --limit 20 --crops 128
  python -m model.paper table9 VOC_FOLDER --preset zf --train-split train --test-split val --steps 200,100,200,100 --limit 40 \\
      --set detector.input.short_side=320 --set detector.input.long_side=480
"""


class Measured(NamedTuple):
    """A row with its numbers, one a seed; none where the data it needs was not given."""

    row: Row
    values: list[float]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.paper", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*sorted(TABLES), "table5"], help="which table; table5 is the timings")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, VOC layout or any other that is read here")
    parser.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    parser.add_argument("--train-split", default="trainval", help="(default: trainval)")
    parser.add_argument("--test-split", default="test", help="(default: test)")
    parser.add_argument("--second", type=Path, metavar="DATA", help="second training set of the unions (default: DATA itself)")
    parser.add_argument("--second-split", help="its split; without it, rows of a union are left out")
    parser.add_argument("--preset", choices=NETWORKS, help="network (default: the paper's for this table)")
    parser.add_argument("--other-preset", choices=NETWORKS, help="the other network of tables 2 and 5 (default: the paper's)")
    parser.add_argument("--weights", action="append", default=[], metavar="NETWORK=FILE", help="ImageNet weights of a network")
    parser.add_argument("--variant", choices=("python", "matlab"), default="python", help="release that alternating training follows")
    parser.add_argument("--steps", default=",".join(map(str, PAPER_STEPS)), help="of the four stages (default: the paper's)")
    parser.add_argument("--lr", type=float, default=1e-3, help="(default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures a step (default: 1)")
    parser.add_argument("--limit", type=int, help="use only so many pictures of each split")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds (default: 1)")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as in model.train, for all networks"
    )
    parser.add_argument("--proposals", type=int, default=2000, help="Selective Search boxes a picture (default: 2000)")
    parser.add_argument("--cache", type=Path, default=Path("cache/selective_search"), help="where they are kept")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep trained steps there, and go on with them")
    parser.add_argument("--crops", type=int, help="table5: R-CNN runs so many regions a picture, its time is scaled to all (default: all)")
    parser.add_argument("--fit-pictures", type=int, default=20, help="table5: training pictures of the SVMs (default: 20)")
    parser.add_argument("--accuracy", action="store_true", help="table5: train too, and score the pictures that are timed")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out instead of stopping at them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        result = _run(options)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    except (DataError, ImageError, TrainingError, CheckpointError, WeightsError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; with --work, the same command goes on after the last finished step", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: expected at least 1")
    sets, setup = _open_sets(options), _setup(options)
    facts = {
        "table": options.table,
        "data": {"train": sets.train.name, "test": sets.test.name, "pictures": [len(sets.train), len(sets.test)]},
        "steps": setup.steps,
        "network": setup.preset,
        "environment": environment(),
    }
    labs = [Lab(sets, setup, seed) for seed in range(options.seeds)]
    if options.table == "table5":
        rows = speed_table(labs[0], _speed_options(options, sets))
        _show_speed(rows, setup.device, options.crops)
        return {**facts, "rows": [_speed_row(row) for row in rows], "times_faster_than_rcnn": ratios(rows)}
    table = TABLES[options.table]
    measured = measure(table.rows(labs[0].config()), labs, setup)
    _show(table, measured, sets)
    return {**facts, "unit": table.unit, "rows": [_row(item) for item in measured]}


def measure(rows: Sequence[Row], labs: Sequence[Lab], setup: Setup) -> list[Measured]:
    """Every row for every seed; rows that need a union are left empty without one."""
    values: list[list[float]] = [[] for _ in rows]
    for lab in labs:
        for row, numbers in zip(rows, values, strict=True):
            if row.needs_union and lab.sets.union is None:
                continue
            numbers.append(row.measure(lab))
            setup.say(f"{row.label}, seed {lab.seed}: {numbers[-1]:.1f}")
    return [Measured(row, numbers) for row, numbers in zip(rows, values, strict=True)]


# -- options -------------------------------------------------------------------------------------------------------------------


def _open_sets(options: argparse.Namespace) -> Sets:
    def opened(root: Path, split: str, names: Sequence[str] | None) -> DetectionSet:
        dataset = open_dataset(root, split, data_format=options.format, class_names=names, skip_bad=options.skip_bad)
        return dataset if options.limit is None else dataset.with_records(dataset.records[: options.limit])

    train = opened(options.data, options.train_split, None)
    test = opened(options.data, options.test_split, train.class_names)
    if options.second_split is None:
        if options.second is not None:
            raise ValueError("--second needs --second-split")
        return Sets(train, test)
    second = opened(options.second or options.data, options.second_split, train.class_names)
    union = DetectionSet(f"{train.name}+{second.name}", train.class_names, (*train.records, *second.records))
    return Sets(train, test, union)


def _setup(options: argparse.Namespace) -> Setup:
    steps = [int(count) for count in options.steps.split(",")]
    if len(steps) != 4 or min(steps) < 1:
        raise ValueError(f"--steps {options.steps}: expected four positive numbers, such as 80000,40000,80000,40000")
    first, second, third, fourth = steps
    paper = "vgg16" if options.table == "table5" else TABLES[options.table].preset
    preset = options.preset or paper
    other = options.other_preset or next(name for name in NETWORKS if name != preset)
    detector_config(preset, ("any",), options.settings)  # a wrong --set is told before hours are spent
    return Setup(
        preset=preset,
        rpn_preset=other,
        settings=tuple(options.settings),
        weights=_weights(options.weights),
        variant=options.variant,
        steps=(first, second, third, fourth),
        recipe=Recipe(1, lr=options.lr, batch_size=options.batch_size),
        search=SearchConfig(limit=options.proposals),
        cache=options.cache,
        work=options.work,
        device=str(start_processes(options.device).device),
        say=_say,
    )


def _weights(pairs: Sequence[str]) -> dict[str, Path]:
    weights = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or name not in NETWORKS:
            raise ValueError(f"--weights {pair}: expected NETWORK=FILE with one of {', '.join(NETWORKS)}")
        if not Path(file).is_file():
            raise FileNotFoundError(f"--weights {pair}: there is no file {file}")
        weights[name] = Path(file)
    return weights


def _speed_options(options: argparse.Namespace, sets: Sets) -> SpeedOptions:
    large = options.preset or "vgg16"
    small = options.other_preset or next(name for name in NETWORKS if name != large)
    return SpeedOptions(len(sets.test), options.fit_pictures, options.crops, large, small, options.accuracy)


# -- results -------------------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _row(item: Measured) -> dict[str, Any]:
    mean, spread = _mean_and_spread(item.values)
    return {"label": item.row.label, "published": item.row.published, "ours": item.values, "mean": mean, "sd": spread}


def _mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _show(table: Table, measured: Sequence[Measured], sets: Sets) -> None:
    scores = table.unit.startswith("mAP")
    shown = Shown(title=f"{table.title} ({table.unit})")
    for name in ("row", "published", "ours", "difference"):
        shown.add_column(name, justify="left" if name == "row" else "right")
    for row, values in measured:
        mean, spread = _mean_and_spread(values)
        band = f" ± {RUN_TO_RUN}" if scores else ""
        published = "-" if row.published is None else f"{row.published:.1f}{band}"
        ours = (
            "needs --second-split" if mean is None else f"{mean:.1f}" + (f" ± {spread:.1f} ({len(values)})" if spread is not None else "")
        )
        difference = "-" if mean is None or row.published is None else f"{mean - row.published:+.1f}"
        shown.add_row(row.label, published, ours, difference)
    console = Console(width=110)
    console.print(shown)
    console.print(f"ours: trained on {sets.train.name} ({len(sets.train)}), tested on {sets.test.name} ({len(sets.test)})", highlight=False)
    if scores:
        console.print(f"± {RUN_TO_RUN}: two deviations of five runs of the original release; ± after ours: of its seeds", highlight=False)


def _show_speed(rows: Sequence[SpeedRow], device: str, crops: int | None) -> None:
    shown = Shown(title=f"Table 5: milliseconds a picture, published (K40) | ours ({device})")
    for name in ("system", *STAGES, "mAP %", "times faster"):
        shown.add_column(name, justify="left" if name == "system" else "right")
    faster = ratios(rows)
    for row in rows:
        cells = [f"{_number(known)} | {row.ours[stage]:.0f}" for stage, known in zip(STAGES, row.published, strict=True)]
        accuracy = f"{_number(row.published_accuracy, 1)} | {_number(row.accuracy, 1)}"
        shown.add_row(row.label, *cells, accuracy, f"{faster[row.label]:.1f}x")
    console = Console(width=130)
    console.print(shown)
    console.print("published times faster, per image with proposals: R-CNN 1x, Fast R-CNN 25x, Faster R-CNN 250x", highlight=False)
    if crops is not None:
        console.print(f"R-CNN ran {crops} regions of each picture, its time is scaled to all of them", highlight=False)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _speed_row(row: SpeedRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "published_ms": dict(zip(STAGES, row.published, strict=True)),
        "ours_ms": row.ours,
        "published_mAP": row.published_accuracy,
        "ours_mAP": row.accuracy,
    }


if __name__ == "__main__":
    raise SystemExit(main())
