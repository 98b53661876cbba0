"""A detector small enough for tests: three levels, two classes, deterministic weights."""

from __future__ import annotations

import torch

from model.config import AnchorConfig, BackboneConfig, DetectorConfig, InputConfig, RoIConfig, RPNConfig
from model.faster_rcnn import FasterRCNN, build_detector

BUCKETS = ((64, 96), (96, 64), (96, 96))


def tiny_config() -> DetectorConfig:
    """Short side 64, strides 8 to 32, heads of a few channels."""
    return DetectorConfig(
        class_names=("disc", "square"),
        input=InputConfig(short_side=64, long_side=96, buckets=BUCKETS),
        backbone=BackboneConfig("mobilenet_v2", fpn_channels=16, extra_level=False),
        anchors=AnchorConfig(sizes=((16.0,), (32.0,), (64.0,))),
        rpn=RPNConfig(pre_nms_top_n_train=200, pre_nms_top_n_test=100, post_nms_top_n_train=100, post_nms_top_n_test=50),
        roi=RoIConfig(canonical_size=32.0, canonical_level=1, hidden=32, samples_per_image=32, candidates_per_image=150),
        architecture="tiny",
    )


def confident_detector(seed: int = 0) -> FasterRCNN:
    """Random weights whose heads give many confident, well spread detections."""
    torch.manual_seed(seed)
    detector = build_detector(tiny_config())
    with torch.no_grad():
        detector.rpn.cls_logits.weight.normal_(0, 0.3)
        detector.rpn.bbox_pred.weight.normal_(0, 0.05)
        detector.head.cls_score.weight.normal_(0, 2.0)
        detector.head.bbox_pred.weight.normal_(0, 0.5)
    return detector.eval()


def random_batch(sizes_hw: list[tuple[int, int]], padded_hw: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise pictures of the given sizes, zero padded."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros((len(sizes_hw), *padded_hw, 3), dtype=torch.uint8)
    for index, (height, width) in enumerate(sizes_hw):
        images[index, :height, :width] = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return images, torch.tensor(sizes_hw)
