"""Presets: one function a network, whose docstring states the command, the hardware, the time and the score to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.config import AnchorConfig, BackboneConfig, DetectorConfig, InputConfig, RoIConfig, RPNConfig
from model.training import AugmentConfig, TrainConfig


@dataclass(frozen=True)
class Preset:
    """A network and how to train it."""

    detector: DetectorConfig
    training: TrainConfig


def mobilenet_v2_fpn(class_names: tuple[str, ...]) -> Preset:
    """MobileNetV2 with a 128-channel pyramid from stride 8 and a light head: 4.1 M parameters, 16 MB, made for CPUs.

    `python -m model.train --preset mobilenet_v2_fpn --data VOC_FOLDER --backbone-weights mobilenet_v2.pth --out runs/cells`

    See the demo model's card for hardware, time and score.
    """
    detector = DetectorConfig(
        class_names=class_names,
        input=InputConfig(short_side=384, long_side=640, buckets=((384, 384), (384, 512), (512, 384), (384, 640), (640, 384))),
        backbone=BackboneConfig(name="mobilenet_v2", fpn_channels=128),
        anchors=AnchorConfig(sizes=((32.0,), (64.0,), (128.0,), (256.0,))),
        rpn=RPNConfig(pre_nms_top_n_train=1000, pre_nms_top_n_test=500, post_nms_top_n_train=500, post_nms_top_n_test=300),
        roi=RoIConfig(canonical_size=112.0, canonical_level=1, hidden=256, samples_per_image=128),
        architecture="mobilenet_v2_fpn",
    )
    training = TrainConfig(
        epochs=30,
        batch_size=4,
        lr=0.01,
        warmup_iterations=100,
        ema_decay=0.995,
        channels_last=True,
        augment=AugmentConfig(hflip=0.5, scale=(0.75, 1.33), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    )
    return Preset(detector, training)


PRESETS: dict[str, Callable[[tuple[str, ...]], Preset]] = {"mobilenet_v2_fpn": mobilenet_v2_fpn}
"""Name on the command line -> preset for the given class names."""
