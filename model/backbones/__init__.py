"""Backbones: a normalised image batch in, pyramid levels out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model.backbones.fpn import FPN
from model.backbones.mobilenet import MobileNetV2
from model.config import BackboneConfig

BODIES: dict[str, Callable[[], MobileNetV2]] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_p2": lambda: MobileNetV2((4, 8, 16, 32)),
}
"""Name in BackboneConfig -> a body with `channels`, `stages()` and `features`."""


class PyramidBackbone(nn.Module):
    """A classification body and the feature pyramid on top of it."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.name not in BODIES:
            raise ValueError(f"unknown backbone {config.name!r}; expected one of {sorted(BODIES)}")
        self.body = BODIES[config.name]()
        self.fpn = FPN(self.body.channels, config.fpn_channels, extra_level=config.extra_level)
        stages = self.body.stages()
        for stage in stages[: max(0, len(stages) - config.trainable_stages)]:
            stage.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Levels `[B, C, H_l, W_l]`, finest first, of a batch `[B, 3, H, W]`."""
        return self.fpn(self.body(x))  # type: ignore[no-any-return]  # torch types calls as Any

    def load_imagenet(self, path: Path) -> None:
        """Load a classification state dict in torchvision's names (`features.*`, or bare as `torch.save(net.features.state_dict())` gives).

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file lacks weights that the body needs.
        """
        if not path.is_file():
            raise FileNotFoundError(f"backbone weights {path} not found; give a torchvision state dict with --backbone-weights FILE")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("features."): value for key, value in loaded.items()}
        wanted = self.body.features.state_dict()
        missing = sorted(set(wanted) - set(state))
        if missing:
            raise ValueError(f"{path} has no weights for {len(missing)} entries of the backbone, first {missing[0]!r}")
        self.body.features.load_state_dict({key: state[key] for key in wanted})
