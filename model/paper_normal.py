"""Box targets brought to mean 0 and deviation 1, as the releases do in alternating training, and the layers that predict them.

While a stage learns, its predictor speaks in normalised deltas; before and after, in plain ones, so that a saved network needs to know
nothing of this. N anchors, P proposals and G objects of a picture, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import boxes as box_ops
from model.data.images import padded_hw, resized_hw
from model.data.records import DetectionSet, Record
from model.faster_rcnn import FasterRCNN
from model.matching import match

LEAST_DEVIATION = 0.01
"""A deviation below it says that there was too little to measure; in the units of the deltas."""


class DeltaNormal(NamedTuple):
    """Mean and deviation of wanted deltas (dx, dy, dw, dh): `[4]` for an RPN, `[K + 1, 4]` by label for a head."""

    mean: Tensor
    deviation: Tensor


class _Sums:
    """Running mean and deviation of deltas by row."""

    def __init__(self, rows: int) -> None:
        self.count = torch.zeros(rows, 1, dtype=torch.float64)
        self.total, self.squares = torch.zeros(rows, 4, dtype=torch.float64), torch.zeros(rows, 4, dtype=torch.float64)

    def add(self, row: int, deltas: Tensor) -> None:
        exact = deltas.double()
        self.count[row] += len(exact)
        self.total[row] += exact.sum(dim=0)
        self.squares[row] += exact.square().sum(dim=0)

    def normal(self, hflip: float) -> DeltaNormal:
        """Rows with fewer than two samples stay as they are (mean 0, deviation 1)."""
        known = self.count >= 2
        mean = self.total / self.count.clamp(min=1)
        mean[:, 0] *= 1 - 2 * hflip  # a mirrored picture has the opposite dx
        deviation = (self.squares / self.count.clamp(min=1) - mean.square()).clamp(min=0).sqrt().clamp(min=LEAST_DEVIATION)
        return DeltaNormal(torch.where(known, mean, 0.0).float(), torch.where(known, deviation, 1.0).float())


@torch.no_grad()
def rpn_normal(detector: FasterRCNN, dataset: DetectionSet, hflip: float = 0.5) -> DeltaNormal:
    """Of the deltas of all positive anchors of a data set: `[4]` each, on the detector's device."""
    device = next(detector.parameters()).device
    sums, grids = _Sums(1), dict[tuple[int, int], Tensor]()
    for record in dataset.records:
        gt, size_hw = _gt_in_input_frame(detector, record, device)
        if not len(gt):
            continue
        frame_hw = padded_hw([size_hw])
        if frame_hw not in grids:
            grids[frame_hw] = _anchors(detector, frame_hw)
        matched = _matched(detector, grids[frame_hw], gt, size_hw)
        rows = torch.nonzero(matched >= 0)[:, 0]
        sums.add(0, box_ops.encode_deltas(gt[matched[rows]], grids[frame_hw][rows]).cpu())
    mean, deviation = sums.normal(hflip)
    return DeltaNormal(mean[0].to(device), deviation[0].to(device))


def _gt_in_input_frame(detector: FasterRCNN, record: Record, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    frame = detector.config.input
    size_hw = resized_hw(record.size_hw, frame.short_side, frame.long_side)
    factor = np.array([size_hw[1] / record.size_hw[1], size_hw[0] / record.size_hw[0]] * 2)
    return torch.from_numpy(record.boxes[record.plain] * factor).float().to(device), size_hw


def _anchors(detector: FasterRCNN, frame_hw: tuple[int, int]) -> Tensor:
    """Anchors `[N, 4]` of an input of this size; the backbone runs once to learn the sizes of its maps."""
    device = next(detector.parameters()).device
    image = torch.zeros(1, *frame_hw, 3, dtype=torch.uint8, device=device)
    levels = detector.backbone(detector.normalize(image, torch.tensor([frame_hw], device=device)))
    return torch.cat(detector.anchors(levels, frame_hw))


def _matched(detector: FasterRCNN, anchors: Tensor, gt: Tensor, size_hw: tuple[int, int]) -> Tensor:
    config = detector.config.rpn
    eligible = box_ops.inside(anchors, torch.tensor([size_hw], device=anchors.device)) if config.inside_only else None
    return match(
        anchors,
        gt[None],
        torch.ones(1, len(gt), dtype=torch.bool, device=gt.device),
        fg_iou_thresh=config.fg_iou_thresh,
        bg_iou_thresh=config.bg_iou_thresh,
        allow_low_quality=True,
        eligible=eligible,
    )[0]


@torch.no_grad()
def head_normal(detector: FasterRCNN, dataset: DetectionSet, proposals: Sequence[NDArray[np.floating]], hflip: float = 0.5) -> DeltaNormal:
    """Of the weighted deltas of all foreground RoIs, objects themselves included, by label: `[K + 1, 4]` each.

    Args:
        proposals: original frame, [P, 4] a record.
    """
    config, sums = detector.config.roi, _Sums(detector.config.num_classes + 1)
    for record, boxes in zip(dataset.records, proposals, strict=True):
        gt = torch.from_numpy(record.boxes[record.plain]).float()
        if not len(gt):
            continue
        rois = torch.cat([torch.from_numpy(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4), gt])
        best, row = box_ops.iou(rois, gt).max(dim=1)  # frames differ by a scale, which deltas do not see
        kept = (best >= config.fg_iou_thresh) & box_ops.wider_than(rois, 0.0)
        deltas = box_ops.encode_deltas(gt[row[kept]], rois[kept], config.box_weights)
        labels = torch.from_numpy(record.labels[record.plain])[row[kept]]
        for label in sorted(set(labels.tolist())):
            sums.add(label, deltas[labels == label])
    mean, deviation = sums.normal(hflip)
    device = next(detector.parameters()).device
    return DeltaNormal(mean.to(device), deviation.to(device))


@contextmanager
def speaking_normal(layer: nn.Conv2d | nn.Linear, normal: DeltaNormal | None) -> Iterator[None]:
    """The layer predicts normalised deltas inside and the same deltas, plain, outside.

    Args:
        layer: whose outputs are deltas, four a row; the rows of `normal` repeat over them.
    """
    if normal is None:
        yield
        return
    assert layer.bias is not None
    repeats = layer.bias.numel() // normal.mean.numel()
    mean, deviation = normal.mean.flatten().repeat(repeats), normal.deviation.flatten().repeat(repeats)
    column = (-1, *([1] * (layer.weight.ndim - 1)))
    with torch.no_grad():
        layer.weight.div_(deviation.reshape(column))
        layer.bias.sub_(mean).div_(deviation)
    try:
        yield
    finally:
        with torch.no_grad():
            layer.weight.mul_(deviation.reshape(column))
            layer.bias.mul_(deviation).add_(mean)
