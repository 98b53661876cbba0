"""Torchvision's detectors with random weights that behave: calm activations, scores of every size, many detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import detection

from export import pictures

BUILDERS = {
    "resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
    "resnet50_fpn_v2": detection.fasterrcnn_resnet50_fpn_v2,
    "mobilenet_v3_large_fpn": detection.fasterrcnn_mobilenet_v3_large_fpn,
    "mobilenet_v3_large_320_fpn": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}
SIDE = 256
CALM = 4.0
"""Variance over the wildest picture by which every norm damps; at 1 a random network amplifies rounding errors a thousandfold."""


def calm_network(name: str, seed: int = 0) -> nn.Module:
    """Random weights, normalised layer by layer on drawn pictures (LSUV's idea), heads scaled to a wide range of scores."""
    torch.manual_seed(seed)
    network = BUILDERS[name](weights=None, weights_backbone=None, num_classes=91, min_size=SIDE, max_size=2 * SIDE).eval()
    network.rpn.score_thresh = 0.0
    hooks = [module.register_forward_pre_hook(_calm) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        network(drawn())
    for hook in hooks:
        hook.remove()
    box_head, predictor = network.roi_heads.box_head, network.roi_heads.box_predictor
    dense = [module for module in box_head.modules() if isinstance(module, nn.Linear)]
    convolutions = [layer for layer in network.rpn.head.conv.modules() if isinstance(layer, nn.Conv2d)]
    hidden = [(layer, 1.0, 0.3) for layer in convolutions]
    _spread(network, [*hidden, (network.rpn.head.cls_logits, 2.0, -1.0), (network.rpn.head.bbox_pred, 0.1, 0.0)])
    _spread(network, [(layer, 1.0, 0.3) for layer in dense])
    _spread(network, [(predictor.cls_score, 2.5, 0.0), (predictor.bbox_pred, 0.2, 0.0)])
    return network


def drawn() -> list[torch.Tensor]:
    """RGB `[3, H, W]` in 0..1, of every kind that an export is verified on: far from them a random network is wild again."""
    hw = (SIDE, SIDE * 5 // 4)
    images = [pictures.smear(hw, 101), pictures.street(hw, 102), pictures.noise(hw, 103), pictures.blank(hw, 0)]
    return [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255 for image in images]


def save_network(name: str, path: Path) -> Path:
    """The state dict of `calm_network(name)`, as torchvision publishes one."""
    torch.save(calm_network(name).state_dict(), path)
    return path


def _calm(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
    mean = inputs[0].mean((0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(CALM * (inputs[0] - mean[:, None, None]).square().mean((2, 3)).amax(0) + 1e-3)


def _spread(network: nn.Module, layers: list[tuple[nn.Module, float, float]]) -> None:
    """Scale and shift each layer's outputs over the drawn pictures to (deviation, mean), one after the other."""
    for layer, deviation, mean in layers:
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output.flatten()))
        with torch.no_grad():
            network(drawn())
            hook.remove()
            values = torch.cat(seen)
            factor = deviation / values.std()
            layer.weight.mul_(factor)
            layer.bias.mul_(factor).add_(mean - values.mean() * factor)
