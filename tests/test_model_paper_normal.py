"""Normalised box targets: the numbers by hand, and layers that mean the same before and after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_model_fast_rcnn import tiny_config
from torch import nn

from model import boxes as box_ops
from model.data.formats import open_dataset
from model.data.records import DetectionSet
from model.data.synthetic import write_voc
from model.faster_rcnn import build_detector
from model.paper_normal import DeltaNormal, head_normal, rpn_normal, speaking_normal


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return open_dataset(write_voc(tmp_path_factory.mktemp("voc"), {"train": 6}), "train")


def test_a_head_s_normal_by_hand(dataset: DetectionSet) -> None:
    """One object, two proposals an eighth of its width to its right and left: with itself, dx is -1/8, 1/8 and 0, weighted by 10."""
    record = dataclasses.replace(
        dataset.records[0],
        boxes=np.array([[20.0, 10.0, 60.0, 30.0]]),
        labels=np.array([2]),
        areas=np.array([800.0]),
        difficult=np.zeros(1, dtype=bool),
        crowd=np.zeros(1, dtype=bool),
    )
    proposals = [np.array([[25.0, 10, 65, 30], [15, 10, 55, 30], [80, 60, 90, 70]])]
    mean, deviation = head_normal(build_detector(tiny_config()), dataset.with_records([record]), proposals, hflip=0.0)
    assert mean[2].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert deviation[2, 0] == pytest.approx(10 * (2 / 3) ** 0.5 / 8)
    assert deviation[2, 1:].tolist() == pytest.approx([0.01] * 3)  # nothing varies: the least deviation
    assert deviation[1].tolist() == [1, 1, 1, 1]  # never seen: left alone
    one_sided = [proposals[0][:1]]
    assert head_normal(build_detector(tiny_config()), dataset.with_records([record]), one_sided, hflip=0.0).mean[2, 0] == pytest.approx(
        -0.625
    )
    assert head_normal(build_detector(tiny_config()), dataset.with_records([record]), one_sided, hflip=0.5).mean[2, 0] == 0


def test_an_rpn_s_normal_is_that_of_its_positive_anchors(dataset: DetectionSet) -> None:
    """Against a plain loop: anchors inside the picture with IoU 0.7, or the best of some object."""
    detector = build_detector(tiny_config())
    wanted = []
    for record in dataset.records:  # these pictures enter at their own size
        height, width = record.size_hw
        levels = [torch.zeros(1, 1, height // 16, width // 16)]
        anchors = torch.cat(detector.anchors(levels, (height, width)))
        inside = (anchors >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
        gt = torch.from_numpy(record.boxes).float()
        overlaps = box_ops.iou(anchors[inside], gt)
        best = (overlaps == overlaps.max(dim=0).values) & (overlaps > 0)
        for a, row in zip(anchors[inside], range(len(overlaps)), strict=True):
            if overlaps[row].max() >= 0.7 or best[row].any():
                wanted.append(box_ops.encode_deltas(gt[overlaps[row].argmax()], a))
    expected = torch.stack(wanted).double()
    mean, deviation = rpn_normal(detector, dataset, hflip=0.0)
    torch.testing.assert_close(mean.double(), expected.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deviation.double(), expected.std(0, correction=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_speaks_normal_inside_and_plain_outside(rows: int) -> None:
    torch.manual_seed(0)
    normal = DeltaNormal(torch.randn(rows, 4).squeeze(0), torch.rand(rows, 4).squeeze(0) + 0.1)
    layer, x = nn.Linear(5, 12), torch.randn(7, 5)
    plain = layer(x).detach()
    with speaking_normal(layer, normal):
        inside = layer(x).detach()
    repeats = 3 // rows
    expected = (plain - normal.mean.flatten().repeat(repeats)) / normal.deviation.flatten().repeat(repeats)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(layer(x).detach(), plain)
