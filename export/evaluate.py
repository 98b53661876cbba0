"""Average precision, errors and speed of an exported file or of a running service, by the same code as a checkpoint's.

A file is run through the service's own decoding, preprocessing and runtime; a service is asked over HTTP as any client would.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.console import Parser, interrupted, interruptible, positive
from export.remote import PictureRefused, RemoteAnswer, RemoteDetector, RemoteError, is_url
from export.target import REPOSITORY, find_version
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet, Fault, Record
from model.evaluation import (
    Evaluation,
    add_data_arguments,
    add_result_arguments,
    check_results,
    open_data,
    percentiles_ms,
    progress_bar,
    publish,
)
from model.metrics.predictions import Prediction
from model.metrics.report import Report, evaluate_detections
from service.device_errors import DeviceLost, DeviceOutOfMemory, first_line
from service.errors import DetectorError, InferenceFailed
from service.images import ImageLimits, Prepared, assemble, prepare, to_original_frame
from service.manifest import ManifestError
from service.runtime import OnnxRuntime, Runtime, RuntimeLoadError

AHEAD = 8  # pictures decoded while the network runs
CONCURRENCY = 4
PROVIDER = "auto"

EXAMPLES = """examples:
  python -m export.evaluate model_repository/blood-cells/1/model.onnx --data VOC_FOLDER --split test --report report
  python -m export.evaluate blood-cells@1 --data VOC_FOLDER --split test
  python -m export.evaluate http://127.0.0.1:8000 --data VOC_FOLDER --split test
  python -m export.evaluate https://detector.example --model cells@3 --api-key @key.txt --data COCO_FOLDER --split val2017

A service is asked for everything down to the model's own score floor. It answers boxes with two decimals and scores with four, so AP may
differ from the file's in the fourth decimal. A busy service is asked again after its Retry-After.
Exit status: 0 evaluated, 1 an error, 64 a mistake on the command line, 130 interrupted.
"""
KNOWN = (DataError, ImageError, ManifestError, RuntimeLoadError, DetectorError, RemoteError, ValueError, OSError)
"""What ends with one sentence instead of a traceback."""


class RunFailed(ValueError):
    """A file that does not run, or a picture that it does not take: which, on what, and why."""


@contextmanager
def told_as(failure: str) -> Iterator[None]:
    """What the service would tell a client who sent one picture, told to somebody with files: what failed, and the library's reason.

    Raises:
        RunFailed: in place of the service's exceptions.
    """
    try:
        yield
    except (InferenceFailed, DeviceLost, DeviceOutOfMemory) as error:
        raise RunFailed(f"{failure}: {first_line(error.__cause__ or error)}") from error
    except DetectorError as error:
        raise RunFailed(f"{failure}: {error}") from error


def answer_one(runtime: Runtime, prepared: Prepared) -> tuple[Prediction, float]:
    """Detections of one picture in the original frame, and the network's seconds; one picture a call, as a lone client would have it."""
    images, sizes_hw = assemble([prepared])
    started = time.perf_counter()
    answer = runtime.run(images, sizes_hw)
    seconds = time.perf_counter() - started
    count = int(answer.num_detections[0])
    boxes = to_original_frame(answer.boxes[0, :count], prepared)
    return Prediction(boxes=boxes, scores=answer.scores[0, :count], labels=answer.labels[0, :count]), seconds


def _answers(runtime: Runtime, dataset: DetectionSet, *, exact_padding: bool) -> Iterator[tuple[Prediction, float]]:
    name = f"{runtime.manifest.name}@{runtime.manifest.version}"
    for record, pending in zip(dataset.records, _prepared(runtime, dataset.records), strict=True):
        with told_as(f"{name} failed on {record.path}"):
            prepared = pending.result()
            if exact_padding:
                stride = runtime.manifest.input.stride
                prepared = replace(prepared, bucket=(-(-prepared.h // stride) * stride, -(-prepared.w // stride) * stride))
            answer = answer_one(runtime, prepared)
        yield answer


def predict_file(
    runtime: Runtime, dataset: DetectionSet, *, exact_padding: bool = False, progress: Callable[[int], None] = lambda _: None
) -> list[Prediction]:
    """Detections of every picture, in the records' order.

    Args:
        exact_padding: pad to the next multiple of the stride instead of the bucket, to see what the bucket costs.
        progress: called with the number of pictures done.
    """
    predictions = []
    for done, (prediction, _) in enumerate(_answers(runtime, dataset, exact_padding=exact_padding), start=1):
        predictions.append(prediction)
        progress(done)
    return predictions


def _prepared(runtime: Runtime, records: Sequence[Record]) -> Iterator[Future[Prepared]]:
    limits, spec = ImageLimits(), runtime.manifest.input
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Prepared]] = deque()  # what was used is let go: thousands of decoded pictures fit into no memory
        for record in records:
            pending.append(pool.submit(prepare, record.path.read_bytes(), spec, limits))
            if len(pending) > AHEAD:
                yield pending.popleft()
        while pending:
            yield pending.popleft()


def evaluate_file(
    runtime: Runtime, dataset: DetectionSet, *, exact_padding: bool = False, progress: Callable[[int], None] = lambda _: None
) -> Report:
    """COCO and VOC numbers of a file on a data set."""
    return evaluate_detections(dataset, predict_file(runtime, dataset, exact_padding=exact_padding, progress=progress))


def predict_service(
    detector: RemoteDetector, dataset: DetectionSet, *, concurrency: int, progress: Callable[[int], None] = lambda _: None
) -> list[RemoteAnswer | PictureRefused]:
    """A running service's answer to every picture, in the records' order, with a few requests under way at a time.

    Raises:
        RemoteError: the service failed, as opposed to refusing a picture.
    """

    def ask(record: Record) -> RemoteAnswer | PictureRefused:
        try:
            return detector.detect(record.path.read_bytes())
        except PictureRefused as refusal:
            return refusal

    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(ask, record) for record in dataset.records]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress(done)
        return [future.result() for future in futures]
    except BaseException:
        detector.close()  # or the requests under way would go on, with a busy service for minutes
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_file(options: argparse.Namespace) -> Evaluation:
    """Evaluate the file that the options name."""
    path = find_version(options.target, options.repository or REPOSITORY)
    runtime = OnnxRuntime(path, provider=options.provider or PROVIDER)
    try:
        dataset = open_data(options, runtime.manifest.class_names)
        predictions, seconds = [], []
        started = time.perf_counter()
        with progress_bar(len(dataset), "evaluating") as progress:
            for prediction, spent in _answers(runtime, dataset, exact_padding=options.exact_padding):
                predictions.append(prediction)
                seconds.append(spent)
                progress(len(predictions))
        speed = {"images_per_s": len(dataset) / (time.perf_counter() - started)}
        speed |= {f"network_{name}": value for name, value in percentiles_ms(seconds).items()}
        source, note = {"file": str(path)}, f"one at a time on {runtime.provider}, decoding included"
        return Evaluation.of(source, dataset, predictions, speed, note)
    finally:
        runtime.close()


def run_service(options: argparse.Namespace) -> Evaluation:
    """Evaluate the service that the options name. With --skip-bad, pictures that it refuses are left out and listed."""
    concurrency = options.concurrency or CONCURRENCY
    detector = RemoteDetector(options.target, model=options.model, api_key=_key(options.api_key))
    try:
        model = detector.describe()
        dataset = open_data(options, model.class_names)
        started = time.perf_counter()
        with progress_bar(len(dataset), "evaluating") as progress:
            outcomes = predict_service(detector, dataset, concurrency=concurrency, progress=progress)
        elapsed_s = time.perf_counter() - started
    finally:
        detector.close()
    dataset, answers = _without_refused(dataset, outcomes, skip_bad=options.skip_bad)
    speed = {"images_per_s": len(dataset) / elapsed_s, **percentiles_ms([answer.seconds for answer in answers])}
    speed |= {f"service_{stage}_mean_ms": float(np.mean([a.stages_ms[stage] for a in answers])) for stage in ("decode", "queue", "infer")}
    speed["retries"] = float(detector.retries)
    note = f"over HTTP with {concurrency} requests at a time"
    return Evaluation.of({"url": options.target, "model": model.reference}, dataset, [answer.prediction for answer in answers], speed, note)


def _without_refused(
    dataset: DetectionSet, outcomes: Sequence[RemoteAnswer | PictureRefused], *, skip_bad: bool
) -> tuple[DetectionSet, list[RemoteAnswer]]:
    answered = [(r, outcome) for r, outcome in zip(dataset.records, outcomes, strict=True) if isinstance(outcome, RemoteAnswer)]
    faults = [
        Fault("refused", r.image_id, str(outcome))
        for r, outcome in zip(dataset.records, outcomes, strict=True)
        if isinstance(outcome, PictureRefused)
    ]
    if faults and not skip_bad:
        raise RemoteError(f"{len(faults)} pictures were refused, the first: {faults[0]}. Leave such out with --skip-bad")
    for fault in faults:
        print(f"skipped {fault}")
    if not answered:
        raise RemoteError(f"the service refused every picture, the first: {faults[0]}")
    return dataset.with_records([record for record, _ in answered], faults), [answer for _, answer in answered]


def _key(given: str | None) -> str | None:
    """The API key itself, or with `@` the content of a file, where `ps` does not show it."""
    if given is None or not given.startswith("@"):
        return given
    return Path(given[1:]).read_text().strip()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export.evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", metavar="VERSION_OR_URL", help="model.onnx, its folder or NAME[@VERSION]; or http(s)://HOST[:PORT] of a service"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder of the data set")
    add_data_arguments(parser, split="test")
    add_result_arguments(parser)
    file = parser.add_argument_group("a file")
    file.add_argument("--exact-padding", action="store_true", help="pad to the next multiple of 32 instead of the bucket")
    file.add_argument("--repository", type=Path, help=f"where names are looked up ({REPOSITORY})")
    file.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), help=f"execution provider (default: {PROVIDER})")
    service = parser.add_argument_group("a service")
    service.add_argument("--model", help="`name` or `name@version`; the service's first model where left out")
    service.add_argument("--api-key", metavar="KEY", help="where the service asks for one; @FILE reads it from a file")
    service.add_argument("--concurrency", type=positive, help=f"requests under way at a time (default: {CONCURRENCY})")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Options of the other kind of target are mistakes, not ornaments. Raises ValueError."""
    remote = is_url(options.target)
    strange = ("exact_padding", "repository", "provider") if remote else ("model", "api_key", "concurrency")
    for name in strange:
        if getattr(options, name) not in (None, False):
            kind = "a file" if remote else "a service"
            raise ValueError(f"--{name.replace('_', '-')} belongs to {kind}, but {options.target} is none")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        with interruptible():
            _check(options)
            check_results(options)
            publish(run_service(options) if is_url(options.target) else run_file(options), options)
    except KNOWN as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted("nothing was written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
