"""The Zeiler & Fergus network (the paper's small model): five convolutions, one map at stride 16."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import BackboneConfig

LRN_WINDOW, LRN_ALPHA, LRN_BETA = 3, 5e-5, 0.75


class WithinChannelNorm(nn.Module):
    """Local response normalisation over a spatial window of each channel: x / (1 + alpha * mean of x^2)^beta."""

    def forward(self, x: Tensor) -> Tensor:
        energy = F.avg_pool2d(x * x, LRN_WINDOW, stride=1, padding=LRN_WINDOW // 2)
        return x / (1 + LRN_ALPHA * energy) ** LRN_BETA


class ZF(nn.Module):
    """96 7x7 / 2, 256 5x5 / 2, 384, 384 and 256 3x3, with two poolings of stride 2."""

    channels = [256]  # noqa: RUF012  # read by the detector, never changed

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2, padding=3),
            nn.ReLU(),
            WithinChannelNorm(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(96, 256, 5, stride=2, padding=2),
            nn.ReLU(),
            WithinChannelNorm(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
        )
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # without it a signal fades a hundredfold on its way, and nothing is learned from scratch
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # these layers have a bias

    def stages(self) -> list[nn.Module]:
        return [self.features[:4], self.features[4:8], self.features[8:10], self.features[10:12], self.features[12:]]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.features(x)]
