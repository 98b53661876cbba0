"""Backbones: a normalised image batch in, feature levels out."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from model.backbones.body import Body
from model.backbones.fpn import FPN
from model.backbones.mobilenet import mobilenet_v2_body, mobilenet_v2_c4_body, mobilenet_v3_large_body
from model.backbones.resnet import ResNet
from model.backbones.vgg import VGG16
from model.backbones.zf import ZF
from model.config import BackboneConfig

BODIES: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    "mobilenet_v2": mobilenet_v2_body,
    "mobilenet_v2_c4": mobilenet_v2_c4_body,
    "mobilenet_v3_large": mobilenet_v3_large_body,
    "resnet50": ResNet,
    "resnet101": ResNet,
    "resnet50_c4": ResNet,
    "resnet101_c4": ResNet,
    "vgg16": VGG16,
    "zf": ZF,
}
"""Name in BackboneConfig -> builder of a `Body`."""


class Backbone(nn.Module):
    """A classification body and, where the config asks for one, the feature pyramid on top of it."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.name not in BODIES:
            raise ValueError(f"unknown backbone {config.name!r}; expected one of {sorted(BODIES)}")
        self.body = BODIES[config.name](config)
        body = cast(Body, self.body)
        self.fpn: FPN | None = None
        self.channels = body.channels[-1]
        if config.fpn_channels is not None:
            self.fpn = FPN(body.channels, config.fpn_channels, extra_level=config.extra_level, batch_norm=config.norm == "batch")
            self.channels = config.fpn_channels
        self.has_extra_level = self.fpn is not None and config.extra_level
        stages = body.stages()
        for stage in stages[: max(0, len(stages) - config.trainable_stages)]:
            stage.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Levels `[B, C, H_l, W_l]`, finest first, of a batch `[B, 3, H, W]`."""
        maps: list[Tensor] = self.body(x)
        return maps if self.fpn is None else self.fpn(maps)
