import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model_boxes import random_boxes
from torchvision.ops import batched_nms, nms

from model.nms import INVALID_SCORE, dense_nms, dense_nms_rounds, greedy_nms


def scene(seed: int, sets: int = 2, count: int = 40, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.stack([random_boxes(count, seed + s, 25, 35) for s in range(sets)])
    scores = torch.rand((sets, count), generator=generator)
    if ties:
        scores = (scores * 4).round() / 4
    scores = scores.sort(dim=1, descending=True, stable=True).values
    scores[:, count - 5 :] = INVALID_SCORE
    return boxes, scores, torch.randint(0, 3, (sets, count), generator=generator)


def test_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 20.0], [1.0, 0.0, 11.0, 20.0], [40.0, 0.0, 50.0, 20.0], [2.0, 0.0, 12.0, 20.0]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, INVALID_SCORE]])
    for strategy in (greedy_nms, dense_nms):
        assert strategy(boxes, scores, None, 0.5).tolist() == [[True, False, True, False]]
        assert strategy(boxes, scores, torch.tensor([[1, 2, 1, 1]]), 0.5).tolist() == [[True, True, True, False]]


def test_a_suppressed_box_suppresses_nothing() -> None:
    """A chain: a over b, b over c, but a not over c; greedy keeps a and c."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 5.0], [4.0, 0.0, 14.0, 5.0], [8.0, 0.0, 18.0, 5.0]]])
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    for strategy in (greedy_nms, dense_nms):
        assert strategy(boxes, scores, None, 0.4).tolist() == [[True, False, True]]


def test_threshold_is_strict() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, 10.0, 2.0]]])  # IoU exactly 0.5
    scores = torch.tensor([[0.9, 0.8]])
    for strategy in (greedy_nms, dense_nms):
        assert strategy(boxes, scores, None, 0.5).tolist() == [[True, True]]


@given(st.integers(0, 300), st.booleans(), st.sampled_from([0.3, 0.5, 0.7]))
def test_dense_equals_greedy(seed: int, ties: bool, threshold: float) -> None:
    boxes, scores, groups = scene(seed, ties=ties)
    for by in (None, groups):
        exact = greedy_nms(boxes, scores, by, threshold)
        keep, rounds = dense_nms_rounds(boxes, scores, by, threshold)
        assert torch.equal(keep, exact)
        assert torch.equal(dense_nms(boxes, scores, by, threshold), exact) or rounds > 16


@given(st.integers(0, 100))
def test_greedy_equals_torchvision(seed: int) -> None:
    boxes, scores, groups = scene(seed, sets=1)
    valid = scores[0] > INVALID_SCORE
    plain = greedy_nms(boxes, scores, None, 0.5)[0].nonzero()[:, 0].tolist()
    assert plain == sorted(nms(boxes[0][valid], scores[0][valid], 0.5).tolist())
    grouped = greedy_nms(boxes, scores, groups, 0.5)[0].nonzero()[:, 0].tolist()
    assert grouped == sorted(batched_nms(boxes[0][valid], scores[0][valid], groups[0][valid], 0.5).tolist())
