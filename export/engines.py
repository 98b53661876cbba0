"""Builds TensorRT engines for a model file, offline and once a machine.

ONNX Runtime builds an engine when a session meets a shape that none covers, which takes minutes; so all are built here, for every bucket
and every batch up to the given size, and the service only reads them (`service/tensorrt.py`). They lie beside the model file, in a folder
that is named after GPU, driver, versions and the file's own digest. Only a file with dense NMS can have them (`--nms dense`): in any other,
shapes within the graph depend on what is in the picture, and no range would hold them.

TensorRT gets the graph in parts, since some operators stay on CUDA, and every part wants the ranges of its own inputs. Which tensors those
are only TensorRT's provider knows: it names them when it refuses a session. Their shapes are measured on the CPU at one and two images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console

from export.console import Parser, error_console, interrupted, interruptible, positive, wide_console
from export.model_file import read
from export.target import add_version_arguments, find_version
from service.device_errors import first_line
from service.manifest import Bucket
from service.providers import (
    PROVIDER_NAMES,
    RuntimeLoadError,
    missing_sentence,
    open_session,
    provider_candidates,
    provider_stack,
    session_options,
    strict_session,
)
from service.tensorrt import PLAN_FILE, EnginePlan, Range, Shape, corners, engine_folder, engine_key, input_ranges, load_plan

MISSING_RANGES = "Following input(s) has no associated shape profiles provided:"
"""The words of ONNX Runtime's TensorRT provider, before a list of names."""
MOST_PARTS = 32
"""Rounds of asking: each names the inputs of one more part of the graph."""

NO_OTHER = "and TensorRT's library; without a GPU there is nothing to build"
SMALLER = "where memory is short, give a smaller --max-batch"
DENSE_HINT = "export the checkpoint with `--nms dense`, or use the CUDA provider"

OpenSession = Callable[[Path, EnginePlan, int], Any]
"""(model file, plan, device) -> a session, which builds what the plan's folder does not hold."""


class BuildError(RuntimeError):
    """The engines cannot be built, as a sentence."""


def open_tensorrt(path: Path, plan: EnginePlan, device_id: int) -> Any:
    """The session that the service would open.

    Raises:
        RuntimeLoadError: caused by the provider's own exception.
    """
    return open_session(path, "tensorrt", provider_stack("tensorrt", device_id=device_id, tensorrt=plan.provider_options(device_id)))


def missing_ranges(message: str) -> list[str]:
    """Tensors whose ranges the provider asks for, from its error message; empty for any other message."""
    _, found, rest = message.partition(MISSING_RANGES)
    return [name.strip() for name in (rest.splitlines() or [""])[0].split(",") if name.strip()] if found else []


def measure(model: onnx.ModelProto, names: Sequence[str], bucket: Bucket, batch_size: int) -> list[Shape]:
    """Shapes of inner tensors for one batch of one bucket, from a run on the CPU. Of a grey picture: none depends on the pixels.

    Raises:
        BuildError: a name is no tensor of the file.
    """
    known = {output for node in model.graph.node for output in node.output}
    unknown = sorted(set(names) - known)
    if unknown:
        raise BuildError(f"TensorRT asks for the ranges of {', '.join(unknown)}, which the file does not have; export it again")
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = session_options("cpu")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = strict_session(opened.SerializeToString(), options, provider_stack("cpu"))
    feed = {"images": np.full((batch_size, *bucket, 3), 114, np.uint8), "image_sizes_hw": np.array([bucket] * batch_size, np.int64)}
    given = {value.name for value in session.get_inputs()}
    return [tuple(array.shape) for array in session.run(list(names), {name: feed[name] for name in given})]


def inner_ranges(model: onnx.ModelProto, names: Sequence[str], buckets: Sequence[Bucket], max_batch_size: int) -> dict[str, Range]:
    """The profile of inner tensors: each side grows evenly with the batch."""
    triples = []
    for hw, size in corners(buckets, max_batch_size):
        one, two = measure(model, names, hw, 1), measure(model, names, hw, 2)
        triples.append([at_batch(first, second, size) for first, second in zip(one, two, strict=True)])
    return dict(zip(names, zip(*triples, strict=True), strict=True))


def fixed_ranges(model: onnx.ModelProto) -> dict[str, Range]:
    """Of the inputs that have a default, which is all that they are ever given on TensorRT."""
    inputs = {value.name for value in model.graph.input}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if tensor.name in inputs}
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def at_batch(one: Shape, two: Shape, batch_size: int) -> Shape:
    """The shape at a batch size, from those at one and two images."""
    return tuple(first + (second - first) * (batch_size - 1) for first, second in zip(one, two, strict=True))


def build(
    path: Path, *, device_id: int, max_batch_size: int, console: Console, again: bool = False, opener: OpenSession = open_tensorrt
) -> EnginePlan:
    """Build every engine of a file, run each bucket once, and write the plan that makes the service use them.

    Args:
        again: build although a plan is there.
        opener: how a session is opened.

    Raises:
        RuntimeLoadError, ManifestError, BuildError: sentences for the user; no plan was written.
    """
    model, manifest = read(path)
    if manifest.nms != "dense":
        raise BuildError(f"{path}: how many boxes reach its head depends on the picture, and an engine needs known shapes; {DENSE_HINT}")
    folder = engine_folder(path, engine_key(path, device_id))
    buckets = tuple(manifest.input.buckets)
    there = load_plan(folder)
    if there is not None and there.max_batch_size >= max_batch_size and not again:
        console.print(f"already built for up to {there.max_batch_size} images: {folder}", highlight=False)
        return there
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN_FILE).unlink(missing_ok=True)  # first of all: a build that ends early leaves engines of two builds
    plan = EnginePlan(folder, buckets, max_batch_size, {**input_ranges(buckets, max_batch_size), **fixed_ranges(model)})
    session, plan = _open_in_rounds(path, model, plan, device_id, console, opener)
    for bucket in buckets:
        for size in sorted({1, max_batch_size}):
            _run_once(session, bucket, size, console)
    plan.save()
    console.print(f"engines for up to {max_batch_size} images: {folder}", highlight=False)
    return plan


def _open_in_rounds(
    path: Path, model: onnx.ModelProto, plan: EnginePlan, device_id: int, console: Console, opener: OpenSession
) -> tuple[Any, EnginePlan]:
    for part in range(1, MOST_PARTS + 1):
        started = time.perf_counter()
        try:
            with console.status(f"building part {part}; minutes, the first time on a machine"):
                session = opener(path, plan, device_id)
        except RuntimeLoadError as error:
            names = missing_ranges(str(error.__cause__ or error))
            if not names or set(names) <= set(plan.ranges):
                raise BuildError(f"TensorRT refuses the graph: {first_line(error.__cause__ or error)}") from error
            console.print(f"part {part}: TensorRT asks for the ranges of {len(names)} inner tensors; measuring them on the CPU")
            plan = replace(plan, ranges={**plan.ranges, **inner_ranges(model, names, plan.buckets, plan.max_batch_size)})
            continue
        if session.get_providers()[0] != PROVIDER_NAMES["tensorrt"]:
            raise BuildError(missing_sentence("tensorrt", "its libraries did not load", NO_OTHER))
        console.print(f"all parts are open after {time.perf_counter() - started:.0f} s in the last round")
        return session, plan
    raise BuildError(f"TensorRT cuts the graph into more than {MOST_PARTS} parts; use the CUDA provider for this file")


def _run_once(session: Any, bucket: Bucket, size: int, console: Console) -> None:
    feed = {"images": np.full((size, *bucket, 3), 114, np.uint8), "image_sizes_hw": np.array([bucket] * size, np.int64)}
    started = time.perf_counter()
    try:
        session.run(None, feed)
        first = time.perf_counter()
        session.run(None, feed)
    except Exception as error:  # ONNX Runtime's have no common class
        raise BuildError(f"the engines do not run {size} images of {bucket[0]}x{bucket[1]}: {first_line(error)}; {SMALLER}") from error
    second_ms, first_ms = (time.perf_counter() - first) * 1e3, (first - started) * 1e3
    console.print(f"{bucket[0]}x{bucket[1]}, {size} images: first run {first_ms:.0f} ms, then {second_ms:.1f} ms", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m export build-engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_version_arguments(parser)
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    parser.add_argument(
        "--max-batch", type=positive, default=16, help="largest batch; DETECTOR_MAX_BATCH_SIZE may not be above it (default: 16)"
    )
    parser.add_argument("--again", action="store_true", help="build although engines for this machine are there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        with interruptible():
            provider_candidates("tensorrt", NO_OTHER)
            build(
                find_version(options.file, options.repository),
                device_id=options.device,
                max_batch_size=options.max_batch,
                console=wide_console(),
                again=options.again,
            )
    except (RuntimeLoadError, BuildError, ValueError, OSError) as error:
        error_console().print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return interrupted("the service uses no engines that were not built to the end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
