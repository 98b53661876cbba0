"""`python -m service detect PICTURE...`: the service's own pipeline on files, without a server. One JSON object a line."""

from __future__ import annotations

import argparse
import asyncio
import glob
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI

from service.answers import answer_document, choose, dump
from service.drawing import draw
from service.errors import DetectorError
from service.health import EXIT_NO_MODEL
from service.images import decode
from service.options import DetectOptions, parse_options, select_labels
from service.parts import Parts
from service.pipeline import Result
from service.problems import problem
from service.repository import ServedVersion

EXIT_SOME_FAILED = 1
PATIENCE_S = 24 * 3600.0
"""Nobody waits at the other end."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".mpo"}
"""What is taken out of a folder; a file that is named is tried whatever its name."""
Job = tuple[Path, Path | None]
"""A picture's file, and where to write it drawn."""
DRAWN_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; its options are those of /v1/detect."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders (searched in depth) or quoted globs")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="also write each picture with its boxes drawn here")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the lines here instead of to standard output")
    for name in ("score_threshold", "max_detections", "classes", "box_format", "model"):
        parser.add_argument("--" + name.replace("_", "-"), help=DetectOptions.model_fields[name].description)


def find_pictures(arguments: Sequence[str]) -> list[Path]:
    """Files in the order given; folders and globs in the order of names.

    Raises:
        ValueError: an argument that matches nothing.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matched = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            matched = [path]
        else:
            matched = sorted(Path(name) for name in glob.glob(argument, recursive=True))  # noqa: PTH207  absolute patterns too
        if not matched:
            raise ValueError(f"{argument!r} matches no picture")
        found += matched
    return found


def drawn_names(paths: Sequence[Path]) -> list[str]:
    """A name for each drawn picture: its own, numbered where two are alike; kinds that are not drawn become JPEG."""
    taken: Counter[str] = Counter()
    names = []
    for path in paths:
        suffix = path.suffix.lower() if path.suffix.lower() in DRAWN_TYPES else ".jpg"
        taken[path.stem + suffix] += 1
        count = taken[path.stem + suffix]
        names.append(f"{path.stem}{f'-{count}' if count > 1 else ''}{suffix}")
    return names


def detect(arguments: argparse.Namespace, app: FastAPI) -> int:
    """Run the command with an app that nothing serves. Returns the exit code: 0, 1 if some picture has no answer, 3 without a model."""
    options = parse_options([(name, value) for name, value in vars(arguments).items() if name in DetectOptions.model_fields and value])
    paths = find_pictures(arguments.pictures)
    targets: list[Path | None] = [None] * len(paths)
    if arguments.draw is not None:
        arguments.draw.mkdir(parents=True, exist_ok=True)
        targets = [arguments.draw / name for name in drawn_names(paths)]
    with ExitStack() as stack:
        lines = stack.enter_context(arguments.output.open("wb")) if arguments.output is not None else sys.stdout.buffer
        return asyncio.run(_detect_all(app, list(zip(paths, targets, strict=True)), options, lines))


async def _detect_all(app: FastAPI, jobs: Sequence[Job], options: DetectOptions, lines: IO[bytes]) -> int:
    parts: Parts = app.state.parts
    async with app.router.lifespan_context(app):
        await parts.health.settled()
        if parts.health.failure is not None:
            print(f"python -m service: {parts.health.failure}", file=sys.stderr)
            return EXIT_NO_MODEL
        served = parts.repository.resolve(options.model)
        select_labels(options.classes, served.manifest.class_names)
        failed = 0
        async for number, document in _answers(parts, served, jobs, options):
            lines.write(dump(document) + b"\n")
            failed += "error" in document
            _show_progress(number, len(jobs))
        lines.flush()
    return EXIT_SOME_FAILED if failed else 0


async def _answers(
    parts: Parts, served: ServedVersion, jobs: Iterable[Job], options: DetectOptions
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Documents in the order of the files, with enough pictures under way to fill batches and no more in memory than that."""
    window = min(4 * parts.settings.max_batch_size, parts.settings.max_queue_images)
    under_way: list[asyncio.Task[dict[str, Any]]] = []
    number = 0
    for job in jobs:
        under_way.append(asyncio.create_task(_answer_one(parts, served, job, options)))
        if len(under_way) >= window:
            number += 1
            yield number, await under_way.pop(0)
    for task in under_way:
        number += 1
        yield number, await task


async def _answer_one(parts: Parts, served: ServedVersion, job: Job, options: DetectOptions) -> dict[str, Any]:
    path, target = job
    try:
        data = await asyncio.to_thread(path.read_bytes)
        result = await parts.pipeline.detect(data, served, deadline=time.monotonic() + PATIENCE_S)
        return {"file": str(path), **await parts.pipeline.compute(_finish, data, result, options, parts, target)}
    except DetectorError as error:
        return {"file": str(path), "error": problem(error)}
    except OSError as error:
        return {"file": str(path), "error": {"code": "unreadable", "detail": str(error)}}


def _finish(data: bytes, result: Result, options: DetectOptions, parts: Parts, target: Path | None) -> dict[str, Any]:
    names = result.served.manifest.class_names
    chosen = choose(result, options, select_labels(options.classes, names))
    if target is not None:
        picture = decode(data, parts.pipeline.limits)
        drawn = draw(picture, chosen.boxes, chosen.scores, chosen.labels, names, media_type=DRAWN_TYPES[target.suffix])
        target.write_bytes(drawn.data)
    return answer_document(result, chosen, options, result.decode_s + result.queue_s + result.infer_s)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)
