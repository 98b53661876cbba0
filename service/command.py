"""`python -m service detect PICTURE...`: the service's own pipeline on files, without a server. One JSON object a line."""

from __future__ import annotations

import argparse
import asyncio
import glob
import os
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
EXIT_INTERRUPTED = 130
PATIENCE_S = 24 * 3600.0
"""Nobody waits at the other end."""
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".mpo"),
    *(".heic", ".heif"),  # answered with the reason why not, which is better than being passed over
}
"""What is taken out of a folder; a file that is named is tried whatever its name."""
EPILOG = """examples:
  python -m service detect photo.jpg
  python -m service detect photos --draw drawn --output found.jsonl
  python -m service detect 'photos/**/*.png' --classes RBC,WBC --score-threshold 0.3 --provider cpu

Each line is a JSON object: `file` and what /v1/detect answers, or `file` and `error`. Lines come in the order of the files.
Exit status: 0 every picture was answered, 1 some were not, 2 a mistake in the command, 3 no model, 130 interrupted.
"""
METAVARS = {"score_threshold": "SCORE", "max_detections": "N", "classes": "NAMES", "box_format": "FORMAT", "model": "NAME"}
Job = tuple[Path, Path | None]
"""A picture's file, and where to write it drawn."""
DRAWN_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; its options are those of /v1/detect."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders (searched in depth) or quoted globs")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="also write each picture with its boxes drawn here")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the lines here instead of to standard output")
    for name, metavar in METAVARS.items():
        field = DetectOptions.model_fields[name]
        shown = f" (default: {field.default})" if field.default else ""
        action = "append" if name == "classes" else "store"
        parser.add_argument("--" + name.replace("_", "-"), metavar=metavar, action=action, help=f"{field.description}{shown}")
    for name in ("--model-repository", "--provider"):  # before the command they mean the same
        parser.add_argument(name, default=argparse.SUPPRESS, help=f"instead of DETECTOR_{name[2:].upper().replace('-', '_')}")


def find_pictures(arguments: Sequence[str], *, leave_out: Path | None = None) -> list[Path]:
    """Files in the order given; folders and globs in the order of names.

    Args:
        leave_out: a folder whose files are not taken out of a folder around it: where an earlier run has drawn.

    Raises:
        ValueError: an argument that matches nothing.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            matched = sorted(file for file in files if leave_out is None or not file.resolve().is_relative_to(leave_out.resolve()))
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
    """Run the command with an app that nothing serves. Returns the exit code, see EPILOG.

    Raises:
        ValueError, DetectorError: a mistake in the command, as a sentence.
    """
    options = parse_options([(name, value) for name, value in vars(arguments).items() if name in DetectOptions.model_fields and value])
    paths = find_pictures(arguments.pictures, leave_out=arguments.draw)
    targets = _targets(paths, arguments.draw)
    with ExitStack() as stack:
        lines = stack.enter_context(_open_output(arguments.output)) if arguments.output is not None else sys.stdout.buffer
        try:
            return asyncio.run(_detect_all(app, list(zip(paths, targets, strict=True)), options, lines))
        except BrokenPipeError:  # whoever read the lines has enough of them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print("\npython -m service: interrupted; the lines so far are written", file=sys.stderr)
            return EXIT_INTERRUPTED


def _targets(paths: Sequence[Path], folder: Path | None) -> list[Path | None]:
    """Where to write each picture drawn.

    Raises:
        ValueError: it would replace one of the pictures themselves, or the folder cannot be made.
    """
    if folder is None:
        return [None] * len(paths)
    targets = [folder / name for name in drawn_names(paths)]
    originals = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in originals:
            raise ValueError(f"--draw {folder} would replace {target} by its drawing; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--draw {folder}: {error.strerror}") from error
    return [*targets]


def _open_output(path: Path) -> IO[bytes]:
    try:
        return path.open("wb")
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror}") from error


async def _detect_all(app: FastAPI, jobs: Sequence[Job], options: DetectOptions, lines: IO[bytes]) -> int:
    parts: Parts = app.state.parts
    async with app.router.lifespan_context(app):
        await parts.health.settled()
        if parts.health.failure is not None:
            print(f"python -m service: {parts.health.failure}", file=sys.stderr)
            return EXIT_NO_MODEL
        served = parts.repository.resolve(options.model)
        select_labels(options.classes, served.manifest.class_names)
        failed, started = 0, time.monotonic()
        async for number, document in _answers(parts, served, jobs, options):
            lines.write(dump(document) + b"\n")
            lines.flush()  # for whoever reads along
            failed += "error" in document
            _show_progress(number, len(jobs), time.monotonic() - started)
        print(_summary(len(jobs), failed, time.monotonic() - started), file=sys.stderr)
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


def _show_progress(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty():
        left_s = seconds / done * (total - done)
        line = f"\r{done}/{total} pictures, {done / max(seconds, 1e-9):.1f} a second, {left_s:.0f} s left "
        print(line, end="" if done < total else "\n", file=sys.stderr, flush=True)


def _summary(total: int, failed: int, seconds: float) -> str:
    unanswered = f", {failed} of them without an answer: see `error` in their lines" if failed else ""
    return f"{total} picture{'s' if total != 1 else ''} in {seconds:.1f} s{unanswered}"
