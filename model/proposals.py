"""Selective Search proposals, computed once a picture and kept on disk: `python -m model.proposals DATA --out CACHE`.

A cached file is named after the picture's bytes and the parameters, so that a changed picture or parameter is never served stale.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from model.data.formats import READERS, open_dataset
from model.data.images import ImageError, read_rgb
from model.data.records import DataError, DetectionSet
from model.stopping import INTERRUPTED

Boxes = NDArray[np.float32]

LINE_SECONDS = 10.0

EXAMPLES = """examples:
  python -m model.proposals VOC2007 --split trainval+test --out cache/ss
  python -m model.proposals VOC2007 --split test --out cache/quality --mode quality --workers 8
"""


@dataclass(frozen=True)
class SearchConfig:
    """Parameters of Selective Search.

    Attributes:
        mode: "fast" (the one that detectors are trained with) or "quality" (about three times as slow, twice the boxes).
        max_side: a larger picture is searched at this long side; VOC's pictures have 500.
        min_side: thinner boxes are dropped, pixels of the original frame.
        limit: boxes kept a picture, best first; the literature's 2000.
        seed: of the random part of the ranking, without which the order differs from run to run.
    """

    mode: Literal["fast", "quality"] = "fast"
    max_side: int = 500
    min_side: float = 10.0
    limit: int = 2000
    seed: int = 0


class Searched(NamedTuple):
    """Boxes float32 [P, 4] of P proposals in the original frame, best first, and how long the search took (when it was done, not read)."""

    boxes: Boxes
    seconds: float


def selective_search(rgb: NDArray[np.uint8], config: SearchConfig) -> Searched:
    """Searches one picture [H, W, 3]. Takes as long as it takes: seconds."""
    started = time.perf_counter()
    height, width = rgb.shape[:2]
    scale = min(1.0, config.max_side / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    searched = cv2.resize(bgr, size_wh, interpolation=cv2.INTER_AREA) if scale < 1 else bgr
    ctypes.CDLL(None).srand(config.seed)  # OpenCV ranks regions with the C library's generator
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(searched)
    (search.switchToSelectiveSearchFast if config.mode == "fast" else search.switchToSelectiveSearchQuality)()
    found = np.asarray(search.process(), dtype=np.float32).reshape(-1, 4)  # x, y, w, h
    boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)
    boxes *= np.array([width / size_wh[0], height / size_wh[1]] * 2, dtype=np.float32)
    sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    kept = boxes[sides >= config.min_side][: config.limit]
    return Searched(kept, time.perf_counter() - started)


def cache_key(path: Path, config: SearchConfig) -> str:
    """A name that depends on the picture's bytes, the parameters and OpenCV's version, and on nothing else."""
    digest = hashlib.sha256(path.read_bytes())
    digest.update(json.dumps([dataclasses.asdict(config), cv2.__version__], sort_keys=True).encode())
    return digest.hexdigest()[:40]


def search_file(path: Path, cache: Path, config: SearchConfig) -> Searched:
    """The proposals of a picture file, from the cache where they are there and whole."""
    kept = cache / f"{cache_key(path, config)}.npz"
    if (cached := _read(kept)) is not None:
        return cached
    searched = selective_search(read_rgb(path), config)
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f".{kept.name}.{os.getpid()}.part"
    with part.open("wb") as file:
        np.savez_compressed(file, boxes=searched.boxes, seconds=np.float64(searched.seconds))
    part.replace(kept)
    return searched


def _read(path: Path) -> Searched | None:
    try:
        with path.open("rb") as file, np.load(file) as content:  # numpy leaves a file open that it cannot read
            return Searched(content["boxes"], float(content["seconds"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # cut short by a full disk: computed again
        return None


def search_dataset(
    dataset: DetectionSet,
    cache: Path,
    config: SearchConfig = SearchConfig(),
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Searched]:
    """Proposals of every picture, in the order of the records.

    Args:
        workers: processes that search; 1 searches here.
        progress: called with (pictures done, pictures in all).
    """
    results = []
    for result in _each(dataset, cache, config, workers):
        results.append(result)
        if progress is not None:
            progress(len(results), len(dataset))
    return results


def _each(dataset: DetectionSet, cache: Path, config: SearchConfig, workers: int) -> Iterator[Searched]:
    paths = [record.path for record in dataset.records]
    if workers <= 1:
        yield from (search_file(path, cache, config) for path in paths)
        return
    # the C library's generator belongs to a process, so threads would disturb each other's order
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(search_file, paths, [cache] * len(paths), [config] * len(paths))


def _one_thread() -> None:
    cv2.setNumThreads(1)


class _Lines:
    """Progress as a line now and then."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS or done == total:
            self.said = now
            left = (now - self.started) / done * (total - done)
            print(f"{done}/{total} pictures, about {left:.0f} s left", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.proposals", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the cached proposals")
    parser.add_argument("--format", choices=sorted(READERS), help="format of the data set; guessed from the folder if left out")
    parser.add_argument("--split", default="train", help='split to search; several are joined with "+" (default: train)')
    parser.add_argument("--mode", choices=("fast", "quality"), default="fast", help="(default: fast)")
    parser.add_argument("--max-side", type=int, default=500, help="larger pictures are searched at this long side (default: 500)")
    parser.add_argument("--limit", type=int, default=2000, help="boxes kept a picture (default: 2000)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out instead of stopping at them")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    config = SearchConfig(mode=options.mode, max_side=options.max_side, limit=options.limit)
    try:
        dataset = open_dataset(options.data, options.split, data_format=options.format, skip_bad=options.skip_bad)
        known = sum((options.out / f"{cache_key(record.path, config)}.npz").is_file() for record in dataset.records)
        print(f"{dataset.name}: {len(dataset)} pictures, {known} of them in {options.out}")
        results = search_dataset(dataset, options.out, config, workers=options.workers, progress=_Lines())
    except (DataError, ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what is done lies in {options.out} and is not searched again", file=sys.stderr)
        return INTERRUPTED
    boxes, seconds = [len(result.boxes) for result in results], [result.seconds for result in results]
    print(f"{np.mean(boxes):.0f} boxes and {np.mean(seconds):.2f} s a picture")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
