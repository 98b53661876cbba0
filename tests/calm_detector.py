"""Any preset with random weights that behave like a trained network's: calm activations, scores of every size, many detections.

A plain random network amplifies the last digit of a number a thousandfold, and no two runtimes agree on its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from export import pictures
from export.pictures import Picture
from model.backbones.frozen_norm import NormalisedConv2d
from model.config import DetectorConfig
from model.faster_rcnn import FasterRCNN, build_detector

HW = (256, 320)
CALM = 4.0
"""Variance over the wildest picture by which every layer damps."""
GREYS = (0, 60, 120, 180, 220, 255)
"""Of the flat pictures that a detector learns to look away from."""
FAINT = 1e-3
"""Of the strongest direction of flat pictures' features: what is fainter does not count."""
EMPHASIS = 10.0
"""Weight of a flat place against any other."""
APART = (0.8, 1.2)
"""By how much anchors and classes weigh that solution: where nothing else is left of their weights, they would all tie."""
BRANCH = 0.25
"""What a residual block's branch weighs beside the path through it, as training leaves it.

At 1 the rounding of a ResNet's layers adds up to more than the gates allow, between PyTorch's own fp32 and fp64 as well.
"""
FEW = 24
"""RoIs an image while the heads are scaled: the last stage of a ResNet on 300 of them takes minutes."""


@torch.no_grad()
def calm_detector(config: DetectorConfig, seed: int = 0) -> FasterRCNN:
    """Random weights, normalised layer by layer on drawn pictures (LSUV's idea), heads scaled to a wide range of scores."""
    torch.manual_seed(seed)
    detector = build_detector(config).eval()
    _lighten_branches(detector)
    detector.config = replace(config, rpn=replace(config.rpn, post_nms_top_n_test=FEW, score_thresh=0.0))
    images, sizes_hw = _drawn()
    body = [layer for part in (detector.backbone, detector.head.body) for layer in part.modules()]
    hooks = [layer.register_forward_hook(_calm_norm) for layer in body if isinstance(layer, NormalisedConv2d)]
    hooks += [layer.register_forward_pre_hook(_calm_batch_norm) for layer in body if isinstance(layer, nn.BatchNorm2d)]
    hooks += [layer.register_forward_hook(_calm_weight) for layer in _plain_convolutions(detector)]
    detector(images, sizes_hw)
    for hook in hooks:
        hook.remove()
    for layer in [*detector.rpn.convs, *(part for part in detector.head.body.modules() if isinstance(part, nn.Linear))]:
        _spread(detector, layer, 1.0, 0.3)
    _look_away(detector, detector.rpn.cls_logits, slice(None), deviation=2.0, flat=-8.0)
    _spread(detector, detector.rpn.bbox_pred, 0.03, 0.0)
    _look_away(detector, detector.head.cls_score, slice(1, None), deviation=2.5, flat=-8.0)
    _spread(detector, detector.head.bbox_pred, 0.1, 0.0)
    detector.config = config
    return detector


def _lighten_branches(detector: FasterRCNN) -> None:
    for block in (module for module in detector.modules() if isinstance(module, Bottleneck)):
        block.bn3.weight.mul_(BRANCH)


def _plain_convolutions(detector: FasterRCNN) -> list[nn.Module]:
    """Those of the body that no norm follows: all of VGG-16's and ZF's, in other networks at most a pyramid's, which are calm already."""
    normed = any(isinstance(layer, NormalisedConv2d | nn.BatchNorm2d) for layer in detector.backbone.modules())
    return [] if normed else [layer for layer in detector.backbone.modules() if isinstance(layer, nn.Conv2d)]


def _drawn() -> tuple[Tensor, Tensor]:
    kinds = [pictures.smear(HW, 101), pictures.street(HW, 102), pictures.noise(HW, 103), pictures.blank(HW, 0), pictures.blank(HW, 255)]
    return torch.from_numpy(np.stack(kinds)), torch.tensor([HW] * len(kinds))


def _statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and damped variance `[C]` of `[B, C, H, W]`."""
    mean = values.mean((0, 2, 3))
    return mean, CALM * (values - mean[:, None, None]).square().mean((2, 3)).amax(0) + 1e-3


def _calm_norm(conv: Any, _inputs: object, output: Tensor) -> Tensor:
    """Takes the statistics of what the convolution gave before its norm, and gives what it gives from now on."""
    norm = conv.norm[0]
    scale, shift = norm.affine()
    norm.running_mean, norm.running_var = _statistics((output - shift[:, None, None]) / scale[:, None, None])
    raw = (output - shift[:, None, None]) / scale[:, None, None]
    scale, shift = norm.affine()
    return raw * scale[:, None, None] + shift[:, None, None]


def _calm_batch_norm(norm: Any, inputs: tuple[Tensor]) -> None:
    mean, variance = _statistics(inputs[0])
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _calm_weight(conv: Any, _inputs: object, output: Tensor) -> Tensor:
    mean, variance = _statistics(output)
    factor = variance.mean().rsqrt()
    conv.weight.mul_(factor)
    conv.bias.copy_(conv.bias * factor - mean * factor + 0.1)
    return (output - mean[:, None, None]) * factor + 0.1


def _look_away(detector: FasterRCNN, layer: Any, rows: slice, *, deviation: float, flat: float) -> None:
    """Logits of the rows spread over the drawn pictures, and `flat` wherever a picture is of one colour, as training teaches.

    All places of a flat picture score alike, so rounding alone would choose among them. Their features span few directions: the weights
    are made blind to those, but for one solution of w f = flat.
    """
    _spread(detector, layer, deviation, 0.0)
    flat_ones = _inputs_of(detector, layer, [pictures.blank(HW, value) for value in GREYS])
    others = _inputs_of(detector, layer, [pictures.smear(HW, 101), pictures.street(HW, 102), pictures.noise(HW, 103)])
    _, strength, directions = torch.linalg.svd(flat_ones, full_matrices=False)
    directions = directions[strength > FAINT * strength[0]]
    blind = layer.weight.flatten(1).double()
    blind -= blind @ directions.T @ directions
    wanted = torch.cat([torch.full((len(flat_ones),), EMPHASIS * flat), torch.zeros(len(others))]).double()
    away = torch.linalg.pinv(torch.cat([EMPHASIS * flat_ones, others]), rtol=FAINT) @ wanted
    blind[rows] += away * torch.linspace(*APART, len(blind[rows]), dtype=torch.float64)[:, None]
    layer.weight.copy_(blind.reshape(layer.weight.shape))


def _inputs_of(detector: FasterRCNN, layer: Any, drawn: list[Picture]) -> Tensor:
    """What the layer sees of pictures, `[M, C]`."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    detector(torch.from_numpy(np.stack(drawn)), torch.tensor([HW] * len(drawn)))
    hook.remove()
    return torch.cat([values.movedim(1, -1).flatten(0, -2) for values in seen]).double()


def _spread(detector: FasterRCNN, layer: Any, deviation: float, mean: float) -> None:
    """Scale and shift the outputs of a layer over the drawn pictures to (deviation, mean)."""
    seen: list[Tensor] = []
    keep: Callable[..., None] = lambda _layer, _inputs, output: seen.append(output.flatten())  # noqa: E731
    hook = layer.register_forward_hook(keep)
    detector(*_drawn())
    hook.remove()
    values = torch.cat(seen)
    factor = deviation / values.std()
    layer.weight.mul_(factor)
    layer.bias.copy_(layer.bias * factor + mean - values.mean() * factor)
