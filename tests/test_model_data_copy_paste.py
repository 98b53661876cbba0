"""Copy-paste by hand: which objects are taken, where they land, and that pixels and boxes agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.data.copy_paste import MOST_COVERED, MOST_OBJECTS, paste_objects, pasted_example
from model.data.formats import open_dataset
from model.data.synthetic import write_voc
from model.data.transforms import Example, plain_example
from model.training import AugmentConfig


def example(height: int, width: int, colour: int, *boxes: tuple[float, float, float, float], labels: tuple[int, ...] = ()) -> Example:
    image = np.full((height, width, 3), colour, dtype=np.uint8)
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Example(image, array, np.array(labels or (1,) * len(boxes), dtype=np.int64))


def painted(colour: int, box: tuple[int, int, int, int]) -> Example:
    """One object of another colour than its surroundings."""
    made = example(60, 90, colour, box)
    x1, y1, x2, y2 = box
    made.image[y1:y2, x1:x2] = 255
    return made


@pytest.mark.parametrize("seed", range(8))
def test_the_pasted_box_holds_the_object_and_the_seam_fades(seed: int) -> None:
    donor, target = painted(200, (30, 20, 60, 40)), example(80, 120, 0)
    made = paste_objects(target, donor, np.random.default_rng(seed))
    assert made.labels.tolist() == [1]
    x1, y1, x2, y2 = made.boxes[0].astype(int)
    assert (x2 - x1, y2 - y1) == (30, 20)
    assert (made.image[y1:y2, x1:x2] == 255).all()
    outside = made.image.astype(int).copy()
    outside[y1:y2, x1:x2] = 0
    assert outside.max() < 200  # never the donor's background unblended
    outside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 3) : x2 + 3] = 0
    assert outside.max() == 0
    assert target.image.max() == 0  # what came in is left alone


def test_an_object_that_another_covers_is_not_taken() -> None:
    crowded = example(60, 90, 9, (10, 10, 40, 40), (20, 10, 50, 40), (60, 10, 80, 30), labels=(1, 2, 3))
    for seed in range(20):
        made = paste_objects(example(80, 120, 0), crowded, np.random.default_rng(seed))
        assert set(made.labels.tolist()) == {3}


def test_rare_classes_are_taken_as_often_as_common_ones() -> None:
    boxes = [(float(x), 5.0, float(x + 8), 13.0) for x in range(0, 90, 10)]
    donor = example(60, 90, 9, *boxes, labels=(1,) * 8 + (2,))
    first = [int(paste_objects(example(80, 120, 0), donor, np.random.default_rng(seed)).labels[0]) for seed in range(60)]
    assert 15 < first.count(2) < 45


def test_nothing_of_the_target_is_hidden() -> None:
    donor = example(60, 90, 9, (10, 10, 50, 40), (60, 5, 80, 50))
    target = example(80, 120, 0, (5, 5, 60, 70), (80, 10, 110, 30), labels=(2, 3))
    for seed in range(30):
        made = paste_objects(target, donor, np.random.default_rng(seed))
        assert made.boxes[:2].tolist() == target.boxes.tolist()
        assert len(made.boxes) <= 2 + MOST_OBJECTS
        for box in made.boxes[2:]:
            for old, area in ((made.boxes[0], 55 * 65), (made.boxes[1], 30 * 20)):
                sides = (np.minimum(box[2:], old[2:]) - np.maximum(box[:2], old[:2])).clip(min=0)
                assert sides.prod() <= MOST_COVERED * area + 1e-3
    full = example(30, 40, 0, (0, 0, 40, 30))
    assert len(paste_objects(full, donor, np.random.default_rng(0)).boxes) == 1  # no room: as it was


def test_a_donor_without_objects_changes_nothing() -> None:
    target = example(30, 40, 7, (1, 2, 20, 15))
    made = paste_objects(target, example(50, 60, 99), np.random.default_rng(0))
    assert made.image.tolist() == target.image.tolist()
    assert made.boxes.tolist() == target.boxes.tolist()


def test_in_a_data_set_it_adds_objects_and_repeats_itself(tmp_path: Path) -> None:
    dataset = open_dataset(write_voc(tmp_path, {"train": 6}), "train")
    config = AugmentConfig(hflip=0.5, copy_paste=1.0, scale=(0.7, 1.3))
    more = 0
    for index, record in enumerate(dataset.records):
        made = [pasted_example(dataset, index, config, (96, 128), np.random.default_rng(index)) for _ in range(2)]
        assert made[0].image.tobytes() == made[1].image.tobytes()
        height, width = made[0].image.shape[:2]
        assert (made[0].boxes >= 0).all()
        assert (made[0].boxes[:, 2:] <= [width, height]).all()
        more += len(made[0].boxes) - len(plain_example(record, 96, 128).boxes)
    assert more > 0
