from dataclasses import replace

import pytest
import torch
from model_fakes import confident_detector, random_batch, tiny_config

from model.boxes import iou
from model.config import config_from_dict, to_dict
from model.faster_rcnn import Detections, FasterRCNN, Targets, build_detector
from model.nms import dense_nms
from model.roi_pool import pool_and_select

SIZES = [(64, 96), (50, 70), (33, 95)]
PADDED = (64, 96)


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    return confident_detector()


def run(detector: FasterRCNN, images: torch.Tensor, sizes: torch.Tensor) -> Detections:
    with torch.no_grad():
        answer = detector(images, sizes)
    assert isinstance(answer, Detections)
    return answer


def test_answers_keep_the_contract(detector: FasterRCNN) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    answer = run(detector, images, sizes)
    assert [t.shape for t in answer] == [(3, 100, 4), (3, 100), (3, 100), (3,)]
    assert (answer.num_detections > 3).all(), "the fake must detect something, or the properties below are empty"
    for boxes, scores, labels, count, (height, width) in zip(*answer, SIZES, strict=True):
        assert (scores[:-1] >= scores[1:]).all()
        assert (scores[:count] > 0.05).all()
        assert (scores[count:] == 0).all()
        assert (labels[:count] >= 1).all()
        assert (labels[:count] <= 2).all()
        assert (labels[count:] == 0).all()
        assert (boxes[count:] == 0).all()
        x1, y1, x2, y2 = boxes[:count].unbind(1)
        assert (x1 >= 0).all()
        assert (x2 <= width).all()
        assert (y2 <= height).all()
        assert (x1 < x2).all()
        assert (y1 < y2).all()


@pytest.mark.parametrize("layer", ["rpn.cls_logits", "rpn.bbox_pred", "head.cls_score", "head.bbox_pred"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_upsets_the_network_gets_nan_instead_of_nothing(detector: FasterRCNN, layer: str, number: float) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    expected = run(detector, images, sizes)

    def upset_second(_layer: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        of_images = output.reshape(3, -1).clone()
        of_images[1, 7] = number
        return of_images.reshape(output.shape)

    hook = detector.get_submodule(layer).register_forward_hook(upset_second)
    answer = run(detector, images, sizes)
    hook.remove()
    assert answer.scores[1].isnan().all()
    for index in (0, 2):
        assert torch.equal(answer.scores[index], expected.scores[index])
        assert torch.equal(answer.boxes[index], expected.boxes[index])


def test_batch_equals_singles(detector: FasterRCNN) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    together = run(detector, images, sizes)
    for index in range(3):
        alone = run(detector, images[index : index + 1], sizes[index : index + 1])
        assert alone.num_detections[0] == together.num_detections[index]
        torch.testing.assert_close(alone.boxes[0], together.boxes[index], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(alone.scores[0], together.scores[index], atol=1e-5, rtol=1e-4)
        assert torch.equal(alone.labels[0], together.labels[index])


def test_padding_content_changes_nothing(detector: FasterRCNN) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    noisy = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    for index, (height, width) in enumerate(SIZES):
        noisy[index, :height, :width] = images[index, :height, :width]
    assert not torch.equal(noisy, images)
    for clean, dirty in zip(run(detector, images, sizes), run(detector, noisy, sizes), strict=True):
        assert torch.equal(clean, dirty)


def test_strategies_agree(detector: FasterRCNN) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    expected = run(detector, images, sizes)
    other = confident_detector()
    other.nms, other.pool = dense_nms, pool_and_select
    answer = run(other, images, sizes)
    assert torch.equal(answer.num_detections, expected.num_detections)
    torch.testing.assert_close(answer.boxes, expected.boxes, atol=1e-3, rtol=1e-4)


def test_infinite_logits_are_dropped() -> None:
    broken = confident_detector()
    with torch.no_grad():
        broken.head.cls_score.bias[1] = float("nan")
    images, sizes = random_batch([(64, 90)], PADDED)
    assert run(broken, images, sizes).num_detections.tolist() == [0]


def test_no_ground_truth_gives_zero_box_losses(detector: FasterRCNN) -> None:
    images, sizes = random_batch(SIZES, PADDED)
    losses = detector(images, sizes, Targets(torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.int64)))
    assert losses["rpn_reg"].item() == 0
    assert losses["roi_reg"].item() == 0
    assert losses["rpn_cls"].item() > 0
    assert torch.isfinite(sum(losses.values()))


def test_padding_rows_of_the_targets_change_nothing() -> None:
    boxes = torch.tensor([[[5.0, 8.0, 40.0, 30.0], [50.0, 10.0, 80.0, 60.0]]])
    labels = torch.tensor([[1, 2]])
    images, sizes = random_batch([(64, 90)], PADDED)
    losses = []
    for extra in (0, 5):
        padded = Targets(torch.cat([boxes, torch.zeros(1, extra, 4)], 1), torch.cat([labels, torch.zeros(1, extra, dtype=torch.int64)], 1))
        torch.manual_seed(0)
        detector = confident_detector()
        # with every candidate sampled there is no draw that the number of rows could shift
        losses.append(detector(images, sizes, padded)["rpn_reg"].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.5)
    assert min(losses) > 0


def test_gradient_reaches_every_trainable_part() -> None:
    torch.manual_seed(0)
    detector = build_detector(tiny_config())
    images, sizes = random_batch([(64, 90), (60, 96)], PADDED)
    targets = Targets(torch.tensor([[[5.0, 8.0, 40.0, 30.0]], [[20.0, 10.0, 60.0, 50.0]]]), torch.tensor([[1], [2]]))
    sum(detector(images, sizes, targets).values()).backward()
    still = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not still


def test_overfits_a_few_pictures() -> None:
    """Four pictures of one bright rectangle each: after training, the best box is the rectangle and the class is right."""
    torch.manual_seed(0)
    boxes = torch.tensor([[[10.0, 12.0, 50.0, 44.0]], [[40.0, 20.0, 84.0, 52.0]], [[5.0, 5.0, 33.0, 37.0]], [[30.0, 24.0, 70.0, 60.0]]])
    labels = torch.tensor([[1], [2], [1], [2]])
    images = torch.full((4, *PADDED, 3), 90, dtype=torch.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes[:, 0].int().tolist()):
        images[index, y1:y2, x1:x2] = torch.tensor([220, 40, 40] if labels[index] == 1 else [40, 60, 220], dtype=torch.uint8)
    sizes = torch.tensor([PADDED] * 4)
    config = tiny_config()
    # random weights learn steadily only with batch norm; a frozen one keeps the statistics of a body that was trained
    detector = build_detector(replace(config, backbone=replace(config.backbone, norm="batch"))).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=120)
    for _ in range(120):
        optimizer.zero_grad()
        sum(detector(images, sizes, Targets(boxes, labels)).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    answer = run(detector.eval(), images, sizes)
    assert answer.labels[:, 0].tolist() == [1, 2, 1, 2]
    overlap = iou(answer.boxes[:, :1], boxes)[:, 0, 0]
    assert (overlap > 0.5).all(), overlap


def test_config_survives_json_types() -> None:
    import json

    config = tiny_config()
    assert config_from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ValueError, match="unknown keys"):
        config_from_dict({**to_dict(config), "anchor": {}})
