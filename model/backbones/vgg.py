"""VGG-16 as a body: one map at stride 16, conv5_3 (the paper, section 3)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import vgg16

from model.config import BackboneConfig


class VGG16(nn.Module):
    """The thirteen convolutions without the last pooling; `features.*` names are torchvision's."""

    channels = [512]  # noqa: RUF012  # read by the detector, never changed

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.features = vgg16().features[:30]

    def stages(self) -> list[nn.Module]:
        """Five stages, split at the poolings: the paper's VGG freezes conv1_1 to conv2_2, the first two."""
        starts = [0, 5, 10, 17, 24]
        return [self.features[start:end] for start, end in zip(starts, [*starts[1:], 30], strict=True)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.features(x)]
