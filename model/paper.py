"""The tables of the Faster R-CNN paper, one command each: `python -m model.paper table2 VOC_FOLDER`.

Any data set will do; only VOC07 (Table 4: VOC12) with the full number of steps can be held against the published numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.alternate import PAPER_STEPS, detector_config
from model.checkpoint import CheckpointError
from model.data.formats import READERS, open_dataset
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet
from model.paper_lab import Lab, Sets, Setup
from model.paper_report import Measured, Page, plot_recall, row_values, speed_page, speed_values, table_page
from model.paper_resume import StageInterrupted
from model.paper_speed import SpeedOptions, ratios, speed_table
from model.paper_tables import TABLES, Row, recall_sources
from model.paper_training import Recipe
from model.processes import start_processes
from model.proposals import SearchConfig
from model.run_folder import command_line, environment
from model.stopping import INTERRUPTED
from model.trainer import TrainingError
from model.weights import WeightsError

NETWORKS = ("zf", "vgg16", "mobilenet_v2_c4")
QUICK_SETTINGS = (
    "detector.input.short_side=192",
    "detector.input.long_side=256",
    "detector.input.buckets=[[192,256],[256,192]]",
    "detector.anchors.sizes=[[20,40,80]]",
    "detector.rpn.min_size=4",
    "detector.rpn.hidden=64",
    "detector.roi.hidden=256",
    "detector.roi.dropout=0",
)
QUICK: dict[str, Any] = {
    "preset": "mobilenet_v2_c4",
    "other_preset": "zf",
    "steps": "40,40,20,20",
    "lr": 0.02,
    "batch_size": 2,
    "limit": 16,
    "proposals": 500,
    "search_side": 300,
    "crops": 8,
    "fit_pictures": 2,
}
"""Defaults of --quick: a small network and few pictures; most tables take minutes on one core."""

FIRST_LOOK = "a first look: few pictures and steps; only VOC07 with the full number of steps can be held against the published column"

EXAMPLES = """examples:
  python -m model.paper table2 VOC2007 --weights zf=zf.pth --weights vgg16=vgg16.pth --work runs/table2 --json table2.json
  python -m model.paper table3 VOC2007 --second VOC2012 --second-split trainval --weights vgg16=vgg16.pth --seeds 5
  python -m model.paper table5 VOC2007 --weights vgg16=vgg16.pth --limit 20 --crops 128
  python -m model.paper table2 VOC_FOLDER --quick --train-split train --test-split val --weights mobilenet_v2_c4=mobilenet_v2.pth
  python -m model.paper proposals VOC_FOLDER --quick --train-split train --test-split val --plot recall.png
  python -m model.paper table9 VOC_FOLDER --preset zf --train-split train --test-split val --steps 200,100,200,100 --limit 40 \\
      --set detector.input.short_side=320 --set detector.input.long_side=480
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.paper", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*sorted(TABLES), "table5"], help="which table; table5 is the timings")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, VOC layout or any other that is read here")
    parser.add_argument("--quick", action="store_true", help=f"other defaults, for a first look on a CPU: {_quick_words()}")
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
    parser.add_argument("--search-side", type=int, default=500, help="larger pictures are searched at this long side (default: 500)")
    parser.add_argument("--cache", type=Path, default=Path("cache/selective_search"), help="where they are kept")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep trained steps there, and go on with them")
    parser.add_argument("--crops", type=int, help="table5: R-CNN runs so many regions a picture, its time is scaled to all (default: all)")
    parser.add_argument("--fit-pictures", type=int, default=20, help="table5: training pictures of the SVMs (default: 20)")
    parser.add_argument("--accuracy", action="store_true", help="table5: train too, and score the pictures that are timed")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out instead of stopping at them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="proposals: recall over IoU as a picture")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    return parser


def _quick_words() -> str:
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with those of --quick where nothing else was said."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not options.quick:
        return options
    quick = {name: value for name, value in QUICK.items() if options.table != "table5" or not name.endswith("preset")}
    parser.set_defaults(**quick)  # table 5 times the paper's own networks
    options = parser.parse_args(arguments)
    options.settings = [*QUICK_SETTINGS, *options.settings]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    try:
        result = _run(options)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    except (DataError, ImageError, TrainingError, CheckpointError, WeightsError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StageInterrupted as interruption:
        kept = "the same command goes on" if options.work is not None else "without --work it is lost with the other steps"
        print(f"{interruption}; {kept}", file=sys.stderr)
        return INTERRUPTED
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
    started = time.monotonic()
    labs = [Lab(sets, setup, seed) for seed in range(options.seeds)]
    page, values = _measure_speed(labs[0], options) if options.table == "table5" else _measure_table(labs, options)
    notes = [*page.notes, f"{_what_ran(setup, options)}, {(time.monotonic() - started) / 60:.1f} minutes"]
    page = page._replace(notes=[*notes, FIRST_LOOK] if options.quick else notes)
    page.print()
    if options.markdown is not None:
        options.markdown.write_text(page.markdown(command_line()))
    facts = {
        "table": options.table,
        "data": {"train": sets.train.name, "test": sets.test.name, "pictures": [len(sets.train), len(sets.test)]},
        "steps": setup.steps,
        "network": setup.preset,
        "settings": list(setup.settings),
        "environment": environment(),
    }
    return {**facts, **values}


def _what_ran(setup: Setup, options: argparse.Namespace) -> str:
    started = "ImageNet weights" if setup.preset in setup.weights else "random weights"
    trained = "untrained" if options.table == "table5" and not options.accuracy else f"steps {','.join(map(str, setup.steps))}"
    return f"{setup.preset} from {started}, {trained}, batch {setup.recipe.batch_size}, {setup.device}"


def _measure_table(labs: Sequence[Lab], options: argparse.Namespace) -> tuple[Page, dict[str, Any]]:
    table, lab = TABLES[options.table], labs[0]
    measured = measure(table.rows(lab.config()), labs, lab.setup)
    if options.plot is not None:
        plot_recall(options.plot, lab.sets.test, recall_sources(lab))
    return table_page(table, measured, lab.sets), {"unit": table.unit, "rows": [row_values(item) for item in measured]}


def _measure_speed(lab: Lab, options: argparse.Namespace) -> tuple[Page, dict[str, Any]]:
    rows = speed_table(lab, _speed_options(options, lab.sets))
    values = {
        "rows": [speed_values(row) for row in rows],
        "times_faster_than_rcnn": {label: band._asdict() for label, band in ratios(rows).items()},
        "crops": options.crops,
    }
    return speed_page(rows, lab.setup.device, options.crops, len(lab.sets.test)), values


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
    if options.plot is not None and options.table != "proposals":
        raise ValueError("--plot draws the recall of proposals; give it with the table proposals")
    detector_config(preset, ("any",), options.settings)  # a wrong --set is told before hours are spent
    return Setup(
        preset=preset,
        rpn_preset=other,
        settings=tuple(options.settings),
        weights=_weights(options.weights),
        variant=options.variant,
        steps=(first, second, third, fourth),
        recipe=Recipe(1, lr=options.lr, batch_size=options.batch_size),
        search=SearchConfig(limit=options.proposals, max_side=options.search_side),
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
