"""The networks, weights and pictures of the runtime benchmark: the same for every contender.

Weights are random unless a torchvision state dict is given, and made to behave: activations of unit size, and heads whose scores spread so
that every proposal slot is filled and many detections are found, the most work that a picture can bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models import detection

from export import pictures
from export.job import input_spec
from model.config import DetectorConfig
from model.faster_rcnn import FasterRCNN, build_detector
from model.presets import PRESETS
from model.pretrained import load_torchvision
from model.rpn import Proposals
from model.weights import load_state
from service.images import Prepared, assemble, prepare_pixels
from service.manifest import Bucket

NETWORKS = ("mobilenet_v3_large_320_fpn", "mobilenet_v3_large_fpn", "resnet50_fpn", "resnet50_fpn_v2")
COCO_CLASSES = tuple(f"class {k}" for k in range(1, 91))
DRAWN_HW = ((480, 640), (640, 480), (360, 640))
CALIBRATION_HW = (256, 320)
DAMPING = 4.0
"""Of the variance, in every norm; at 1 a random network amplifies rounding errors a thousandfold."""
PICTURE_TYPES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Pair:
    """Torchvision's network and ours with one set of weights."""

    name: str
    theirs: nn.Module
    ours: FasterRCNN
    weights: str


@dataclass(frozen=True)
class Sample:
    """One picture as each side takes it: padded to its bucket for ours, as it is for torchvision, which pads by the same rule."""

    images: NDArray[np.uint8]  # [1, H, W, 3]
    image_sizes_hw: NDArray[np.int64]  # [1, 2]
    float_picture: Tensor  # [3, h, w], 0..1


def build_pair(name: str, weights: Path | None = None) -> Pair:
    """Both networks in eval mode.

    Args:
        weights: a torchvision state dict; None draws random ones.
    """
    torch.manual_seed(0)
    theirs: nn.Module = getattr(detection, f"fasterrcnn_{name}")(weights=None, weights_backbone=None).eval()
    if weights is not None:
        theirs.load_state_dict(load_state(weights))
    else:
        enliven(theirs)
    ours = build_detector(PRESETS[name](COCO_CLASSES).detector).eval()
    load_torchvision(ours, theirs.state_dict(), "torchvision's network")
    return Pair(name, theirs, ours, weights.name if weights else "random")


def with_proposals(pair: Pair, proposals: int) -> Pair:
    """The same networks and weights with another number of RoIs an image."""
    limits = {"rpn_post_nms_top_n_test": proposals, "rpn_pre_nms_top_n_test": max(proposals, 1000)}
    theirs: nn.Module = getattr(detection, f"fasterrcnn_{pair.name}")(weights=None, weights_backbone=None, **limits).eval()
    theirs.load_state_dict(pair.theirs.state_dict())
    config = pair.ours.config
    rpn = replace(config.rpn, post_nms_top_n_test=proposals, pre_nms_top_n_test=max(proposals, 1000))
    ours = build_detector(replace(config, rpn=rpn)).eval()
    ours.load_state_dict(pair.ours.state_dict())
    return Pair(pair.name, theirs, ours, pair.weights)


@torch.no_grad()
def enliven(network: nn.Module) -> None:
    """Every norm damps by its wildest picture, then layer after layer of the heads is scaled: (deviation, mean) of its outputs.

    A network that amplified instead would let the last digit decide its answers, and no export of it could be held against another.
    """
    kinds = (pictures.street(CALIBRATION_HW, 0), pictures.smear(CALIBRATION_HW, 1), pictures.noise(CALIBRATION_HW, 2))
    drawn = [_as_float(picture) for picture in (*kinds, pictures.blank(CALIBRATION_HW, 0))]
    transform: Any = network.transform
    usual, transform.min_size = transform.min_size, (min(CALIBRATION_HW),)  # sixty passes at full size would take minutes
    hooks = [module.register_forward_pre_hook(_damp) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    network(drawn)
    for hook in hooks:
        hook.remove()
    rpn, body, last = (network.get_submodule(name) for name in ("rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"))
    for layer in (module for module in rpn.get_submodule("conv").modules() if isinstance(module, nn.Conv2d)):
        _spread(network, layer, 1.0, 0.3, drawn)
    _spread(network, rpn.get_submodule("cls_logits"), 2.0, 0.0, drawn)
    _spread(network, rpn.get_submodule("bbox_pred"), 0.1, 0.0, drawn)
    for dense in (module for module in body.modules() if isinstance(module, nn.Linear)):
        _spread(network, dense, 1.0, 0.3, drawn)
    _spread(network, last.get_submodule("cls_score"), 2.5, 0.0, drawn)
    _spread(network, last.get_submodule("bbox_pred"), 0.2, 0.0, drawn)
    transform.min_size = usual


def _damp(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    mean = inputs[0].mean((0, 2, 3))
    variance = (inputs[0] - mean[:, None, None]).square().mean((2, 3)).amax(0)
    norm.running_mean.copy_(mean)  # type: ignore[union-attr]  # these norms keep statistics
    norm.running_var.copy_(DAMPING * variance + 1e-3)  # type: ignore[union-attr]


def _spread(network: nn.Module, layer: nn.Module, deviation: float, mean: float, drawn: list[Tensor]) -> None:
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten()))
    network(drawn)
    hook.remove()
    values = torch.cat(seen)
    factor = deviation / values.std()
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.mul_(factor)
    bias.mul_(factor).add_(mean - values.mean() * factor)


def read_pictures(folder: Path | None, limit: int) -> list[pictures.Picture]:
    """Of a folder and its subfolders, in order of path; without a folder drawn ones.

    Raises:
        ValueError: the folder holds none.
    """
    if folder is None:
        draw = (pictures.street, pictures.smear, pictures.street)
        return [draw[i % 3](DRAWN_HW[i % len(DRAWN_HW)], seed=i) for i in range(limit)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_TYPES)[:limit]
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_TYPES))}); name another folder with --pictures")
    return [np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in paths]


def samples_of(config: DetectorConfig, found: Sequence[pictures.Picture]) -> list[Sample]:
    """Every picture resized and padded as the service does it."""
    return [_sample(prepare_pixels(picture, input_spec(config))) for picture in found]


def full_bucket(bucket: Bucket, batch_size: int = 1) -> Sample:
    """Drawn pictures that fill their bucket to the last pixel."""
    drawn = [pictures.street(bucket, seed=seed) for seed in range(batch_size)]
    return Sample(np.stack(drawn), np.array([bucket] * batch_size, dtype=np.int64), _as_float(drawn[0]))


@torch.inference_mode()
def filled_slots(pair: Pair, samples: Sequence[Sample]) -> list[int]:
    """Proposals that each picture really brings: the work of the head goes with them."""
    counts: list[int] = []

    def count(proposals: Proposals) -> Proposals:
        counts.append(int(proposals.valid.sum()))
        return proposals

    pair.ours.trim = count
    for sample in samples:
        pair.ours.cpu()(torch.from_numpy(sample.images), torch.from_numpy(sample.image_sizes_hw))
    pair.ours.trim = None
    return counts


def _sample(prepared: Prepared) -> Sample:
    images, sizes_hw = assemble([prepared])
    return Sample(images, sizes_hw, _as_float(prepared.pixels))


def _as_float(pixels: pictures.Picture) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
