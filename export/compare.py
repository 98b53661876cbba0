"""Holds a model version against another on a data set before it is rolled out: agreement, average precision, speed, and pictures.

A is the version before, B the version after; each is a version folder, a model.onnx, or `name` or `name@version` of the repository.
Both run on the same pictures through the service's own preprocessing and runtime, in turn, so that their times share the machine's moods.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from export.compare_agreement import ClassAgreement, PictureAgreement, agree, agree_by_class
from export.compare_report import check_folder, tables, write_report
from export.comparison import Bounds, Comparison, Version
from export.console import Parser, error_console, interrupted, interruptible, wide_console
from export.evaluate import answer_one, told_as
from export.target import add_repository_argument, find_version
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet
from model.evaluation import add_data_arguments, open_data, percentiles_ms, progress_bar
from model.metrics.predictions import Prediction
from model.metrics.report import evaluate_detections
from service.errors import DetectorError
from service.images import ImageLimits, Prepared, prepare
from service.manifest import ManifestError
from service.runtime import OnnxRuntime, Runtime, RuntimeLoadError, file_sha256
from service.warm_up import warm_up

EXAMPLES = """examples:
  python -m export compare model_repository/blood-cells/1 model_repository/blood-cells/2 VOC_FOLDER
  python -m export compare blood-cells@1 blood-cells@2 VOC_FOLDER --split test --out comparison --max-drop 0.5
  python -m export compare before.onnx after.onnx COCO_FOLDER --split val2017 --score-threshold 0.3

The folder holds index.html, comparison.json and pictures of the largest disagreements. Classes are compared by name.
Exit status: 0 compared and within the bounds, 1 an error, 2 a bound is broken, 64 a mistake on the command line, 130 interrupted.
"""
KNOWN = (DataError, ImageError, ManifestError, RuntimeLoadError, DetectorError, ValueError, OSError)
"""What ends with one sentence instead of a traceback."""


@dataclass(frozen=True)
class _Side:
    """One version while it is run. `relabel[label]` is the label in the classes of both versions together."""

    label: str
    path: Path
    runtime: OnnxRuntime
    relabel: np.ndarray


def compare_versions(
    paths: tuple[Path, Path],
    open_dataset: Callable[[Sequence[str]], DetectionSet],
    *,
    provider: str = "auto",
    score_threshold: float = 0.5,
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Comparison:
    """Run both versions over a data set.

    Args:
        paths: A's and B's file.
        open_dataset: from the classes of both versions to the data.
        progress: from the number of pictures to what is called with the number done.

    Raises:
        ValueError: the versions have no class in common.
    """
    with ExitStack() as stack:
        runtimes = []
        for path in paths:
            runtimes.append(OnnxRuntime(path, provider=provider))
            stack.callback(runtimes[-1].close)
        names = common_classes(runtimes[0].manifest.class_names, runtimes[1].manifest.class_names)
        sides = [
            _Side(label, path, runtime, np.array([0, *(names.index(name) + 1 for name in runtime.manifest.class_names)]))
            for label, path, runtime in zip("AB", paths, runtimes, strict=True)
        ]
        dataset = open_dataset(names)
        for side in sides:
            with told_as(f"{side.label}, {side.path}, failed while it warmed up"):
                warm_up(side.runtime, 1)
        done = _run(sides, dataset, progress(len(dataset)))
        versions = [_version(side, dataset, *measured) for side, measured in zip(sides, done, strict=True)]
    agreements = [
        agree(a, b, score_threshold=score_threshold) for a, b in zip(versions[0].predictions, versions[1].predictions, strict=True)
    ]
    classes: list[ClassAgreement] = agree_by_class(agreements, versions[0].predictions, versions[1].predictions, names)
    return Comparison(versions[0], versions[1], dataset, score_threshold, tuple[PictureAgreement, ...](agreements), tuple(classes))


def common_classes(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
    """A's classes, then those that only B knows.

    Raises:
        ValueError: they share none.
    """
    if not set(a) & set(b):
        raise ValueError(f"the versions have no class in common: A knows {', '.join(a)}; B knows {', '.join(b)}")
    return tuple(dict.fromkeys([*a, *b]))


Measured = tuple[list[Prediction], list[float], list[float]]
"""Predictions, and the seconds of preparing and of the network for each picture."""


def _run(sides: Sequence[_Side], dataset: DetectionSet, progress: Callable[[int], None]) -> tuple[Measured, Measured]:
    """Every picture through both versions, which take turns in being first."""
    measured: tuple[Measured, Measured] = ([], [], []), ([], [], [])
    for number, record in enumerate(dataset.records):
        data = record.path.read_bytes()
        for which in ((0, 1), (1, 0))[number % 2]:
            side, (predictions, preparing, running) = sides[which], measured[which]
            with told_as(f"{side.label}, {side.path}, failed on {record.path}"):
                prepared, prepare_s = _prepare(data, side.runtime)
                prediction, run_s = answer_one(side.runtime, prepared)
            labels = side.relabel[prediction["labels"]]
            predictions.append(Prediction(boxes=prediction["boxes"], scores=prediction["scores"], labels=labels))
            preparing.append(prepare_s)
            running.append(run_s)
        progress(number + 1)
    return measured


def _prepare(data: bytes, runtime: Runtime) -> tuple[Prepared, float]:
    started = time.perf_counter()
    prepared = prepare(data, runtime.manifest.input, ImageLimits())
    return prepared, time.perf_counter() - started


def _version(side: _Side, dataset: DetectionSet, predictions: list[Prediction], preparing: list[float], running: list[float]) -> Version:
    times = {"prepare": percentiles_ms(preparing), "network": percentiles_ms(running)}
    return Version(
        label=side.label,
        path=side.path,
        manifest=side.runtime.manifest,
        provider=side.runtime.provider,
        sha256=file_sha256(side.path),
        file_bytes=side.path.stat().st_size,
        predictions=predictions,
        report=evaluate_detections(dataset, predictions),
        speed={f"{stage}_{name}": value for stage, numbers in times.items() for name, value in numbers.items()},
    )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export compare", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="the version before")
    parser.add_argument("b", metavar="B", help="the version after")
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data set: VOC, COCO or CSV")
    add_data_arguments(parser, split="test")
    add_repository_argument(parser)
    parser.add_argument("--score-threshold", type=_share, default=0.5, help="least score of a detection that agreement is about (0.5)")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), default="auto", help="execution provider (auto)")
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="FOLDER", help="where the report goes (comparison)")
    parser.add_argument("--pictures", type=_count, default=12, metavar="N", help="most pictures of disagreements (12)")
    bounds = parser.add_argument_group("bounds, for a pipeline: exit status 2 where one is broken")
    bounds.add_argument("--max-drop", type=_points, metavar="POINTS", help="most that AP may fall from A to B; 0.5 is 0.005 of AP")
    bounds.add_argument("--max-class-drop", type=_points, metavar="POINTS", help="the same for every class that A knows")
    return parser


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a score from 0 to 1, got {text!r}")
    return value


def _points(text: str) -> float:
    """A bound that can be broken: nothing is over NaN or infinity."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected hundredths of AP, 0 or more, for example 0.5; got {text!r}")
    return value


def _number(text: str) -> float:
    """NaN where the text is no number, which lies in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected 0, 1, 2, ..., got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console, errors = wide_console(), error_console()
    try:
        with interruptible():
            broken = _compare(options, console)
    except KNOWN as error:
        errors.print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return interrupted("no report was written; one that was there before is as it was")
    for sentence in broken:
        errors.print(sentence, style="bold red")
    return 2 if broken else 0


def _compare(options: argparse.Namespace, console: Console) -> tuple[str, ...]:
    paths = find_version(options.a, options.repository), find_version(options.b, options.repository)
    check_folder(options.out)
    if not options.data.is_dir():
        raise ValueError(f"there is no folder {options.data}; DATA is the folder of a VOC, COCO or CSV data set")
    with ExitStack() as stack:
        comparison = compare_versions(
            paths,
            lambda names: open_data(options, names),
            provider=options.provider,
            score_threshold=options.score_threshold,
            progress=lambda total: stack.enter_context(progress_bar(total, "comparing")),
        )
    comparison = replace(comparison, broken=Bounds(options.max_drop, options.max_class_drop).broken(comparison))
    page = write_report(options.out, comparison, pictures=options.pictures)
    for table in tables(comparison):
        console.print(table)
    console.print(f"report: {page}")
    return comparison.broken


if __name__ == "__main__":
    sys.exit(main())
