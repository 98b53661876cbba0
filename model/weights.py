"""State dicts of others: read from a file without running code, and fitted into a module by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from model.backbones import Backbone
from model.roi_heads import BoxHead
from model.tensor_file import read_tensor_file

BOOKKEEPING = "num_batches_tracked"


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
    loaded = read_tensor_file(path, lambda reason: WeightsError(f"{path} is no state dict: {reason}"))
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} is no state dict: expected names with tensors")
    return dict(loaded)


def load_imagenet(backbone: Backbone, head: BoxHead, path: Path) -> None:
    """Start the body, and what the head takes over from the classifier, from ImageNet weights.

    The file holds torchvision's classification names, or those of `features` alone, as `torch.save(net.features.state_dict())` gives.
    A ResNet's last stage goes to a res5 head; VGG's first two classifier layers go to fc6 and fc7 where the shapes fit.
    """
    state = load_state(path)
    if all(re.match(r"\d", name) for name in state):
        state = {f"features.{name}": value for name, value in state.items()}
    fit(backbone.body, state, str(path))
    layer4 = getattr(head.body, "layer4", None)
    if layer4 is not None:
        fit(layer4, {name.removeprefix("layer4."): value for name, value in state.items() if name.startswith("layer4.")}, str(path))
    for ours, theirs in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
        layer = getattr(head.body, ours, None)
        weight = state.get(f"{theirs}.weight")
        if isinstance(layer, nn.Linear) and weight is not None and weight.shape == layer.weight.shape:
            fit(layer, {"weight": weight, "bias": state[f"{theirs}.bias"]}, str(path))


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load what the module needs; what else the state holds is left out.

    Raises:
        WeightsError: a weight is missing or has another shape, by name.
    """
    wanted = {name: value for name, value in module.state_dict().items() if not name.endswith(BOOKKEEPING)}
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise WeightsError(f"{source} has no weights for {len(missing)} of {len(wanted)} entries, first {missing[0]!r}")
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise WeightsError(f"{source}: {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    module.load_state_dict({name: state[name] for name in wanted}, strict=False)
