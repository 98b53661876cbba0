"""R-CNN and SPP-net, the two systems before Fast R-CNN: features of regions, then linear SVMs and ridge regression after the fact.

They differ in where the features come from: R-CNN warps every region and runs the whole network on it; SPP-net runs the convolutions
once and pools each region by a spatial pyramid. P regions of a picture, F features, K classes, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms, roi_pool

from model import boxes as box_ops
from model.config import RoIConfig
from model.data.images import read_rgb
from model.data.records import DetectionSet, Record
from model.fast_rcnn import FastRCNN, pad_proposals, read_input, to_input_frame
from model.faster_rcnn import FasterRCNN
from model.metrics.predictions import Prediction, pairwise_iou
from model.roi_heads import BoxHead, TwoFC

Array = NDArray[np.float32]
Features = Callable[[Record, Array], Array]
"""(picture, regions [P, 4] in its frame) -> features [P, F]."""

CROP_SIDE = 224
CROP_CONTEXT = 16 / 227
"""R-CNN leaves 16 px of context on each side of its 227 px crops."""

CROP_BATCH = 32
PYRAMID = (6, 3, 2, 1)
"""Bins a side of SPP-net's four levels: 50 bins in all."""

SVM_C = 1e-3
RIDGE_ALPHA = 1000.0
FEATURE_NORM = 20.0
"""R-CNN scales features to this mean norm before its SVMs, so that C means the same for every network."""

NEGATIVE_IOU, REGRESSION_IOU = 0.3, 0.6
NEGATIVES_PER_PICTURE = 200
NMS_THRESH = 0.3
DETECTIONS_PER_IMAGE = 100


def crop_features(detector: FasterRCNN) -> Features:
    """R-CNN's features: fc7 of each region warped to a fixed square, whatever its shape."""

    @torch.inference_mode()
    def features(record: Record, boxes: Array) -> Array:
        rgb = read_rgb(record.path, expected_hw=record.size_hw)
        device = next(detector.parameters()).device
        batches = []
        for start in range(0, len(boxes), CROP_BATCH):
            crops = np.stack([warp(rgb, box) for box in boxes[start : start + CROP_BATCH]])
            batches.append(_whole_network(detector, torch.from_numpy(crops).to(device)).cpu().numpy())
        return np.concatenate(batches) if batches else np.zeros((0, detector.head.body.out_channels), np.float32)

    return features


def _whole_network(detector: FasterRCNN, crops: Tensor) -> Tensor:
    sizes_hw = torch.tensor([crops.shape[1:3]], device=crops.device).expand(len(crops), 2)
    level = detector.backbone(detector.normalize(crops, sizes_hw))[0]
    hidden: Tensor = detector.head.body(F.adaptive_max_pool2d(level, detector.config.roi.pool_size))
    return hidden


def warp(rgb: NDArray[np.uint8], box: Array) -> NDArray[np.uint8]:
    """A region with its context, stretched to CROP_SIDE squared; beyond the border the picture's edge is repeated."""
    inner = CROP_SIDE * (1 - 2 * CROP_CONTEXT)
    sx, sy = inner / max(float(box[2] - box[0]), 1.0), inner / max(float(box[3] - box[1]), 1.0)
    margin = CROP_SIDE * CROP_CONTEXT - 0.5  # OpenCV counts from the middle of the first pixel
    matrix = np.array([[sx, 0, margin - sx * (box[0] - 0.5)], [0, sy, margin - sy * (box[1] - 0.5)]], dtype=np.float64)
    warped = cv2.warpAffine(rgb, matrix, (CROP_SIDE, CROP_SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, dtype=np.uint8)


def pyramid_detector(detector: FasterRCNN) -> FasterRCNN:
    """A copy whose head sees each region through a spatial pyramid; its fc6 and predictors start anew."""
    made = copy.deepcopy(detector)
    config = replace(made.config.roi, pool_size=1)
    channels = made.backbone.channels * sum(bins * bins for bins in PYRAMID)
    made.head = BoxHead(TwoFC(channels, config), made.config.num_classes).to(next(detector.parameters()).device)
    made.pool = pool_pyramid
    return made.eval()


def pool_pyramid(features: Sequence[Tensor], rois: Tensor, padded_hw: tuple[int, int], config: RoIConfig) -> Tensor:
    """The spatial pyramid layer: maxima over 6 x 6, 3 x 3, 2 x 2 and 1 x 1 bins of each RoI, `[B * R, 50 C, 1, 1]`."""
    if len(features) != 1:
        raise ValueError(f"the spatial pyramid layer is defined on one feature map, but {len(features)} came")
    scale = features[0].shape[2] / padded_hw[0]
    boxes = list(rois.to(features[0].dtype).unbind(0))
    pooled = [roi_pool(features[0], boxes, bins, spatial_scale=scale).flatten(1) for bins in PYRAMID]
    return torch.cat(pooled, dim=1)[:, :, None, None]


def pyramid_features(detector: FasterRCNN) -> Features:
    """SPP-net's features: fc7 of each region, pooled from one map of the whole picture."""
    fast, frame = FastRCNN(detector), detector.config.input

    @torch.inference_mode()
    def features(record: Record, boxes: Array) -> Array:
        device = next(detector.parameters()).device
        image, size_hw = (part.to(device) for part in read_input(record, frame.short_side, frame.long_side))
        height, width = size_hw[0].tolist()
        rois = pad_proposals([to_input_frame(boxes, record.size_hw, (height, width))]).boxes.to(device)
        levels = detector.backbone(detector.normalize(image, size_hw))
        hidden = detector.head.body(fast.pool(levels, rois, (image.shape[1], image.shape[2])))
        return np.asarray(hidden.cpu().numpy()[: len(boxes)])

    return features


@dataclass
class RegionClassifier:
    """Linear SVMs and ridge regressors over region features; one each a class (None where the training pictures lack it)."""

    scale: float
    svms: list[LinearSVC | None]
    ridges: list[Ridge | None]

    def score(self, features: Array) -> NDArray[np.float64]:
        """Decision values [P, K]; -inf for a class that was never seen."""
        scaled = features * self.scale
        columns = [np.full(len(features), -np.inf) if svm is None else svm.decision_function(scaled) for svm in self.svms]
        return np.stack(columns, axis=1)

    def refine(self, features: Array, boxes: Array, k: int) -> Array:
        """Boxes [P, 4] moved by the regressor of class k (from 0)."""
        ridge = self.ridges[k]
        if ridge is None:
            return boxes
        deltas = torch.from_numpy(ridge.predict(features * self.scale)).float()
        return np.asarray(box_ops.decode_deltas(deltas, torch.from_numpy(boxes)).numpy())

    def detect(self, record: Record, boxes: Array, features: Array, *, least_score: float = -1.0) -> Prediction:
        """Detections of a picture: per class the regions above the score, refined, after NMS; the best hundred."""
        height, width = record.size_hw
        scores = self.score(features)
        found: list[tuple[Array, NDArray[np.float64], int]] = []
        for k in range(len(self.svms)):
            rows = np.flatnonzero(scores[:, k] > least_score)
            refined = self.refine(features[rows], boxes[rows], k) if len(rows) else boxes[rows]
            refined = refined.clip(0, np.array([width, height, width, height], dtype=np.float32))
            kept = nms(torch.from_numpy(refined).float(), torch.from_numpy(scores[rows, k]).float(), NMS_THRESH).numpy()
            found.append((refined[kept], scores[rows, k][kept], k + 1))
        every = np.concatenate([part[1] for part in found])
        best = np.argsort(-every, kind="stable")[:DETECTIONS_PER_IMAGE]
        labels = np.concatenate([np.full(len(part[1]), part[2], dtype=np.int64) for part in found])
        return Prediction(boxes=np.concatenate([part[0] for part in found])[best], scores=every[best], labels=labels[best])


def fit_regions(
    dataset: DetectionSet,
    proposals: Sequence[Array],
    features_of: Features,
    *,
    negatives: int = NEGATIVES_PER_PICTURE,
    seed: int = 0,
    progress: Callable[[int, float | None], object] | None = None,
) -> RegionClassifier:
    """Trains SVMs and regressors on a set.

    Positives of a class are its objects themselves, negatives the regions that overlap none of them by 0.3; regressors learn from
    regions that overlap one by 0.6 or more. Regions come from a random `negatives` of each picture's proposals: SVMs of this size fit in
    memory whole, which spares R-CNN's rounds of hard negatives.

    Args:
        progress: called with (pictures done, None) while features are taken.
    """
    rng = np.random.default_rng(seed)
    pictures: list[_Regions] = []
    for record, boxes in zip(dataset.records, proposals, strict=True):
        pictures.append(_regions(record, boxes[rng.permutation(len(boxes))[:negatives]], features_of))
        if progress is not None:
            progress(len(pictures), None)
    norms = np.concatenate([np.linalg.norm(picture.features, axis=1) for picture in pictures])
    scale = FEATURE_NORM / max(float(norms.mean()), 1e-6)
    classes = range(1, len(dataset.class_names) + 1)
    svms = [_fit_svm(pictures, label, scale, seed) for label in classes]
    return RegionClassifier(scale, svms, [_fit_ridge(pictures, label, scale) for label in classes])


@dataclass(frozen=True)
class _Regions:
    """Of one picture: its objects first, then proposals."""

    gt: Array
    labels: NDArray[np.int64]
    boxes: Array
    features: Array


def _regions(record: Record, drawn: Array, features_of: Features) -> _Regions:
    gt, labels = record.boxes[record.plain].astype(np.float32), record.labels[record.plain]
    boxes = np.concatenate([gt, drawn])
    return _Regions(gt, labels, boxes, features_of(record, boxes))


def _fit_svm(pictures: Sequence[_Regions], label: int, scale: float, seed: int) -> LinearSVC | None:
    rows, answers = [], []
    for picture in pictures:
        of_class = picture.labels == label
        positive = np.zeros(len(picture.boxes), dtype=bool)
        positive[: len(of_class)] = of_class
        negative = pairwise_iou(picture.boxes, picture.gt[of_class]).max(axis=1, initial=0.0) < NEGATIVE_IOU
        chosen = positive | negative
        rows.append(picture.features[chosen])
        answers.append(positive[chosen])
    known = np.concatenate(answers)
    if not known.any() or known.all():
        return None
    return LinearSVC(C=SVM_C, class_weight={True: 2.0, False: 1.0}, random_state=seed, max_iter=5000).fit(
        np.concatenate(rows) * scale, known
    )


def _fit_ridge(pictures: Sequence[_Regions], label: int, scale: float) -> Ridge | None:
    rows, deltas = [], []
    for picture in pictures:
        gt = picture.gt[picture.labels == label]
        if not len(gt):
            continue
        overlaps = pairwise_iou(picture.boxes, gt)
        near = overlaps.max(axis=1) >= REGRESSION_IOU
        wanted = torch.from_numpy(gt[overlaps[near].argmax(axis=1)])
        rows.append(picture.features[near])
        deltas.append(box_ops.encode_deltas(wanted, torch.from_numpy(picture.boxes[near])).numpy())
    if not sum(map(len, rows)):
        return None
    return Ridge(alpha=RIDGE_ALPHA).fit(np.concatenate(rows) * scale, np.concatenate(deltas))
