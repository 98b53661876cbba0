"""VOC numbers by hand and against the published figures of two classic samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.data.records import DetectionSet, Record
from model.metrics.predictions import Prediction, empty_prediction, pairwise_iou
from model.metrics.voc import Curve, make_curve, voc_curves


def record(boxes: list[list[float]], labels: list[int], *, difficult: list[bool] | None = None, crowd: list[bool] | None = None) -> Record:
    array = np.array(boxes, np.float64).reshape(-1, 4)
    none = [False] * len(boxes)
    flags = np.array(difficult or none, bool), np.array(crowd or none, bool)
    return Record("a", Path("a.png"), (200, 300), array, np.array(labels, np.int64), np.ones(len(boxes)), *flags)


def prediction(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Prediction:
    return Prediction(boxes=np.array(boxes, np.float64).reshape(-1, 4), scores=np.array(scores), labels=np.array(labels, np.int64))


def test_iou_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 20]])
    others = np.array([[0.0, 0, 10, 10], [5, 10, 15, 30], [20, 20, 30, 30]])
    np.testing.assert_allclose(pairwise_iou(boxes, others), [[0.5, 50 / 350, 0]])
    np.testing.assert_allclose(pairwise_iou(boxes, others, crowd=np.array([False, True, False])), [[0.5, 50 / 200, 0]])
    np.testing.assert_allclose(pairwise_iou(boxes, others, pixel_offset=1)[0, 0], 121 / 231)
    assert pairwise_iou(np.zeros((0, 4)), others).shape == (0, 3)


def test_curve_by_hand() -> None:
    """True, false, true, false of three objects: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3."""
    curve = make_curve(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, True, False]), 3)
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 1 / 2])
    assert curve.ap_area == pytest.approx(1 / 3 + 2 / 9)
    assert curve.ap_11_point == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # recall 0 to .3, then .4 to .6


def test_duplicates_difficult_and_crowds() -> None:
    boxes = [[0.0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10]]
    dataset = DetectionSet("x", ("a", "b"), (record(boxes, [1, 1, 1], difficult=[False, True, False], crowd=[False, False, True]),))
    rows = prediction([[0, 0, 10, 10], [0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10]], [0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1])
    curve = voc_curves(dataset, [rows])["a"]
    assert curve.positives == 1
    assert curve.precision.tolist() == [1, 0.5]  # the two ignored finds are not in the curve


def test_a_find_needs_more_than_the_threshold_and_its_class() -> None:
    dataset = DetectionSet("x", ("a", "b"), (record([[0.0, 0, 10, 20]], [1]),))
    at_half = prediction([[0, 0, 10, 10]], [0.9], [1])
    assert voc_curves(dataset, [at_half])["a"].ap_area == 0
    assert voc_curves(dataset, [at_half], iou_thresh=0.49)["a"].ap_area == 1
    other = voc_curves(dataset, [prediction([[0, 0, 10, 20]], [0.9], [2])])
    assert other["a"].ap_area == 0
    assert np.isnan(other["b"].ap_area)
    assert voc_curves(dataset, [empty_prediction()])["a"].ap_area == 0


def read_sample(folder: Path, truth: str, found: str, *, widths: bool) -> tuple[DetectionSet, list[Prediction]]:
    """A sample in text form; `widths` where a line ends in width and height; that tool adds them to the corner and one px more after."""

    def corners(values: list[str]) -> list[float]:
        left, top, c, d = (float(value) for value in values)
        return [left, top, left + c, top + d] if widths else [left, top, c, d]

    files = sorted((folder / truth).glob("*.txt"))
    lines = {path.stem: [line.split() for line in path.read_text().splitlines() if line.strip()] for path in files}
    names = sorted({row[0] for rows in lines.values() for row in rows})
    label = {name: k for k, name in enumerate(names, start=1)}
    records, predictions = [], []
    for path in files:
        rows = lines[path.stem]
        marks = [len(row) > 5 and row[5] == "difficult" for row in rows]
        records.append(record([corners(row[1:5]) for row in rows], [label[row[0]] for row in rows], difficult=marks))
        other = folder / found / path.name
        hits = [line.split() for line in other.read_text().splitlines() if line.strip()] if other.is_file() else []
        hits = [row for row in hits if row[0] in label]
        predictions.append(
            prediction([corners(row[2:6]) for row in hits], [float(row[1]) for row in hits], [label[row[0]] for row in hits])
        )
    return DetectionSet("sample", tuple(names), tuple(records)), predictions


@pytest.mark.data
def test_rafaelpadilla_sample(detection_data: Path) -> None:
    expected = json.loads((detection_data / "eval_ref/expected.json").read_text())["rafaelpadilla"]
    dataset, predictions = read_sample(detection_data / "eval_ref/rafaelpadilla", "groundtruths", "detections", widths=True)
    (curve,) = voc_curves(dataset, predictions, iou_thresh=0.3 - 1e-12, pixel_offset=1).values()
    assert curve.positives == expected["ground_truth_boxes"]
    assert curve.ap_area == pytest.approx(expected["recomputed_here"]["iou_0.3_all_points"], abs=1e-8)
    assert curve.ap_11_point == pytest.approx(expected["recomputed_here"]["iou_0.3_11_point"], abs=1e-8)
    assert 100 * curve.ap_area == pytest.approx(expected["published"]["AP_all_points_percent"], abs=0.011)
    assert 100 * curve.ap_11_point == pytest.approx(expected["published"]["AP_11_point_percent"], abs=0.005)


@pytest.mark.data
def test_cartucho_sample(detection_data: Path) -> None:
    expected = json.loads((detection_data / "eval_ref/expected.json").read_text())["cartucho"]
    dataset, predictions = read_sample(detection_data / "eval_ref/cartucho", "ground-truth", "detection-results", widths=False)
    curves = voc_curves(dataset, predictions, iou_thresh=0.5 - 1e-12, pixel_offset=1)  # that tool counts an IoU of exactly .5
    for name, value in expected["recomputed_here"]["AP_per_class"].items():
        assert curves[name].ap_area == pytest.approx(value, abs=6e-9), name
    mean = float(np.mean([curve.ap_area for curve in curves.values()]))
    assert round(100 * mean, 2) == expected["published"]["mAP_percent"]


def test_no_ground_truth_is_no_number() -> None:
    empty = Curve(np.zeros(0), np.zeros(0), np.zeros(0), 0)
    assert np.isnan(empty.ap_area)
    assert np.isnan(empty.ap_11_point)
