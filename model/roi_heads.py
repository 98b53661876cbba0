"""Detection head: classifies RoIs and refines their boxes, per class.

B images, R RoIs an image, K classes, M candidates of the final NMS, D detections an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import boxes as box_ops
from model.backbones.resnet import res5
from model.config import DetectorConfig, RoIConfig
from model.matching import Samples, match, sample
from model.nms import INVALID_SCORE, NMS
from model.precision import at_least_fp32
from model.ranking import take_rows, top_rows
from model.rpn import Proposals


class Detections(NamedTuple):
    """The graph contract: `boxes` f32 `[B, D, 4]`, `scores` f32 `[B, D]` descending, `labels` i64 `[B, D]`, `num_detections` i64 `[B]`.

    Boxes are in the input frame; slots beyond the count are zero.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    num_detections: Tensor


class RoISamples(NamedTuple):
    """RoIs of a training batch with what they should learn.

    Attributes:
        rois: `[B, S, 4]`.
        labels: int64 `[B, S]`, 0 for background.
        gt_boxes: `[B, S, 4]`, meaningful where the label is positive.
        valid: bool `[B, S]`.
    """

    rois: Tensor
    labels: Tensor
    gt_boxes: Tensor
    valid: Tensor


class TwoFC(nn.Module):
    """fc6 and fc7 over the flattened RoI, as in Fast R-CNN and FPN."""

    def __init__(self, channels: int, config: RoIConfig) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * config.pool_size**2, config.hidden)
        self.fc7 = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out_channels = config.hidden

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = self.dropout(F.relu(self.fc6(pooled.flatten(1))))
        dropped: Tensor = self.dropout(F.relu(self.fc7(hidden)))
        return dropped


class ConvFC(nn.Module):
    """Four 3x3 convolutions with batch norm and one fully connected layer (torchvision's V2 head)."""

    def __init__(self, channels: int, config: RoIConfig) -> None:
        super().__init__()
        layers = [(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()) for _ in range(4)]
        self.convs = nn.Sequential(*(nn.Sequential(*layer) for layer in layers))
        self.fc = nn.Linear(channels * config.pool_size**2, config.hidden)
        for layer in layers:
            nn.init.kaiming_normal_(layer[0].weight, mode="fan_out", nonlinearity="relu")
        self.out_channels = config.hidden

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc(self.convs(pooled).flatten(1)))


class Res5(nn.Module):
    """The ResNet's last stage on every RoI, then its mean (the C4 rows of the literature)."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.layer4 = stage
        self.out_channels = 2048

    def forward(self, pooled: Tensor) -> Tensor:
        hidden: Tensor = self.layer4(pooled)
        return hidden.mean(dim=(2, 3))


class BoxHead(nn.Module):
    """A body over each RoI, then class logits and per-class deltas (background included, as torchvision stores them)."""

    def __init__(self, body: TwoFC | ConvFC | Res5, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.cls_score = nn.Linear(body.out_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(body.out_channels, (num_classes + 1) * 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[R, K + 1]` and deltas `[R, K + 1, 4]` of pooled features `[R, C, s, s]`."""
        hidden = self.body(pooled)
        deltas = self.bbox_pred(hidden)
        return self.cls_score(hidden), deltas.reshape(deltas.shape[0], -1, 4)


def build_head(config: DetectorConfig, channels: int) -> BoxHead:
    """The head that the config names, for features of the given depth."""
    body: TwoFC | ConvFC | Res5
    if config.roi.head == "two_fc":
        body = TwoFC(channels, config.roi)
    elif config.roi.head == "conv_fc":
        body = ConvFC(channels, config.roi)
    else:
        body = Res5(res5(config.backbone))
    return BoxHead(body, config.num_classes)


def detect(logits: Tensor, deltas: Tensor, proposals: Proposals, image_sizes_hw: Tensor, config: RoIConfig, nms: NMS) -> Detections:
    """Detections from the head's raw output.

    Only the best `candidates_per_image` (RoI, class) pairs are decoded and enter the per-class NMS: exact whenever as many pairs as that
    pass the score threshold, or `detections_per_image` of them survive.

    Args:
        logits: `[B * R, K + 1]`.
        deltas: `[B * R, K + 1, 4]`.
    """
    batch, rois = proposals.valid.shape
    num_classes = logits.shape[1] - 1
    scores = at_least_fp32(logits).softmax(dim=1)[:, 1:].reshape(batch, rois, num_classes)
    scores = torch.where(proposals.valid[..., None] & (scores > config.score_thresh), scores, INVALID_SCORE)
    best, index = top_rows(scores.flatten(1), max(config.candidates_per_image, config.detections_per_image))
    labels = index % num_classes + 1
    class_deltas = at_least_fp32(deltas).reshape(batch, rois, num_classes + 1, 4)[:, :, 1:].flatten(1, 2)
    boxes = box_ops.decode_deltas(take_rows(class_deltas, index), take_rows(proposals.boxes, index // num_classes), config.box_weights)
    boxes = box_ops.clip(boxes, image_sizes_hw)
    best = torch.where(box_ops.wider_than(boxes, config.min_size), best, INVALID_SCORE)
    keep = nms(boxes, best, labels, config.nms_thresh)
    return _select(boxes, torch.where(keep, best, INVALID_SCORE), labels, config.detections_per_image)


def _select(boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> Detections:
    best, index = top_rows(scores, count)
    found = best > INVALID_SCORE
    return Detections(
        torch.where(found[..., None], take_rows(boxes, index), 0.0),
        torch.where(found, best, 0.0),
        torch.where(found, labels.gather(1, index), 0),
        found.sum(dim=1),
    )


@torch.no_grad()
def sample_rois(proposals: Proposals, gt_boxes: Tensor, gt_labels: Tensor, config: RoIConfig) -> RoISamples:
    """Proposals and the ground truth itself, matched and sampled to a fixed number an image."""
    gt_valid = gt_labels > 0
    rois = torch.cat([proposals.boxes, gt_boxes], dim=1)
    valid = torch.cat([proposals.valid, gt_valid], dim=1)
    matched = match(
        rois, gt_boxes, gt_valid, fg_iou_thresh=config.fg_iou_thresh, bg_iou_thresh=config.fg_iou_thresh, allow_low_quality=False
    )
    samples: Samples = sample(matched, config.samples_per_image, config.positive_fraction, eligible=valid)
    gt_rows = matched.gather(1, samples.rows).clamp(min=0)
    labels = torch.where(samples.foreground, gt_labels.gather(1, gt_rows), 0)
    return RoISamples(take_rows(rois, samples.rows), labels, take_rows(gt_boxes, gt_rows), samples.valid)


def roi_loss(
    logits: Tensor, deltas: Tensor, samples: RoISamples, config: RoIConfig, *, normal: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy over the sampled RoIs and smooth L1 over the foreground, both divided by the number of sampled RoIs.

    Args:
        logits: `[B * S, K + 1]`.
        deltas: `[B * S, K + 1, 4]`.
        normal: mean and deviation `[K + 1, 4]` of wanted deltas by label, where the head predicts them normalised.

    Returns:
        Two scalars; the box loss is exactly 0 where there is no foreground.
    """
    labels, valid = samples.labels.flatten(), samples.valid.flatten()
    foreground = (labels > 0) & valid
    count = valid.sum().clamp(min=1)
    cls = F.cross_entropy(at_least_fp32(logits), torch.where(valid, labels, -1), ignore_index=-1, reduction="sum") / count
    rois, gt = samples.rois.flatten(0, 1), samples.gt_boxes.flatten(0, 1)
    unit = rois.new_tensor([0.0, 0.0, 1.0, 1.0])  # keeps the masked rows finite
    wanted = box_ops.encode_deltas(
        torch.where(foreground[:, None], gt, unit), torch.where(foreground[:, None], rois, unit), config.box_weights
    )
    wanted = wanted if normal is None else (wanted - normal[0][labels]) / normal[1][labels]
    own = at_least_fp32(deltas).gather(1, labels[:, None, None].expand(-1, 1, 4))[:, 0]
    reg = F.smooth_l1_loss(own, wanted, beta=config.smooth_l1_beta, reduction="none").sum(-1)
    return cls, torch.where(foreground, reg, 0.0).sum() / count
