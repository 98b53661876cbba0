"""Fast R-CNN on external proposals: frames, padding, duplicates, background, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.alternate import detector_config
from model.config import DetectorConfig
from model.data.formats import open_dataset
from model.data.synthetic import CLASS_NAMES, write_voc
from model.fast_rcnn import FastRCNN, deduplicate, detect_external, near_objects, pad_proposals, to_input_frame
from model.faster_rcnn import FasterRCNN, Targets, build_detector
from model.metrics.report import evaluate_detections
from model.paper_training import Recipe, fast_objective, train_stage
from model.rpn import Proposals, propose

TINY = (
    "detector.input.short_side=96",
    "detector.input.long_side=128",
    "detector.input.buckets=[[96,128],[128,96]]",
    "detector.anchors.sizes=[[16,32,48]]",
    "detector.rpn.min_size=4",
    "detector.rpn.hidden=32",
    "detector.roi.hidden=48",
    "detector.roi.dropout=0",
    "detector.roi.samples_per_image=32",
)


def tiny_config() -> DetectorConfig:
    return detector_config("zf", CLASS_NAMES, TINY)


@pytest.fixture
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    return build_detector(tiny_config()).eval()


def rows(*boxes: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def test_boxes_travel_between_frames_axis_by_axis() -> None:
    boxes = rows((10, 20, 30, 60))
    there = to_input_frame(boxes, (100, 50), (200, 150))
    np.testing.assert_allclose(there, [[30, 40, 90, 120]])
    np.testing.assert_allclose(to_input_frame(there, (200, 150), (100, 50)), boxes)


def test_of_boxes_on_the_same_cells_the_first_stays() -> None:
    boxes = rows((0, 0, 32, 48), (64, 0, 96, 48), (1, 2, 33, 47), (0, 0, 32, 80))
    np.testing.assert_array_equal(deduplicate(boxes), boxes[[0, 1, 3]])
    assert deduplicate(rows()).shape == (0, 4)


def test_padding_rows_are_marked_and_there_is_always_one() -> None:
    padded = pad_proposals([rows((1, 2, 3, 4), (5, 6, 7, 8)), rows()])
    assert padded.valid.tolist() == [[True, True], [False, False]]
    assert padded.boxes[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert pad_proposals([rows()]).boxes.shape == (1, 1, 4)


def test_background_can_be_asked_to_touch_an_object() -> None:
    targets = Targets(torch.tensor([[[0.0, 0, 10, 20], [0, 0, 90, 90]]]), torch.tensor([[1, 0]]))  # the second row is padding
    proposals = Proposals(torch.tensor([[[0.0, 0, 10, 10], [50, 50, 90, 90]]]), torch.ones(1, 2, dtype=torch.bool))
    assert near_objects(proposals, targets, 0.1).valid.tolist() == [[True, False]]
    assert near_objects(proposals, targets, 0.0).valid.tolist() == [[True, True]]


def test_it_is_the_detection_half_of_the_whole_network(detector: FasterRCNN) -> None:
    """Given the proposals that the RPN would make, both give the same detections, batched or alone."""
    detector.head.cls_score.weight.data.mul_(20)
    images = torch.randint(0, 256, (2, 96, 128, 3), dtype=torch.uint8)
    sizes_hw = torch.tensor([[96, 128], [80, 100]])
    with torch.no_grad():
        levels = detector.backbone(detector.normalize(images, sizes_hw))
        anchors = detector.anchors(levels, (96, 128))
        proposals = propose(detector.rpn(levels), anchors, sizes_hw, detector.config.rpn, detector.nms, training=False)
        whole, fast = detector(images, sizes_hw), FastRCNN(detector)
        half = fast(images, sizes_hw, proposals)
        alone = fast(images[1:], sizes_hw[1:], Proposals(proposals.boxes[1:], proposals.valid[1:]))
    assert int(whole.num_detections.min()) > 0
    for a, b in zip(whole, half, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(alone.boxes[0], half.boxes[1], atol=1e-4, rtol=1e-4)


def test_a_picture_without_proposals_has_no_detections(detector: FasterRCNN, tmp_path: Path) -> None:
    dataset = open_dataset(write_voc(tmp_path, {"train": 2}), "train")
    found = detect_external(detector, dataset, [rows(), rows()])
    assert [len(prediction["boxes"]) for prediction in found] == [0, 0]
    with pytest.raises(ValueError, match="proposals for 1"):
        detect_external(detector, dataset, [rows()])


def test_it_learns_from_proposals_alone(tmp_path: Path) -> None:
    """Jittered objects as proposals: after some steps the set is known by heart, and nothing but backbone and head has moved."""
    dataset = open_dataset(write_voc(tmp_path, {"train": 4}), "train")
    rng = np.random.default_rng(0)
    proposals = [np.concatenate([r.boxes + rng.normal(0, 3, r.boxes.shape) for _ in range(6)]).clip(0, 96) for r in dataset.records]
    proposals = [boxes[(boxes[:, 2:] - boxes[:, :2] > 4).all(axis=1)] for boxes in proposals]
    torch.manual_seed(0)
    detector = build_detector(tiny_config())
    for module in detector.backbone.modules():
        if isinstance(module, nn.Conv2d):  # stands for pretrained weights: the signal reaches the last layer
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    rpn_before = {name: value.clone() for name, value in detector.rpn.state_dict().items()}
    before = evaluate_detections(dataset, detect_external(detector, dataset, proposals)).voc_ap50
    recipe = Recipe(60, lr=0.01, batch_size=2)
    learning = [detector.backbone, detector.head]
    losses: list[float] = []
    train_stage(
        detector, learning, fast_objective(detector), dataset, recipe, seed=1, proposals=proposals, progress=lambda _, x: losses.append(x)
    )
    after = evaluate_detections(dataset, detect_external(detector, dataset, proposals)).voc_ap50
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    assert after > before
    assert all(torch.equal(value, rpn_before[name]) for name, value in detector.rpn.state_dict().items())
    assert all(parameter.requires_grad for parameter in detector.parameters())
