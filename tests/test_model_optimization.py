"""Learning rates by hand, parameter groups, the moving average, configuration."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from model.optimization import MovingAverage, build_optimizer, learning_rate, parameter_groups, set_learning_rate
from model.training import AugmentConfig, TrainConfig, train_config_from_dict


class Parts(nn.Module):
    """Names as a detector's: a pretrained body, a frozen stage, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nn.Linear(2, 3), "fpn": nn.Linear(3, 3)})
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)


def test_warm_up_and_cosine_by_hand() -> None:
    config = TrainConfig(lr=1.0, epochs=10, warmup_iterations=4, warmup_factor=0.2, schedule="cosine", final_lr_factor=0.1)
    assert learning_rate(0, 0.0, config) == pytest.approx(0.2)
    assert learning_rate(2, 0.0, config) == pytest.approx(0.6)
    assert learning_rate(4, 0.0, config) == pytest.approx(1.0)
    assert learning_rate(99, 5.0, config) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(99, 10.0, config) == pytest.approx(0.1)


def test_multistep_and_constant() -> None:
    config = TrainConfig(lr=1.0, epochs=10, warmup_iterations=0, schedule="multistep", milestones=(4, 8), gamma=0.1)
    assert [learning_rate(9, progress, config) for progress in (3.99, 4.0, 7.9, 8.0)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert learning_rate(9, 9.0, dataclasses.replace(config, schedule="constant")) == 1


def test_groups_by_rate_and_decay() -> None:
    parts = Parts()
    config = TrainConfig(lr=0.1, backbone_lr_factor=0.5, bias_lr_factor=2.0, weight_decay=0.01)
    found = {
        id(parameter): (group["lr_factor"], group["weight_decay"])
        for group in parameter_groups(parts, config)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    names = {name: found.get(id(parameter)) for name, parameter in parts.named_parameters()}
    assert names["backbone.body.weight"] == (0.5, 0.01)
    assert names["backbone.body.bias"] == (1.0, 0.0)
    assert names["backbone.fpn.weight"] == (1.0, 0.01)
    assert names["norm.weight"] == (1.0, 0.0)
    assert names["norm.bias"] == (2.0, 0.0)
    assert names["frozen.weight"] is None
    optimizer = build_optimizer(parts, config)
    set_learning_rate(optimizer, 0.2)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.1, 0.2, 0.2, 0.4])
    assert isinstance(build_optimizer(parts, dataclasses.replace(config, optimizer="adamw")), torch.optim.AdamW)


def test_moving_average_by_hand() -> None:
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, 0.0)
    average = MovingAverage(linear, decay=0.9)
    nn.init.constant_(linear.weight, 1.0)
    average.update(linear)  # decay of the first step: 2/11
    assert average.detector.weight.item() == pytest.approx(9 / 11)
    average.steps = 1000
    average.update(linear)
    assert average.detector.weight.item() == pytest.approx(0.9 * 9 / 11 + 0.1)
    assert not average.detector.training
    assert not average.detector.weight.requires_grad


def test_configuration_survives_json_and_refuses_what_it_does_not_know() -> None:
    config = TrainConfig(milestones=(3, 5), augment=AugmentConfig(scale=(0.5, 2.0), short_sides=(320, 384)))
    assert train_config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rate'\]"):
        train_config_from_dict({"learning_rate": 1})
    with pytest.raises(ValueError, match=r"training.lr: expected a positive number, got 0"):
        TrainConfig(lr=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_fused_step_equals_the_plain_one_in_either_memory_layout(kind: str) -> None:
    """Channels-last weights and their gradients are walked in memory's order by the fused step: both must lie alike."""
    torch.manual_seed(0)
    fused_net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, (3, 2), groups=2)).to(memory_format=torch.channels_last)
    plain_net = copy.deepcopy(fused_net).to(memory_format=torch.contiguous_format)
    config = TrainConfig(optimizer="sgd" if kind == "sgd" else "adamw", lr=0.1, weight_decay=0.05)
    fused = build_optimizer(fused_net, config)
    groups = parameter_groups(plain_net, config)
    plain = torch.optim.SGD(groups, momentum=0.9, foreach=False) if kind == "sgd" else torch.optim.AdamW(groups, foreach=False)
    images = torch.rand(2, 3, 9, 13)
    for _ in range(4):
        for net, optimizer in ((fused_net, fused), (plain_net, plain)):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    assert fused.defaults["fused"]
    for ours, theirs in zip(fused_net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
