"""COCO numbers: ours through the data set classes equal pycocotools on the files themselves."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.data.coco import read_coco
from model.data.records import DetectionSet, Record, build
from model.metrics.coco import STATS, coco_evaluate
from model.metrics.predictions import Prediction, empty_prediction


def read_predictions(path: Path, ids: list[int], categories: list[int]) -> list[Prediction]:
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        rows[row["image_id"]].append(row)
    label = {category: k for k, category in enumerate(categories, start=1)}
    return [
        Prediction(
            boxes=np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in rows[i])], np.float64).reshape(-1, 4),
            scores=np.array([row["score"] for row in rows[i]], np.float64),
            labels=np.array([label[row["category_id"]] for row in rows[i]], np.int64),
        )
        for i in ids
    ]


@pytest.mark.data
@pytest.mark.parametrize("case", ["jittered", "perfect", "yolox_nano", "fakebbox100"])
def test_equal_to_pycocotools(case: str, detection_data: Path, tmp_path: Path) -> None:
    expected = json.loads((detection_data / "coco_json/pycocotools_expected.json").read_text())["cases"][case]
    truth_file = detection_data / "coco_json" / expected["ground_truth"]
    detections_file = detection_data / "coco_json" / expected["detections"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_x.json").write_bytes(truth_file.read_bytes())
    truth = json.loads(truth_file.read_text())
    (tmp_path / "x").mkdir()
    for image in truth["images"]:
        (tmp_path / "x" / image["file_name"]).touch()  # evaluation needs boxes alone
    dataset = build(read_coco(tmp_path, "x"), None, skip_bad=True)
    categories = sorted(category["id"] for category in truth["categories"])
    ours = coco_evaluate(dataset, read_predictions(detections_file, [int(record.image_id) for record in dataset.records], categories))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth_file))
        oracle = COCOeval(coco, coco.loadRes(str(detections_file)), "bbox")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    np.testing.assert_allclose([ours.stats[name] for name in STATS], oracle.stats, atol=1e-12, rtol=0)
    np.testing.assert_allclose([ours.stats[name] for name in STATS], [expected["stats"][name] for name in STATS], atol=6e-9)
    per_class = {category: numbers["AP"] for category, numbers in zip(categories, ours.per_class.values(), strict=True)}
    for category, value in expected["AP_per_category_id"].items():
        assert per_class[int(category)] == pytest.approx(value, abs=6e-9)


def one_picture(boxes: list[list[float]], *, difficult: list[bool] | None = None) -> DetectionSet:
    array = np.array(boxes, np.float64)
    marks = np.array(difficult or [False] * len(boxes))
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1)
    record = Record("a", Path("a.png"), (200, 300), array, np.ones(len(boxes), np.int64), areas, marks, np.zeros(len(boxes), bool))
    return DetectionSet("made", ("a", "never"), (record,))


def found(boxes: list[list[float]], scores: list[float]) -> list[Prediction]:
    return [Prediction(boxes=np.array(boxes), scores=np.array(scores), labels=np.ones(len(boxes), np.int64))]


def test_iou_of_eight_tenths_by_hand() -> None:
    stats = coco_evaluate(one_picture([[0, 0, 100, 100]]), found([[0, 0, 100, 80]], [0.9])).stats
    assert stats["AP"] == pytest.approx(0.7)  # thresholds .5 to .8, seven of ten
    assert (stats["AP50"], stats["AP75"]) == pytest.approx((1, 1))
    assert stats["AP_small"] == -1


def test_difficult_objects_neither_help_nor_hurt() -> None:
    boxes = [[0.0, 0, 100, 100], [150, 0, 250, 100]]
    detections = found([[150, 0, 250, 100], [0, 0, 100, 100]], [0.9, 0.8])
    assert coco_evaluate(one_picture(boxes, difficult=[False, True]), detections).stats["AP"] == pytest.approx(1)
    assert coco_evaluate(one_picture(boxes), found([[0, 0, 100, 100]], [0.8])).stats["AR_100"] == pytest.approx(0.5)
    assert coco_evaluate(one_picture(boxes, difficult=[False, True]), found([[0, 0, 100, 100]], [0.8])).stats["AR_100"] == pytest.approx(1)


def test_nothing_found_is_zero_and_a_wrong_count_is_an_error() -> None:
    dataset = one_picture([[0, 0, 100, 100]])
    result = coco_evaluate(dataset, [empty_prediction()])
    assert result.stats["AP"] == 0
    assert result.per_class["never"]["AP"] == -1
    with pytest.raises(ValueError, match="one prediction for each of 1 pictures, got 2"):
        coco_evaluate(dataset, [empty_prediction()] * 2)
