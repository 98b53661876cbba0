"""Average precision of an exported file, through the service's own decoding, preprocessing and runtime.

`python -m export.evaluate model_repository/blood-cells/1/model.onnx --data VOC_FOLDER --split test`
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from model.data.formats import READERS, open_dataset
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet, Record
from model.metrics.predictions import Prediction
from model.metrics.report import Report, evaluate_detections
from service.errors import DetectorError
from service.images import ImageLimits, Prepared, assemble, prepare, to_original_frame
from service.manifest import ManifestError
from service.runtime import OnnxRuntime, Runtime, RuntimeLoadError

AHEAD = 8  # pictures decoded while the network runs


def predict_file(
    runtime: Runtime, dataset: DetectionSet, *, exact_padding: bool = False, progress: Callable[[int], None] = lambda _: None
) -> list[Prediction]:
    """Detections of every picture, in the records' order, one picture a call as a lone client would have it.

    Args:
        exact_padding: pad to the next multiple of the stride instead of the bucket, to see what the bucket costs.
        progress: called with the number of pictures done.
    """
    predictions = []
    for done, prepared in enumerate(_prepared(runtime, dataset.records), start=1):
        if exact_padding:
            stride = runtime.manifest.input.stride
            prepared = replace(prepared, bucket=(-(-prepared.h // stride) * stride, -(-prepared.w // stride) * stride))
        answer = runtime.run(*assemble([prepared]))
        count = int(answer.num_detections[0])
        boxes = to_original_frame(answer.boxes[0, :count], prepared)
        predictions.append(Prediction(boxes=boxes, scores=answer.scores[0, :count], labels=answer.labels[0, :count]))
        progress(done)
    return predictions


def _prepared(runtime: Runtime, records: Sequence[Record]) -> Iterator[Prepared]:
    limits, spec = ImageLimits(), runtime.manifest.input
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(prepare, record.path.read_bytes(), spec, limits) for record in records[:AHEAD]]
        for index in range(len(records)):
            if index + AHEAD < len(records):
                pending.append(pool.submit(prepare, records[index + AHEAD].path.read_bytes(), spec, limits))
            yield pending[index].result()
            pending[index].cancel()


def evaluate_file(
    runtime: Runtime, dataset: DetectionSet, *, exact_padding: bool = False, progress: Callable[[int], None] = lambda _: None
) -> Report:
    """COCO and VOC numbers of a file on a data set."""
    return evaluate_detections(dataset, predict_file(runtime, dataset, exact_padding=exact_padding, progress=progress))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="model.onnx of an exported version")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder of the data set")
    parser.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    parser.add_argument("--split", default="test", help="split to evaluate on (default: test)")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out and list them, instead of stopping at them")
    parser.add_argument("--exact-padding", action="store_true", help="pad to the next multiple of 32 instead of the bucket")
    parser.add_argument(
        "--provider", choices=("auto", "tensorrt", "cuda", "cpu"), default="auto", help="execution provider (default: auto)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        runtime = OnnxRuntime(options.file, provider=options.provider)
        names = runtime.manifest.class_names
        dataset = open_dataset(options.data, options.split, data_format=options.format, class_names=names, skip_bad=options.skip_bad)
        for fault in dataset.skipped:
            print(f"skipped {fault}")
        started = time.perf_counter()
        report = evaluate_file(runtime, dataset, exact_padding=options.exact_padding, progress=_line_now_and_then(len(dataset)))
        images_per_s = len(dataset) / (time.perf_counter() - started)
    except (DataError, ImageError, ManifestError, RuntimeLoadError, DetectorError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.to_text())
    print(f"  {images_per_s:.1f} pictures a second on {runtime.provider}, decoding included")
    if options.json is not None:
        values = {"file": str(options.file), "split": options.split, "images_per_s": images_per_s, **report.to_dict()}
        options.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0


def _line_now_and_then(total: int, every_s: float = 10.0) -> Callable[[int], None]:
    due = time.monotonic() + every_s

    def line(done: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + every_s
            print(f"{done}/{total} pictures", file=sys.stderr)

    return line


if __name__ == "__main__":
    raise SystemExit(main())
