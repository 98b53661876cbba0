"""How the time of an image grows: with the batch, with the picture, with the proposals; and how deep the NMS of real proposals goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.runtime_contenders import Device, Run, exported, our_graph, their_eager
from benchmarks.runtime_networks import Sample, build_pair, full_bucket, with_proposals
from export.job import input_spec
from model.checkpoint import load_detector
from model.data.formats import open_dataset
from model.data.images import read_rgb
from model.nms import INVALID_SCORE, dense_nms_rounds, greedy_nms
from service.images import assemble, prepare_pixels
from service.manifest import Bucket

STRIDE = 32


@dataclass(frozen=True)
class Plan:
    """What is swept over."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    short_sides: tuple[int, ...] = (320, 480, 640, 800)
    proposals: tuple[int, ...] = (50, 150, 300, 1000)
    bucket: Bucket = (800, 1088)


QUICK = Plan(batches=(1, 2), short_sides=(64, 96), proposals=(20,), bucket=(64, 96))


def sweep(
    network: str, weights: Path | None, device: Device, plan: Plan, rounds: int, progress: Callable[[str], None]
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds an image: `{"batch": [{"x": 1, "ours": ..., "torchvision": ...}, ...], "short side": ..., "proposals": ...}`."""
    pair = build_pair(network, weights)
    progress(f"exporting {network} for the sweeps")
    ours, theirs = exported(our_graph(pair, device).SerializeToString(), device), their_eager(pair, device)
    found: dict[str, list[dict[str, float]]] = {"batch": [], "short side": [], "proposals": []}
    for size in plan.batches:
        progress(f"batch of {size}")
        found["batch"].append({"x": size, **_both(ours, None, full_bucket(plan.bucket, size), rounds)})
    for side in plan.short_sides:
        progress(f"short side {side}")
        bucket = (side, -(-side * 4 // 3 // STRIDE) * STRIDE)
        _unlimited(pair.theirs, bucket)
        found["short side"].append({"x": side, **_both(ours, theirs, full_bucket(bucket), rounds)})
    for count in plan.proposals:
        progress(f"{count} proposals")
        limited = with_proposals(pair, count)
        model = our_graph(limited, device).SerializeToString()
        _unlimited(limited.theirs, plan.bucket)
        found["proposals"].append(
            {"x": count, **_both(exported(model, device), their_eager(limited, device), full_bucket(plan.bucket), rounds)}
        )
    return found


def _unlimited(network: Any, bucket: Bucket) -> None:
    """Keep torchvision from resizing pictures of this size."""
    network.transform.min_size, network.transform.max_size = (min(bucket),), max(bucket)


def _both(ours: Run, theirs: Run | None, sample: Sample, rounds: int) -> dict[str, float]:
    """Milliseconds an image, medians of rounds in turns after one that warms up."""
    runs = {"ours": ours} | ({"torchvision": theirs} if theirs else {})
    times = in_turns(runs, [sample], rounds)
    return {name: float(np.median(values)) * 1e3 / len(sample.images) for name, values in times.items()}


def in_turns(
    runs: dict[str, Run], samples: Sequence[Sample], rounds: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, list[float]]:
    """Seconds a picture of every contender in every round; a first round, which warms up, does not count.

    Everybody runs in turns within one process, so that a busy machine slows them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            progress(f"round {index} of {rounds}: {name}" if index else f"warming up {name}")
            started = time.perf_counter()
            for sample in samples:
                run(sample)
            if index:
                seconds[name].append((time.perf_counter() - started) / len(samples))
    return seconds


@torch.inference_mode()
def nms_depth(checkpoint: Path, data: Path, split: str, pictures: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Rounds that the matrix form of NMS needs on a trained network's own proposals and detections, its last look included.

    Returns:
        `{"pictures", "proposals": {rounds: scenes}, "detections": {...}, "unequal": scenes where it differs from greedy NMS}`.
    """
    detector = load_detector(checkpoint)
    counts: dict[str, Counter[int]] = {"proposals": Counter(), "detections": Counter()}
    unequal = 0

    def counting(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
        nonlocal unequal
        keep = greedy_nms(boxes, scores, groups, iou_thresh)
        for scene in range(len(boxes)):
            if not (scores[scene] > INVALID_SCORE).any():
                continue
            rows = slice(scene, scene + 1)
            found, rounds = dense_nms_rounds(boxes[rows], scores[rows], None if groups is None else groups[rows], iou_thresh)
            counts["proposals" if groups is None else "detections"][rounds] += 1
            unequal += not torch.equal(found, keep[rows])
        return keep

    detector.nms = counting
    dataset = open_dataset(data, split, class_names=detector.config.class_names, skip_bad=True)
    spec = input_spec(detector.config)
    records = dataset.records[:pictures]
    for index, record in enumerate(records, start=1):
        progress(f"NMS depth, picture {index} of {len(records)}")
        images, sizes_hw = assemble([prepare_pixels(read_rgb(record.path), spec)])
        detector(torch.from_numpy(images), torch.from_numpy(sizes_hw))
    histograms = {name: {str(rounds): count for rounds, count in sorted(counter.items())} for name, counter in counts.items()}
    return {"pictures": len(records), "unequal": unequal, **histograms}
