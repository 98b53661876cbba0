"""Kinds of error, confusion and proposal recall by hand; the report holds them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.data.records import DetectionSet, Record
from model.metrics.errors import break_down, confusion_matrix
from model.metrics.predictions import Prediction, empty_prediction
from model.metrics.recall import covered_overlaps, proposal_recall
from model.metrics.report import evaluate_detections


def dataset(boxes: list[list[float]], labels: list[int]) -> DetectionSet:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1)
    flags = np.zeros(len(boxes), bool)
    return DetectionSet("made", ("a", "b"), (Record("x", Path("x.png"), (200, 300), array, np.array(labels), areas, flags, flags),))


def prediction(rows: list[tuple[list[float], float, int]]) -> Prediction:
    boxes, scores, labels = zip(*rows, strict=True)
    return Prediction(boxes=np.array(boxes, np.float64), scores=np.array(scores), labels=np.array(labels))


FOUR = dataset([[0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10], [150, 0, 160, 10]], [1, 1, 2, 2])


def test_each_kind_by_hand() -> None:
    rows = [
        ([0.0, 0, 10, 10], 0.9, 1),  # right
        ([0.0, 0, 10, 10], 0.8, 1),  # found before
        ([50.0, 0, 60, 10], 0.7, 2),  # class b on an a
        ([100.0, 5, 110, 15], 0.6, 2),  # IoU 1/3
        ([100.0, 6, 110, 16], 0.55, 1),  # IoU 1/4, and of the other class
        ([200.0, 100, 210, 110], 0.4, 1),  # nothing there
    ]
    breakdown = break_down(FOUR, [prediction(rows)])
    assert breakdown.counts == {"class": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 1}
    # a: right, twice, both, background -> AP 1/2; b: class, localisation -> AP 0. Mended class: a finds two of two.
    assert breakdown.ap_cost["class"] == pytest.approx(((0.5 + 0.5 * 2 / 3) - 0.5 + 0) / 2)
    assert breakdown.ap_cost["localisation"] == pytest.approx((0.5 * 0.5) / 2)
    assert breakdown.ap_cost["missed"] == pytest.approx(0)
    assert breakdown.ap_cost["background"] == pytest.approx(0)


def test_perfect_and_empty() -> None:
    record = FOUR.records[0]
    perfect = Prediction(boxes=record.boxes, scores=np.full(4, 0.9), labels=record.labels)
    breakdown = break_down(FOUR, [perfect])
    assert not any(breakdown.counts.values())
    assert not any(breakdown.ap_cost.values())
    nothing = break_down(FOUR, [empty_prediction()])
    assert nothing.counts["missed"] == 4
    assert nothing.confusion.tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_confusion_by_hand() -> None:
    rows = [
        ([0.0, 0, 10, 10], 0.9, 1),
        ([50.0, 0, 60, 10], 0.7, 2),
        ([100.0, 0, 110, 10], 0.6, 2),
        ([200.0, 100, 210, 110], 0.8, 1),
        ([150.0, 0, 160, 10], 0.3, 2),  # under the threshold
    ]
    assert confusion_matrix(FOUR, [prediction(rows)]).tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_covered_overlaps_take_the_best_pair_first() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [0, 4, 10, 14]])
    proposals = np.array([[0.0, 2, 10, 12], [0, 1, 10, 11]])
    # IoU: first proposal 8/12 and 8/12, second 9/11 and 7/13; the second takes the first box, the first the other
    np.testing.assert_allclose(covered_overlaps(boxes, proposals), [9 / 11, 8 / 12])
    np.testing.assert_allclose(covered_overlaps(boxes, proposals[:1]), [8 / 12, 0])
    assert covered_overlaps(boxes, np.zeros((0, 4))).tolist() == [0, 0]


def test_proposal_recall_by_hand() -> None:
    small_and_large = dataset([[0, 0, 20, 20], [50, 50, 150, 150]], [1, 2])
    proposals = [np.array([[50.0, 50, 150, 130], [0, 0, 20, 20], [50, 50, 150, 150]])]
    result = proposal_recall(small_and_large, proposals, top_n=(1, 3))
    assert result[1]["large"]["AR"] == pytest.approx(0.7)  # IoU .8
    assert result[1]["small"]["AR"] == 0
    assert result[1]["all"]["recall_50"] == pytest.approx(0.5)
    assert result[3]["all"]["AR"] == pytest.approx(1)
    assert result[3]["96-128"]["objects"] == 1
    assert np.isnan(result[3]["512-inf"]["AR"])


def test_report_files(tmp_path: Path) -> None:
    record = FOUR.records[0]
    report = evaluate_detections(FOUR, [Prediction(boxes=record.boxes, scores=np.full(4, 0.9), labels=record.labels)])
    report.write(tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md", "report.json", "precision_recall.png", "confusion.png", "errors.png",
    }  # fmt: skip
    assert "| VOC AP50, area | 1.0000 |" in (tmp_path / "report/report.md").read_text()
    assert report.to_dict()["per_class"]["a"]["voc_ap50"] == 1
    assert "VOC AP50    1.0000" in report.to_text()
