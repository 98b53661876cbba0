"""ResNets as bodies: four maps for a pyramid, or the stride-16 map alone for a C4 detector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50, resnet101

from model.backbones.body import norm_layer
from model.backbones.frozen_norm import fuse_frozen_norms
from model.config import BackboneConfig

BUILDERS = {"resnet50": resnet50, "resnet101": resnet101}


class ResNet(nn.Module):
    """Torchvision's ResNet without its classifier.

    Args:
        config: `name` is a key of BUILDERS, or one with `_c4` behind it.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.c4 = config.name.endswith("_c4")
        source = BUILDERS[config.name.removesuffix("_c4")](norm_layer=norm_layer(config))
        self.conv1, self.bn1 = source.conv1, source.bn1
        self.layer1, self.layer2, self.layer3 = source.layer1, source.layer2, source.layer3
        self.channels = [1024]
        if not self.c4:
            self.layer4 = source.layer4
            self.channels = [256, 512, 1024, 2048]
        fuse_frozen_norms(self)

    def _layers(self) -> list[nn.Module]:
        layers = [self.layer1, self.layer2, self.layer3]
        return layers if self.c4 else [*layers, self.layer4]

    def stages(self) -> list[nn.Module]:
        return [nn.ModuleList([self.conv1, self.bn1]), *self._layers()]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=2, padding=1)
        maps = []
        for layer in self._layers():
            x = layer(x)
            maps.append(x)
        return maps[-1:] if self.c4 else maps


def res5(config: BackboneConfig) -> nn.Module:
    """The last stage, which a C4 detector runs on every RoI: `[R, 1024, s, s]` -> `[R, 2048, s / 2, s / 2]`."""
    name = config.name.removesuffix("_c4")
    if name not in BUILDERS:
        raise ValueError(f"a res5 head needs a ResNet body, but the backbone is {config.name!r}")
    layer: nn.Module = BUILDERS[name](norm_layer=norm_layer(config)).layer4
    fuse_frozen_norms(layer)
    return layer
