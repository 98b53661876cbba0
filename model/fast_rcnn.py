"""Fast R-CNN: the detection half of the network, on proposals that come from elsewhere (Selective Search, another RPN).

It borrows backbone, pooling and head of a `FasterRCNN`, so that both halves can be trained in turns on the same weights.
B images, P proposals an image, R RoIs, G ground-truth boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import boxes as box_ops
from model.data.images import pad_batch, padded_hw, read_rgb, resized_hw
from model.data.records import DetectionSet, Record
from model.faster_rcnn import FasterRCNN, Targets
from model.metrics.predictions import Prediction
from model.roi_heads import Detections, detect, roi_loss, sample_rois
from model.rpn import Proposals

Boxes = NDArray[np.float32]

DEDUPLICATION_STRIDE = 16
"""Proposals that round to the same cells of the shared map give the same features; the release keeps one of them."""


class FastRCNN(nn.Module):
    """A detector on given proposals.

    Args:
        detector: whose backbone, pooling and head it uses; its RPN stays out of it.
        background_low: RoIs learn as background from this IoU with some object up (the MATLAB release: 0.1, its later one: 0).
        normal: mean and deviation `[K + 1, 4]` of wanted deltas by label, where the head predicts them normalised while it learns.
    """

    def __init__(self, detector: FasterRCNN, *, background_low: float = 0.0, normal: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.background_low = background_low
        self.normal = normal

    def forward(
        self, images: Tensor, image_sizes_hw: Tensor, proposals: Proposals, targets: Targets | None = None
    ) -> Detections | dict[str, Tensor]:
        """Detections, or with targets the losses "roi_cls" and "roi_reg".

        Args:
            images: uint8 `[B, H, W, 3]`, padded.
            image_sizes_hw: int64 `[B, 2]`.
            proposals: `[B, P, 4]` in the input frame.
        """
        detector, roi = self.detector, self.detector.config.roi
        levels = detector.backbone(detector.normalize(images, image_sizes_hw))
        frame_hw = (images.shape[1], images.shape[2])
        if targets is None:
            logits, deltas = detector.head(self.pool(levels, proposals.boxes, frame_hw))
            return detect(logits, deltas, proposals, image_sizes_hw, roi, detector.nms)
        samples = sample_rois(near_objects(proposals, targets, self.background_low), targets.boxes, targets.labels, roi)
        logits, deltas = detector.head(self.pool(levels, samples.rois, frame_hw))
        cls, reg = roi_loss(logits, deltas, samples, roi, normal=self.normal)
        return {"roi_cls": cls, "roi_reg": reg}

    def pool(self, levels: list[Tensor], rois: Tensor, frame_hw: tuple[int, int]) -> Tensor:
        """Pooled features `[B * R, C, s, s]` of RoIs `[B, R, 4]`; the extra level of a pyramid serves an RPN alone."""
        seen = levels[:-1] if self.detector.backbone.has_extra_level else levels
        return self.detector.pool(seen, rois, frame_hw, self.detector.config.roi)


def near_objects(proposals: Proposals, targets: Targets, background_low: float) -> Proposals:
    """Without the proposals that overlap no object by at least `background_low`."""
    if background_low <= 0:
        return proposals
    overlaps = box_ops.iou(proposals.boxes, targets.boxes)  # [B, P, G]
    best = torch.where(targets.labels[:, None, :] > 0, overlaps, 0.0).amax(dim=2)
    return Proposals(proposals.boxes, proposals.valid & (best >= background_low))


def deduplicate(boxes: Boxes, stride: int = DEDUPLICATION_STRIDE) -> Boxes:
    """The first of all boxes [P, 4] (input frame) that round to the same cells, order kept."""
    _, first = np.unique(np.round(boxes / stride), axis=0, return_index=True)
    return boxes[np.sort(first)]


def to_input_frame(boxes: NDArray[np.floating], original_hw: tuple[int, int], input_hw: tuple[int, int]) -> Boxes:
    """Boxes [P, 4] of the original frame in the input frame."""
    factor = np.array([input_hw[1] / original_hw[1], input_hw[0] / original_hw[0]] * 2)
    return np.asarray(boxes * factor, dtype=np.float32).reshape(-1, 4)


def pad_proposals(boxes: Sequence[Boxes]) -> Proposals:
    """Proposals of several pictures, [P_i, 4] each, padded to the longest (at least one row)."""
    most = max(1, *(len(rows) for rows in boxes))
    padded = torch.zeros(len(boxes), most, 4)
    valid = torch.zeros(len(boxes), most, dtype=torch.bool)
    for i, rows in enumerate(boxes):
        padded[i, : len(rows)] = torch.from_numpy(rows)
        valid[i, : len(rows)] = True
    return Proposals(padded, valid)


def read_input(record: Record, short_side: float, long_side: float) -> tuple[Tensor, Tensor]:
    """One picture as a batch: uint8 `[1, H, W, 3]`, padded, and its size `[1, 2]`."""
    size_hw = resized_hw(record.size_hw, short_side, long_side)
    image = read_rgb(record.path, size_hw=size_hw, expected_hw=record.size_hw)
    return torch.from_numpy(pad_batch([image], padded_hw([size_hw]))), torch.tensor([size_hw])


@torch.inference_mode()
def detect_external(
    detector: FasterRCNN,
    dataset: DetectionSet,
    proposals: Sequence[NDArray[np.floating]],
    *,
    limit: int = 2000,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Detections of every picture on the best `limit` of its proposals, one array [P, 4] a record in the original frame."""
    if len(proposals) != len(dataset):
        raise ValueError(f"{len(dataset)} pictures, but proposals for {len(proposals)}; compute them for this very split")
    fast, frame = FastRCNN(detector).eval(), detector.config.input
    device = next(detector.parameters()).device
    found = []
    for record, boxes in zip(dataset.records, proposals, strict=True):
        image, size_hw = read_input(record, frame.short_side, frame.long_side)
        height, width = size_hw[0].tolist()
        rois = pad_proposals([deduplicate(to_input_frame(boxes[:limit], record.size_hw, (height, width)))])
        detections = fast(image.to(device), size_hw.to(device), Proposals(rois.boxes.to(device), rois.valid.to(device)))
        found.append(original_frame(detections, record, (height, width)))
        if progress is not None:
            progress(len(found))
    return found


def original_frame(detections: Detections, record: Record, input_hw: tuple[int, int]) -> Prediction:
    """The detections of a batch of one in the frame of its picture."""
    count = int(detections.num_detections[0])
    boxes = to_input_frame(detections.boxes[0, :count].float().cpu().numpy(), input_hw, record.size_hw)  # the way back
    height, width = record.size_hw
    return Prediction(
        boxes=boxes.clip(0, np.array([width, height, width, height], dtype=np.float32)),
        scores=detections.scores[0, :count].float().cpu().numpy(),
        labels=detections.labels[0, :count].cpu().numpy(),
    )
