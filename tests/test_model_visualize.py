"""Pictures with boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from model.data.formats import open_dataset
from model.data.synthetic import CLASS_NAMES, write_voc
from model.metrics.predictions import Prediction, empty_prediction
from model.visualize import draw_detections, save_samples, worst_pictures


def test_boxes_are_drawn_where_they_are() -> None:
    image = np.zeros((480, 700, 3), np.uint8)
    found = Prediction(boxes=np.array([[100.0, 200, 300, 400], [400, 10, 500, 90]]), scores=np.array([0.9, 0.2]), labels=np.array([2, 1]))
    drawn = np.asarray(draw_detections(image, found, CLASS_NAMES, truth=np.array([[600.0, 300, 650, 470]])))
    assert drawn.shape == image.shape
    assert drawn[400, 200].tolist() == [220, 38, 38]  # the lower edge, in the second class's red
    assert drawn[300, 200].tolist() == [0, 0, 0]
    assert drawn[10:91, 400:501].sum() == 0  # under the threshold
    assert drawn[470, 620].tolist() == [255, 255, 255]
    small = draw_detections(image[:100, :150], empty_prediction(), CLASS_NAMES)
    assert small.size == (750, 500)


def test_worst_pictures_and_files(tmp_path: Path) -> None:
    dataset = open_dataset(write_voc(tmp_path / "data", {"val": 4}), "val")
    perfect = [Prediction(boxes=r.boxes, scores=np.full(len(r.labels), 0.9), labels=r.labels) for r in dataset.records]
    spoilt = [*perfect]
    spoilt[2] = empty_prediction()
    assert worst_pictures(dataset, spoilt, 1) == [2]
    paths = save_samples(tmp_path, dataset, spoilt, [2, 0])
    assert [path.name for path in paths] == ["00002_val_002.png", "00000_val_000.png"]
    with Image.open(paths[0]) as picture:
        assert picture.width < picture.height  # every third scene stands upright
