"""Weights that others trained: ImageNet classifiers for the body, and torchvision's COCO detectors key by key.

`python -m model.pretrained resnet50_fpn` fetches the COCO weights of a network and writes a checkpoint of this project.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.faster_rcnn import FasterRCNN

_BOOKKEEPING = "num_batches_tracked"


class WeightsError(ValueError):
    """A file of weights that does not fit the network."""


def load_state(path: Path, *, option: str = "--backbone-weights") -> dict[str, Tensor]:
    """A state dict from a file, without running any code that the file might hold.

    Args:
        option: with which the user gives such a file, for the message.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} not found; give a torchvision state dict, for example with {option} FILE")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is no state dict: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} is no state dict: expected names with tensors")
    return dict(loaded)


def load_imagenet(detector: FasterRCNN, path: Path) -> None:
    """Start the body, and what the head takes over from the classifier, from ImageNet weights.

    The file holds torchvision's classification names, or those of `features` alone, as `torch.save(net.features.state_dict())` gives.
    A ResNet's last stage goes to a res5 head; VGG's first two classifier layers go to fc6 and fc7 where the shapes fit.
    """
    state = load_state(path)
    if all(re.match(r"\d", name) for name in state):
        state = {f"features.{name}": value for name, value in state.items()}
    _load(detector.backbone.body, state, str(path))
    layer4 = getattr(detector.head.body, "layer4", None)
    if layer4 is not None:
        _load(layer4, {name.removeprefix("layer4."): value for name, value in state.items() if name.startswith("layer4.")}, str(path))
    for ours, theirs in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
        layer = getattr(detector.head.body, ours, None)
        weight = state.get(f"{theirs}.weight")
        if isinstance(layer, nn.Linear) and weight is not None and weight.shape == layer.weight.shape:
            _load(layer, {"weight": weight, "bias": state[f"{theirs}.bias"]}, str(path))


def load_torchvision(detector: FasterRCNN, state: Mapping[str, Tensor], source: str) -> None:
    """Load the state dict of a torchvision Faster R-CNN, key by key.

    Raises:
        WeightsError: a weight is missing, left over or of another shape, by name.
    """
    renamed = {rename(name, detector): value for name, value in state.items() if not name.endswith(_BOOKKEEPING)}
    left_over = sorted(set(renamed) - set(detector.state_dict()))
    if left_over:
        raise WeightsError(f"{source} holds {len(left_over)} weights that {detector.config.architecture} lacks, first {left_over[0]!r}")
    _load(detector, renamed, source)


def rename(name: str, detector: FasterRCNN) -> str:
    """Torchvision's name of a weight -> ours."""
    features = "features." if hasattr(detector.backbone.body, "features") else ""
    rules = [
        (r"^backbone\.body\.", f"backbone.body.{features}"),
        (r"^backbone\.fpn\.inner_blocks\.(\d+)\.", r"backbone.fpn.laterals.\1."),
        (r"^backbone\.fpn\.layer_blocks\.(\d+)\.", r"backbone.fpn.outputs.\1."),
        (r"^rpn\.head\.conv\.(\d+)\.0\.", r"rpn.convs.\1."),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.convs.0.\1"),
        (r"^rpn\.head\.", "rpn."),
        (r"^roi_heads\.box_predictor\.", "head."),
        (r"^roi_heads\.box_head\.(fc\d)\.", r"head.body.\1."),
        (r"^roi_heads\.box_head\.([0-3])\.", r"head.body.convs.\1."),
        (r"^roi_heads\.box_head\.5\.", "head.body.fc."),
    ]
    if detector.config.backbone.norm == "frozen":  # without a norm in the pyramid, torchvision still counts the convolution as number 0
        rules[1:3] = [(pattern + r"(?:0\.)?", ours) for pattern, ours in rules[1:3]]
    for pattern, ours in rules:
        name, found = re.subn(pattern, ours, name)
        if found:
            return name
    return name


def _load(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith(_BOOKKEEPING)}
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise WeightsError(f"{source} has no weights for {len(missing)} of {len(wanted)} entries, first {missing[0]!r}")
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise WeightsError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    module.load_state_dict({name: state[name] for name in wanted}, strict=False)


if __name__ == "__main__":
    from model.coco import main  # here, since it builds detectors, and those load weights through this module

    raise SystemExit(main())
