"""Slots that no proposal filled never reach the head, and the answers stay the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny_detector import tiny_detector
from torch import Tensor, nn

from export import pictures
from export.trim import TRANSLATIONS, filled_slots, trim
from model.rpn import Proposals


def proposals(counts: list[int], slots: int = 6) -> Proposals:
    valid = torch.arange(slots)[None, :] < torch.tensor(counts)[:, None]
    boxes = torch.rand(len(counts), slots, 4, generator=torch.Generator().manual_seed(0)) * valid[..., None]
    return Proposals(boxes, valid)


@pytest.mark.parametrize(("counts", "used"), [([0, 0], 1), ([2, 4], 4), ([6, 1], 6), ([3], 3)])
def test_as_many_slots_as_the_fullest_image_needs(counts: list[int], used: int) -> None:
    given = proposals(counts)
    trimmed = trim(given)
    assert torch.equal(trimmed.boxes, given.boxes[:, :used])
    assert torch.equal(trimmed.valid, given.valid[:, :used])


class Areas(nn.Module):
    def forward(self, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        boxes, valid = filled_slots(boxes, valid)
        return boxes.flatten(0, 1).sum(dim=1), valid.sum(dim=1)


def test_the_graph_trims_by_what_it_sees() -> None:
    batch = torch.export.Dim("batch")
    given = tuple(proposals([2, 4]))
    program = torch.onnx.export(
        Areas().eval(),
        given,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: batch}, {0: torch.export.Dim.AUTO}),
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for counts in ([0], [3, 1], [6, 6, 2], [1, 0]):
        boxes, valid = proposals(counts)
        sums, kept = session.run(None, {"boxes": boxes.numpy(), "valid": valid.numpy()})
        used = max(1, *counts)
        assert sums.shape == (len(counts) * used,)
        np.testing.assert_allclose(sums, boxes[:, :used].flatten(0, 1).sum(1), rtol=1e-6)
        assert kept.tolist() == counts


def test_detections_do_not_change() -> None:
    detector = tiny_detector()
    detector.config = dataclasses.replace(detector.config, rpn=dataclasses.replace(detector.config.rpn, score_thresh=0.95))
    hw = (128, 160)
    images = torch.from_numpy(np.stack([pictures.street(hw, 1), pictures.blank(hw, 0), pictures.smear(hw, 2)]))
    sizes_hw = torch.tensor([hw] * 3)
    seen: list[int] = []
    hook = detector.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        whole = detector(images, sizes_hw)
        detector.trim = trim
        trimmed = detector(images, sizes_hw)
    hook.remove()
    assert seen[1] < seen[0], "some slots stayed empty"
    assert whole.num_detections.sum() > 0
    for one, other in zip(whole, trimmed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
