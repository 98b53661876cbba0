"""What rounding decides is told from a fault: a network that computes in fp64 is among the judges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_detector import tiny_detector

from export import pictures
from export.agreement import Answer, answer_of, compare
from export.stability import ROUNDS, exact, judge, rivals_of, shaken
from export.verify import eager
from model.faster_rcnn import FasterRCNN

HW = (96, 128)
BOX_PX, SCORE = 1e-3, 1e-4


@pytest.fixture(scope="module")
def calm() -> FasterRCNN:
    return tiny_detector()


@pytest.fixture(scope="module")
def wild(calm: FasterRCNN) -> FasterRCNN:
    """The same network with a number added to every logit that leaves fp32 few digits: anchors tie that do not tie in fp64."""
    other = copy.deepcopy(calm)
    with torch.no_grad():
        other.rpn.cls_logits.bias.add_(1e6)
    return other


def answer(detector: FasterRCNN) -> Answer:
    return answer_of(eager(detector, pictures.street(HW, 1)[None].copy(), np.array([HW])), 0)


def test_the_exact_copy_computes_in_fp64_and_leaves_the_network_alone(calm: FasterRCNN) -> None:
    other = exact(calm)
    assert {weight.dtype for weight in other.parameters()} == {torch.float64}
    assert {weight.dtype for weight in calm.parameters()} == {torch.float32}
    assert other.normalize.get_buffer("scale").dtype == torch.float64
    found = compare(answer(calm), answer(other), limit=100)
    assert len(found.pairs) == len(answer(calm)) > 10
    assert 0 < found.worst_box_px < BOX_PX


def test_rivals_are_the_exact_copy_and_shaken_ones(calm: FasterRCNN) -> None:
    kinds = [next(rival.parameters()).dtype for rival in rivals_of(calm)]
    assert kinds == [torch.float64] + [torch.float32] * ROUNDS


def test_what_fp64_answers_differently_is_excused(wild: FasterRCNN) -> None:
    reference, truth = answer(wild), answer(exact(wild))
    strict = compare(reference, truth, limit=100)
    assert strict.missed or strict.worst_box_px > BOX_PX, "fp32 must go wrong here"
    found = judge(reference, truth, [truth], limit=100, box_px=BOX_PX, score=SCORE)
    assert found.undecided > 0
    assert not found.missed
    assert not found.extra
    assert found.worst_box_px <= BOX_PX


def row_of_scores(detector: FasterRCNN) -> torch.Tensor:
    """Logits of one anchor in the middle of a long white strip, where every position sees the same."""
    strip = torch.full((1, 32, 2048, 3), 255, dtype=torch.uint8)
    with torch.inference_mode():
        levels = detector.backbone(detector.normalize(strip, torch.tensor([[32, 2048]])))
        grid = detector.rpn(levels).logits[0].reshape(levels[0].shape[2], levels[0].shape[3], -1)
    middle = grid.shape[1] // 2
    return grid[1, middle - 8 : middle + 8, 0]


def test_only_a_rival_that_rounds_by_position_breaks_the_ties_of_a_constant_picture(calm: FasterRCNN) -> None:
    """There the first position of a row suppresses its neighbours, unless a runtime rounds another one up."""
    assert len(row_of_scores(calm).unique()) == 1
    assert len(row_of_scores(exact(calm)).unique()) == 1
    scores = row_of_scores(shaken(calm, 0))
    assert len(scores.unique()) > 4
    assert (scores - row_of_scores(calm)).abs().max() < 1e-4, "by the last digits only"


def test_a_fault_is_still_a_fault(calm: FasterRCNN) -> None:
    reference = answer(calm)
    moved = Answer(reference.boxes + np.float32(0.5), reference.scores, reference.labels)
    rivals = [answer(rival) for rival in list(rivals_of(calm))[:3]]
    found = judge(reference, moved, rivals, limit=100, box_px=BOX_PX, score=SCORE)
    assert found.undecided < 0.1 * len(reference)
    assert found.worst_box_px == pytest.approx(0.5, abs=1e-3)
