"""Every preset builds; those that torchvision has give its answers from its weights."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
import torch
from torch import nn
from torchvision.models import detection

from model import alternate, train
from model.config import config_from_dict, to_dict
from model.faster_rcnn import FasterRCNN, Targets, build_detector
from model.presets import PRESETS
from model.pretrained import load_torchvision
from model.weights import WeightsError

CLASSES = tuple(f"class{k}" for k in range(1, 91))
TORCHVISION = {
    "resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
    "resnet50_fpn_v2": detection.fasterrcnn_resnet50_fpn_v2,
    "mobilenet_v3_large_fpn": detection.fasterrcnn_mobilenet_v3_large_fpn,
    "mobilenet_v3_large_320_fpn": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}
PROPOSALS = 100
SIZES = [(96, 160), (96, 132), (140, 96)]
LARGE = [(3 * height, 3 * width) for height, width in SIZES]
"""For the mobile networks: a RoI under one cell of 32 px is pooled like its neighbour, and equal scores have no order."""


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_builds_and_survives_a_checkpoint(name: str) -> None:
    preset = PRESETS[name](("a", "b"))
    assert config_from_dict(to_dict(preset.detector)) == preset.detector
    assert preset.detector.architecture == name
    with torch.device("meta"):
        detector = FasterRCNN(preset.detector)
    assert detector.head.cls_score.out_features == 3


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_command_that_a_preset_states_is_one(name: str) -> None:
    told = " ".join((PRESETS[name].__doc__ or "").split())
    command = re.search(r"`(?:python|torchrun --nproc-per-node 8) -m model\.(train|alternate) ([^`]+)`", told)
    assert command, "the docstring states the command"
    program, arguments = command.groups()
    options = {"train": train, "alternate": alternate}[program].build_parser().parse_args(shlex.split(arguments))
    assert options.preset == name
    assert options.data


@pytest.mark.parametrize("name", ["mobilenet_v2_fpn", "mobilenet_v2_c4", "resnet50_c4", "vgg16", "zf"])
def test_networks_without_a_counterpart_train_and_detect(name: str) -> None:
    torch.manual_seed(0)
    config = PRESETS[name](("a", "b")).detector
    small = dataclasses.replace(
        config,
        rpn=dataclasses.replace(
            config.rpn, pre_nms_top_n_train=100, pre_nms_top_n_test=50, post_nms_top_n_train=20, post_nms_top_n_test=10, min_size=1.0
        ),
        roi=dataclasses.replace(config.roi, samples_per_image=8, hidden=16 if config.roi.head == "two_fc" else config.roi.hidden),
    )
    detector = build_detector(small)
    images = torch.randint(0, 255, (1, 96, 160, 3), dtype=torch.uint8)
    sizes = torch.tensor([[90, 160]])
    losses = detector(images, sizes, Targets(torch.tensor([[[10.0, 10.0, 90.0, 70.0]]]), torch.tensor([[1]])))
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    with torch.no_grad():
        assert detector.eval()(images, sizes).boxes.shape == (1, 100, 4)


def sizes_of(name: str) -> list[tuple[int, int]]:
    return LARGE if name.startswith("mobile") else SIZES


def random_network(name: str) -> nn.Module:
    """Torchvision's network with random weights, statistics of real activations, and heads that give many confident detections."""
    torch.manual_seed(0)
    network = TORCHVISION[name](
        weights=None,
        weights_backbone=None,
        num_classes=91,
        min_size=min(sizes_of(name)[0]),
        max_size=4000,
        rpn_post_nms_top_n_test=PROPOSALS,
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over what it sees
    with torch.no_grad():
        for _ in range(2):
            network.train().backbone(torch.randn(2, 3, 160, 192))
    network.eval()
    # one after the other, since each sees what the ones before it let through
    for layer, spread in (
        (network.rpn.head.cls_logits, 0.5),
        (network.rpn.head.bbox_pred, 0.2),
        (network.roi_heads.box_predictor.cls_score, 2.0),
        (network.roi_heads.box_predictor.bbox_pred, 0.5),
    ):
        spread_outputs(network, layer, spread)
    return network


def spread_outputs(network: nn.Module, layer: nn.Module, spread: float) -> None:
    """Scale a prediction layer so that its outputs over a picture deviate by `spread`."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.std()))
    with torch.no_grad():
        network([image.permute(2, 0, 1) / 255 for image in pictures(SIZES[:1])])
        layer.weight.mul_(spread / torch.stack(seen).mean())
    handle.remove()


def our_network(name: str, theirs: nn.Module) -> FasterRCNN:
    config = PRESETS[name](CLASSES).detector
    # torchvision lets every pair above the score threshold into the final NMS
    unlimited = dataclasses.replace(
        config,
        rpn=dataclasses.replace(config.rpn, post_nms_top_n_test=PROPOSALS),
        roi=dataclasses.replace(config.roi, candidates_per_image=90 * PROPOSALS),
    )
    dtype = next(theirs.parameters()).dtype
    torch.set_default_dtype(dtype)  # so that mean and deviation are not rounded to fp32 first
    try:
        ours = FasterRCNN(unlimited).to(dtype).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    load_torchvision(ours, theirs.state_dict(), "torchvision")
    return ours


def pictures(sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = [torch.randint(0, 256, (3, height // 8, width // 8), generator=generator).float() for height, width in sizes]
    grown = [nn.functional.interpolate(c[None], size=size, mode="bilinear")[0] for c, size in zip(coarse, sizes, strict=True)]
    return [picture.permute(1, 2, 0).to(torch.uint8) for picture in grown]


def as_batch(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded as torchvision pads: to the largest sides, rounded up to 32."""
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (0, 1))
    batch = torch.zeros((len(images), height, width, 3), dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return batch, torch.tensor([image.shape[:2] for image in images])


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_torchvisions_weights_give_torchvisions_answers(name: str) -> None:
    """In fp64, so that no rounding decides about a suppression: what differs then is the method."""
    theirs = random_network(name).double()
    ours = our_network(name, theirs)
    for images in (pictures(sizes_of(name)[:1]), pictures(sizes_of(name))):
        with torch.no_grad():
            expected = theirs([image.permute(2, 0, 1).double() / 255 for image in images])
            answer = ours(*as_batch(images))
        for row, wanted in enumerate(expected):
            count = len(wanted["scores"])
            assert count > 10, "the oracle must see something"
            assert answer.num_detections[row] == count
            assert_same(answer.boxes[row], answer.scores[row], answer.labels[row], wanted)


def assert_same(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, wanted: dict[str, torch.Tensor]) -> None:
    """Every detection has its twin within 1e-4 px and 1e-4 score; equal scores may come in another order."""
    count = len(wanted["scores"])
    torch.testing.assert_close(scores[:count], wanted["scores"], atol=1e-4, rtol=0)
    box_gap = (wanted["boxes"][:, None] - boxes[None, :count]).abs().amax(-1)
    score_gap = (wanted["scores"][:, None] - scores[None, :count]).abs()
    twins = (box_gap < 1e-4) & (score_gap < 1e-4) & (wanted["labels"][:, None] == labels[None, :count])
    assert twins.any(dim=1).all(), f"{int((~twins.any(dim=1)).sum())} of {count} differ, nearest {box_gap.amin(1).max():.6f} px"


def test_weights_that_do_not_fit_are_named() -> None:
    theirs = random_network("mobilenet_v3_large_320_fpn").state_dict()
    ours = FasterRCNN(PRESETS["mobilenet_v3_large_320_fpn"](CLASSES).detector)
    with pytest.raises(WeightsError, match=r"first 'backbone.extra'"):
        load_torchvision(ours, {**theirs, "backbone.extra": torch.zeros(1)}, "file.pth")
    with pytest.raises(WeightsError, match=r"no weights for 1 of .* first 'head.cls_score.bias'"):
        load_torchvision(ours, {k: v for k, v in theirs.items() if not k.endswith("cls_score.bias")}, "file.pth")
    few = FasterRCNN(PRESETS["mobilenet_v3_large_320_fpn"](("one",)).detector)
    with pytest.raises(WeightsError, match=r"has shape \(91,\), expected \(2,\)|has shape \(91, 1024\), expected \(2, 1024\)"):
        load_torchvision(few, theirs, "file.pth")
