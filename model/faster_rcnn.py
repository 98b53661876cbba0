"""Faster R-CNN: one module from uint8 images to detections, the same in training, evaluation and the exported graph.

B images, H and W the padded input's size (multiples of 32), G ground-truth boxes, P proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.anchors import AnchorGenerator
from model.backbones import Backbone
from model.config import DetectorConfig
from model.nms import NMS, greedy_nms
from model.precision import at_least_fp32
from model.roi_heads import Detections, build_head, detect, roi_loss, sample_rois
from model.roi_pool import RoIPooling, default_pooling
from model.rpn import RPN, Proposals, propose, rpn_loss
from model.weights import load_imagenet


class Targets(NamedTuple):
    """Ground truth of a batch, padded to the same number of rows (at least one).

    Attributes:
        boxes: f32 `[B, G, 4]`, input frame; zero in padding rows.
        labels: int64 `[B, G]`, 1..K; 0 marks a padding row.
    """

    boxes: Tensor
    labels: Tensor


class Normalize(nn.Module):
    """uint8 RGB to the network's input: 0..1, mean and deviation, and zero wherever the image is not."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("scale", (1.0 / (255.0 * torch.tensor(std)))[:, None, None], persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std))[:, None, None], persistent=False)

    def forward(self, images: Tensor, image_sizes_hw: Tensor) -> Tensor:
        """`[B, H, W, 3]` uint8 -> `[B, 3, H, W]` float, laid out channels last; whatever lies in the padding becomes zero."""
        scale = self.get_buffer("scale")
        x = images.permute(0, 3, 1, 2).to(scale.dtype) * scale + self.get_buffer("shift")
        rows = torch.arange(images.shape[1], device=images.device)[None, :] < image_sizes_hw[:, :1]  # [B, H]
        columns = torch.arange(images.shape[2], device=images.device)[None, :] < image_sizes_hw[:, 1:]  # [B, W]
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], x, 0.0)


class FasterRCNN(nn.Module):
    """The detector. `nms`, `pool` and `trim` are strategies that an exporter may swap; every choice gives the same answer."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.input.mean, config.input.std)
        self.backbone = Backbone(config.backbone)
        self.anchors = AnchorGenerator(config.anchors.sizes, config.anchors.ratios, config.anchors.rule)
        self.rpn = RPN(self.backbone.channels, self.anchors.anchors_per_cell[0], config.rpn)
        self.head = build_head(config, self.backbone.channels)
        self.nms: NMS = greedy_nms
        self.pool: RoIPooling = default_pooling(config.roi)
        self.trim: Callable[[Proposals], Proposals] | None = None  # may drop slots at the end that no image filled

    def forward(self, images: Tensor, image_sizes_hw: Tensor, targets: Targets | None = None) -> Detections | dict[str, Tensor]:
        """Detections, or with targets the four losses by name; the scores of an image that upset the network are NaN.

        Args:
            images: uint8 `[B, H, W, 3]` RGB, padded right and bottom with anything.
            image_sizes_hw: int64 `[B, 2]`, true height and width.
            targets: ground truth; asks for losses.
        """
        levels = self.backbone(self.normalize(images, image_sizes_hw))
        anchors = self.anchors(levels, (images.shape[1], images.shape[2]))
        with torch.no_grad():  # no gradient flows through the proposals' coordinates (approximate joint training)
            raw = self.rpn(levels)
            proposals = propose(raw, anchors, image_sizes_hw, self.config.rpn, self.nms, training=targets is not None)
        if targets is None:
            proposals = proposals if self.trim is None else self.trim(proposals)
            logits, deltas = self._classify(levels, proposals.boxes, images)
            found = detect(logits, deltas, proposals, image_sizes_hw, self.config.roi, self.nms)
            return spoil_unless_finite(found, [*raw.logits, *raw.deltas, logits, deltas])
        rpn_cls, rpn_reg = rpn_loss(self.rpn, levels, anchors, targets.boxes, targets.labels > 0, image_sizes_hw, self.config.rpn)
        samples = sample_rois(proposals, targets.boxes, targets.labels, self.config.roi)
        roi_cls, roi_reg = roi_loss(*self._classify(levels, samples.rois, images), samples, self.config.roi)
        return {"rpn_cls": rpn_cls, "rpn_reg": rpn_reg, "roi_cls": roi_cls, "roi_reg": roi_reg}

    def _classify(self, levels: list[Tensor], rois: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Head output of RoIs `[B, R, 4]`; the extra level of the pyramid serves the RPN alone."""
        pooled_levels = levels[:-1] if self.backbone.has_extra_level else levels
        pooled = self.pool(pooled_levels, rois, (images.shape[1], images.shape[2]), self.config.roi)
        return self.head(pooled)  # type: ignore[no-any-return]  # torch types calls as Any


def spoil_unless_finite(found: Detections, raw: Sequence[Tensor]) -> Detections:
    """All scores of an image become NaN if the network gave one number that is NaN or infinite for it.

    Such numbers pass no threshold, so without this the image would seem to hold nothing.

    Args:
        raw: what the layers gave, each with as many numbers for every image of the batch, image after image.
    """
    batch = found.scores.shape[0]
    total = torch.stack([at_least_fp32(part).reshape(batch, -1).sum(dim=1) for part in raw]).sum(dim=0)  # [B], finite if all of them are
    return found._replace(scores=torch.where((total.abs() < math.inf)[:, None], found.scores, math.nan))


def build_detector(config: DetectorConfig, backbone_weights: Path | None = None) -> FasterRCNN:
    """A new detector, laid out channels last (the faster layout for convolutions on CPU and GPU).

    Args:
        backbone_weights: an ImageNet state dict in torchvision's names; without it the backbone starts from random weights.
    """
    detector = FasterRCNN(config)
    if backbone_weights is not None:
        load_imagenet(detector.backbone, detector.head, backbone_weights)
    return detector.to(memory_format=torch.channels_last)
