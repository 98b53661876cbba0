"""A detector with random weights that behaves: healthy activations, scores of every size, many detections. And one export of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from export import pictures
from export.job import Job, export
from model.backbones.frozen_norm import NormalisedConv2d
from model.checkpoint import Checkpoint, load_detector, save_checkpoint
from model.config import AnchorConfig, BackboneConfig, DetectorConfig, InputConfig, RoIConfig, RPNConfig
from model.faster_rcnn import FasterRCNN, build_detector

BUCKETS = ((128, 160), (160, 128), (128, 128))
CLASS_NAMES = ("red", "white", "platelet")
CALM = 3.0
"""Deviation by which every layer is damped; at 1 a random network amplifies rounding errors a thousandfold."""


@dataclass(frozen=True)
class Exported:
    """A published version of the tiny detector."""

    folder: Path
    checkpoint: Path
    detector: FasterRCNN
    log: str

    @property
    def file(self) -> Path:
        return self.folder / "model.onnx"


def tiny_config() -> DetectorConfig:
    return DetectorConfig(
        class_names=CLASS_NAMES,
        input=InputConfig(short_side=128, long_side=160, buckets=BUCKETS),
        backbone=BackboneConfig(name="mobilenet_v2", fpn_channels=32),
        anchors=AnchorConfig(sizes=((16.0,), (32.0,), (64.0,), (96.0,))),
        rpn=RPNConfig(pre_nms_top_n_test=100, post_nms_top_n_test=60),
        roi=RoIConfig(hidden=64, candidates_per_image=200, canonical_size=64.0, canonical_level=1),
        architecture="tiny",
    )


def tiny_detector(seed: int = 0) -> FasterRCNN:
    """Random weights, normalised layer by layer on drawn pictures (LSUV's idea), heads scaled to a wide range of scores."""
    torch.manual_seed(seed)
    detector = build_detector(tiny_config()).eval()
    images, sizes_hw = _drawn()
    hooks = [m.register_forward_pre_hook(_calm) for m in detector.modules() if isinstance(m, NormalisedConv2d)]
    with torch.no_grad():
        detector(images, sizes_hw)
    for hook in hooks:
        hook.remove()
    spreads = [
        (detector.rpn.convs[0], 1.0, 0.3),
        (detector.rpn.cls_logits, 2.0, -1.0),
        (detector.rpn.bbox_pred, 0.1, 0.0),
        (detector.head.body.fc6, 1.0, 0.3),
        (detector.head.body.fc7, 1.0, 0.3),
        (detector.head.cls_score, 1.5, 0.0),
        (detector.head.bbox_pred, 0.2, 0.0),
    ]
    for layer, deviation, mean in spreads:
        _spread(detector, layer, deviation, mean)
    return detector


def _drawn() -> tuple[torch.Tensor, torch.Tensor]:
    hw = BUCKETS[0]
    drawn = np.stack([pictures.smear(hw, 101), pictures.street(hw, 102), pictures.noise(hw, 103)])
    return torch.from_numpy(drawn), torch.tensor([hw] * len(drawn))


def _calm(conv: NormalisedConv2d, inputs: tuple[torch.Tensor]) -> None:
    y = conv._conv_forward(inputs[0], conv.weight, None)
    conv.norm[0].running_mean.copy_(y.mean((0, 2, 3)))
    conv.norm[0].running_var.copy_(CALM * y.var((0, 2, 3)) + 1e-3)


def _spread(detector: FasterRCNN, layer: nn.Conv2d | nn.Linear, deviation: float, mean: float) -> None:
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        detector(*_drawn())
        hook.remove()
        values = torch.cat([output.flatten() for output in seen])
        factor = deviation / values.std()
        layer.weight.mul_(factor)
        layer.bias.mul_(factor).add_(mean - values.mean() * factor)


def save_tiny(path: Path) -> Path:
    """A checkpoint as training writes it."""
    detector = tiny_detector()
    training = {"dataset": "drawn pictures", "command": "python -m model.train --data drawn", "commit": "0123abc", "metrics": METRICS}
    save_checkpoint(path, Checkpoint(detector.state_dict(), detector.config, training))
    return path


METRICS = {
    "dataset": "drawn/val",
    "images": 3,
    "coco": {"AP": 0.5, "AP50": 0.8},
    "voc_ap50": 0.81,
    "per_class": {
        "red": {"AP": 0.6, "AP50": 0.9, "voc_ap50": 0.9, "ground_truth": 40},
        "white": {"AP": 0.4, "AP50": 0.7, "voc_ap50": 0.72, "ground_truth": 9},
        "platelet": {"AP": float("nan"), "AP50": float("nan"), "voc_ap50": None, "ground_truth": 0},
    },
}


def export_tiny(folder: Path) -> Exported:
    """The whole job, once."""
    checkpoint = save_tiny(folder / "best.pt")
    log = io.StringIO()
    job = Job(checkpoint=checkpoint, name="tiny", repository=folder / "repository", command="python -m export best.pt --name tiny")
    target = export(job, Console(file=log, width=150))
    return Exported(target, checkpoint, load_detector(checkpoint), log.getvalue())
