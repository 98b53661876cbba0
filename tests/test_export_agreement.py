"""Matching of two answers, and what rounding alone decides, on boxes typed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_detector import tiny_detector

from export.agreement import Agreement, Answer, Tally, compare, pairwise_iou
from export.stability import SHARE, judge, shaken


def answer(*rows: tuple[float, float, float, float, float, int]) -> Answer:
    """Rows of x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Answer(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


CAT = (10.0, 10.0, 30.0, 20.0, 0.9, 1)
DOG = (50.0, 12.0, 70.0, 40.0, 0.7, 2)
BIRD = (5.0, 50.0, 25.0, 60.0, 0.4, 3)


def moved(row: tuple[float, ...], px: float = 0.0, score: float = 0.0) -> tuple[float, float, float, float, float, int]:
    return (row[0] + px, row[1], row[2] + px, row[3], row[4] + score, int(row[5]))


def test_iou_by_hand() -> None:
    a = np.array([[0, 0, 10, 10], [0, 0, 4, 5]], np.float32)
    b = np.array([[5, 0, 15, 10], [20, 20, 30, 30], [2, 2, 2, 2]], np.float32)
    np.testing.assert_allclose(pairwise_iou(a, b), [[50 / 150, 0, 0], [0, 0, 0]], atol=1e-6)


def test_equal_answers_agree() -> None:
    found = compare(answer(CAT, DOG), answer(CAT, DOG), limit=100)
    assert found == Agreement(pairs=((0, 0), (1, 1)))


def test_differences_are_measured_over_pairs() -> None:
    found = compare(answer(CAT, DOG), answer(moved(CAT, px=0.25), moved(DOG, score=-0.125)), limit=100)
    assert (found.worst_box_px, found.worst_score) == (0.25, 0.125)
    assert not found.missed
    assert not found.extra


def test_another_order_still_pairs() -> None:
    found = compare(answer(CAT, DOG), answer(DOG, CAT), limit=100)
    assert sorted(found.pairs) == [(0, 1), (1, 0)]


def test_missed_extra_and_relabelled() -> None:
    relabelled = (*CAT[:5], 2)
    found = compare(answer(CAT, DOG), answer(relabelled, DOG, BIRD), limit=100)
    assert found.missed == {0: pytest.approx(0.9)}
    assert found.extra == {0: pytest.approx(0.9), 2: pytest.approx(0.4)}


def test_tie_at_the_cut_is_no_disagreement() -> None:
    left = answer(CAT, DOG)
    right = answer(CAT, (*BIRD[:4], DOG[4], 3))
    found = compare(left, right, limit=2)
    assert not found.missed
    assert not found.extra
    assert found.at_cut == 2
    assert compare(left, right, limit=3).missed == {1: pytest.approx(0.7)}  # nothing was cut: a real disagreement


def test_empty_answers() -> None:
    nothing = answer()
    assert compare(nothing, nothing, limit=100) == Agreement()
    assert compare(nothing, answer(CAT), limit=100).extra == {0: pytest.approx(0.9)}
    assert compare(answer(CAT), nothing, limit=100).missed == {0: pytest.approx(0.9)}


def test_tally_adds_and_takes_the_worst() -> None:
    a = compare(answer(CAT, DOG), answer(moved(CAT, px=0.5)), limit=100)
    b = compare(answer(CAT), answer(moved(CAT, px=0.25), BIRD), limit=100)
    assert Tally.of([a, b]) == Tally(matched=2, worst_box_px=0.5, missed=1, extra=1, top_unmatched=pytest.approx(0.7))


TOLERANCES = {"limit": 100, "box_px": 1e-3, "score": 1e-4}


def test_what_rivals_confirm_is_judged_in_full() -> None:
    reference, rivals = answer(CAT, DOG), [answer(CAT, DOG), answer(CAT, DOG)]
    found = judge(reference, answer(moved(CAT, px=0.5)), rivals, **TOLERANCES)
    assert found.worst_box_px == 0.5
    assert found.missed == {1: pytest.approx(0.7)}
    assert found.undecided == 0


def test_what_rounding_decides_is_set_aside_and_counted() -> None:
    reference, rivals = answer(CAT, DOG), [answer(CAT, moved(DOG, px=0.5)), answer(CAT, DOG)]
    found = judge(reference, answer(CAT, moved(DOG, px=0.5)), rivals, **TOLERANCES)
    assert (found.worst_box_px, found.undecided) == (0.0, 1)
    found = judge(reference, answer(CAT), rivals, **TOLERANCES)
    assert not found.missed
    assert found.undecided == 1


def test_an_undecided_box_excuses_no_other() -> None:
    reference, rivals = answer(CAT, DOG), [answer(CAT)]
    found = judge(reference, answer(moved(CAT, px=0.5), BIRD), rivals, **TOLERANCES)
    assert found.worst_box_px == 0.5
    assert found.extra == {1: pytest.approx(0.4)}


def test_shaken_weights_differ_in_the_last_place_only() -> None:
    detector = tiny_detector()
    other = shaken(detector, seed=1)
    before, after = (network.head.cls_score.weight.detach().double() for network in (detector, other))
    changed = before != after
    assert 0 < changed.double().mean() < 3 * SHARE
    assert ((before - after).abs() <= 1.2e-7 * before.abs()).all()
