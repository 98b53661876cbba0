"""Table 5 and the comparison of the three generations: time a picture, stage by stage, all in one run on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.data.images import read_rgb
from model.data.records import DetectionSet, Record
from model.fast_rcnn import FastRCNN, deduplicate, original_frame, pad_proposals, read_input, to_input_frame
from model.faster_rcnn import FasterRCNN
from model.metrics.predictions import Prediction
from model.paper_lab import Lab, mean_ap
from model.paper_rcnn import (
    NEGATIVES_PER_PICTURE,
    Array,
    Features,
    RegionClassifier,
    crop_features,
    fit_regions,
    pyramid_detector,
    pyramid_features,
)
from model.paper_training import fast_objective, train_stage
from model.proposals import selective_search
from model.roi_heads import detect
from model.rpn import Proposals, propose

STAGES = ("conv", "proposal", "region", "total")

_Published = tuple[float | None, float | None, float | None, float | None]

PUBLISHED: dict[tuple[str, str], tuple[_Published, float | None]] = {
    ("R-CNN", "vgg16"): ((None, None, None, 50_000.0), 66.0),
    ("Fast R-CNN", "vgg16"): ((146.0, 1510.0, 174.0, 1830.0), 66.9),
    ("Faster R-CNN", "vgg16"): ((141.0, 10.0, 47.0, 198.0), 69.9),
    ("Faster R-CNN", "zf"): ((31.0, 3.0, 25.0, 59.0), 59.9),
}
"""(system, network) -> milliseconds a picture by stage on a K40, and mean average precision on VOC07 test."""


@dataclass(frozen=True)
class SpeedRow:
    """Milliseconds a picture.

    Attributes:
        published: conv, proposal, region-wise and total on a K40; None where the paper has no such number.
        ours: medians over the pictures, by stage.
        totals: of each picture, in their order.
        accuracy: mean average precision, where it was asked for.
    """

    label: str
    published: _Published
    ours: dict[str, float]
    totals: list[float]
    accuracy: float | None = None
    published_accuracy: float | None = None


@dataclass(frozen=True)
class SpeedOptions:
    """How much is measured.

    Attributes:
        pictures: of the test set, one more being run before to warm up.
        fit_pictures: training pictures of the SVMs.
        crops: R-CNN runs so many of its regions and the time is scaled to all of them; its SVMs and those of SPP-net see no more of each
            training picture. None: all.
        large, small: the two networks, VGG-16 and ZF in the paper.
        accuracy: also train, and score the pictures that are timed.
    """

    pictures: int
    fit_pictures: int
    crops: int | None
    large: str
    small: str
    accuracy: bool


class Clock:
    """Times the stages of a picture; waits for the device at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages = dict.fromkeys(STAGES[:-1], 0.0)
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self, stage: str, factor: float = 1.0) -> None:
        """What passed since the last stop belongs to this stage, times a factor."""
        now = self._now()
        self.stages[stage] += 1000 * (now - self._last) * factor
        self._last = now


System = Callable[[Record, Array, Clock], Prediction | None]
"""Detects on one picture, with the boxes of Selective Search at hand, and stops the clock after each stage."""


@dataclass(frozen=True)
class Contender:
    """A row of the table; `searches` says whether it needs Selective Search, whose time is then its own."""

    label: str
    system: System
    published: _Published
    accuracy: float | None
    searches: bool = True


class Band(NamedTuple):
    """Median, least and largest value over the pictures."""

    median: float
    low: float
    high: float


def speed_table(lab: Lab, options: SpeedOptions) -> list[SpeedRow]:
    """All systems on the same pictures in turn, in the opposite order on every other one, so that a busy machine disturbs them alike.

    Selective Search runs once a picture, and its time counts for each system that needs it: their ratios then do not carry its noise.

    Raises:
        ValueError: the two networks are one.
    """
    if options.large == options.small:
        raise ValueError(f"table 5 compares two networks, but both are {options.large}; give another --other-preset")
    test = lab.sets.test.with_records(lab.sets.test.records[: options.pictures])
    contenders = _contenders(lab, options)
    times: dict[str, list[dict[str, float]]] = {contender.label: [] for contender in contenders}
    found: dict[str, list[Prediction | None]] = {contender.label: [] for contender in contenders}
    with lab.progress("timing", len(test) + 1) as progress:
        for number, record in enumerate([test.records[0], *test.records]):
            for contender, stages, prediction in _picture(lab, contenders if number % 2 else contenders[::-1], record):
                if number:  # the first picture only warms up
                    times[contender.label].append(stages)
                    found[contender.label].append(prediction)
            progress(number + 1, None)
    return [
        SpeedRow(
            each.label,
            each.published,
            _medians(times[each.label]),
            [stages["total"] for stages in times[each.label]],
            _accuracy(lab, options, test, found[each.label]),
            each.accuracy,
        )
        for each in contenders
    ]


def _picture(lab: Lab, contenders: Sequence[Contender], record: Record) -> Iterator[tuple[Contender, dict[str, float], Prediction | None]]:
    """Milliseconds by stage and detections of each system on one picture."""
    device = torch.device(lab.setup.device)
    search = Clock(device)
    boxes = _search(lab, record, search)
    for contender in contenders:
        clock = Clock(device)
        prediction = contender.system(record, boxes, clock)
        if contender.searches:
            clock.stages["proposal"] = search.stages["proposal"]
        yield contender, {**clock.stages, "total": sum(clock.stages.values())}, prediction


def ratios(rows: Sequence[SpeedRow]) -> dict[str, Band]:
    """How many times faster than R-CNN each system is, picture by picture; published with the large network: Fast 25, Faster 250."""
    slowest = np.array(next(row.totals for row in rows if row.label.startswith("R-CNN")))
    bands = {}
    for row in rows:
        faster = slowest / np.array(row.totals)
        bands[row.label] = Band(float(np.median(faster)), float(faster.min()), float(faster.max()))
    return bands


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {stage: float(np.median([picture[stage] for picture in times])) for stage in STAGES}


def _accuracy(lab: Lab, options: SpeedOptions, test: DetectionSet, found: list[Prediction | None]) -> float | None:
    whole = [prediction for prediction in found if prediction is not None]
    return mean_ap(test, whole) if options.accuracy and len(whole) == len(test) else None


def _contenders(lab: Lab, options: SpeedOptions) -> list[Contender]:
    large, small = options.large, options.small
    fast = lab.fast(large) if options.accuracy else _untrained(lab, large)
    spp = _spp(lab, fast, options)
    train = lab.sets.train.with_records(lab.sets.train.records[: options.fit_pictures])
    proposals = lab.searched_boxes(train)
    crops, pyramid = crop_features(fast), pyramid_features(spp)
    crop_svms, pyramid_svms = (_fit(lab, name, train, proposals, made, options) for name, made in (("R-CNN", crops), ("SPP-net", pyramid)))
    systems: list[tuple[str, str, str, System]] = [
        ("R-CNN", large, "SS", rcnn(crops, crop_svms, options.crops)),
        ("SPP-net", large, "SS", spp_net(pyramid, pyramid_svms)),
        ("Fast R-CNN", large, "SS", fast_rcnn(fast)),
        ("Faster R-CNN", large, "RPN", faster_rcnn(_whole(lab, large, options))),
        ("Faster R-CNN", small, "RPN", faster_rcnn(_whole(lab, small, options))),
    ]
    return [
        Contender(f"{name}, {network}, {source}", system, *_published(name, network), searches=source == "SS")
        for name, network, source, system in systems
    ]


def _fit(
    lab: Lab, name: str, train: DetectionSet, proposals: Sequence[Array], features: Features, options: SpeedOptions
) -> RegionClassifier:
    """The time of an SVM does not depend on what it has learned from: where R-CNN runs few regions, it also learns from few."""
    negatives = NEGATIVES_PER_PICTURE if options.crops is None else min(options.crops, NEGATIVES_PER_PICTURE)
    with lab.progress(f"features for the SVMs of {name}", len(train), "pictures") as progress:
        return fit_regions(train, proposals, features, negatives=negatives, progress=progress)


def _published(system: str, network: str) -> tuple[_Published, float | None]:
    return PUBLISHED.get((system, network), ((None, None, None, None), None))


def _untrained(lab: Lab, preset: str) -> FasterRCNN:
    return lab.alternation("timing", lab.config(preset), lab.sets.train, Path(), preset).new_detector()


def _whole(lab: Lab, preset: str, options: SpeedOptions) -> FasterRCNN:
    if not options.accuracy:
        return _untrained(lab, preset)
    return lab.shared(f"shared {preset}", lab.config(preset), preset=preset)


def _spp(lab: Lab, fast: FasterRCNN, options: SpeedOptions) -> FasterRCNN:
    """SPP-net's convolutions stay as they are; with `accuracy` its head learns."""
    spp = pyramid_detector(fast)
    if options.accuracy:
        proposals = lab.searched_boxes(lab.sets.train)
        recipe = lab.plan.recipes[1]
        train_stage(spp, [spp.head], fast_objective(spp), lab.sets.train, recipe, seed=lab.seed, proposals=proposals)
    return spp


def _search(lab: Lab, record: Record, clock: Clock) -> Array:
    """Selective Search, done again however full the cache is: its time is what is asked for."""
    rgb = read_rgb(record.path, expected_hw=record.size_hw)
    clock.stop("conv", 0.0)  # reading a picture counts for nobody
    boxes = selective_search(rgb, lab.setup.search).boxes
    clock.stop("proposal")
    return boxes


def rcnn(features: Features, classifier: RegionClassifier, crops: int | None) -> System:
    """Every region through the whole network; nothing is shared, so all of it counts as region-wise."""

    def system(record: Record, boxes: Array, clock: Clock) -> Prediction | None:
        run = boxes if crops is None else boxes[:crops]
        prediction = classifier.detect(record, run, features(record, run))
        clock.stop("region", len(boxes) / max(1, len(run)))
        return prediction if len(run) == len(boxes) else None

    return system


def spp_net(features: Features, classifier: RegionClassifier) -> System:
    """One map, a spatial pyramid a region, then the SVMs; reading and the map's time stand under region-wise."""

    def system(record: Record, boxes: Array, clock: Clock) -> Prediction | None:
        prediction = classifier.detect(record, boxes, features(record, boxes))
        clock.stop("region")
        return prediction

    return system


def fast_rcnn(detector: FasterRCNN) -> System:
    """One map, RoIPool, one head for class and box."""
    fast, frame, roi = FastRCNN(detector).eval(), detector.config.input, detector.config.roi
    device = next(detector.parameters()).device

    @torch.inference_mode()
    def system(record: Record, boxes: Array, clock: Clock) -> Prediction | None:
        image, size_hw = (part.to(device) for part in read_input(record, frame.short_side, frame.long_side))
        clock.stop("conv", 0.0)
        levels = detector.backbone(detector.normalize(image, size_hw))
        clock.stop("conv")
        height, width = size_hw[0].tolist()
        rois = pad_proposals([deduplicate(to_input_frame(boxes, record.size_hw, (height, width)))])
        proposals = Proposals(rois.boxes.to(device), rois.valid.to(device))
        logits, deltas = detector.head(fast.pool(levels, proposals.boxes, (image.shape[1], image.shape[2])))
        detections = detect(logits, deltas, proposals, size_hw, roi, detector.nms)
        clock.stop("region")
        return original_frame(detections, record, (height, width))

    return system


def faster_rcnn(detector: FasterRCNN) -> System:
    """The whole network, stopped between its parts."""
    fast, frame, config = FastRCNN(detector).eval(), detector.config.input, detector.config
    device = next(detector.parameters()).device

    @torch.inference_mode()
    def system(record: Record, _boxes: Array, clock: Clock) -> Prediction | None:
        image, size_hw = (part.to(device) for part in read_input(record, frame.short_side, frame.long_side))
        clock.stop("conv", 0.0)
        frame_hw = (image.shape[1], image.shape[2])
        levels = detector.backbone(detector.normalize(image, size_hw))
        clock.stop("conv")
        anchors = detector.anchors(levels, frame_hw)
        proposals = propose(detector.rpn(levels), anchors, size_hw, config.rpn, detector.nms, training=False)
        clock.stop("proposal")
        logits, deltas = detector.head(fast.pool(levels, proposals.boxes, frame_hw))
        detections = detect(logits, deltas, proposals, size_hw, config.roi, detector.nms)
        clock.stop("region")
        height, width = size_hw[0].tolist()
        return original_frame(detections, record, (height, width))

    return system
