"""One evaluation from the command line to the report, whoever makes the predictions: a network, an exported file or a running service.

Imports no torch, so that evaluating a file or a service starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model.data.formats import READERS, open_dataset
from model.data.records import DetectionSet
from model.metrics.predictions import Prediction
from model.metrics.report import Report, evaluate_detections
from model.visualize import save_samples, worst_pictures

WORST_PICTURES = 8
LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a data set, with what they are worth and what they cost.

    Attributes:
        source: what was evaluated, as plain values: {"checkpoint": "best.pt"}.
        speed: name with its unit to number; holds `images_per_s`.
        speed_note: one phrase on what the speed includes.
    """

    source: Mapping[str, str]
    dataset: DetectionSet
    predictions: Sequence[Prediction]
    report: Report
    speed: Mapping[str, float]
    speed_note: str

    @staticmethod
    def of(
        source: Mapping[str, str], dataset: DetectionSet, predictions: Sequence[Prediction], speed: Mapping[str, float], speed_note: str
    ) -> Evaluation:
        """Counts AP and errors of predictions, one a record in the records' order."""
        return Evaluation(source, dataset, predictions, evaluate_detections(dataset, predictions), speed, speed_note)


def add_data_arguments(parser: argparse.ArgumentParser, *, split: str) -> None:
    """Which data set, as every command that evaluates takes it; the path itself is the command's own."""
    parser.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    parser.add_argument("--split", default=split, help=f"split to evaluate on (default: {split})")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out and list them, instead of stopping at them")


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the numbers go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write report.md, report.json, plots and the worst pictures there")


def check_results(options: argparse.Namespace) -> None:
    """For before the work, whose numbers nobody should lose at its end.

    Raises:
        ValueError: a file or folder of `add_result_arguments` cannot be written.
    """
    if options.json is not None:
        if options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder; give the name of a file")
        if not options.json.parent.is_dir() or not os.access(options.json.parent, os.W_OK):
            raise ValueError(f"--json {options.json} cannot be written: {options.json.parent} is no folder that may be written to")
    if options.report is not None:
        check_new_folder(options.report, "--report")


def check_new_folder(folder: Path, option: str) -> None:
    """For a folder that is made at the end, with those above it.

    Raises:
        ValueError: something else is in the way, or it may not be written.
    """
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        raise ValueError(f"{option} {folder} cannot be made: {present} is no folder that may be written to")


def open_data(options: argparse.Namespace, class_names: Sequence[str]) -> DetectionSet:
    """The data set that the options name, with a model's classes.

    Raises:
        DataError: nothing there, or faults without --skip-bad.
    """
    dataset = open_dataset(options.data, options.split, data_format=options.format, class_names=class_names, skip_bad=options.skip_bad)
    for fault in dataset.skipped:
        print(f"skipped {fault}")
    return dataset


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of some times, in milliseconds."""
    p50, p95 = np.percentile(np.asarray(seconds) * 1e3, [50, 95])
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}


def publish(evaluation: Evaluation, options: argparse.Namespace) -> None:
    """Prints the report, and writes the files that the options ask for; an interrupt leaves none of them half written."""
    report = evaluation.report
    print(report.to_text())
    print(f"  {evaluation.speed['images_per_s']:.1f} pictures a second, {evaluation.speed_note}")
    values = {**evaluation.source, "split": options.split, "images_per_s": evaluation.speed["images_per_s"], **report.to_dict()}
    values["speed"] = dict(evaluation.speed)
    numbers = json.dumps(values, indent=2) + "\n"
    if options.report is not None:
        with _filled_at_the_end(options.report) as folder:
            _write_report(folder, evaluation, numbers)
    if options.json is not None:
        options.json.write_text(numbers)


def _write_report(folder: Path, evaluation: Evaluation, numbers: str) -> None:
    evaluation.report.write(folder)
    (folder / "report.json").write_text(numbers)
    with (folder / "report.md").open("a") as page:
        page.write(_about(evaluation))
    worst = worst_pictures(evaluation.dataset, evaluation.predictions, WORST_PICTURES)
    save_samples(folder, evaluation.dataset, evaluation.predictions, worst)


@contextmanager
def _filled_at_the_end(folder: Path) -> Iterator[Path]:
    """A scratch folder beside the files to be, which are put in their places where the block ends well."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
            yield Path(scratch)
            for file in Path(scratch).iterdir():
                file.replace(folder / file.name)
    except BaseException:
        for made in missing:
            with suppress(OSError):  # somebody put something into it
                made.rmdir()
        raise


def _about(evaluation: Evaluation) -> str:
    lines = [f"\n## Speed\n\n{evaluation.speed_note[:1].upper()}{evaluation.speed_note[1:]}.\n", "| number | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in evaluation.speed.items()]
    lines += ["", "Evaluated: " + ", ".join(f"{name} `{value}`" for name, value in evaluation.source.items()) + ".", ""]
    return "\n".join(lines)


@contextmanager
def progress_bar(total: int, name: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of pictures done: a bar on a terminal, a line now and then elsewhere; on standard error."""
    console = Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        yield _line_now_and_then(total, name)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def _line_now_and_then(total: int, name: str) -> Callable[[int], None]:
    due = time.monotonic() + LINE_SECONDS

    def line(done: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + LINE_SECONDS
            print(f"{name}: {done}/{total} pictures", file=sys.stderr)

    return line
