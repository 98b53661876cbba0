"""Optimizer, learning rate and moving average of a training run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from model.training import TrainConfig

Module = TypeVar("Module", bound=nn.Module)

PRETRAINED_PREFIX = "backbone.body."
"""Parameters that start from ImageNet; `backbone_lr_factor` is for them."""


def parameter_groups(detector: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Groups by learning rate and decay; vectors (biases, normalisation) are not decayed, frozen parameters are left out."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = config.backbone_lr_factor if name.startswith(PRETRAINED_PREFIX) else 1.0
        if name.endswith(".bias"):
            factor *= config.bias_lr_factor
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": members, "lr": config.lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def build_optimizer(detector: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused: one pass over the weights and no copy of them, six times as fast on a CPU (VGG's fc6 alone has 103 M of them)."""
    groups = parameter_groups(detector, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, progress: float, config: TrainConfig) -> float:
    """The rate of a step, before group factors.

    Args:
        step: optimizer steps done, for the warm-up.
        progress: epochs done, as a fraction (3.5 is the middle of the fourth).
    """
    warmup = 1.0
    if step < config.warmup_iterations:
        warmup = config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_iterations
    return config.lr * warmup * _decay(progress, config)


def _decay(progress: float, config: TrainConfig) -> float:
    if config.schedule == "cosine":
        part = min(progress / config.epochs, 1.0)
        return config.final_lr_factor + (1 - config.final_lr_factor) * (1 + math.cos(math.pi * part)) / 2
    if config.schedule == "multistep":
        return config.gamma ** sum(progress >= milestone for milestone in config.milestones)
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


class MovingAverage(Generic[Module]):
    """Exponential moving average of a detector's weights; buffers (batch-norm statistics) are averaged too.

    Early on the average follows faster: the decay of step t is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, detector: Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, detector: nn.Module) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged, current = _floats(self.detector), _floats(detector)
        torch._foreach_lerp_(averaged, current, weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self.detector.state_dict()


def _floats(detector: nn.Module) -> list[Tensor]:
    def tensors() -> Iterable[Tensor]:
        yield from detector.parameters()
        yield from detector.buffers()

    return [tensor.detach() for tensor in tensors() if tensor.is_floating_point()]
